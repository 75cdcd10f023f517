#include "fused_step.h"

#include <algorithm>

namespace bitdraft {
namespace {

enum Slot { kStates = 4, kLogits = 5, kRead = 9 };

// y = the product with x, normed already; gated if `gated`; residual may be null.
void apply(const Kernels& set, const FusedModel& model, const Linear& linear, const float* norm, const float* x,
           int64_t m, bool gated, const float* residual, float* y) {
  const Matrix<float> rows(x, m, linear.k);
  const Epilogue epilogue = gated ? model.epilogue : Epilogue::none;
  if (!linear.scale) {
    const Matrix<float> add(residual, m, linear.n);
    return multiply_dense(set, rows, linear.data, norm, model.eps, epilogue, residual != nullptr ? &add : nullptr, y);
  }
  Product p{};
  p.format = format_of(linear.data, linear.n, linear.k);
  p.tiles = linear.data.data<uint8_t>();
  p.scale = linear.scale->data<float>();
  p.n = linear.n;
  p.epilogue = epilogue;
  p.residual = residual;
  p.residual_stride = linear.n;
  p.out = y;
  multiply_rows(set, rows, norm, model.eps, p);
}

// y = linear(x), norm and all.
void apply(const Kernels& set, const FusedModel& model, const Linear& linear, const float* x, int64_t m, bool gated,
           const float* residual, float* y) {
  apply(set, model, linear, linear.norm ? linear.norm->data<float>() : nullptr, x, m, gated, residual, y);
}

void embed(const mx::array& embedding, int token, float* x) {
  const int width = embedding.shape(1);
  const auto row = static_cast<int64_t>(std::clamp(token, 0, embedding.shape(0) - 1)) * width;
  if (embedding.dtype() == mx::bfloat16) {
    std::copy_n(embedding.data<mx::bfloat16_t>() + row, width, x);
  } else {
    std::copy_n(embedding.data<float>() + row, width, x);
  }
}

// The caches' memory: the keys of each layer, then the values of each.
struct Caches {
  std::vector<mx::bfloat16_t*> data;
  int64_t capacity;
};

// What leaves a layer, and where it is to be kept.
struct Tap {
  size_t layer;
  float* states;
};

// Scratch memory for m rows through the layers; it begins with their states, [m][hidden].
float* row_space(const FusedModel& model, int64_t m) {
  const Linear* linear = model.layers.data();
  return scratch_floats(kStates, m * (2 * model.hidden() + linear[0].n + linear[1].k + linear[2].n / 2));
}

// Runs the layers over the m rows of some spans, whose first states are in `row_space`, and their last ones then.
void run_layers(const FusedModel& model, int64_t m, const std::vector<Span>& spans, const Caches& caches,
                const std::vector<Tap>& taps = {}) {
  const Kernels& set = kernels();
  const Linear* linear = model.layers.data();
  const int64_t hidden = model.hidden(), qkv_width = linear[0].n, attended_width = linear[1].k;
  const size_t layers = model.layers.size() / 4;
  float *x = row_space(model, m), *next = x + m * hidden, *qkv = next + m * hidden, *attended = qkv + m * qkv_width,
        *h = attended + m * attended_width;
  auto tap = taps.begin();
  for (size_t layer = 0; layer < layers; layer++, linear += 4) {
    apply(set, model, linear[0], x, m, false, nullptr, qkv);
    attend_spans(model.heads, spans, Matrix<float>(qkv, m, qkv_width), model.inverse_frequency.data<float>(),
                 caches.data[layer], caches.data[layers + layer], caches.capacity, attended);
    apply(set, model, linear[1], attended, m, false, x, next);
    apply(set, model, linear[2], next, m, true, nullptr, h);
    apply(set, model, linear[3], h, m, false, next, x);
    if (tap != taps.end() && tap->layer == layer) {
      std::copy_n(x, m * hidden, tap->states);
      tap++;
    }
  }
}

// Tokens through a model. Returns the last states, [m][hidden], in scratch memory.
const float* run_tokens(const FusedModel& model, const int32_t* tokens, int64_t m, const std::vector<Span>& spans,
                        const Caches& caches, const std::vector<Tap>& taps = {}) {
  float* x = row_space(model, m);
  for (int64_t i = 0; i < m; i++) {
    embed(model.embedding, tokens[i], x + i * model.hidden());
  }
  run_layers(model, m, spans, caches, taps);
  return x;
}

// What is made of the teacher's states, by tap, [m][hidden] in `fused`.
void fuse(const FusedModel& model, const std::vector<Matrix<float>>& states, int64_t m, float* fused) {
  const Kernels& set = kernels();
  const Linear& fusion = model.before[0];
  const int64_t width = model.width();
  float *rows = scratch_floats(kRead, m * fusion.k + width), *space = rows + m * fusion.k;
  for (size_t tap = 0; tap < states.size(); tap++) {
    const int64_t column = static_cast<int64_t>(tap) * width;
    for (int64_t i = 0; i < m; i++) {
      set.normalise(states[tap].row(i, space), fusion.norm->data<float>() + column, model.eps, width,
                    rows + i * fusion.k + column);
    }
  }
  apply(set, model, fusion, nullptr, rows, m, false, nullptr, fused);
}

// Tokens and the states that they stand behind, [m][hidden], through a draft that reads. Returns as run_tokens; states
// may lie there.
const float* run_reader(const FusedModel& model, const int32_t* tokens, const float* states, int64_t m, const Span& span,
                        const Caches& caches) {
  const Kernels& set = kernels();
  const Linear& input = model.before[1];
  const int64_t width = model.width(), hidden = model.hidden();
  const float* norm = input.norm->data<float>();
  float *rows = scratch_floats(kRead, m * input.k + width), *embedded = rows + m * input.k;
  for (int64_t i = 0; i < m; i++) {
    embed(model.embedding, tokens[i], embedded);
    set.normalise(embedded, norm, model.eps, width, rows + i * input.k);
    set.normalise(states + i * hidden, norm + width, model.eps, hidden, rows + i * input.k + width);
  }
  float* x = row_space(model, m);
  apply(set, model, input, nullptr, rows, m, false, nullptr, x);
  run_layers(model, m, {span}, caches);
  return x;
}

void run_head(const FusedModel& model, const float* states, int64_t m, float* logits) {
  if (model.after.size() == 2) {
    float* wide = scratch_floats(kRead, m * model.after[0].n);
    apply(kernels(), model, model.after[0], states, m, false, nullptr, wide);
    states = wide;
  }
  apply(kernels(), model, model.after.back(), states, m, false, nullptr, logits);
}

// What steps and a chain of steps have in common: tokens, caches and perhaps states in; one array, the caches and perhaps
// states out.
class OverCaches : public CpuPrimitive {
 public:
  OverCaches(mx::Stream stream, std::shared_ptr<FusedModel> model, std::vector<Span> spans)
      : CpuPrimitive(stream), model_(std::move(model)), spans_(std::move(spans)) {}

