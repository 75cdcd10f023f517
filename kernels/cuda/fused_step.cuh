// A decoding step of 1..8 rows of a whole model in one launch, or a chain of steps: one of 1..8 rows, then some of one.
//
// One block a multiprocessor stays for the step. A layer is four products, QKV, output, gate and up, and down, with
// attention behind the first. Between them blocks exchange packets (exchange.cuh): in front of a product the statistics
// of its rows, then their int8, or both at once, each block those of the values that it has computed itself. The residual
// stream never leaves its owners. The first weights of a product are on their way to shared memory since the end of the one before.
//
// A reader's rows (decode/models/reader.py) begin with two more products: of its teacher's states, and of the token's
// embedding beside the fused state, or the reader's own. What goes into these all blocks that multiply it read and round
// by themselves, so the one exchange there is that of the states, as they are.
//
// All products run through the same instructions, with what differs in a table: the code of a layer has to fit into
// the multiprocessors' caches of instructions.
#pragma once

#include "attention.cuh"
#include "exchange.cuh"
#include "products.cuh"

namespace bitdraft {

// A layer's products; those of a reader in front of its layers and from its width to its teacher's; the head.
enum ProductOf { kQkv, kOutput, kGateUp, kDown, kProducts, kFusion = kProducts, kInput, kWidening, kHead, kStages };
// The residual stream, attention's results, the FFN's middle, and a reader's states in its teacher's width.
enum RowsOf { kStream, kAttended, kMiddle, kWidened, kRowKinds };

// The shapes of a model, and where things lie.
template <int KIND, int LAYERS, int HIDDEN, int FFN, int HEADS, int KV_HEADS, int DIM, int EMBEDDED, int READS,
          bool WIDENS>
struct ModelShape {
  static constexpr int Q = HEADS * DIM, KV = KV_HEADS * DIM, QKV = Q + 2 * KV;
  static constexpr int64_t bytes(int n, int k) {
    return static_cast<int64_t>(n / kTile) * spans_of(k) * kPieceBytes<KIND>;
  }
  // Where a layer's matrices start, in bytes, and its norms and scales, in floats.
  static constexpr int64_t O_AT = bytes(QKV, HIDDEN), GATE_UP_AT = O_AT + bytes(HIDDEN, Q),
                           DOWN_AT = GATE_UP_AT + bytes(2 * FFN, HIDDEN), LAYER_BYTES = DOWN_AT + bytes(HIDDEN, FFN);
  static constexpr int ATTENTION_NORM_AT = HIDDEN, POST_NORM_AT = ATTENTION_NORM_AT + Q,
                       FFN_NORM_AT = POST_NORM_AT + HIDDEN, QKV_SCALE_AT = FFN_NORM_AT + FFN,
                       O_SCALE_AT = QKV_SCALE_AT + QKV, GATE_UP_SCALE_AT = O_SCALE_AT + HIDDEN,
                       DOWN_SCALE_AT = GATE_UP_SCALE_AT + 2 * FFN, LAYER_FLOATS = DOWN_SCALE_AT + HIDDEN;
  // Behind the layers, from the weights' and the floats' start.
  static constexpr int64_t FUSION_AT = LAYERS * LAYER_BYTES, INPUT_AT = FUSION_AT + bytes(HIDDEN, READS * EMBEDDED),
                           WIDENING_AT = INPUT_AT + bytes(HIDDEN, EMBEDDED + HIDDEN);
  static constexpr int FINAL_NORM_AT = LAYERS * LAYER_FLOATS, FUSION_NORM_AT = FINAL_NORM_AT + HIDDEN,
                       FUSION_SCALE_AT = FUSION_NORM_AT + READS * EMBEDDED, INPUT_NORM_AT = FUSION_SCALE_AT + HIDDEN,
                       INPUT_SCALE_AT = INPUT_NORM_AT + EMBEDDED + HIDDEN, WIDENING_SCALE_AT = INPUT_SCALE_AT + HIDDEN;
  // Where packets start, with room for eight rows: of each kind of rows (statistics and int8 take less than whole ones),
  // Q, K and V, states as they are, the blocks' choices, and the parts of attention behind them.
  static constexpr int rows_packets(int k) { return k / kTile * 8 * kWholePackets; }
  static constexpr int A_PACKETS_AT = rows_packets(HIDDEN), H_PACKETS_AT = A_PACKETS_AT + rows_packets(Q),
                       WIDENED_PACKETS_AT = H_PACKETS_AT + rows_packets(FFN), WIDENED = WIDENS ? EMBEDDED : 0,
                       QKV_PACKETS_AT = WIDENED_PACKETS_AT + rows_packets(WIDENED),
                       STREAM_VALUES_AT = QKV_PACKETS_AT + QKV / kTile * packets_of(kTile * 8),
                       WIDENED_VALUES_AT = STREAM_VALUES_AT + HIDDEN / kTile * packets_of(kTile * 8),
                       CHOICES_AT = WIDENED_VALUES_AT + WIDENED / kTile * packets_of(kTile * 8);
};

// What differs between products.
struct Stage {
  int64_t weights;    // bytes from the layer's start, or from the weights'
  int scales, norm;   // floats from there; norm: of the rows that come out of it, -1 for none
  bool normed;        // the rows that go in
  int input, output;  // of RowsOf; of Q, K and V, what attention makes of them
  int k;              // inputs
  int first, tiles;   // this block's outputs
  int gate;           // as Product::start has it
};

// A row of k values, of which this block has the tiles of a share; own: room for them and their norm.
template <int M>
__device__ Rows rows_of(int k, Packet* packets, float* own, Packet* values = nullptr) {
  const int group = tiles_of_group(k);
  const Share share(k / kTile / group);
  const int tiles = share.count * group;
  return {k, group, share.first * group, tiles, own, own + tiles * M * kTile, packets, packets + k / kTile * 8,
          values};
}

// What is called ahead or copied is so by the last threads, since the first have most to do.
__device__ inline int from_the_last() { return kThreads - 1 - threadIdx.x; }

// Calls a contiguous range of memory into L2; both ends are multiples of 16 bytes.
__device__ inline void call_ahead(const void* from, int64_t bytes) {
  if (from_the_last() == 0) {
#pragma unroll 1
    for (int64_t at = 0; at < bytes; at += 1 << 16) {
      prefetch(static_cast<const uint8_t*>(from) + at, bytes - at < 1 << 16 ? bytes - at : 1 << 16);
    }
  }
}

// Starts to copy `tiles` tiles of floats to shared memory; ones for null.
__device__ inline void copy_tiles(float* to, const float* from, int tiles) {
  const int i = from_the_last();
  if (i < tiles * 4) {
    if (from) {
      copy_ahead(to + 4 * i, from + 4 * i);
    } else {
      *reinterpret_cast<float4*>(to + 4 * i) = make_float4(1, 1, 1, 1);
    }
  }
}

// A layer's caches, [KV_HEADS][capacity][DIM], `offset` keys long before this step.
struct Caches {
  bfloat16 *keys, *values;
  int offset, capacity;
};

// The tasks of attention: a key/value head, a chunk of keys, and up to two of the `live` ones of M rows; the keys it sees
// begin with `start`, `old` of them from before this step.
template <int M, int KV_HEADS>
struct Task {
  static constexpr int each = M < 2 ? M : 2;
  int head, chunk, row, rows, start, count, old;

