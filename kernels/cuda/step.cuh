// A whole decoding step of 1..8 rows in one launch.
//
// One block a multiprocessor stays for the step. Between stages all blocks meet at a barrier, which
// costs a microsecond where a launch of its own would cost several, and the weights of the stage to come
// are called into L2 while the present one is computed. A layer is five stages: QKV, attention, output
// projection, gate and up, down.
#pragma once

#include "attention.cuh"
#include "products.cuh"

namespace bitdraft {

constexpr int kThreads = 512;

// All blocks of the launch, which must all be resident: as many as there are multiprocessors.
struct Grid {
  unsigned* arrived;  // zero before a launch and after it
  unsigned passed = 0;

  __device__ explicit Grid(unsigned* state) : arrived(state) {}

  __device__ void meet() {
    passed += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
      raise(arrived);
      while (look(arrived) < passed) {
      }
    }
    __syncthreads();
  }

  // After the last meeting: whoever leaves last leaves zeros behind.
  __device__ void leave() {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(arrived + 1, 1u) == gridDim.x - 1) {
      arrived[1] = 0;
      atomicExch(arrived, 0u);
    }
  }
};

// Of `total` things, those of this block.
struct Share {
  int first, count;
  __device__ explicit Share(int total)
      : first(static_cast<int64_t>(total) * blockIdx.x / gridDim.x),
        count(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x - first) {}
};

// Calls a contiguous range of memory into L2; both ends are multiples of 16 bytes.
__device__ inline void call_ahead(const uint8_t* from, int64_t bytes) {
  if (threadIdx.x == 0) {
    for (int64_t at = 0; at < bytes; at += 1 << 16) {
      prefetch(from + at, bytes - at < 1 << 16 ? bytes - at : 1 << 16);
    }
  }
}

// The shapes of a model; `Shape` of the functions below is one of these.
template <int KIND_, int LAYERS_, int HIDDEN_, int FFN_, int HEADS_, int KV_HEADS_, int DIM_, bool SUB_NORM_, bool RELU2_>
struct ModelShape {
  static constexpr int KIND = KIND_, LAYERS = LAYERS_, HIDDEN = HIDDEN_, FFN = FFN_, HEADS = HEADS_,
                       KV_HEADS = KV_HEADS_, DIM = DIM_;
  static constexpr bool SUB_NORM = SUB_NORM_, RELU2 = RELU2_;
  static constexpr int Q = HEADS * DIM, KV = KV_HEADS * DIM, QKV = Q + 2 * KV, GROUP = HEADS / KV_HEADS;
  static constexpr int64_t bytes(int n, int k) {
    return static_cast<int64_t>(n / kTile) * spans_of(k) * kPieceBytes<KIND>;
  }
  // Where a layer's matrices start, in bytes, and its norms and scales, in floats.
  static constexpr int64_t O_AT = bytes(QKV, HIDDEN), GATE_UP_AT = O_AT + bytes(HIDDEN, Q),
                           DOWN_AT = GATE_UP_AT + bytes(2 * FFN, HIDDEN), LAYER_BYTES = DOWN_AT + bytes(HIDDEN, FFN);
  static constexpr int64_t ATTENTION_NORM_AT = HIDDEN, POST_NORM_AT = ATTENTION_NORM_AT + Q,
                           FFN_NORM_AT = POST_NORM_AT + HIDDEN, QKV_SCALE_AT = FFN_NORM_AT + FFN,
                           O_SCALE_AT = QKV_SCALE_AT + QKV, GATE_UP_SCALE_AT = O_SCALE_AT + HIDDEN,
                           DOWN_SCALE_AT = GATE_UP_SCALE_AT + 2 * FFN, LAYER_FLOATS = DOWN_SCALE_AT + HIDDEN;};

// Shared memory of a block; the parts that are never used together lie upon each other.
template <int M>
struct Memory {
  float s[M];
  int sums[M];
  float scratch[3 * M * 32];
  int flag;
};

