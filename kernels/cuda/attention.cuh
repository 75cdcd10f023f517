// Attention of a few rows over the KV cache, in chunks of 32 keys that are combined in order.
//
// A query's chunk holds its largest score, the sum of its exponentials and its weighted values; keys
// behind a query's own position count as exact zeros, and chunks behind it are left out. So a row's
// bits depend on its position only, never on how many rows or keys stand beside it.
#pragma once

#include "rows.cuh"

namespace bitdraft {

constexpr int kChunk = 32;  // keys: one a lane

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

__host__ __device__ constexpr int padded_dim(int dim) { return dim + 4; }  // keeps lanes' keys in different banks

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

// Room in shared memory for QUERIES queries of a key/value head and a chunk of keys, in floats.
template <int QUERIES, int DIM>
struct ChunkMemory {
  float* queries;  // [QUERIES][DIM], rotated and scaled
  float* keys;     // [kChunk][padded_dim(DIM)]
  float* values;   // [kChunk][DIM]
  float* weights;  // [QUERIES][kChunk]
  static constexpr int floats = QUERIES * DIM + kChunk * (2 * DIM + 4) + QUERIES * kChunk;

  __device__ explicit ChunkMemory(void* work)
      : queries(static_cast<float*>(work)),
        keys(queries + QUERIES * DIM),
        values(keys + kChunk * padded_dim(DIM)),
        weights(values + kChunk * DIM) {}