  static __device__ int splits(int live) { return (live + each - 1) / each; }
  static __device__ int total(int offset, int live) {
    return (offset + live + kChunk - 1) / kChunk * KV_HEADS * splits(live);
  }

  __device__ Task(int task, int offset, int live)
      : head(task % KV_HEADS), chunk(task / KV_HEADS / splits(live)), row(task / KV_HEADS % splits(live) * each),
        rows(live - row < each ? live - row : each), start(chunk * kChunk) {
    count = offset + row + rows - start;
    count = count < kChunk ? count : kChunk;
    old = offset - start < 0 ? 0 : offset - start < kChunk ? offset - start : kChunk;
  }
};

// The parts of attention. New keys and values are rotated, rounded and put into the cache by the tasks of their rows.
// qkv: packets [(Q + 2 KV) / 16]; parts: packets of 16 values, the largest score and the sum,
// [chunks][KV_HEADS][M * GROUP][DIM / 16].
template <int M, int HEADS, int KV_HEADS, int DIM>
__device__ void attend(const Caches& cache, int live, const Packet* qkv, Packet* parts, unsigned number,
                       const float2* turns, float scale, uint8_t* work) {
  constexpr int GROUP = HEADS / KV_HEADS, QUERIES = Task<M, KV_HEADS>::each * GROUP, half = DIM / 2, width = DIM + 2,
                tiles = DIM / kTile;  // of a head
  float* queries = reinterpret_cast<float*>(work);  // query m * GROUP + g, of the task's rows
  bfloat16* keys = reinterpret_cast<bfloat16*>(queries + QUERIES * DIM);
  bfloat16* values = keys + kChunk * padded_dim(DIM);
  float* weights = reinterpret_cast<float*>(values + kChunk * DIM);
  float* part = weights + QUERIES * kChunk;
  float* fresh = part + QUERIES * width;  // [M][GROUP queries, key, value][DIM]
  const int tasks = Task<M, KV_HEADS>::total(cache.offset, live);
#pragma unroll 1
  for (int number_of_task = blockIdx.x; number_of_task < tasks; number_of_task += gridDim.x) {
    const Task<M, KV_HEADS> task(number_of_task, cache.offset, live);
    if (task.count <= 0) {
      continue;
    }
    const int64_t at = (static_cast<int64_t>(task.head) * cache.capacity + task.start) * DIM;
    bfloat16* k_rows = cache.keys + at;
    bfloat16* v_rows = cache.values + at;
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < task.old * DIM / 8; i += kThreads) {
      const int key = i / (DIM / 8), d = i % (DIM / 8) * 8;
      copy_ahead(keys + key * padded_dim(DIM) + d, k_rows + key * DIM + d);
      copy_ahead(values + key * DIM + d, v_rows + key * DIM + d);
    }
    const bool news = task.count > task.old;  // keys of this step are in the chunk
    receive<kTile * M, depth_of(M)>(
        (GROUP + (news ? 2 : 0)) * tiles, number,
        [&](int unit) {
          const int which = unit / tiles, tile = unit % tiles;
          const int from = which < GROUP ? task.head * GROUP + which : HEADS + task.head + (which - GROUP) * KV_HEADS;
          return qkv + (from * tiles + tile) * packets_of(kTile * M);
        },
        [&](int unit, int i, unsigned word) {
          fresh[i / kTile * (GROUP + 2) * DIM + unit * kTile + i % kTile] = __uint_as_float(word);
        });
    close_copies();
    await_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < task.rows * GROUP * half; i += kThreads) {
      const int d = i % half, query = i / half, m = task.row + query / GROUP;
      const float* from = fresh + (m * (GROUP + 2) + query % GROUP) * DIM;
      const float2 y = rotated(from[d], from[d + half], turns[m * half + d]);
      queries[query * DIM + d] = __fmul_rn(y.x, scale);
      queries[query * DIM + d + half] = __fmul_rn(y.y, scale);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (task.row + task.rows) * half; i += kThreads) {
      const int d = i % half, m = i / half, key = cache.offset + m - task.start;
      if (key >= 0 && key < kChunk) {
        const float* from = fresh + (m * (GROUP + 2) + GROUP) * DIM;
        const float2 y = rotated(from[d], from[d + half], turns[m * half + d]);
        const bfloat16 k[] = {to_bfloat16(y.x), to_bfloat16(y.y)};
        const bfloat16 v[] = {to_bfloat16(from[DIM + d]), to_bfloat16(from[DIM + d + half])};
        keys[key * padded_dim(DIM) + d] = k[0];
        keys[key * padded_dim(DIM) + d + half] = k[1];
        values[key * DIM + d] = v[0];
        values[key * DIM + d + half] = v[1];
        if (m >= task.row) {
          k_rows[key * DIM + d] = k[0];
          k_rows[key * DIM + d + half] = k[1];
          v_rows[key * DIM + d] = v[0];
          v_rows[key * DIM + d + half] = v[1];
        }
      }
    }
    __syncthreads();
    const auto last = [&](int query) {
      const int seen = cache.offset + task.row + query / GROUP - task.start;
      return query >= task.rows * GROUP ? -1 : seen < kChunk - 1 ? seen : kChunk - 1;
    };
    attend_chunk<QUERIES, DIM, kThreads>(queries, keys, values, task.count, last, weights, part);
    __syncthreads();
    const int64_t first = (static_cast<int64_t>(task.chunk * KV_HEADS + task.head) * M + task.row) * GROUP * tiles;
    send<kTile + 2>(parts + first * packets_of(kTile + 2), task.rows * GROUP * tiles, number, [&](int unit, int i) {
      const float* from = part + unit / tiles * width;
      return __float_as_uint(from[i < kTile ? unit % tiles * kTile + i : DIM + i - kTile]);
    });
  }
}

