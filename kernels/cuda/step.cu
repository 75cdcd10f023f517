// The body of the whole step. Constants: M, KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, SUB_NORM,
// RELU2, VOCAB, INT8_HEAD, EPS and SCALE (bits of floats), EMBEDDING and HEAD (types). `k_caches` and
// `v_caches` are arrays of pointers made by the caller from inputs; the caches, though inputs, are
// written in place: nobody else holds them, and the next step waits for `after`.
using namespace bitdraft;
using Model = ModelShape<KIND, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, SUB_NORM, RELU2>;
extern __shared__ __align__(128) uint8_t work[];
__shared__ Memory<M> memory;
__shared__ float2 turns[M * DIM / 2];

const int offset = request[0], capacity = request[1];
const float eps = __int_as_float(EPS), scale = __int_as_float(SCALE);
float* x = scratch;                  // [M][HIDDEN], the residual stream
float* qkv = x + M * HIDDEN;         // [M][QKV]
float* a = qkv + M * Model::QKV;     // [M][Q]
float* h = a + M * Model::Q;         // [M][FFN]
float* parts = h + M * FFN;          // chunks of attention
unsigned* counters = const_cast<unsigned*>(state);
Grid grid(counters);
unsigned* done = counters + 2;

rope_table<M, DIM, kThreads>(frequency, offset, turns);
for (int i = blockIdx.x * kThreads + threadIdx.x; i < M * HIDDEN; i += gridDim.x * kThreads) {
  x[i] = static_cast<float>(embedding[static_cast<int64_t>(request[2 + i / HIDDEN]) * HIDDEN + i % HIDDEN]);
}
call_ahead_stage<Model, false>(weights, Model::QKV, HIDDEN);
grid.meet();

for (int layer = 0; layer < LAYERS; layer++) {
  const uint8_t* w = weights + layer * Model::LAYER_BYTES;
  const float* f = floats + layer * Model::LAYER_FLOATS;
  call_ahead_stage<Model, false>(w + Model::O_AT, HIDDEN, Model::Q);
  product_stage<Model, M, false>(w, f + Model::QKV_SCALE_AT, Model::QKV, HIDDEN, x, f, eps, memory, work,
                                 [&](int j, int m, float y) { qkv[m * Model::QKV + j] = y; });
  grid.meet();
  call_ahead_stage<Model, true>(w + Model::GATE_UP_AT, 2 * FFN, HIDDEN);
  attention_stage<Model, M>(qkv, const_cast<float*>(k_caches[layer]), const_cast<float*>(v_caches[layer]), capacity,
                            offset, turns, scale, a, parts, done, memory, work);
  grid.meet();
  product_stage<Model, M, false>(w + Model::O_AT, f + Model::O_SCALE_AT, HIDDEN, Model::Q, a,
                                 SUB_NORM ? f + Model::ATTENTION_NORM_AT : nullptr, eps, memory, work,
                                 [&](int j, int m, float y) {
                                   x[m * HIDDEN + j] = __fadd_rn(y, __ldcg(x + m * HIDDEN + j));
                                 });
  grid.meet();
  call_ahead_stage<Model, false>(w + Model::DOWN_AT, HIDDEN, FFN);
  product_stage<Model, M, true>(w + Model::GATE_UP_AT, f + Model::GATE_UP_SCALE_AT, 2 * FFN, HIDDEN, x,
                                f + Model::POST_NORM_AT, eps, memory, work,
                                [&](int j, int m, float y) { h[m * FFN + j] = y; });
  grid.meet();
  if (layer + 1 < LAYERS) {
    call_ahead_stage<Model, false>(w + Model::LAYER_BYTES, Model::QKV, HIDDEN);
  }
  product_stage<Model, M, false>(w + Model::DOWN_AT, f + Model::DOWN_SCALE_AT, HIDDEN, FFN, h,
                                 SUB_NORM ? f + Model::FFN_NORM_AT : nullptr, eps, memory, work,
                                 [&](int j, int m, float y) {
                                   x[m * HIDDEN + j] = __fadd_rn(y, __ldcg(x + m * HIDDEN + j));
                                 });
  grid.meet();
}

const float* final_norm = floats + LAYERS * Model::LAYER_FLOATS;
if constexpr (INT8_HEAD) {
  using Head = ModelShape<kInt8, 1, HIDDEN, FFN, HEADS, KV_HEADS, DIM, false, false>;
  product_stage<Head, M, false>(reinterpret_cast<const uint8_t*>(head), head_scale, (VOCAB + kTile - 1) / kTile * kTile, HIDDEN, x,
                                final_norm, eps, memory, work, [&](int j, int m, float y) {
                                  if (j < VOCAB) {
                                    logits[static_cast<int64_t>(m) * VOCAB + j] = y;
                                  }
                                });
} else {
  dense_head<HEAD, M>(reinterpret_cast<const HEAD*>(head), VOCAB, HIDDEN, x, final_norm, eps, memory, work, logits);
}
grid.leave();
