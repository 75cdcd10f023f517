// Attention over the KV cache, in chunks of 32 keys that are combined in order. Keys and values are bfloat16, all else is
// float.
//
// A query's chunk holds its largest score, the sum of its exponentials and its weighted values; keys
// behind a query's own position count as exact zeros, and chunks behind it are left out. So a row's
// bits depend on its position only, never on how many rows or keys stand beside it.
//
// attend_few.cu and attend_many.cu share the order of everything: a score is one chain over its dimensions, a chunk's sum
// the tree of `sum_lanes` over its keys, its values a chain over its keys, and chunks are folded in one by one (`Fold`).
#pragma once

#include "rows.cuh"

namespace bitdraft {

constexpr int kChunk = 32;  // keys: one a lane

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

constexpr int padded_dim(int dim) { return dim + 8; }  // of keys, whose sixteen bytes lanes then find in different banks

// Bytes of shared memory that a chunk's keys and values take.
constexpr int chunk_bytes(int dim) { return 2 * kChunk * (padded_dim(dim) + dim); }

// N consecutive bfloat16, 1, 2, 4 or 8, aligned to as many.
template <int N>
__device__ inline void load_widened(const bfloat16* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = from[0];
  } else {
    unsigned pairs[N / 2];
    if constexpr (N == 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      pairs[0] = v.x;
      pairs[1] = v.y;
      pairs[2] = v.z;
      pairs[3] = v.w;
    } else if constexpr (N == 4) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      pairs[0] = v.x;
      pairs[1] = v.y;
    } else {
      pairs[0] = *reinterpret_cast<const unsigned*>(from);
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      to[2 * i] = __uint_as_float(pairs[i] << 16);
      to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
}

// cos and sin of pos * frequency for M rows: table [M][DIM / 2].
template <int M, int DIM, int THREADS>
__device__ void rope_table(const float* frequency, int offset, float2* table) {
  for (int i = threadIdx.x; i < M * DIM / 2; i += THREADS) {
    const float angle = __fmul_rn(static_cast<float>(offset + i / (DIM / 2)), __ldg(frequency + i % (DIM / 2)));
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    table[i] = make_float2(cosine, sine);
  }
}

// Element i of the first half of a head, rotated with its partner (rotate-half layout).
__device__ inline float2 rotated(float a, float b, float2 turn) {
  return make_float2(__fsub_rn(__fmul_rn(a, turn.x), __fmul_rn(b, turn.y)),
                     __fadd_rn(__fmul_rn(b, turn.x), __fmul_rn(a, turn.y)));
}

// QUERIES queries of one key/value head over one chunk of keys.
// queries: shared [QUERIES][DIM], rotated and scaled; keys: shared [kChunk][padded_dim(DIM)];
// values: shared [kChunk][DIM]; weights: shared [QUERIES][kChunk].
// last(query): the highest key of the chunk, counted from its start, that a query sees (negative: none);
// count: keys of the chunk that exist for any query.
// out: [QUERIES][DIM + 2]: weighted values, then the largest score and the sum of exponentials.
template <int QUERIES, int DIM, int THREADS, class Last>
__device__ void attend_chunk(const float* queries, const bfloat16* keys, const bfloat16* values, int count, Last last,
                             float* weights, float* out) {
  constexpr int width = DIM + 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int query = warp; query < QUERIES; query += THREADS / 32) {
    if (last(query) < 0) {
      continue;
    }
    const float4* a = reinterpret_cast<const float4*>(queries + query * DIM);
    const bfloat16* b = keys + lane * padded_dim(DIM);
    float score[4] = {};
#pragma unroll 4
    for (int i = 0; i < DIM / 8; i++) {
      float k[8];
      load_widened(b + 8 * i, k);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float4 q = a[2 * i + half];
        score[0] = __fmaf_rn(q.x, k[4 * half], score[0]);
        score[1] = __fmaf_rn(q.y, k[4 * half + 1], score[1]);
        score[2] = __fmaf_rn(q.z, k[4 * half + 2], score[2]);
        score[3] = __fmaf_rn(q.w, k[4 * half + 3], score[3]);
      }
    }
    const float total = __fadd_rn(__fadd_rn(score[0], score[1]), __fadd_rn(score[2], score[3]));
    const bool seen = lane <= last(query);
    const float top = max_lanes(seen ? total : minus_infinity());
    const float weight = seen ? expf(total - top) : 0.0f;
    const float sum = sum_lanes(weight);
    weights[query * kChunk + lane] = weight;
    if (lane == 0) {
      out[query * width + DIM] = top;
      out[query * width + DIM + 1] = sum;
    }
  }
  __syncthreads();
  constexpr int teams = THREADS / DIM;  // of DIM threads
  const int d = threadIdx.x % DIM, team = threadIdx.x / DIM;
  constexpr int share = (QUERIES + teams - 1) / teams;
  if (team < teams) {
    float sums[share] = {};
#pragma unroll 4
    for (int key = 0; key < count; key++) {
      const float value = values[key * DIM + d];
#pragma unroll
      for (int i = 0; i < share; i++) {
        const int query = team + i * teams;
        if (query < QUERIES) {  // a key that the query does not see weighs zero
          sums[i] = __fmaf_rn(weights[query * kChunk + key], value, sums[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < share; i++) {
      const int query = team + i * teams;
      if (query < QUERIES && last(query) >= 0) {
        out[query * width + d] = sums[i];
      }
    }
  }
}

// What is known of a query behind its first chunks: the largest score, and sums that are relative to it.
struct Fold {
  float top, sum;

  static __device__ Fold none() { return {minus_infinity(), 0}; }

  // Takes in the next chunk's; returns what the values so far and the chunk's are to be multiplied by.
  __device__ float2 take(float chunk_top, float chunk_sum) {
    const float higher = fmaxf(top, chunk_top);
    const float2 factors = make_float2(expf(__fsub_rn(top, higher)), expf(__fsub_rn(chunk_top, higher)));
    top = higher;
    sum = __fmaf_rn(chunk_sum, factors.y, __fmul_rn(sum, factors.x));
    return factors;
  }
};

__device__ inline float folded(float value, float chunk_value, float2 factors) {
  return __fmaf_rn(chunk_value, factors.y, __fmul_rn(value, factors.x));
}

}  // namespace bitdraft