 protected:
  // Runs body(tokens, caches, in, out) once the caches are the outputs' own.
  template <class Body>
  void dispatch_over_caches(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Body body) {
    const size_t end = 1 + model_->layers.size() / 2;  // behind the caches
    drop_spare_inputs(inputs, outputs);
    std::vector<size_t> copied;
    for (size_t i = 0; i < outputs.size(); i++) {
      if (i == 0 || i >= end) {
        allocate(outputs[i]);
      } else if (share_cache(inputs[i], outputs[i])) {
        copied.push_back(i);
      }
    }
    dispatch(inputs, outputs, [copied, end, body](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      for (size_t i : copied) {
        copy_cache(in[i], out[i]);
      }
      Caches caches{{}, out[1].shape(2)};
      for (size_t i = 1; i < end; i++) {
        caches.data.push_back(out[i].data<mx::bfloat16_t>());
      }
      std::vector<int32_t> tokens(in[0].size());
      for (size_t i = 0; i < tokens.size(); i++) {
        tokens[i] = in[0].data<int32_t>()[static_cast<int64_t>(i) * in[0].strides(0)];
      }
      body(tokens, caches, in, out);
    });
  }

  std::shared_ptr<FusedModel> model_;
  std::vector<Span> spans_;  // the tokens' places
};

class FusedStep : public OverCaches {
 public:
  FusedStep(mx::Stream stream, std::shared_ptr<FusedModel> model, std::vector<Span> spans, std::vector<int> taps)
      : OverCaches(stream, std::move(model), std::move(spans)), taps_(std::move(taps)) {}
  DEFINE_NAME(BitdraftFusedStep)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch_over_caches(inputs, outputs, [model = model_, spans = spans_, layers = taps_](
                                              const std::vector<int32_t>& tokens, const Caches& caches,
                                              std::vector<mx::array>&, std::vector<mx::array>& out) {
      const auto m = static_cast<int64_t>(tokens.size());
      std::vector<Tap> taps;
      for (size_t i = 0; i < layers.size(); i++) {
        taps.push_back({static_cast<size_t>(layers[i]), out[out.size() - layers.size() + i].data<float>()});
      }
      run_head(*model, run_tokens(*model, tokens.data(), m, spans, caches, taps), m, out[0].data<float>());
    });
  }

