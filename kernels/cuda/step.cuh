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
constexpr int kCounterLine = 32;  // counters are so far apart

// All blocks of the launch, which must all be resident: as many as there are multiprocessors.
struct Grid {
  // Zero before a launch and after it; each in a line of its own, since many look at one while others raise the next.
  unsigned *arrived, *announced, *left;
  unsigned arrivals = 0, announcements = 0;

  __device__ explicit Grid(unsigned* state)
      : arrived(state), announced(state + kCounterLine), left(state + 2 * kCounterLine) {}

  // This block's results so far are there for those who wait.
  __device__ void arrive() {
    arrivals += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
      raise(arrived);
    }
  }
  __device__ void wait_for_all() { wait(arrived, arrivals); }
  __device__ void meet() {
    arrive();
    wait_for_all();
  }

  // A few blocks prepare something for all: they announce, everyone waits for `expected` announcements.
  __device__ void announce() {
    __syncthreads();
    if (threadIdx.x == 0) {
      raise(announced);
    }
  }
  __device__ void wait_for_announcements(int expected) {
    announcements += expected;
    wait(announced, announcements);
  }

  // At the end: whoever leaves last leaves zeros behind.
  __device__ void leave() {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(left, 1u) == gridDim.x - 1) {
      *arrived = *announced = *left = 0;
    }
  }

 private:
  // Fails after some seconds, should the blocks not all be resident after all: a step has hundreds of waits, so
  // going on without the others would take as long as a GPU that hangs, and give wrong results.
  __device__ static void wait(const unsigned* counter, unsigned value) {
    if (threadIdx.x == 0) {
      for (int looks = 0; look(counter) < value; looks++) {
        if (looks == 1 << 23) {
          __trap();
        }
      }
    }
    __syncthreads();
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

// M int8 rows that a few blocks prepare for all: reading floats everywhere would cost the more, the more
// rows there are, since all blocks ask the same places of L2.
struct SharedRows {
  int8_t* q;  // [M][row_stride(K)]
  float* s;   // [M]
  int* sums;  // [M]
};

// What a block keeps in shared memory beside its stage's work.
template <int M>
struct Memory {
  RowScratch row;
  float s[M];
  int sums[M];
  float squares[M * 32];
};

// Stages are functions of their own, so that the compiler does not keep what one needs in registers during
// the others.
//
// A product stage: the last blocks wait for everyone's results, quantise a row each (or more, if there are fewer than
// M blocks) and announce it; all blocks multiply the rows with their share of tiles. Weights are on their way meanwhile.
// work: dynamic shared memory for M int8 rows and the integer sums. prepare(m): does what is needed before
// row m can be loaded, and returns the function that loads four of its floats. store(output, m, value) gets
// every result of this block; with a gate, of N / 2 outputs.
template <class Shape, int M, int N, int K, bool GATE, class Prepare, class Store>
__device__ __noinline__ void product_stage(Grid& grid, const uint8_t* weights, const float* scale, Prepare prepare,
                                           const float* norm, float eps, const SharedRows& shared, Memory<M>& memory,
                                           uint8_t* work, Store store) {
  constexpr int stride = row_stride(K), spans = spans_of(K), tiles = N / kTile / (GATE ? 2 : 1);
  grid.arrive();
  const Share share(tiles);
  using Product = TileProduct<Shape::KIND, M, kThreads>;
  Product product(weights, spans, share.first, share.count);
  for (int m = gridDim.x - 1 - blockIdx.x; m < M; m += gridDim.x) {
    grid.wait_for_all();
    quantise_row<K, kThreads>(prepare(m), norm, eps, shared.q + m * stride, spans * kSpan, memory.row);
    if (threadIdx.x == 0) {
      shared.s[m] = memory.row.s;
      shared.sums[m] = memory.row.sum;
    }
    grid.announce();
  }
  int8_t* q = reinterpret_cast<int8_t*>(work);
  int* acc = reinterpret_cast<int*>(work + M * stride);
  const int results = share.count * kTile * M;
  for (int i = threadIdx.x; i < (GATE ? 2 : 1) * results; i += kThreads) {
    acc[i] = 0;
  }
  grid.wait_for_announcements(M);
  for (int i = threadIdx.x; i < M * stride / 16; i += kThreads) {
    reinterpret_cast<uint4*>(q)[i] = __ldcg(reinterpret_cast<const uint4*>(shared.q) + i);
  }
  if (threadIdx.x < M) {
    memory.s[threadIdx.x] = __ldcg(shared.s + threadIdx.x);
    memory.sums[threadIdx.x] = __ldcg(shared.sums + threadIdx.x);
  }
  __syncthreads();
  product.add(q, stride, acc);
  if (GATE) {
    Product(weights, spans, tiles + share.first, share.count).add(q, stride, acc + results);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < results; i += kThreads) {
    const int m = i % M, output = kTile * share.first + i / M;
    const int taken_off = Shape::KIND == kTernary ? memory.sums[m] : 0;
    float y = scaled(acc[i] - taken_off, __ldg(scale + output), memory.s[m]);
    if (GATE) {
      y = gated<Shape::RELU2>(y, scaled(acc[results + i] - taken_off, __ldg(scale + N / 2 + output), memory.s[m]));
    }
    store(output, m, y);
  }
}

// Calls into L2 what this block will read in a product stage: its weights and their scales.
template <class Shape, int N, int K, bool GATE>
__device__ __noinline__ void call_ahead_stage(const uint8_t* weights, const float* scale) {
  constexpr int tiles = N / kTile / (GATE ? 2 : 1);
  constexpr int64_t tile = static_cast<int64_t>(spans_of(K)) * kPieceBytes<Shape::KIND>;
  const Share share(tiles);
  for (int part = 0; part < (GATE ? 2 : 1); part++) {
    call_ahead(weights + (part * tiles + share.first) * tile, share.count * tile);
    call_ahead(reinterpret_cast<const uint8_t*>(scale + (part * tiles + share.first) * kTile),
               share.count * kTile * sizeof(float));
  }
}

// The attention stage: tasks of (key/value head, chunk). New keys and values are rotated and put into
// the cache by the task that owns their chunk. qkv: [M][Shape::QKV]; parts: the chunks' results,
// [KV_HEADS][chunks][M * GROUP][DIM + 2].
template <class Shape, int M>
__device__ __noinline__ void attention_stage(const float* qkv, float* k_cache, float* v_cache, int capacity, int offset,
                                             const float2* turns, float scale, float* parts, uint8_t* work) {
  constexpr int DIM = Shape::DIM, GROUP = Shape::GROUP, QUERIES = M * GROUP, half = DIM / 2, width = DIM + 2;
  const ChunkMemory<QUERIES, DIM> memory(work);  // query m * GROUP + g
  const int total = offset + M, chunks = (total + kChunk - 1) / kChunk;
  for (int task = blockIdx.x; task < chunks * Shape::KV_HEADS; task += gridDim.x) {
    const int head = task % Shape::KV_HEADS, chunk = task / Shape::KV_HEADS, start = chunk * kChunk;
    float* k_rows = k_cache + (static_cast<int64_t>(head) * capacity + start) * DIM;
    float* v_rows = v_cache + (static_cast<int64_t>(head) * capacity + start) * DIM;
    const int old = offset - start < kChunk ? offset - start : kChunk;
    __syncthreads();
    memory.template load<kThreads>(k_rows, v_rows, old);
    for (int i = threadIdx.x; i < QUERIES * half; i += kThreads) {
      const int d = i % half, query = i / half, m = query / GROUP, g = query % GROUP;
      const float* from = qkv + m * Shape::QKV + (head * GROUP + g) * DIM;
      const float2 y = rotated(__ldcg(from + d), __ldcg(from + d + half), turns[m * half + d]);
      memory.queries[query * DIM + d] = __fmul_rn(y.x, scale);
      memory.queries[query * DIM + d + half] = __fmul_rn(y.y, scale);
    }
    if (start + kChunk > offset) {
      for (int i = threadIdx.x; i < kChunk * half; i += kThreads) {
        const int d = i % half, key = i / half, m = start + key - offset;
        if (m >= 0 && m < M) {
          const float* from = qkv + m * Shape::QKV + Shape::Q + head * DIM;
          const float2 y = rotated(__ldcg(from + d), __ldcg(from + d + half), turns[m * half + d]);
          memory.keys[key * padded_dim(DIM) + d] = k_rows[key * DIM + d] = y.x;
          memory.keys[key * padded_dim(DIM) + d + half] = k_rows[key * DIM + d + half] = y.y;
          memory.values[key * DIM + d] = v_rows[key * DIM + d] = __ldcg(from + Shape::KV + d);
          memory.values[key * DIM + d + half] = v_rows[key * DIM + d + half] = __ldcg(from + Shape::KV + d + half);
        } else if (m >= M) {  // weighs zero, but must be a number
          memory.values[key * DIM + d] = memory.values[key * DIM + d + half] = 0;
        }
      }
    }
    __syncthreads();
    const auto last = [&](int query) {
      const int seen = offset + query / GROUP - start;
      return seen < kChunk - 1 ? seen : kChunk - 1;
    };
    attend_chunk<QUERIES, DIM, kThreads>(memory, last,
                                         parts + (static_cast<int64_t>(head) * chunks + chunk) * QUERIES * width);
  }
}

// Row m of attention from its chunks, into shared memory: row [Shape::Q], then room for the factors.
template <class Shape, int M>
__device__ __noinline__ void combine_row(const float* parts, int offset, int m, float* row) {
  constexpr int GROUP = Shape::GROUP, DIM = Shape::DIM, width = DIM + 2, line = M * GROUP * width;
  const int chunks = (offset + M + kChunk - 1) / kChunk, mine = (offset + m) / kChunk + 1;
  combine_chunks<Shape::HEADS, DIM, kThreads>(
      [&](int h) {
        return parts + static_cast<int64_t>(h / GROUP) * chunks * line + (m * GROUP + h % GROUP) * width;
      },
      line, mine, row + Shape::Q, [&](int h, int d, float value) { row[h * DIM + d] = value; });
  __syncthreads();
}

// Calls into L2 the keys and values that this block will read in the attention stage.
template <class Shape>
__device__ __noinline__ void call_ahead_keys(const float* k_cache, const float* v_cache, int capacity, int offset) {
  const int head = blockIdx.x % Shape::KV_HEADS, start = blockIdx.x / Shape::KV_HEADS * kChunk;
  if (start < offset) {
    const int64_t at = (static_cast<int64_t>(head) * capacity + start) * Shape::DIM;
    const int rows = offset - start < kChunk ? offset - start : kChunk;
    call_ahead(reinterpret_cast<const uint8_t*>(k_cache + at), rows * Shape::DIM * sizeof(float));
    call_ahead(reinterpret_cast<const uint8_t*>(v_cache + at), rows * Shape::DIM * sizeof(float));
  }
}

// The head over bfloat16 or float32 weights: warps take whole quads.
template <typename T, int M>
__device__ __noinline__ void dense_head(const T* weights, int n, int k, const float* x, const float* norm, float eps,
                           Memory<M>& memory, uint8_t* work, float* logits) {
  float* y = reinterpret_cast<float*>(work);
  normalise_rows<M, kThreads>(x, k, k, norm, eps, y, memory.squares);
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
