#include "fused_step.h"

#include <algorithm>

namespace bitdraft {
namespace {

enum Slot { kStates = 4, kLogits = 5 };

// y = linear(x), gated if `gated`; residual may be null.
void apply(const Kernels& set, const FusedModel& model, const Linear& linear, const float* x, int64_t m, bool gated,
           const float* residual, float* y) {
  const Matrix<float> rows(x, m, linear.k);
  const float* norm = linear.norm ? linear.norm->data<float>() : nullptr;
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

void embed(const mx::array& embedding, int token, float* x) {
  const int hidden = embedding.shape(1);
  const auto row = static_cast<int64_t>(std::clamp(token, 0, embedding.shape(0) - 1)) * hidden;
  if (embedding.dtype() == mx::bfloat16) {
    std::copy_n(embedding.data<mx::bfloat16_t>() + row, hidden, x);
  } else {
    std::copy_n(embedding.data<float>() + row, hidden, x);
  }
}

// The caches' memory: the keys of each layer, then the values of each.
struct Caches {
  std::vector<mx::bfloat16_t*> data;
  int64_t capacity;
};

// Runs the layers over the m tokens of some spans. Returns the last states, [m][hidden], in scratch memory.
float* run_layers(const FusedModel& model, const int32_t* tokens, int64_t m, const std::vector<Span>& spans,
                  const Caches& caches) {
  const Kernels& set = kernels();
  const int64_t hidden = model.hidden();
  const Linear* linear = model.linears.data();
  const int64_t qkv_width = linear[0].n, attended_width = linear[1].k, gated_width = linear[2].n / 2;
  float* x = scratch_floats(kStates, m * (2 * hidden + qkv_width + attended_width + gated_width));
  float *next = x + m * hidden, *qkv = next + m * hidden, *attended = qkv + m * qkv_width,
        *h = attended + m * attended_width;
  for (int64_t i = 0; i < m; i++) {
    embed(model.embedding, tokens[i], x + i * hidden);
  }
  for (size_t layer = 0; layer < model.layers(); layer++, linear += 4) {
    apply(set, model, linear[0], x, m, false, nullptr, qkv);
    attend_spans(model.heads, spans, Matrix<float>(qkv, m, qkv_width), model.inverse_frequency.data<float>(),
                 caches.data[layer], caches.data[model.layers() + layer], caches.capacity, attended);
    apply(set, model, linear[1], attended, m, false, x, next);
    apply(set, model, linear[2], next, m, true, nullptr, h);
    apply(set, model, linear[3], h, m, false, next, x);
  }
  return x;
}

void run_head(const FusedModel& model, const float* states, int64_t m, float* logits) {
  apply(kernels(), model, model.linears.back(), states, m, false, nullptr, logits);
}

// What steps and a chain of steps have in common: tokens and caches in, one array and the caches out.
class OverCaches : public CpuPrimitive {
 public:
  OverCaches(mx::Stream stream, std::shared_ptr<FusedModel> model, std::vector<Span> spans)
      : CpuPrimitive(stream), model_(std::move(model)), spans_(std::move(spans)) {}

 protected:
  // Runs body(tokens, caches, out[0]) once the caches are the outputs' own.
  template <class Body>
  void dispatch_over_caches(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Body body) {
    allocate(outputs[0]);
    drop_spare_inputs(inputs, outputs);
    std::vector<size_t> copied;
    for (size_t i = 1; i < inputs.size(); i++) {
      if (share_cache(inputs[i], outputs[i])) {
        copied.push_back(i);
      }
    }
    dispatch(inputs, outputs, [copied, body](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      for (size_t i : copied) {
        copy_cache(in[i], out[i]);
      }
      Caches caches{{}, out[1].shape(2)};
      for (size_t i = 1; i < out.size(); i++) {
        caches.data.push_back(out[i].data<mx::bfloat16_t>());
      }
      std::vector<int32_t> tokens(in[0].size());
      for (size_t i = 0; i < tokens.size(); i++) {
        tokens[i] = in[0].data<int32_t>()[static_cast<int64_t>(i) * in[0].strides(0)];
      }
      body(tokens, caches, out[0]);
    });
  }

  std::shared_ptr<FusedModel> model_;
  std::vector<Span> spans_;  // the tokens' places
};

class FusedStep : public OverCaches {
 public:
  using OverCaches::OverCaches;
  DEFINE_NAME(BitdraftFusedStep)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch_over_caches(inputs, outputs, [model = model_, spans = spans_](const std::vector<int32_t>& tokens,
                                                                           const Caches& caches, mx::array& logits) {
      const auto m = static_cast<int64_t>(tokens.size());
      run_head(*model, run_layers(*model, tokens.data(), m, spans, caches), m, logits.data<float>());
    });
  }
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
                                                               const Caches& caches, mx::array& chosen) {
      const auto m = static_cast<int64_t>(tokens.size());
      const int64_t vocab = model->linears.back().n;
      float* logits = scratch_floats(kLogits, m * vocab);
      run_head(*model, run_layers(*model, tokens.data(), m, spans, caches), m, logits);
      choose_rows(Matrix<float>(logits, m, vocab), temperature.data(), uniform.data(), chosen.data<uint32_t>());
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
    dispatch_over_caches(inputs, outputs, [model = model_, spans = spans_, d2t = d2t_](
                                              const std::vector<int32_t>& tokens, const Caches& caches,
                                              mx::array& chosen) {
      float* logits = scratch_floats(kLogits, model->linears.back().n);
      const int32_t* feed = tokens.data();
      int64_t m = static_cast<int64_t>(tokens.size());
      std::vector<Span> span = spans;
      for (int64_t i = 0; i < chosen.shape(0); i++) {
        const float* states = run_layers(*model, feed, m, span, caches);
        run_head(*model, states + (m - 1) * model->hidden(), 1, logits);
        const uint32_t best = best_index(logits, model->linears.back().n);
        span = {{0, 0, span[0].offset + static_cast<int>(m), 1}};
        chosen.data<uint32_t>()[i] = d2t ? d2t->data<uint32_t>()[best] : best;
        feed = reinterpret_cast<int32_t*>(chosen.data<uint32_t>()) + i;
        m = 1;
      }
    });
  }

