// Rows of activations: RMSNorm and rounding to int8, and sums over a block of threads.
//
// A row's order of summation depends on nothing but its length and the block's size: every thread takes
// part in every row, whose sixteen-odd warp sums are then added in order.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

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

// Norm and int8 of M rows at once, by a whole block of THREADS.
// x: rows of k floats, k a multiple of 4, `stride` apart; norm: k floats or null.
// q: [M][q_stride] int8, filled with zeros up to `padded`; s: [M] factors. scratch: 2 * M * 32 floats of
// shared memory.
template <int M, int THREADS>
__device__ void quantise_rows(const float* x, int k, int64_t stride, const float* norm, float eps, int8_t* q,
                              int64_t q_stride, int padded, float* s, float* scratch) {
  constexpr int warps = THREADS / 32;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* squares = scratch;
  float* largest = scratch + M * 32;

  float square[M], top[M];
#pragma unroll
  for (int m = 0; m < M; m++) {
    square[m] = 0;
    top[m] = 0;
  }
  for (int i = 4 * thread; i < k; i += 4 * THREADS) {
    const float4 w = norm ? __ldg(reinterpret_cast<const float4*>(norm + i)) : make_float4(1, 1, 1, 1);
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float4 v = load_shared4(x + m * stride + i);
      square[m] = __fmaf_rn(v.x, v.x, square[m]);
      square[m] = __fmaf_rn(v.y, v.y, square[m]);
      square[m] = __fmaf_rn(v.z, v.z, square[m]);
      square[m] = __fmaf_rn(v.w, v.w, square[m]);
      top[m] = fmaxf(top[m], fmaxf(fmaxf(fabsf(v.x * w.x), fabsf(v.y * w.y)), fmaxf(fabsf(v.z * w.z), fabsf(v.w * w.w))));
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++) {
    square[m] = sum_lanes(square[m]);
    top[m] = max_lanes(top[m]);
    if (lane == 0) {
      squares[m * 32 + warp] = square[m];
      largest[m * 32 + warp] = top[m];
    }
  }
  __syncthreads();

  float factor[M];  // of a row's x * norm to its int8
#pragma unroll
  for (int m = 0; m < M; m++) {
    float total = 0, most = 0;
    for (int w = 0; w < warps; w++) {
      total = __fadd_rn(total, squares[m * 32 + w]);
      most = fmaxf(most, largest[m * 32 + w]);
    }
    const float r = norm ? __frsqrt_rn(__fadd_rn(__fdiv_rn(total, static_cast<float>(k)), eps)) : 1.0f;
    const float scale = __fdiv_rn(127.0f, fmaxf(__fmul_rn(most, r), kSmallest));
    factor[m] = __fmul_rn(r, scale);
    if (thread == 0) {
      s[m] = scale;
    }
  }
  for (int i = 4 * thread; i < padded; i += 4 * THREADS) {
    const bool inside = i < k;
    const float4 w = inside && norm ? __ldg(reinterpret_cast<const float4*>(norm + i)) : make_float4(1, 1, 1, 1);
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float4 v = inside ? load_shared4(x + m * stride + i) : make_float4(0, 0, 0, 0);
      const int a = __float2int_rn(__fmul_rn(__fmul_rn(v.x, w.x), factor[m]));
      const int b = __float2int_rn(__fmul_rn(__fmul_rn(v.y, w.y), factor[m]));
      const int c = __float2int_rn(__fmul_rn(__fmul_rn(v.z, w.z), factor[m]));
      const int d = __float2int_rn(__fmul_rn(__fmul_rn(v.w, w.w), factor[m]));
      *reinterpret_cast<char4*>(q + m * q_stride + i) = make_char4(a, b, c, d);
    }
  }
}

// RMSNorm of M rows into shared memory, y: [M][k]; norm may be null. Ends with a barrier.
template <int M, int THREADS>
__device__ void normalise_rows(const float* x, int k, int64_t stride, const float* norm, float eps, float* y,
                               float* scratch) {
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
      scratch[m * 32 + warp] = square[m];
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; m++) {
    float total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
      total = __fadd_rn(total, scratch[m * 32 + w]);
    }
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