 private:
  std::vector<int> taps_;
};

class ChooseTokens : public OverCaches {
 public:
  ChooseTokens(mx::Stream stream, std::shared_ptr<FusedModel> model, std::vector<Span> spans,
               std::vector<float> temperature, std::vector<float> uniform)
      : OverCaches(stream, std::move(model), std::move(spans)),
        temperature_(std::move(temperature)),
        uniform_(std::move(uniform)) {}
  DEFINE_NAME(BitdraftChooseTokens)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch_over_caches(inputs, outputs, [model = model_, spans = spans_, temperature = temperature_,
                                           uniform = uniform_](const std::vector<int32_t>& tokens,
                                                               const Caches& caches, std::vector<mx::array>&,
                                                               std::vector<mx::array>& out) {
      const auto m = static_cast<int64_t>(tokens.size());
      const int64_t vocab = model->head_size();
      float* logits = scratch_floats(kLogits, m * vocab);
      run_head(*model, run_tokens(*model, tokens.data(), m, spans, caches), m, logits);
      choose_rows(Matrix<float>(logits, m, vocab), temperature.data(), uniform.data(), out[0].data<uint32_t>());
    });
  }

 private:
  std::vector<float> temperature_, uniform_;
};

class GreedyTokens : public OverCaches {
 public:
  GreedyTokens(mx::Stream stream, std::shared_ptr<FusedModel> model, std::vector<Span> spans, MaybeArray d2t)
      : OverCaches(stream, std::move(model), std::move(spans)), d2t_(std::move(d2t)) {}
  DEFINE_NAME(BitdraftGreedyTokens)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch_over_caches(inputs, outputs, [model = model_, first = spans_[0], d2t = d2t_](
                                              const std::vector<int32_t>& tokens, const Caches& caches,
                                              std::vector<mx::array>& in, std::vector<mx::array>& out) {
      Span span = first;
      auto* chosen = out[0].data<uint32_t>();
      const int32_t* feed = tokens.data();
      auto m = static_cast<int64_t>(tokens.size());
      const bool reads = model->taps() > 0;
      std::vector<float> fused(reads ? static_cast<size_t>(m * model->hidden()) : 0);
      const float* states = fused.data();
      if (reads) {
        fuse(*model, {in.end() - model->taps(), in.end()}, m, fused.data());
      }
      float* logits = scratch_floats(kLogits, model->head_size());
      for (int i = 0; i < out[0].shape(0); i++) {
        states = reads ? run_reader(*model, feed, states, m, span, caches)
                       : run_tokens(*model, feed, m, {span}, caches);
        states += (m - 1) * model->hidden();
        run_head(*model, states, 1, logits);
        const uint32_t best = best_index(logits, model->head_size());
        chosen[i] = d2t ? d2t->data<uint32_t>()[best] : best;
        feed = reinterpret_cast<int32_t*>(chosen) + i;
        span = {0, 0, span.offset + static_cast<int>(m), 1};
        m = 1;
      }
    });
  }

 private:
  MaybeArray d2t_;
};