// A product stage: quantise the rows of `x`, multiply with this block's share of tiles, finish.
// work: dynamic shared memory for M int8 rows and the integer sums. store(output, m, value) gets every
// result of this block; with a gate, of n / 2 outputs.
template <class Shape, int M, bool GATE, class Store>
__device__ void product_stage(const uint8_t* weights, const float* scale, int n, int k, const float* x,
                              const float* norm, float eps, Memory<M>& memory, uint8_t* work, Store store) {
  const int stride = row_stride(k), spans = spans_of(k), tiles = n / kTile / (GATE ? 2 : 1);
  int8_t* q = reinterpret_cast<int8_t*>(work);
  int* acc = reinterpret_cast<int*>(work + M * stride);
  const Share share(tiles);
  const int results = share.count * kTile * M;
  for (int i = threadIdx.x; i < (GATE ? 2 : 1) * results; i += kThreads) {
    acc[i] = 0;
  }
  quantise_rows<M, kThreads>(x, k, k, norm, eps, q, stride, spans * kSpan, memory.s, memory.sums, memory.scratch);
  multiply_tiles<Shape::KIND, M, kThreads>(weights, spans, share.first, share.count, q, stride, acc);
  if (GATE) {
    multiply_tiles<Shape::KIND, M, kThreads>(weights, spans, tiles + share.first, share.count, q, stride,
                                             acc + results);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < results; i += kThreads) {
    const int m = i % M, output = kTile * share.first + i / M;
    const int taken_off = Shape::KIND == kTernary ? memory.sums[m] : 0;
    float y = scaled(acc[i] - taken_off, __ldg(scale + output), memory.s[m]);
    if (GATE) {
      y = gated<Shape::RELU2>(y, scaled(acc[results + i] - taken_off, __ldg(scale + n / 2 + output), memory.s[m]));
    }
    store(output, m, y);
  }
}

// Calls into L2 what `product_stage` will read.
template <class Shape, bool GATE>
__device__ inline void call_ahead_stage(const uint8_t* weights, int n, int k) {
  const int tiles = n / kTile / (GATE ? 2 : 1);
  const Share share(tiles);
  const int64_t tile = static_cast<int64_t>(spans_of(k)) * kPieceBytes<Shape::KIND>;
  call_ahead(weights + share.first * tile, share.count * tile);
  if (GATE) {
    call_ahead(weights + (tiles + share.first) * tile, share.count * tile);
  }
}

