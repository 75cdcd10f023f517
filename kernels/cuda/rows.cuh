// A row of activations: RMSNorm and rounding to int8, and sums over a block of threads.
//
// The order of summation depends on nothing but the row's length and the block's size: the warps' sums are added in
// order.
#pragma once

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

// The nearest one, of two as near the even one.
__device__ inline bfloat16 to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  return {static_cast<unsigned short>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0)};
}

__device__ inline float max_lanes(float x) {
  for (int lane = 16; lane > 0; lane /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  }
  return x;
}

// Four values times their norm and factor, as the bytes of a word.
__device__ inline unsigned rounded(float4 v, float4 w, float factor) {
  const unsigned a = __float2int_rn(__fmul_rn(__fmul_rn(v.x, w.x), factor)) & 255;
  const unsigned b = __float2int_rn(__fmul_rn(__fmul_rn(v.y, w.y), factor)) & 255;
  const unsigned c = __float2int_rn(__fmul_rn(__fmul_rn(v.z, w.z), factor)) & 255;
  const unsigned d = __float2int_rn(__fmul_rn(__fmul_rn(v.w, w.w), factor)) & 255;
  return a | b << 8 | c << 16 | d << 24;
}

// 1 / rms of a row of k values with this sum of squares, or 1 where there is no norm.
__device__ inline float inverse_rms(float squares, int k, float eps, bool normed) {
  return normed ? __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(k)), eps)) : 1.0f;
}

// Norm and int8 of a row by a whole block of THREADS.
// x: k floats, k a multiple of 4; norm: k floats or null; q: int8, filled with zeros up to `padded`; s: the row's
// factor; sum: that of its int8, which float32 holds exactly. scratch: 96 floats of shared memory.
template <int THREADS>
__device__ void quantise_row(const float* x, int k, const float* norm, float eps, int8_t* q, int padded, float* s,
                             float* sum, float* scratch) {
  constexpr int warps = THREADS / 32;
  const int warp = threadIdx.x / 32;
  float square = 0, top = 0;
  for (int i = 4 * threadIdx.x; i < k; i += 4 * THREADS) {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    const float4 w = norm ? __ldg(reinterpret_cast<const float4*>(norm + i)) : make_float4(1, 1, 1, 1);
    square = __fmaf_rn(v.x, v.x, square);
    square = __fmaf_rn(v.y, v.y, square);
    square = __fmaf_rn(v.z, v.z, square);
    square = __fmaf_rn(v.w, v.w, square);
    top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x * w.x), fabsf(v.y * w.y)), fmaxf(fabsf(v.z * w.z), fabsf(v.w * w.w))));
  }
  square = sum_lanes(square);
  top = max_lanes(top);
  if (threadIdx.x % 32 == 0) {
    scratch[warp] = square;
    scratch[32 + warp] = top;
  }
  __syncthreads();
  float total = 0, most = 0;
  for (int w = 0; w < warps; w++) {
    total = __fadd_rn(total, scratch[w]);
    most = fmaxf(most, scratch[32 + w]);
  }
  const float r = inverse_rms(total, k, eps, norm != nullptr);
  const float scale = __fdiv_rn(127.0f, fmaxf(__fmul_rn(most, r), kSmallest));
  const float factor = __fmul_rn(r, scale);  // of x * norm to int8
  int mine = 0;
  for (int i = 4 * threadIdx.x; i < padded; i += 4 * THREADS) {
    const bool inside = i < k;
    const float4 v = inside ? *reinterpret_cast<const float4*>(x + i) : make_float4(0, 0, 0, 0);
    const float4 w = inside && norm ? __ldg(reinterpret_cast<const float4*>(norm + i)) : make_float4(1, 1, 1, 1);
    const unsigned word = rounded(v, w, factor);
    *reinterpret_cast<unsigned*>(q + i) = word;
    mine = __dp4a(0x01010101, static_cast<int>(word), mine);
  }
  const float all = sum_lanes(__int2float_rn(mine));  // whole numbers: exact in any order
  if (threadIdx.x % 32 == 0) {
    scratch[64 + warp] = all;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total_of_int8 = 0;
    for (int w = 0; w < warps; w++) {
      total_of_int8 = __fadd_rn(total_of_int8, scratch[64 + w]);
    }
    *s = scale;
    *sum = total_of_int8;
  }
}

// 1 / rms of a row, by a whole block of THREADS. scratch: 32 floats of shared memory.
template <int THREADS>
__device__ float row_inverse_rms(const float* x, int k, float eps, float* scratch) {
  float square = 0;
  for (int i = threadIdx.x; i < k; i += THREADS) {
    square = __fmaf_rn(x[i], x[i], square);
  }
  square = sum_lanes(square);
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = square;
  }
  __syncthreads();
  float total = 0;
  for (int w = 0; w < THREADS / 32; w++) {
    total = __fadd_rn(total, scratch[w]);
  }
  return inverse_rms(total, k, eps, true);
}

// A value of a row with this 1 / rms, behind RMSNorm.
__device__ inline float normed(float x, float r, const float* norm) { return __fmul_rn(__fmul_rn(x, r), __ldg(norm)); }

// RMSNorm of a row by a whole block of THREADS. scratch: 32 floats of shared memory.
template <int THREADS>
__device__ void normalise_row(const float* x, int k, const float* norm, float eps, float* y, float* scratch) {
  const float r = row_inverse_rms<THREADS>(x, k, eps, scratch);
  for (int i = threadIdx.x; i < k; i += THREADS) {
    y[i] = normed(x[i], r, norm + i);
  }
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