// Checks the arguments, and makes the operation's outputs: an array of this shape and dtype, the new caches, and as many
// arrays of states as there are taps. spare: rows that are written to the caches behind those of the spans.
template <class Operation, class... Options>
std::vector<mx::array> over_caches(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                   const std::vector<mx::array>& caches, const std::vector<mx::array>& states,
                                   std::vector<Span> spans, int spare, const mx::Shape& shape, mx::Dtype dtype,
                                   size_t taps, const Options&... options) {
  const Heads& h = model->heads;
  require(caches.size() == model->layers.size() / 2, "a layer has two caches");
  std::vector<mx::Shape> shapes{shape};
  std::vector<mx::Dtype> dtypes{dtype};
  std::vector<mx::array> inputs{tokens};
  for (const mx::array& cache : caches) {
    require(cache.ndim() == 4 && cache.dtype() == mx::bfloat16 && cache.shape() == caches[0].shape() &&
                cache.shape(1) == h.kv_heads && cache.shape(3) == h.d,
            "every cache must be bfloat16 [sequences, kv_heads, capacity, d]");
    shapes.push_back(cache.shape());
    dtypes.push_back(mx::bfloat16);
    inputs.push_back(cache);
  }
  int64_t rows = 0;
  for (const Span& span : spans) {
    require(span.sequence >= 0 && span.sequence < caches[0].shape(0) && span.offset >= 0 && span.count > 0 &&
                span.offset <= caches[0].shape(2) - span.count - spare,
            "the new rows do not fit the cache");
    rows += span.count;
  }
  require(tokens.ndim() == 1 && tokens.dtype() == mx::int32 && tokens.shape(0) == rows && rows > 0,
          "tokens must be int32 [m], one a new row");
  require(static_cast<int>(states.size()) == model->taps(), "a draft that reads needs the states of all its taps, others none");
  for (const mx::array& tap : states) {
    require(tap.ndim() == 2 && tap.dtype() == mx::float32 && tap.shape(0) == rows && tap.shape(1) == model->width(),
            "a tap's states must be float32 [m, width], one a new row");
    inputs.push_back(tap);
  }
  for (size_t tap = 0; tap < taps; tap++) {
    shapes.push_back({tokens.shape(0), model->hidden()});
    dtypes.push_back(mx::float32);
  }
  const auto operation = std::make_shared<Operation>(cpu_stream(), model, std::move(spans), options...);
  return mx::array::make_arrays(std::move(shapes), dtypes, operation, inputs);
}

// The span of the only sequence.
std::vector<Span> only_span(const mx::array& tokens, const std::vector<mx::array>& caches, int offset) {
  require(!caches.empty() && caches[0].ndim() == 4 && caches[0].shape(0) == 1, "the caches must be of one sequence");
  require(tokens.size() > 0 && tokens.size() <= kSmallRows, "a step takes 1 to 8 tokens of a sequence");
  return {{0, 0, offset, static_cast<int>(tokens.size())}};
}

// Every product reads what the one before makes.
void check_chain(const FusedModel& model) {
  const Heads& h = model.heads;
  require(model.layers.size() % 4 == 0 && !model.layers.empty(), "a layer has four products");
  require(model.after.size() == 1 || model.after.size() == 2, "behind the layers are one product or two");
  const int width = model.width(), hidden = model.hidden();
  if (model.before.empty()) {
    require(hidden == width, "the layers do not read what the embedding has");
  } else {
    require(model.before.size() == 2, "before the layers of a draft that reads are two products");
    const Linear &fusion = model.before[0], &input = model.before[1];
    require(fusion.norm && fusion.k % width == 0 && fusion.n == hidden, "the product over the taps does not fit");
    require(input.norm && input.k == width + hidden && input.n == hidden, "the product over token and state does not fit");
  }
  for (auto linear = model.layers.begin(); linear != model.layers.end(); linear += 4) {
    require(linear[0].k == hidden && linear[0].n == (h.heads + 2 * h.kv_heads) * h.d && linear[1].k == h.heads * h.d &&
                linear[1].n == hidden && linear[2].k == hidden && linear[2].n == model.layers[2].n &&
                2 * linear[3].k == linear[2].n && linear[3].n == hidden,
            "a layer's products do not fit");
  }
  require(model.after[0].k == hidden && (model.after.size() == 1 || model.after[1].k == model.after[0].n),
          "the head does not fit");
}

}  // namespace

