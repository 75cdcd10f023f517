// The body of the fused step. Constants: M, CHAIN, D2T, TAPS, KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, SUB_NORM,
// RELU2, VOCAB, INT8_HEAD, EPS and SCALE (bits of floats), EMBEDDING and HEAD (types). request: the offset, the caches'
// capacity, the number of the first exchange, how many tokens are given and how many to be chosen; with TAPS then of each
// layer where in `states` what leaves it goes, in blocks of M rows, or -1. `k_caches` and
// `v_caches` are arrays of pointers made by the caller from inputs; the caches and the packets, though inputs, are
// written in place: nobody else holds them, and the next step waits for `after`.
//
// Without CHAIN: one step of M rows; `out` has their logits. With it, steps of one row that follow each other, over the
// tokens given and then each over the choice of the one before; `out` has the choices, with D2T as ids of
// the teacher: of a trimmed head, d2t has those that its rows stand for.
using Model = ModelShape<KIND, HIDDEN, FFN, HEADS, KV_HEADS, DIM>;
extern __shared__ __align__(128) uint8_t work[];
__shared__ Stage stages[kProducts + 1];
__shared__ Rows rows[kRowKinds];
__shared__ Factors<M> factors;
__shared__ float2 turns[M * DIM / 2];
__shared__ Choice choices[kThreads / 32];

const int capacity = request[1], given = request[3], steps = CHAIN ? given + request[4] - 1 : 1;
const float eps = __int_as_float(EPS);
int offset = request[0];
unsigned number = request[2];
Packet* all = reinterpret_cast<Packet*>(const_cast<unsigned*>(packets));
Packet* const qkv = all + Model::QKV_PACKETS_AT;
Packet* const block_choices = all + Model::CHOICES_AT;  // of each block
Packet* const parts = block_choices + gridDim.x;
// This block's values, their norms and the scales of its outputs (of two stages in turn), then the weights on their
// way, then what a stage works with.
using Layers = Product<KIND, M, SLOTS>;
using Head = Product<kInt8, M, HEAD_SLOTS>;
float* const own = reinterpret_cast<float*>(work);
float* const scales = own + (STREAM_TILES + OTHER_TILES) * (M + 1) * kTile;
uint8_t* const rings = reinterpret_cast<uint8_t*>(scales + 4 * MOST_TILES * kTile);
constexpr int ring = INT8_HEAD && Head::kRing > Layers::kRing ? Head::kRing : Layers::kRing;
uint8_t* const stage_work = rings + kThreads / 32 * ring;
if (threadIdx.x == 0) {
  float* const other = own + STREAM_TILES * (M + 1) * kTile;
  rows[kStream] = rows_of<M>(HIDDEN, all, own);
  rows[kAttended] = rows_of<M>(Model::Q, all + Model::A_PACKETS_AT, other);
  rows[kMiddle] = rows_of<M>(FFN, all + Model::H_PACKETS_AT, other);
  const Share qkv_share(Model::QKV / kTile), head_share((VOCAB + kTile - 1) / kTile);
  const int x_first = rows[kStream].first, x_tiles = rows[kStream].tiles;
  const int norms[] = {SUB_NORM ? Model::ATTENTION_NORM_AT : -1, SUB_NORM ? Model::FFN_NORM_AT : -1};
  stages[kQkv] = {0, Model::QKV_SCALE_AT, 0, kStream, kAttended, qkv_share.first, qkv_share.count, 0};
  stages[kOutput] = {Model::O_AT, Model::O_SCALE_AT, norms[0], kAttended, kStream, x_first, x_tiles, 0};
  stages[kGateUp] = {Model::GATE_UP_AT, Model::GATE_UP_SCALE_AT, Model::POST_NORM_AT, kStream, kMiddle,
                     rows[kMiddle].first, rows[kMiddle].tiles, FFN / kTile};
  stages[kDown] = {Model::DOWN_AT, Model::DOWN_SCALE_AT, norms[1], kMiddle, kStream, x_first, x_tiles, 0};
  stages[kHead] = {0, 0, 0, kStream, kStream, head_share.first, head_share.count, 0};
}
__syncthreads();
// What is copied for a stage before its turn: the scales of its outputs and the norm behind them, then its weights.
Layers product;
Head head_product;
const auto start_stage = [&](int turn) {
  const int layer = turn / kProducts, which = turn % kProducts;
  if (turn == kProducts * LAYERS) {
    if constexpr (INT8_HEAD) {
      const Stage& stage = stages[kHead];
      head_product.start(reinterpret_cast<const uint8_t*>(head), spans_of(HIDDEN), stage.first, stage.tiles, 0,
                         kThreads / 32, rings);
    }
    return;
  }
  const Stage& stage = stages[which];
  const Rows& out = rows[stage.output];
  const float* f = floats + layer * Model::LAYER_FLOATS;
  float* to = scales + turn % 2 * 2 * MOST_TILES * kTile;
  copy_tiles(to, f + stage.scales + stage.first * kTile, stage.tiles);
  if (stage.gate) {
    copy_tiles(to + stage.tiles * kTile, f + stage.scales + (stage.gate + stage.first) * kTile, stage.tiles);
  }
  // The next layer's first norm, or the final one, is behind this layer's floats.
  const int norm = stages[(which + 1) % kProducts].norm;
  const float* behind = f + (which == kDown ? Model::LAYER_FLOATS : 0) + norm + out.first * kTile;
  copy_tiles(out.norm, norm < 0 ? nullptr : behind, out.tiles);
  close_copies();
  product.start(weights + layer * Model::LAYER_BYTES + stage.weights, spans_of(rows[stage.input].k), stage.first,
                stage.tiles, stage.gate, kThreads / 32, rings);
};