 private:
  MaybeArray d2t_;
};

// Checks the arguments, and makes the operation's outputs: an array of this shape and dtype, and the new caches.
// spare: rows that are written to the caches behind those of the spans.
template <class Operation, class... Options>
std::vector<mx::array> over_caches(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                   const std::vector<mx::array>& caches, std::vector<Span> spans, int spare,
                                   const mx::Shape& shape, mx::Dtype dtype, const Options&... options) {
  const Heads& h = model->heads;
  require(model->linears.size() % 4 == 1, "a model has four linear layers a layer, and a head");
  require(caches.size() == 2 * model->layers() && !caches.empty(), "a layer has two caches");
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
  const auto operation = std::make_shared<Operation>(cpu_stream(), model, std::move(spans), options...);
  return mx::array::make_arrays(std::move(shapes), dtypes, operation, inputs);
}

// The span of the only sequence.
std::vector<Span> only_span(const mx::array& tokens, const std::vector<mx::array>& caches, int offset) {
  require(!caches.empty() && caches[0].ndim() == 4 && caches[0].shape(0) == 1, "the caches must be of one sequence");
  require(tokens.size() > 0 && tokens.size() <= kSmallRows, "a step takes 1 to 8 tokens of a sequence");
  return {{0, 0, offset, static_cast<int>(tokens.size())}};
}

}  // namespace

std::shared_ptr<FusedModel> fused_model(const mx::array& embedding, const mx::array& inverse_frequency, int heads,
                                        int kv_heads, float scale, int epilogue, float eps) {
  require(embedding.ndim() == 2 && (embedding.dtype() == mx::bfloat16 || embedding.dtype() == mx::float32),
          "the embedding must be bfloat16 or float32 [vocab, hidden]");
  const int d = 2 * inverse_frequency.shape(0);
  return std::make_shared<FusedModel>(FusedModel{Heads{heads, kv_heads, d, scale}, inverse_frequency, embedding,
                                               static_cast<Epilogue>(epilogue), eps, {}});
}

void add_linear(FusedModel& model, const mx::array& data, const MaybeArray& scale, int n, int k,
                const MaybeArray& norm) {
  if (scale) {
    check_weight(*format_of(data, n, k), data, *scale, k);
    require(scale->shape(0) == n, "a weight must have n scales");
  } else {
    require(data.ndim() == 2 && data.shape(0) == n && data.shape(1) == k && data.flags().row_contiguous,
            "a dense weight must be contiguous [n, k]");
  }
  require(!norm || norm->shape(0) == k, "the norm's weight must have k values");
  model.linears.push_back({data, scale, n, k, norm});
}

std::vector<mx::array> fused_step(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                  const std::vector<mx::array>& caches, int offset) {
  return over_caches<FusedStep>(model, tokens, caches, only_span(tokens, caches, offset), 0,
                                {static_cast<int>(tokens.size()), model->linears.back().n}, mx::float32);
}

std::vector<mx::array> greedy_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& caches, int offset, int count,
                                     const MaybeArray& d2t) {
  require(count > 0, "at least one token must be asked for");
  require(!d2t || (d2t->ndim() == 1 && d2t->dtype() == mx::uint32 && d2t->is_available() &&
                    d2t->flags().row_contiguous && d2t->shape(0) == model->linears.back().n),
          "d2t must be uint32, evaluated, one id a row of the head");
  return over_caches<GreedyTokens>(model, tokens, caches, only_span(tokens, caches, offset), count - 1, {count},
                                   mx::uint32, d2t);
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
  return over_caches<ChooseTokens>(model, tokens, caches, std::move(spans), 0, {static_cast<int>(m)}, mx::uint32,
                                   temperature, uniform);
}

}  // namespace bitdraft