// The attention stage: tasks of (key/value head, chunk). New keys and values are rotated and put into
// the cache by the task that owns their chunk. The last task of a head combines its chunks.
// qkv: [M][Shape::QKV]; out: [M][Shape::Q]; parts: room for the chunks; done: a counter a head, zero.
template <class Shape, int M>
__device__ void attention_stage(const float* qkv, float* k_cache, float* v_cache, int capacity, int offset,
                                const float2* turns, float scale, float* out, float* parts, unsigned* done,
                                Memory<M>& memory, uint8_t* work) {
  constexpr int DIM = Shape::DIM, GROUP = Shape::GROUP, QUERIES = M * GROUP, half = DIM / 2, width = DIM + 2;
  float* queries = reinterpret_cast<float*>(work);  // query m * GROUP + g
  float* keys = queries + QUERIES * DIM;
  float* values = keys + kChunk * padded_dim(DIM);
  float* weights = values + kChunk * DIM;
  const int total = offset + M, chunks = (total + kChunk - 1) / kChunk;
  for (int task = blockIdx.x; task < chunks * Shape::KV_HEADS; task += gridDim.x) {
    const int head = task % Shape::KV_HEADS, chunk = task / Shape::KV_HEADS, start = chunk * kChunk;
    const int count = total - start < kChunk ? total - start : kChunk;
    float* k_rows = k_cache + (static_cast<int64_t>(head) * capacity + start) * DIM;
    float* v_rows = v_cache + (static_cast<int64_t>(head) * capacity + start) * DIM;
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * half; i += kThreads) {
      const int d = i % half, query = i / half, m = query / GROUP, g = query % GROUP;
      const float* from = qkv + m * Shape::QKV + (head * GROUP + g) * DIM;
      const float2 y = rotated(__ldcg(from + d), __ldcg(from + d + half), turns[m * half + d]);
      queries[query * DIM + d] = __fmul_rn(y.x, scale);
      queries[query * DIM + d + half] = __fmul_rn(y.y, scale);
    }
    for (int i = threadIdx.x; i < M * half; i += kThreads) {
      const int d = i % half, m = i / half, key = offset + m - start;
      if (key >= 0 && key < kChunk) {
        const float* from = qkv + m * Shape::QKV + Shape::Q + head * DIM;
        const float2 y = rotated(__ldcg(from + d), __ldcg(from + d + half), turns[m * half + d]);
        keys[key * padded_dim(DIM) + d] = k_rows[key * DIM + d] = y.x;
        keys[key * padded_dim(DIM) + d + half] = k_rows[key * DIM + d + half] = y.y;
        values[key * DIM + d] = v_rows[key * DIM + d] = __ldcg(from + Shape::KV + d);
        values[key * DIM + d + half] = v_rows[key * DIM + d + half] = __ldcg(from + Shape::KV + d + half);
      }
    }
    const int old = offset - start < kChunk ? offset - start : kChunk;
    for (int i = threadIdx.x; i < old * DIM / 4; i += kThreads) {
      const int key = i / (DIM / 4), d = i % (DIM / 4) * 4;
      *reinterpret_cast<float4*>(keys + key * padded_dim(DIM) + d) =
          *reinterpret_cast<const float4*>(k_rows + key * DIM + d);
      *reinterpret_cast<float4*>(values + key * DIM + d) = *reinterpret_cast<const float4*>(v_rows + key * DIM + d);
    }
    __syncthreads();
    float* part = parts + static_cast<int64_t>(head * chunks + chunk) * QUERIES * width;
    const auto last = [&](int query) {
      const int seen = offset + query / GROUP - start;
      return seen < kChunk - 1 ? seen : kChunk - 1;
    };
    attend_chunk<QUERIES, DIM, kThreads>(queries, keys, values, count, last, weights, part);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      memory.flag = atomicAdd(done + head, 1u) == chunks - 1;
    }
    __syncthreads();
    if (memory.flag) {
      __threadfence();
      const float* first = parts + static_cast<int64_t>(head) * chunks * QUERIES * width;
      for (int i = threadIdx.x; i < QUERIES * DIM; i += kThreads) {
        const int d = i % DIM, query = i / DIM, m = query / GROUP, g = query % GROUP;
        out[m * Shape::Q + (head * GROUP + g) * DIM + d] =
            combine_chunks<DIM>(first + query * width, QUERIES * width, (offset + m) / kChunk + 1, d);
      }
      if (threadIdx.x == 0) {
        done[head] = 0;
      }
    }
  }
}

// The head over bfloat16 or float32 weights: warps take whole quads.
template <typename T, int M>
__device__ void dense_head(const T* weights, int n, int k, const float* x, const float* norm, float eps,
                           Memory<M>& memory, uint8_t* work, float* logits) {
  float* y = reinterpret_cast<float*>(work);
  normalise_rows<M, kThreads>(x, k, k, norm, eps, y, memory.scratch);
  const Share share((n + 3) / 4);
  const int lane = threadIdx.x % 32;
  for (int quad = share.first + threadIdx.x / 32; quad < share.first + share.count; quad += kThreads / 32) {
    const float mine = dense_quad<T, M>(weights, k, n, 4 * quad, y);
    const int j = lane / M, m = lane % M;
    if (j < 4 && 4 * quad + j < n) {
      logits[static_cast<int64_t>(m) * n + 4 * quad + j] = mine;
    }
  }
}

}  // namespace bitdraft