// This block's tiles of attention's results: the chunks of a row and head, combined in order, by the threads that
// `finish_tiles` asks for them.
template <int M, int HEADS, int KV_HEADS, int DIM>
__device__ void combine(const Rows& rows, int offset, int live, const Packet* parts, unsigned number) {
  constexpr int GROUP = HEADS / KV_HEADS, tiles = DIM / kTile, packets = packets_of(kTile + 2), depth = 8;
  constexpr int64_t stride = static_cast<int64_t>(KV_HEADS) * M * GROUP * tiles * packets;  // of chunks
  const int lane = threadIdx.x % 32, o = lane % 16, items = rows.tiles * live;
#pragma unroll 1
  for (int pair = threadIdx.x / 32 * 2; pair < items; pair += kThreads / 16) {
    const int item = pair + lane / 16 < items ? pair + lane / 16 : pair, tile = item % rows.tiles, m = item / rows.tiles;
    const int head = (rows.first + tile) / tiles, query = head / GROUP * M * GROUP + m * GROUP + head % GROUP;
    const Packet* from = parts + (query * tiles + (rows.first + tile) % tiles) * packets;
    const int chunks = (offset + m) / kChunk + 1;
    const auto scores_of = [&](int chunk) {
      Packet got[1];
      await_packets(got, 1, number, [&](int) { return from + chunk * stride + packets - 1; });
      return got[0];
    };
    // A lane has the scores of one chunk in sixteen; those of the first sixteen are kept.
    Packet scores = make_uint4(0, 0, 0, 0);
    float top = minus_infinity(), value = 0, sum = 0;
#pragma unroll 1
    for (int c = o; c < chunks; c += 16) {
      const Packet now = scores_of(c);
      top = fmaxf(top, __uint_as_float(now.y));
      scores = c == o ? now : scores;
    }
    top = max_tile(top);
#pragma unroll 1
    for (int first = 0; first < (offset + live - 1) / kChunk + 1; first += 16) {  // as often for every row
      if (first > 0 && first + o < chunks) {
        scores = scores_of(first + o);
      }
      const float weight = first + o < chunks ? expf(__fsub_rn(__uint_as_float(scores.y), top)) : 0.0f;
#pragma unroll 1
      for (int c = 0; c < 16; c += depth) {
        Packet got[depth];
        await_packets(got, chunks - first - c, number,
                      [&](int u) { return from + (first + c + u) * stride + o / 3; });
#pragma unroll
        for (int u = 0; u < depth; u++) {
          const int lane_of_chunk = lane / 16 * 16 + c + u;
          const float factor = __shfl_sync(kAllLanes, weight, lane_of_chunk);
          const float part = __uint_as_float(__shfl_sync(kAllLanes, scores.z, lane_of_chunk));
          if (first + c + u < chunks) {
            const Packet p = got[u];
            value = __fmaf_rn(__uint_as_float(o % 3 == 0 ? p.x : o % 3 == 1 ? p.y : p.z), factor, value);
            sum = __fmaf_rn(part, factor, sum);
          }
        }
      }
    }
    rows.mine[(tile * M + m) * kTile + o] = __fdiv_rn(value, sum);
  }
}