unsigned fed = 0;  // the token that a chained step begins with
#pragma unroll 1
for (int step = 0; step < steps; step++, offset++, number++) {
  rope_table<M, DIM, kThreads>(frequency, offset, turns);
  copy_tiles(rows[kStream].norm, floats + rows[kStream].first * kTile, rows[kStream].tiles);
  close_copies();
  await_copies<0>();
  __syncthreads();
  start_stage(0);
  if (CHAIN && step < given) {
    fed = tokens[step];
  }
  finish_tiles<M>(rows[kStream], number, [&](int tile, int m, int o) {
    const int64_t row = static_cast<int64_t>(CHAIN ? fed : tokens[m]) * HIDDEN;
    return static_cast<float>(embedding[row + (rows[kStream].first + tile) * kTile + o]);
  });

  Choice best = Choice::none();  // of this thread's logits
  const auto take = [&](int m, int j, float logit) {
    if constexpr (CHAIN) {
      best.better(logit, j);
    } else {
      out[static_cast<int64_t>(m) * VOCAB + j] = logit;
    }
  };

  // One turn a product, and one for an int8 head, which comes in the place of a layer's first.
#pragma unroll 1
  for (int turn = 0; turn < kProducts * LAYERS + INT8_HEAD; turn++) {
    const int layer = turn / kProducts, which = turn % kProducts;
    const bool at_head = turn == kProducts * LAYERS;
    const Stage& stage = stages[at_head ? kHead : which];
    const Rows& in = rows[stage.input];
    const Rows& results = rows[stage.output];
    const unsigned exchange = number + (which == kGateUp);
    const int first = stage.first, tiles = stage.tiles;

    if (which == kOutput) {
      const Caches cache{const_cast<bfloat16*>(k_caches[layer]), const_cast<bfloat16*>(v_caches[layer]), offset,
                         capacity};
      attend<M, HEADS, KV_HEADS, DIM>(cache, qkv, parts, number, turns, __int_as_float(SCALE), stage_work);
      combine<M, HEADS, KV_HEADS, DIM>(in, offset, parts, number);
      finish_tiles<M>(in, number, [&](int tile, int m, int o) { return in.mine[(tile * M + m) * kTile + o]; });
    }

    const int stride = row_stride(in.k);
    int8_t* q = reinterpret_cast<int8_t*>(stage_work);
    int* acc = reinterpret_cast<int*>(stage_work + M * stride);
    __syncthreads();  // what is written from here on has been read, and what is read has been written
    if (which == kQkv && !at_head && blockIdx.x < Task<M, KV_HEADS>::total(offset)) {
      const Task<M, KV_HEADS> task(blockIdx.x, offset);
      const int64_t at = (static_cast<int64_t>(task.head) * capacity + task.start) * DIM;
      call_ahead(k_caches[layer] + at, task.old * DIM * 2);
      call_ahead(v_caches[layer] + at, task.old * DIM * 2);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (stage.gate ? 2 : 1) * tiles * kTile * M; i += kThreads) {
      acc[i] = 0;
    }
    // Who has nothing to send nor to multiply waits for nothing; but a choice says that its block is done with a step.
    if (in.tiles || tiles || (CHAIN && at_head)) {
      receive_statistics<M>(in, exchange, stage.norm >= 0, eps, factors, reinterpret_cast<float*>(q));
    }
    if (at_head) {
      await_copies<HEAD_SLOTS>();
    } else {
      await_copies<SLOTS>();
    }
    __syncthreads();
    send_rows<M>(in, factors, exchange);
    if (tiles) {
      receive_rows<M>(in, exchange, q, stride);
      __syncthreads();
      if (at_head) {
        head_product.run(q, stride, acc);
      } else {
        product.run(q, stride, acc);
      }
    }
    __syncthreads();

    if (at_head) {
      const int outputs = tiles * kTile;
#pragma unroll 1
      for (int i = threadIdx.x; i < outputs * M; i += kThreads) {
        const int m = i / outputs, local = i % outputs, j = first * kTile + local;
        if (j < VOCAB) {
          take(m, j, scaled(acc[local * M + m], __ldg(head_scale + j), factors.s[m]));
        }
      }
      break;
    }
    const auto result = [&](int local, int m) {  // of this block's outputs
      return scaled(acc[local * M + m], scales[turn % 2 * 2 * MOST_TILES * kTile + local], factors.s[m]);
    };
    if (which == kQkv) {
      send<kTile * M>(qkv + first * packets_of(kTile * M), tiles, number, [&](int tile, int i) {
        return __float_as_uint(result(tile * kTile + i % kTile, i / kTile));
      });
    } else {
      finish_tiles<M>(results, number + (which == kOutput ? 1 : which == kDown ? 2 : 0), [&](int tile, int m, int o) {
        const int local = tile * kTile + o;
        const float y = result(local, m);
        if (which == kGateUp) {
          return gated<RELU2>(y, result(tiles * kTile + local, m));
        }
        const float sum = __fadd_rn(y, results.mine[(tile * M + m) * kTile + o]);
        if (TAPS && which == kDown && request[5 + layer] >= 0) {
          states[static_cast<int64_t>(request[5 + layer] * M + m) * HIDDEN + (first + tile) * kTile + o] = sum;
        }
        return sum;
      });
    }
    number += which == kDown ? 2 : 0;
    // Warps that had nothing to finish are here already.
    if (turn + 1 < kProducts * LAYERS + INT8_HEAD) {
      start_stage(turn + 1);
    }
  }

  if constexpr (!INT8_HEAD) {
    float* y = reinterpret_cast<float*>(stage_work);
    const Rows& in = rows[kStream];
    const float* norm = floats + LAYERS * Model::LAYER_FLOATS;
    __syncthreads();
    send<kTile * M>(qkv + in.first * packets_of(kTile * M), in.tiles, number, [&](int tile, int i) {
      return __float_as_uint(in.mine[tile * kTile * M + i]);
    });
    receive_statistics<M>(in, number, true, eps, factors, y);
    __syncthreads();
    receive<kTile * M, depth_of(M)>(
        HIDDEN / kTile, number, [&](int tile) { return qkv + tile * packets_of(kTile * M); },
        [&](int tile, int i, unsigned word) {
          const int m = i / kTile, column = tile * kTile + i % kTile;
          y[m * HIDDEN + column] = __fmul_rn(__fmul_rn(__uint_as_float(word), factors.r[m]), __ldg(norm + column));
        });
    __syncthreads();
    dense_head<HEAD, M>(reinterpret_cast<const HEAD*>(head), VOCAB, HIDDEN, y, take);
  }

  if constexpr (CHAIN) {
    // Choices carry the caches' new keys and values with them: written before, and read behind the next statistics.
    __threadfence();
    best = best_of_block(best, choices);
    if (threadIdx.x == 0) {
      post(block_choices + blockIdx.x, make_uint4(__float_as_uint(best.logit), best.id, 0, number));
    }
    if (rows[kStream].tiles) {
      fed = chosen_by_all(block_choices, number, choices);
      fed = D2T ? d2t[fed] : fed;
      if (rows[kStream].first == 0 && threadIdx.x == 0 && step >= given - 1) {
        out[step - (given - 1)] = fed;
      }
      __threadfence();
    }
  }
}
