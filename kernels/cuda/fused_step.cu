// The body of the fused step. Constants: M, CHAIN, D2T, TAPS, KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, SUB_NORM,
// RELU2, VOCAB, INT8_HEAD, EPS and SCALE (bits of floats), EMBEDDED (the width of embedding and head), HEAD (a type), READS,
// WIDENS and WHOLE (exchange.cuh). request: the offset, the caches' capacity, the number of the first exchange, how many
// tokens are given and how many to be chosen; with TAPS then of each layer where in `states` what leaves it goes, in blocks
// of M rows, or -1. `k_caches`, `v_caches` and `read` are arrays of pointers made by the caller from inputs; the caches and
// the packets, though inputs, are written in place: nobody else holds them, and the next step waits for `after`.
//
// Without CHAIN: one step of M rows; `out` has their logits. With it, steps that follow each other: one over the tokens
// given, at most M, then each over the choice of the one before; `out` has the choices, with D2T as ids of the teacher: of
// a trimmed head, d2t has those that its rows stand for. READS: of a reader, how many states of the teacher it reads, of
// which `read` has those of each tap for the tokens given; its rows after these are made of its own. WIDENS: whether it
// has a product from its width to its teacher's.
using Model = ModelShape<KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, EMBEDDED, READS, WIDENS>;
extern __shared__ __align__(128) uint8_t work[];
__shared__ Stage stages[kStages];
__shared__ Rows rows[kRowKinds];
__shared__ Factors<M> factors;
__shared__ float2 turns[M * DIM / 2];
__shared__ Choice choices[kThreads / 32];