// Four values, of a row that starts with sixteen bytes, or eight of bfloat16.
__device__ inline float4 four(const float* x) { return *reinterpret_cast<const float4*>(x); }
__device__ inline float4 four(const bfloat16* x) {
  const uint2 v = *reinterpret_cast<const uint2*>(x);
  return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
                     __uint_as_float(v.y & 0xffff0000u));
}

// Rows of k values, as int8, that a block puts together by itself: of PARTS parts, each normed by its own root mean
// square, the last as wide as it is and the others WIDTH. at(m, column): four values; norms: [k]; s: the rows' scales;
// work: 2 * PARTS floats of shared memory a row.
template <int PARTS, int WIDTH, class At>
__device__ void put_together(int rows, int k, const float* norms, float eps, int8_t* q, int stride, float* s,
                             float* work, At at) {
  float2* parts = reinterpret_cast<float2*>(work);  // 1 / rms, and the largest magnitude behind the norm
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int part = threadIdx.x / 32; part < rows * PARTS; part += kThreads / 32) {
    const int m = part / PARTS, first = part % PARTS * WIDTH, end = part % PARTS < PARTS - 1 ? first + WIDTH : k;
    float squares = 0, top = 0;
#pragma unroll 5
    for (int i = first + 4 * lane; i < end; i += 128) {
      const float4 v = at(m, i), w = four(norms + i);
      squares = __fmaf_rn(v.x, v.x, __fmaf_rn(v.y, v.y, __fmaf_rn(v.z, v.z, __fmaf_rn(v.w, v.w, squares))));
      top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x * w.x), fabsf(v.y * w.y)), fmaxf(fabsf(v.z * w.z), fabsf(v.w * w.w))));
    }
    const float r = inverse_rms(sum_lanes(squares), end - first, eps, true);
    top = max_lanes(top);
    if (lane == 0) {
      parts[part] = {r, top * r};
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (k / 4); i += kThreads) {
    const int m = i / (k / 4), column = i % (k / 4) * 4;
    const float2* mine = parts + m * PARTS;
    float top = kSmallest;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      top = fmaxf(top, mine[part].y);
    }
    const float scale = __fdiv_rn(127.0f, top);
    const int part = column / WIDTH < PARTS ? column / WIDTH : PARTS - 1;
    *reinterpret_cast<unsigned*>(q + m * stride + column) = rounded(at(m, column), four(norms + column), mine[part].x * scale);
    if (column == 0) {
      s[m] = scale;
    }
  }
}

