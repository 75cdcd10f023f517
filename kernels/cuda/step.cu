// The body of the whole step. Constants: M, KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, SUB_NORM,
// RELU2, VOCAB, INT8_HEAD, EPS and SCALE (bits of floats), EMBEDDING and HEAD (types). `k_caches` and
// `v_caches` are arrays of pointers made by the caller from inputs; the caches, though inputs, are
// written in place: nobody else holds them, and the next step waits for `after`. `requests` are pairs of
// integers: the offset and the capacity of the caches, then the tokens.
using namespace bitdraft;
using Model = ModelShape<KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, SUB_NORM, RELU2>;
constexpr int Q = Model::Q, QKV = Model::QKV;
extern __shared__ __align__(128) uint8_t work[];
__shared__ Memory<M> memory;
__shared__ float2 turns[M * DIM / 2];

const uint8_t* weights = reinterpret_cast<const uint8_t*>(matrices);
const int offset = requests[0][0], capacity = requests[0][1];
const float eps = __int_as_float(EPS), scale = __int_as_float(SCALE);
constexpr int WIDEST = row_stride(FFN > HIDDEN ? (FFN > Q ? FFN : Q) : (HIDDEN > Q ? HIDDEN : Q));
float* x = scratch;           // [M][HIDDEN], the residual stream
float* qkv = x + M * HIDDEN;  // [M][QKV]
float* h = qkv + M * QKV;     // [M][FFN]
const SharedRows shared{reinterpret_cast<int8_t*>(h + M * FFN), h + M * FFN + M * WIDEST / 4,
                        reinterpret_cast<int*>(h + M * FFN + M * WIDEST / 4 + 8)};
float* parts = h + M * FFN + M * WIDEST / 4 + 16;  // chunks of attention
unsigned* counters = const_cast<unsigned*>(state);
Grid grid(counters);
const auto row_of = [&](const float* rows, int width) {
  return [=](int m) { return [=](int i) { return load_shared4(rows + m * width + i); }; };
};
const auto add_to_x = [=](int j, int m, float y) { x[m * HIDDEN + j] = __fadd_rn(y, __ldcg(x + m * HIDDEN + j)); };
const auto combined = [=](int m) {
  float* row = reinterpret_cast<float*>(work);
  combine_row<Model, M>(parts, offset, m, row);
  return [=](int i) { return *reinterpret_cast<const float4*>(row + i); };
};

call_ahead_stage<Model, QKV, HIDDEN, false>(weights, floats + Model::QKV_SCALE_AT);
rope_table<M, DIM, kThreads>(frequency, offset, turns);
for (int i = blockIdx.x * kThreads + threadIdx.x; i < M * HIDDEN; i += gridDim.x * kThreads) {
  const int m = i / HIDDEN, token = requests[1 + m / 2][m % 2];
  x[i] = static_cast<float>(embedding[static_cast<int64_t>(token) * HIDDEN + i % HIDDEN]);
}

for (int layer = 0; layer < LAYERS; layer++) {
  const uint8_t* w = weights + layer * Model::LAYER_BYTES;
  const float* f = floats + layer * Model::LAYER_FLOATS;
  call_ahead_stage<Model, HIDDEN, Q, false>(w + Model::O_AT, f + Model::O_SCALE_AT);
  call_ahead_keys<Model>(k_caches[layer], v_caches[layer], capacity, offset);
  if (blockIdx.x == 0) {  // all norms of this layer and the first of the next
    call_ahead(reinterpret_cast<const uint8_t*>(f + Model::ATTENTION_NORM_AT),
               (Model::QKV_SCALE_AT - Model::ATTENTION_NORM_AT) * sizeof(float));
    call_ahead(reinterpret_cast<const uint8_t*>(f + Model::LAYER_FLOATS), HIDDEN * sizeof(float));
  }
  product_stage<Model, M, QKV, HIDDEN, false>(grid, w, f + Model::QKV_SCALE_AT, row_of(x, HIDDEN), f, eps, shared,
                                              memory, work, [=](int j, int m, float y) { qkv[m * QKV + j] = y; });
  grid.meet();
  call_ahead_stage<Model, 2 * FFN, HIDDEN, true>(w + Model::GATE_UP_AT, f + Model::GATE_UP_SCALE_AT);
  attention_stage<Model, M>(qkv, const_cast<float*>(k_caches[layer]), const_cast<float*>(v_caches[layer]), capacity,
                            offset, turns, scale, parts, work);
  product_stage<Model, M, HIDDEN, Q, false>(grid, w + Model::O_AT, f + Model::O_SCALE_AT, combined,
                                            SUB_NORM ? f + Model::ATTENTION_NORM_AT : nullptr, eps, shared, memory,
                                            work, add_to_x);
  call_ahead_stage<Model, HIDDEN, FFN, false>(w + Model::DOWN_AT, f + Model::DOWN_SCALE_AT);
  product_stage<Model, M, 2 * FFN, HIDDEN, true>(grid, w + Model::GATE_UP_AT, f + Model::GATE_UP_SCALE_AT,
                                                 row_of(x, HIDDEN), f + Model::POST_NORM_AT, eps, shared, memory, work,
                                                 [=](int j, int m, float y) { h[m * FFN + j] = y; });
  if (layer + 1 < LAYERS) {
    call_ahead_stage<Model, QKV, HIDDEN, false>(w + Model::LAYER_BYTES,
                                                f + Model::LAYER_FLOATS + Model::QKV_SCALE_AT);
  }
  product_stage<Model, M, HIDDEN, FFN, false>(grid, w + Model::DOWN_AT, f + Model::DOWN_SCALE_AT, row_of(h, FFN),
                                              SUB_NORM ? f + Model::FFN_NORM_AT : nullptr, eps, shared, memory, work,
                                              add_to_x);
}

const float* final_norm = floats + LAYERS * Model::LAYER_FLOATS;
if constexpr (INT8_HEAD) {
  using Head = ModelShape<kInt8, 1, HIDDEN, FFN, HEADS, KV_HEADS, DIM, false, false>;
  constexpr int PADDED = (VOCAB + kTile - 1) / kTile * kTile;
  product_stage<Head, M, PADDED, HIDDEN, false>(grid, reinterpret_cast<const uint8_t*>(head), head_scale,
                                                row_of(x, HIDDEN), final_norm, eps, shared, memory, work,
                                                [=](int j, int m, float y) {
                                                  if (j < VOCAB) {
                                                    logits[static_cast<int64_t>(m) * VOCAB + j] = y;
                                                  }
                                                });
} else {
  grid.meet();
  dense_head<HEAD, M>(reinterpret_cast<const HEAD*>(head), VOCAB, HIDDEN, x, final_norm, eps, memory, work, logits);
}
grid.leave();
