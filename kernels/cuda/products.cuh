// Products of 1..8 rows with ternary, int8 and bfloat16 matrices: weights are read once for all rows.
//
// Layouts. Outputs in quads of four, inputs in blocks of sixteen; a (quad, block) is contiguous:
//   ternary: four 32-bit words, one an output; bits 2i..2i+1 of byte b hold W[16 block + 4i + b] + 1,
//            so (word >> 2i) & 0x03030303 is four consecutive inputs, an operand of dp4a;
//   int8:    four times sixteen bytes, one sixteen an output.
// bfloat16 matrices stay as they are, [n][k].
//
// Integer sums are exact in any order, so a block's warps share them by the (quad, slice of 512 inputs)
// and meet in shared memory. Float sums keep one order: a warp has an output to itself.
#pragma once

#include "rows.cuh"

namespace bitdraft {

enum Kind { kTernary = 0, kInt8 = 1 };

template <int KIND>
struct Word;  // what a lane reads of a (quad, block)
template <>
struct Word<kTernary> {
  uint4 codes;
};
template <>
struct Word<kInt8> {
  int4 rows[4];
};

__device__ inline uint4 stream16(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

template <int KIND>
__device__ inline Word<KIND> load_word(const uint8_t* weights, int64_t index) {
  Word<KIND> word;
  if constexpr (KIND == kTernary) {
    word.codes = stream16(weights + 16 * index);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 v = stream16(weights + 64 * index + 16 * j);
      word.rows[j] = make_int4(v.x, v.y, v.z, v.w);
    }
  }
  return word;
}

// acc[j][m] += four outputs' products with sixteen inputs of M rows.
template <int KIND, int M>
__device__ inline void multiply_word(const Word<KIND>& word, const int8_t* x, int64_t stride, int (&acc)[4][M]) {
  int4 rows[M];
#pragma unroll
  for (int m = 0; m < M; m++) {
    rows[m] = *reinterpret_cast<const int4*>(x + m * stride);
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int parts[4];
    if constexpr (KIND == kTernary) {
      const unsigned w = j == 0 ? word.codes.x : j == 1 ? word.codes.y : j == 2 ? word.codes.z : word.codes.w;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        parts[i] = static_cast<int>(w >> (2 * i) & 0x03030303u);
      }
    } else {
      parts[0] = word.rows[j].x;
      parts[1] = word.rows[j].y;
      parts[2] = word.rows[j].z;
      parts[3] = word.rows[j].w;
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
      acc[j][m] = __dp4a(parts[0], rows[m].x, acc[j][m]);
      acc[j][m] = __dp4a(parts[1], rows[m].y, acc[j][m]);
      acc[j][m] = __dp4a(parts[2], rows[m].z, acc[j][m]);
      acc[j][m] = __dp4a(parts[3], rows[m].w, acc[j][m]);
    }
  }
}

// Adds a range of quads' products into acc, [quads][4][M] int32 of shared memory that starts at zero.
// The range is cut into pieces of (quad, slice of 32 blocks), of which warps take equal, contiguous parts.
template <int KIND, int M, int THREADS>
__device__ void multiply_quads(const uint8_t* weights, int blocks, int first_quad, int quads, const int8_t* x,
                               int64_t stride, int* acc) {
  constexpr int warps = THREADS / 32, depth = KIND == kTernary ? 4 : 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slices = (blocks + 31) / 32, pieces = quads * slices;
  const int begin = pieces * warp / warps, end = pieces * (warp + 1) / warps;

  // The weights of the next `depth` pieces are on their way while one is multiplied.
  Word<KIND> ahead[depth];
  int load_quad = begin / slices, load_slice = begin % slices, loaded = begin;
  const auto fetch = [&](Word<KIND>& word) {
    const int block = load_slice * 32 + lane;
    if (loaded < end && block < blocks) {
      word = load_word<KIND>(weights, static_cast<int64_t>(first_quad + load_quad) * blocks + block);
    }
    loaded++;
    if (++load_slice == slices) {
      load_slice = 0;
      load_quad++;
    }
  };
#pragma unroll
  for (int u = 0; u < depth; u++) {
    fetch(ahead[u]);
  }

  int sums[4][M] = {};
  int quad = begin / slices, slice = begin % slices;
  for (int piece = begin; piece < end; piece += depth) {
#pragma unroll
    for (int u = 0; u < depth; u++) {
      if (piece + u < end) {
        const Word<KIND> word = ahead[u];
        fetch(ahead[u]);
        const int block = slice * 32 + lane;
        if (block < blocks) {
          multiply_word<KIND, M>(word, x + 16 * block, stride, sums);
        }
        if (++slice == slices || piece + u + 1 == end) {
          int mine = 0;
#pragma unroll
          for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int m = 0; m < M; m++) {
              const int total = __reduce_add_sync(kAllLanes, sums[j][m]);
              mine = lane == j * M + m ? total : mine;
              sums[j][m] = 0;
            }
          }
          if (lane < 4 * M) {
            atomicAdd(acc + quad * 4 * M + lane, mine);
          }
          slice = 0;
          quad++;
        }
      }
    }
  }
}

// Sums of M int8 rows, added to `sums` in shared memory; `length` is a multiple of 16.
template <int M, int THREADS>
__device__ void sum_rows(const int8_t* x, int length, int* sums) {
#pragma unroll
  for (int m = 0; m < M; m++) {
    int sum = 0;
    for (int i = 4 * threadIdx.x; i < length; i += 4 * THREADS) {
      sum = __dp4a(0x01010101, *reinterpret_cast<const int*>(x + m * length + i), sum);
    }
    sum = __reduce_add_sync(kAllLanes, sum);
    if (threadIdx.x % 32 == 0) {
      atomicAdd(sums + m, sum);
    }
  }
}

// float(sum) * (scale / s), the division first and nothing fused, as the reference has it.
__device__ inline float scaled(int sum, float scale, float s) {
  return __fmul_rn(__int2float_rn(sum), __fdiv_rn(scale, s));
}

// Four outputs of a bfloat16 or float32 matrix times M rows of x in shared memory, by one warp: every
// lane's part in order of k, then one fixed tree. Lane j * M + m holds the result.
template <typename T, int M>
__device__ inline float dense_quad(const T* weights, int k, int64_t n, int64_t first, const float* x) {
  const int lane = threadIdx.x % 32;
  float sums[4][M] = {};
  const T* rows[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    rows[j] = weights + (first + j < n ? first + j : n - 1) * k;
  }
  int at = 0;
  if constexpr (sizeof(T) == 2) {
    if (k % 8 == 0) {
      for (at = 8 * lane; at < k; at += 256) {
        float w[4][8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint4 v = stream16(rows[j] + at);
          const unsigned parts[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            w[j][2 * i] = __uint_as_float(parts[i] << 16);
            w[j][2 * i + 1] = __uint_as_float(parts[i] & 0xffff0000u);
          }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
          const float4 a = *reinterpret_cast<const float4*>(x + m * k + at);
          const float4 b = *reinterpret_cast<const float4*>(x + m * k + at + 4);
          const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
              sums[j][m] = __fmaf_rn(w[j][i], v[i], sums[j][m]);
            }
          }
        }
      }
      at = k;
    }
  }
  for (at = at < k ? lane : k; at < k; at += 32) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[j][m] = __fmaf_rn(static_cast<float>(rows[j][at]), x[m * k + at], sums[j][m]);
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float total = sum_lanes(sums[j][m]);
      mine = lane == j * M + m ? total : mine;
    }
  }
  return mine;
}

}  // namespace bitdraft