const int capacity = request[1], given = request[3], steps = CHAIN ? request[4] : 1;
const float eps = __int_as_float(EPS);
int offset = request[0];
unsigned number = request[2];
Packet* all = reinterpret_cast<Packet*>(const_cast<unsigned*>(packets));
Packet* const qkv = all + Model::QKV_PACKETS_AT;
Packet* const block_choices = all + Model::CHOICES_AT;  // of each block
Packet* const parts = block_choices + gridDim.x;
// This block's values, their norms and the scales of its outputs (of two stages in turn), then the weights on their
// way, then what a stage works with.
constexpr RowsOf kLast = WIDENS ? kWidened : kStream;  // in front of the head
constexpr int kAsked = CHAIN ? 1 : M;                  // rows whose logits are
using Layers = Product<KIND, M, SLOTS>;
using Head = Product<kInt8, M, HEAD_SLOTS>;
float* const own = reinterpret_cast<float*>(work);
float* const scales = own + (STREAM_TILES + OTHER_TILES) * (M + 1) * kTile;
uint8_t* const rings = reinterpret_cast<uint8_t*>(scales + 4 * MOST_TILES * kTile);
constexpr int ring = INT8_HEAD && Head::kRing > Layers::kRing ? Head::kRing : Layers::kRing;
uint8_t* const stage_work = rings + kThreads / 32 * ring;
// Of a reader: what its rows' states are, [M][HIDDEN], behind the rows that are put together and their products.
constexpr int widest = READS > 1 && (READS - 1) * EMBEDDED > HIDDEN ? READS * EMBEDDED : EMBEDDED + HIDDEN;
float* const own_states = reinterpret_cast<float*>(stage_work + M * (row_stride(widest) + 4 * STREAM_TILES * kTile));
const auto take_state = [&](int m, int column, float value) { own_states[m * HIDDEN + column] = value; };
if (threadIdx.x == 0) {
  float* const other = own + STREAM_TILES * (M + 1) * kTile;
  rows[kStream] = rows_of<M>(HIDDEN, all, own, all + Model::STREAM_VALUES_AT);
  rows[kAttended] = rows_of<M>(Model::Q, all + Model::A_PACKETS_AT, other);
  rows[kMiddle] = rows_of<M>(FFN, all + Model::H_PACKETS_AT, other);
  rows[kWidened] = rows_of<M>(EMBEDDED, all + Model::WIDENED_PACKETS_AT, other, all + Model::WIDENED_VALUES_AT);
  const Share qkv_share(Model::QKV / kTile), head_share((VOCAB + kTile - 1) / kTile);
  const int x_first = rows[kStream].first, x_tiles = rows[kStream].tiles;
  const int norms[] = {SUB_NORM ? Model::ATTENTION_NORM_AT : -1, SUB_NORM ? Model::FFN_NORM_AT : -1};
  // The next layer's first norm, or the final one, is behind a layer's floats.
  stages[kQkv] = {0, Model::QKV_SCALE_AT, norms[0], true, kStream, kAttended, HIDDEN, qkv_share.first,
                  qkv_share.count, 0};
  stages[kOutput] = {Model::O_AT, Model::O_SCALE_AT, Model::POST_NORM_AT, SUB_NORM, kAttended, kStream, Model::Q,
                     x_first, x_tiles, 0};
  stages[kGateUp] = {Model::GATE_UP_AT, Model::GATE_UP_SCALE_AT, norms[1], true, kStream, kMiddle, HIDDEN,
                     rows[kMiddle].first, rows[kMiddle].tiles, FFN / kTile};
  stages[kDown] = {Model::DOWN_AT, Model::DOWN_SCALE_AT, Model::LAYER_FLOATS, SUB_NORM, kMiddle, kStream, FFN, x_first,
                   x_tiles, 0};
  stages[kFusion] = {Model::FUSION_AT, Model::FUSION_SCALE_AT, -1, true, kStream, kStream, READS * EMBEDDED, x_first,
                     x_tiles, 0};
  stages[kInput] = {Model::INPUT_AT, Model::INPUT_SCALE_AT, 0, true, kStream, kStream, EMBEDDED + HIDDEN, x_first,
                    x_tiles, 0};
  stages[kWidening] = {Model::WIDENING_AT, Model::WIDENING_SCALE_AT, -1, true, kStream, kWidened, HIDDEN,
                       rows[kWidened].first, rows[kWidened].tiles, 0};
  stages[kHead] = {0, 0, -1, !WIDENS, kLast, kLast, EMBEDDED, head_share.first, head_share.count, 0};
}
__syncthreads();
// The products of a step in their turns: a reader's fusion, in the first step only, and its input; the layers'; what widens
// a reader's states; and an int8 head.
constexpr int kBefore = READS ? 2 : 0, kBehind = kBefore + kProducts * LAYERS, kTurns = kBehind + WIDENS + INT8_HEAD;
const auto stage_of = [](int turn) -> int {
  return turn < kBefore              ? kFusion + turn
         : turn < kBehind            ? (turn - kBefore) % kProducts
         : WIDENS && turn == kBehind ? kWidening
                                     : kHead;
};
// What is copied for a stage before its turn: the scales of its outputs and the norm behind them, then its weights.
Layers product;
Head head_product;
const auto start_stage = [&](int turn) {
  const int which = stage_of(turn), layer = which < kProducts ? (turn - kBefore) / kProducts : 0;
  const Stage& stage = stages[which];
  if (which == kHead) {
    if constexpr (INT8_HEAD) {
      head_product.start(reinterpret_cast<const uint8_t*>(head), spans_of(EMBEDDED), stage.first, stage.tiles, 0,
                         kThreads / 32, rings);
    }
    return;
  }
  const Rows& out = rows[stage.output];
  const float* f = floats + layer * Model::LAYER_FLOATS;
  float* to = scales + turn % 2 * 2 * MOST_TILES * kTile;
  copy_tiles(to, f + stage.scales + stage.first * kTile, stage.tiles);
  if (stage.gate) {
    copy_tiles(to + stage.tiles * kTile, f + stage.scales + (stage.gate + stage.first) * kTile, stage.tiles);
  }
  copy_tiles(out.norm, stage.norm < 0 ? nullptr : f + stage.norm + out.first * kTile, out.tiles);
  close_copies();
  product.start(weights + layer * Model::LAYER_BYTES + stage.weights, spans_of(stage.k), stage.first, stage.tiles,
                stage.gate, kThreads / 32, rings);
};