// A token and its logit.
struct Choice {
  float logit;
  unsigned id;

  static __device__ Choice none() { return {minus_infinity(), 0}; }

  // The higher logit's; of equal ones the lower id. NaN is never better.
  __device__ void better(float other, unsigned other_id) {
    if (other > logit || (other == logit && other_id < id)) {
      logit = other;
      id = other_id;
    }
  }
};

__device__ inline Choice best_lane(Choice best) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const float logit = __shfl_xor_sync(kAllLanes, best.logit, lane);
    best.better(logit, __shfl_xor_sync(kAllLanes, best.id, lane));
  }
  return best;
}

// The best of all threads' of a block, for all of them. warps: shared, one a warp.
__device__ inline Choice best_of_block(Choice best, Choice* warps) {
  best = best_lane(best);
  __syncthreads();  // what was kept there before has been read
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = best;
  }
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; warp++) {
    best.better(warps[warp].logit, warps[warp].id);
  }
  return best;
}

// The id that the best of all blocks' choices has. By the whole block.
__device__ inline unsigned chosen_by_all(const Packet* packets, unsigned number, Choice* warps) {
  Choice best = Choice::none();
  const int blocks = gridDim.x;
#pragma unroll 1
  for (int block = threadIdx.x; block < blocks; block += kThreads) {
    Packet got[1];
    await_packets(got, 1, number, [&](int) { return packets + block; });
    best.better(__uint_as_float(got[0].x), got[0].y);
  }
  return best_of_block(best, warps).id;
}

// The head over bfloat16 or float32 weights: warps take whole quads. y: [M][k], the normalised rows; take(m, j, logit)
// gets every logit of this block.
template <typename T, int M, class Take>
__device__ void dense_head(const T* weights, int n, int k, const float* y, Take take) {
  const Share share((n + 3) / 4);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int quad = share.first + threadIdx.x / 32; quad < share.first + share.count; quad += kThreads / 32) {
    const float mine = dense_quad<T, M>(weights, k, n, 4 * quad, y);
    const int j = lane / M, m = lane % M;
    if (j < 4 && 4 * quad + j < n) {
      take(m, 4 * quad + j, mine);
    }
  }
}

}  // namespace bitdraft