Linear make_linear(const mx::array& data, const MaybeArray& scale, int n, int k, const MaybeArray& norm) {
  if (scale) {
    check_weight(*format_of(data, n, k), data, *scale, k);
    require(scale->shape(0) == n, "a weight must have n scales");
  } else {
    require(data.ndim() == 2 && data.shape(0) == n && data.shape(1) == k && data.flags().row_contiguous,
            "a dense weight must be contiguous [n, k]");
  }
  require(!norm || (norm->dtype() == mx::float32 && norm->ndim() == 1 && norm->shape(0) == k),
          "the norm's weight must have k values");
  return {data, scale, n, k, norm};
}

std::shared_ptr<FusedModel> fused_model(const mx::array& embedding, const mx::array& inverse_frequency, int heads,
                                        int kv_heads, float scale, int epilogue, float eps,
                                        const std::vector<Linear>& before, const std::vector<Linear>& layers,
                                        const std::vector<Linear>& after) {
  require(embedding.ndim() == 2 && (embedding.dtype() == mx::bfloat16 || embedding.dtype() == mx::float32),
          "the embedding must be bfloat16 or float32 [vocab, width]");
  const Heads h{heads, kv_heads, 2 * inverse_frequency.shape(0), scale};
  auto model = std::make_shared<FusedModel>(FusedModel{h, inverse_frequency, embedding, static_cast<Epilogue>(epilogue),
                                                       eps, before, layers, after});
  check_chain(*model);
  return model;
}

std::vector<mx::array> fused_step(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                  const std::vector<mx::array>& caches, int offset, const std::vector<int>& taps) {
  for (size_t i = 0; i < taps.size(); i++) {
    require(taps[i] >= 0 && taps[i] < static_cast<int>(model->layers.size() / 4) && (i == 0 || taps[i - 1] < taps[i]),
            "taps must be layers of the model, ascending");
  }
  return over_caches<FusedStep>(model, tokens, caches, {}, only_span(tokens, caches, offset), 0,
                                {static_cast<int>(tokens.size()), model->head_size()}, mx::float32, taps.size(), taps);
}

std::vector<mx::array> greedy_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& states, const std::vector<mx::array>& caches,
                                     int offset, int count, const MaybeArray& d2t) {
  require(count > 0, "at least one token must be asked for");
  require(!d2t || (d2t->ndim() == 1 && d2t->dtype() == mx::uint32 && d2t->is_available() &&
                    d2t->flags().row_contiguous && d2t->shape(0) == model->head_size()),
          "d2t must be uint32, evaluated, one id a row of the head");
  return over_caches<GreedyTokens>(model, tokens, caches, states, only_span(tokens, caches, offset), count - 1,
                                   {count}, mx::uint32, 0, d2t);
}

std::vector<mx::array> choose_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& caches, const std::vector<int>& sequences,
                                     const std::vector<int>& offsets, const std::vector<float>& temperature,
                                     const std::vector<float>& uniform) {
  const size_t m = tokens.size();
  require(sequences.size() == m && offsets.size() == m && temperature.size() == m && uniform.size() == m,
          "every token needs its sequence, offset, temperature and uniform number");
  std::vector<Span> spans;
  std::vector<bool> seen(caches.empty() ? 0 : static_cast<size_t>(caches[0].shape(0)));
  for (size_t i = 0; i < m; i++) {
    const auto sequence = static_cast<size_t>(sequences[i]);
    require(sequence < seen.size() && !seen[sequence], "a token is of a sequence of the caches, each of another");
    seen[sequence] = true;
    spans.push_back({sequences[i], static_cast<int64_t>(i), offsets[i], 1});
  }
  return over_caches<ChooseTokens>(model, tokens, caches, {}, std::move(spans), 0, {static_cast<int>(m)}, mx::uint32,
                                   0, temperature, uniform);
}

}  // namespace bitdraft