unsigned fed = 0;  // the token that a step behind the first of a chain begins with
int live = CHAIN && M > 1 ? given : M;  // rows of M that there are
#pragma unroll 1
for (int step = 0; step < steps; step++, number++) {
  const auto embedded = [&](int m) {
    return embedding + static_cast<int64_t>(CHAIN && step > 0 ? fed : tokens[m]) * EMBEDDED;
  };
  rope_table<M, DIM, kThreads>(frequency, offset, turns);
  if constexpr (READS > 0) {
    if (step == 0) {
      start_stage(0);
    }
  } else {
    copy_tiles(rows[kStream].norm, floats + rows[kStream].first * kTile, rows[kStream].tiles);
    close_copies();
    await_copies<0>();
    __syncthreads();
    start_stage(0);
    finish_tiles<M, WHOLE>(rows[kStream], live, number, [&](int tile, int m, int o) {
      return static_cast<float>(embedded(m)[(rows[kStream].first + tile) * kTile + o]);
    });
  }

  Choice best = Choice::none();  // of this thread's logits
  const auto take = [&](int m, int j, float logit) {
    if constexpr (CHAIN) {
      best.better(logit, j);
    } else {
      out[static_cast<int64_t>(m) * VOCAB + j] = logit;
    }
  };

#pragma unroll 1
  for (int turn = READS > 0 && step > 0; turn < kTurns; turn++) {
    const int which = stage_of(turn), layer = (turn - kBefore) / kProducts;
    const bool at_head = which == kHead, apart = READS > 0 && (which == kFusion || which == kInput);
    const Stage& stage = stages[which];
    const Rows& in = rows[stage.input];
    const Rows& results = rows[stage.output];
    const unsigned exchange = number + (which == kGateUp);
    const int first = stage.first, tiles = stage.tiles;

    if (which == kOutput) {
      const Caches cache{const_cast<bfloat16*>(k_caches[layer]), const_cast<bfloat16*>(v_caches[layer]), offset,
                         capacity};
      attend<M, HEADS, KV_HEADS, DIM>(cache, live, qkv, parts, number, turns, __int_as_float(SCALE), stage_work);
      combine<M, HEADS, KV_HEADS, DIM>(in, offset, live, parts, number);
      finish_tiles<M, WHOLE>(in, live, number,
                             [&](int tile, int m, int o) { return in.mine[(tile * M + m) * kTile + o]; });
    }

    const int stride = row_stride(stage.k);
    int8_t* q = reinterpret_cast<int8_t*>(stage_work);
    int* acc = reinterpret_cast<int*>(stage_work + M * stride);
    __syncthreads();  // what is written from here on has been read, and what is read has been written
    if (which == kQkv && blockIdx.x < Task<M, KV_HEADS>::total(offset, live)) {
      const Task<M, KV_HEADS> task(blockIdx.x, offset, live);
      const int64_t at = (static_cast<int64_t>(task.head) * capacity + task.start) * DIM;
      call_ahead(k_caches[layer] + at, task.old * DIM * 2);
      call_ahead(v_caches[layer] + at, task.old * DIM * 2);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (stage.gate ? 2 : 1) * tiles * kTile * M; i += kThreads) {
      acc[i] = 0;
    }
    if (READS > 0 && turn == kBehind) {
      send_values<1, M>(rows[kStream], live - 1, number);
    }
    // Who has nothing to send nor to multiply waits for nothing; but a choice says that its block is done with a step.
    float* const values = reinterpret_cast<float*>(acc + (stage.gate ? 2 : 1) * tiles * kTile * M);  // of whole rows
    if (!apart && ((!WHOLE && in.tiles) || tiles || (CHAIN && at_head))) {
      receive_statistics<M, WHOLE>(in, live, exchange, stage.normed, eps, factors, reinterpret_cast<float*>(q), values);
    }
    if (at_head) {
      await_copies<HEAD_SLOTS>();
    } else {
      await_copies<SLOTS>();
    }
    __syncthreads();
    if (!WHOLE && !apart) {
      send_rows<M>(in, factors, exchange);
    }
    if (tiles) {
      if (WHOLE && !apart) {
        round_rows<M>(stage.k, live, factors, values, q, stride);
      } else if (!apart) {
        receive_rows<M>(in, exchange, q, stride);
      } else if constexpr (READS > 0) {
        float* const measured = own_states + M * HIDDEN;
        if (which == kFusion) {
          put_together<READS, EMBEDDED>(live, stage.k, floats + Model::FUSION_NORM_AT, eps, q, stride, factors.s,
                                        measured, [&](int m, int column) {
            return four(read[column / EMBEDDED] + m * EMBEDDED + column % EMBEDDED);
          });
        } else {
          if (step == 0) {
            receive_values<M>(rows[kStream], number, take_state);
          }
          __syncthreads();
          put_together<2, EMBEDDED>(live, stage.k, floats + Model::INPUT_NORM_AT, eps, q, stride, factors.s, measured,
                                    [&](int m, int column) {
            return column < EMBEDDED ? four(embedded(m) + column) : four(own_states + m * HIDDEN + column - EMBEDDED);
          });
        }
      }
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
      for (int i = threadIdx.x; i < outputs * kAsked; i += kThreads) {
        const int m = CHAIN ? live - 1 : i / outputs, local = i % outputs, j = first * kTile + local;
        if (j < VOCAB) {
          take(m, j, scaled(acc[local * M + m], __ldg(head_scale + j), factors.s[m]));
        }
      }
      break;
    }
    const auto result = [&](int local, int m) {  // of this block's outputs
      return scaled(acc[local * M + m], scales[turn % 2 * 2 * MOST_TILES * kTile + local], factors.s[m]);
    };
    if (which == kQkv || (READS > 0 && which == kFusion)) {
      Packet* const to = which == kQkv ? qkv : results.values;
      send<kTile * M>(to + first * packets_of(kTile * M), tiles, number, [&](int tile, int i) {
        return __float_as_uint(result(tile * kTile + i % kTile, i / kTile));
      });
    } else {
      const unsigned then = number + (which == kOutput ? 1 : which == kDown ? 2 : 0);
      finish_tiles<M, WHOLE>(results, live, then, [&](int tile, int m, int o) {
        const int local = tile * kTile + o;
        const float y = result(local, m);
        if (which == kGateUp) {
          return gated<RELU2>(y, result(tiles * kTile + local, m));
        }
        if (READS > 0 && which >= kProducts) {
          return y;
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
    if (turn + 1 < kTurns) {
      start_stage(turn + 1);
    }
  }

  if constexpr (!INT8_HEAD) {
    float* y = reinterpret_cast<float*>(stage_work);
    const Rows& in = rows[kLast];
    const float* norm = floats + Model::FINAL_NORM_AT;
    const int first = CHAIN ? live - 1 : 0;
    __syncthreads();
    send_values<kAsked, M>(in, first, number);
    receive_statistics<M, WHOLE>(in, live, number, !WIDENS, eps, factors, y);
    __syncthreads();
    receive_values<kAsked>(in, number, [&](int m, int column, float value) {
      const float x = __fmul_rn(value, factors.r[first + m]);
      y[m * EMBEDDED + column] = WIDENS ? x : __fmul_rn(x, __ldg(norm + column));
    });
    __syncthreads();
    dense_head<HEAD, kAsked>(reinterpret_cast<const HEAD*>(head), VOCAB, EMBEDDED, y, take);
  }

  if constexpr (CHAIN) {
    // Choices carry the caches' new keys and values with them: written before, and read behind the next statistics.
    __threadfence();
    best = best_of_block(best, choices);
    if (threadIdx.x == 0) {
      post(block_choices + blockIdx.x, make_uint4(__float_as_uint(best.logit), best.id, 0, number));
    }
    if (READS > 0 && step + 1 < steps) {  // what the next step begins with, while the choice is on its way
      start_stage(1);
      if (rows[kStream].tiles) {
        receive_values<1>(rows[kStream], number, take_state);
      }
    }
    if (rows[kStream].tiles) {
      fed = chosen_by_all(block_choices, number, choices);
      fed = D2T ? d2t[fed] : fed;
      if (rows[kStream].first == 0 && threadIdx.x == 0) {
        out[step] = fed;
      }
      __threadfence();
    }
  }
  offset += live;
  live = CHAIN ? 1 : M;
}