  // The first `count` keys and values of a chunk, from caches' rows; all loads start before the first is stored.
  template <int THREADS>
  __device__ void load(const float* k_rows, const float* v_rows, int count) const {
    constexpr int vectors = kChunk * DIM / 4, loads = (vectors + THREADS - 1) / THREADS;
    float4 k[loads], v[loads];
#pragma unroll
    for (int l = 0; l < loads; l++) {
      const int i = threadIdx.x + l * THREADS;
      if (i < count * DIM / 4) {
        k[l] = __ldcg(reinterpret_cast<const float4*>(k_rows) + i);
        v[l] = __ldcg(reinterpret_cast<const float4*>(v_rows) + i);
      }
    }
#pragma unroll
    for (int l = 0; l < loads; l++) {
      const int i = threadIdx.x + l * THREADS, key = i / (DIM / 4), d = i % (DIM / 4) * 4;
      if (i < count * DIM / 4) {
        *reinterpret_cast<float4*>(keys + key * padded_dim(DIM) + d) = k[l];
        *reinterpret_cast<float4*>(values + key * DIM + d) = v[l];
      }
    }
  }
};

// Queries over a chunk. last(query): the highest key of the chunk, counted from its start, that a query
// sees (negative: none). out: [QUERIES][DIM + 2]: weighted values, the largest score, the sum of
// exponentials; nothing for a query that sees no key.
template <int QUERIES, int DIM, int THREADS, class Last>
__device__ void attend_chunk(const ChunkMemory<QUERIES, DIM>& memory, Last last, float* out) {
  constexpr int width = DIM + 2, warps = THREADS / 32;
  // A warp takes several queries, since reading keys costs more than multiplying them.
  constexpr int each = (2 * QUERIES + warps - 1) / warps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp * each < QUERIES) {
    float scores[each][4] = {};
    const float4* key = reinterpret_cast<const float4*>(memory.keys + lane * padded_dim(DIM));
#pragma unroll 4
    for (int i = 0; i < DIM / 4; i++) {
      const float4 k = key[i];
#pragma unroll
      for (int e = 0; e < each; e++) {
        const int query = warp * each + e < QUERIES ? warp * each + e : QUERIES - 1;
        const float4 q = reinterpret_cast<const float4*>(memory.queries + query * DIM)[i];
        scores[e][0] = __fmaf_rn(q.x, k.x, scores[e][0]);
        scores[e][1] = __fmaf_rn(q.y, k.y, scores[e][1]);
        scores[e][2] = __fmaf_rn(q.z, k.z, scores[e][2]);
        scores[e][3] = __fmaf_rn(q.w, k.w, scores[e][3]);
      }
    }
#pragma unroll
    for (int e = 0; e < each; e++) {
      const int query = warp * each + e;
      if (query < QUERIES) {
        const float total = __fadd_rn(__fadd_rn(scores[e][0], scores[e][1]), __fadd_rn(scores[e][2], scores[e][3]));
        const bool seen = lane <= last(query);
        const float top = max_lanes(seen ? total : minus_infinity());
        const float weight = seen ? expf(total - top) : 0.0f;
        const float sum = sum_lanes(weight);
        memory.weights[query * kChunk + lane] = weight;
        if (lane == 0 && last(query) >= 0) {
          out[query * width + DIM] = top;
          out[query * width + DIM + 1] = sum;
        }
      }
    }
  }
  __syncthreads();
  constexpr int teams = THREADS / DIM, share = (QUERIES + teams - 1) / teams;  // teams of DIM threads
  const int d = threadIdx.x % DIM, team = threadIdx.x / DIM;
  if (team * share < QUERIES && team < teams) {
    float sums[share] = {};
#pragma unroll 2
    for (int key = 0; key < kChunk; key += 4) {  // a key that a query does not see weighs zero
      const float v[4] = {memory.values[key * DIM + d], memory.values[(key + 1) * DIM + d],
                          memory.values[(key + 2) * DIM + d], memory.values[(key + 3) * DIM + d]};
#pragma unroll
      for (int i = 0; i < share; i++) {
        const int query = team * share + i < QUERIES ? team * share + i : QUERIES - 1;
        const float4 w = *reinterpret_cast<const float4*>(memory.weights + query * kChunk + key);
        sums[i] = __fmaf_rn(w.x, v[0], sums[i]);
        sums[i] = __fmaf_rn(w.y, v[1], sums[i]);
        sums[i] = __fmaf_rn(w.z, v[2], sums[i]);
        sums[i] = __fmaf_rn(w.w, v[3], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < share; i++) {
      const int query = team * share + i;
      if (query < QUERIES && last(query) >= 0) {
        out[query * width + d] = sums[i];
      }
    }
  }
}

// All values of QUERIES queries, which see the same `chunks` chunks, from these, by a whole block:
// store(query, d, value). part_of(query): the query's line in its first chunk; the next chunks' are
// `stride` floats apart. factors: shared memory, kCombineFloats<QUERIES>.
constexpr int kTogether = 64;  // chunks whose factors are in shared memory at a time

template <int QUERIES, int DIM, int THREADS, class Part, class Store>
__device__ void combine_chunks(Part part_of, int64_t stride, int chunks, float* factors, Store store) {
  constexpr int warps = THREADS / 32, outputs = (QUERIES * DIM + THREADS - 1) / THREADS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = factors + QUERIES * kTogether;
  float values[outputs] = {};
  for (int first = 0; first < chunks; first += kTogether) {
    const int end = chunks < first + kTogether ? chunks : first + kTogether;
    __syncthreads();
    for (int query = warp; query < QUERIES; query += warps) {
      const float* part = part_of(query) + DIM;
      float top = minus_infinity();
      for (int c = lane; c < chunks; c += 32) {
        top = fmaxf(top, __ldcg(part + c * stride));
      }
      top = max_lanes(top);
      float sum = first == 0 ? 0.0f : sums[query];
      for (int c = first; c < end; c += 32) {
        float factor = 0, share = 0;
        if (c + lane < end) {
          factor = expf(__ldcg(part + (c + lane) * stride) - top);
          share = __fmul_rn(factor, __ldcg(part + (c + lane) * stride + 1));
          factors[query * kTogether + c - first + lane] = factor;
        }
        sum = __fadd_rn(sum, sum_lanes(share));
      }
      if (lane == 0) {
        sums[query] = sum;
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int c = first; c < end; c++) {
#pragma unroll
      for (int o = 0; o < outputs; o++) {
        const int i = threadIdx.x + o * THREADS, query = i / DIM;
        if (query < QUERIES) {
          const float part = __ldcg(part_of(query) + c * stride + i % DIM);
          values[o] = __fmaf_rn(part, factors[query * kTogether + c - first], values[o]);
        }
      }
    }
  }
#pragma unroll
  for (int o = 0; o < outputs; o++) {
    const int i = threadIdx.x + o * THREADS;
    if (i < QUERIES * DIM) {
      store(i / DIM, i % DIM, __fdiv_rn(values[o], sums[i / DIM]));
    }
  }
}

template <int QUERIES>
constexpr int kCombineFloats = QUERIES * (kTogether + 1);

}  // namespace bitdraft
