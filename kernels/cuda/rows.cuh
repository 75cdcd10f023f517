// Rows of activations: RMSNorm and rounding to int8, and sums over a block of threads.
//
// A row's order of summation depends on nothing but its length and the block's size: every thread takes
// part in every row, whose sixteen-odd warp sums are then added in order.
#pragma once

#include <cuda_bf16.h>

#include "ptx.cuh"

#include "ptx.cuh"

namespace bitdraft {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kSmallest = 1e-5f;  // the least largest magnitude of a row (kernels/reference.py)

__device__ inline float sum_lanes(float x) {
  for (int lane = 16; lane > 0; lane /= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, lane));
  }
  return x;
}

__device__ inline float max_lanes(float x) {
  for (int lane = 16; lane > 0; lane /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  }
  return x;
}

// Data that other blocks wrote during this launch must come from L2: the first cache is not coherent.
__device__ inline float4 load_shared4(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }

// What the warps of a block tell each other about a row.
struct RowScratch {
  float square[32];
  unsigned top[32];
  float s;  // quantisation factor
  int sum;  // of the row's int8: it takes off the "plus one" of ternary codes
};

// Norm and int8 of a row of K floats by a whole block of THREADS; K is a multiple of 4.
// load(i): four of its floats from i on; norm: K floats or null; q: int8 (shared or global), filled with zeros
// up to `padded`. Leaves s and sum in scratch; ends with a barrier.
template <int K, int THREADS, class Load>
__device__ void quantise_row(Load load, const float* norm, float eps, int8_t* q, int padded, RowScratch& scratch) {
  constexpr int warps = THREADS / 32, loads = (K / 4 + THREADS - 1) / THREADS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float4 row[loads];  // stays in registers between both passes, once multiplied with the norm
  float square = 0, top = 0;
  float4 weights[loads];
#pragma unroll
  for (int l = 0; l < loads; l++) {
    const int i = 4 * (thread + l * THREADS);
    weights[l] = norm && i < K ? __ldg(reinterpret_cast<const float4*>(norm + i)) : make_float4(1, 1, 1, 1);
    row[l] = i < K ? load(i) : make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int l = 0; l < loads; l++) {
    float4& v = row[l];
    square = __fmaf_rn(v.x, v.x, square);
    square = __fmaf_rn(v.y, v.y, square);
    square = __fmaf_rn(v.z, v.z, square);
    square = __fmaf_rn(v.w, v.w, square);
    v = make_float4(__fmul_rn(v.x, weights[l].x), __fmul_rn(v.y, weights[l].y), __fmul_rn(v.z, weights[l].z),
                    __fmul_rn(v.w, weights[l].w));
    top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  }
  square = sum_lanes(square);
  // Floats that are not negative are ordered as their bits are.
  const unsigned largest = __reduce_max_sync(kAllLanes, __float_as_uint(top));
  if (lane == 0) {
    scratch.square[warp] = square;
    scratch.top[warp] = largest;
  }
  if (thread == 0) {
    scratch.sum = 0;
  }
  __syncthreads();
  // Every warp for itself, which spares another barrier.
  const float total = sum_lanes(lane < warps ? scratch.square[lane] : 0.0f);
  const float most = __uint_as_float(__reduce_max_sync(kAllLanes, lane < warps ? scratch.top[lane] : 0u));
  const float r = norm ? __frsqrt_rn(__fadd_rn(__fdiv_rn(total, static_cast<float>(K)), eps)) : 1.0f;
  const float s = __fdiv_rn(127.0f, fmaxf(__fmul_rn(most, r), kSmallest));
  const float factor = __fmul_rn(r, s);
  int sum = 0;
#pragma unroll
  for (int l = 0; l < loads; l++) {
    const int i = 4 * (thread + l * THREADS);
    const char4 rounded =
        make_char4(__float2int_rn(__fmul_rn(row[l].x, factor)), __float2int_rn(__fmul_rn(row[l].y, factor)),
                   __float2int_rn(__fmul_rn(row[l].z, factor)), __float2int_rn(__fmul_rn(row[l].w, factor)));
    sum += rounded.x + rounded.y + rounded.z + rounded.w;
    if (i < K) {
      *reinterpret_cast<char4*>(q + i) = rounded;
    }
  }
  for (int i = K + 4 * thread; i < padded; i += 4 * THREADS) {
    *reinterpret_cast<char4*>(q + i) = make_char4(0, 0, 0, 0);
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane == 0) {
    atomicAdd(&scratch.sum, sum);
  }
  if (thread == 0) {
    scratch.s = s;
  }
  __syncthreads();
}

// RMSNorm of M rows of k floats into y, [M][k] (shared or global); norm may be null. Ends with a barrier.
// squares: shared memory, [M][32].
template <int M, int THREADS>
__device__ void normalise_rows(const float* x, int k, int64_t stride, const float* norm, float eps, float* y,
                               float* squares) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float square[M] = {};
  for (int i = thread; i < k; i += THREADS) {
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float v = __ldcg(x + m * stride + i);
      square[m] = __fmaf_rn(v, v, square[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++) {
    square[m] = sum_lanes(square[m]);
    if (lane == 0) {
      squares[m * 32 + warp] = square[m];
    }
  }
  __syncthreads();
  for (int m = 0; m < M; m++) {
    const float total = sum_lanes(lane < THREADS / 32 ? squares[m * 32 + lane] : 0.0f);
    const float r = norm ? __frsqrt_rn(__fadd_rn(__fdiv_rn(total, static_cast<float>(k)), eps)) : 1.0f;
    for (int i = thread; i < k; i += THREADS) {
      const float v = __fmul_rn(__ldcg(x + m * stride + i), r);
      y[m * k + i] = norm ? __fmul_rn(v, __ldg(norm + i)) : v;
    }
  }
  __syncthreads();
}

// relu(gate)^2 * up, or silu(gate) * up.
template <bool RELU2>
__device__ inline float gated(float gate, float up) {
  if (RELU2) {
    const float g = fmaxf(gate, 0.0f);
    return __fmul_rn(__fmul_rn(g, g), up);
  }
  return __fmul_rn(__fmul_rn(gate, __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-gate)))), up);
}

}  // namespace bitdraft
