#include "step.h"

#include <algorithm>

namespace bitdraft {
namespace {

enum Slot { kStep = 4 };

// y = linear(x), gated if `gated`; residual may be null.
void apply(const Kernels& set, const StepModel& model, const Linear& linear, const float* x, int64_t m, bool gated,
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

// caches: keys of each layer, then values of each, every one of `capacity` positions.
void run(const StepModel& model, int offset, const mx::array& tokens, const std::vector<float*>& caches,
         int64_t capacity, float* logits) {
  const Kernels& set = kernels();
  const int64_t m = tokens.shape(0), hidden = model.hidden();
  const Linear* linear = model.linears.data();
  const int64_t qkv_width = linear[0].n, attended_width = linear[1].k, gated_width = linear[2].n / 2;
  float* x = scratch_floats(kStep, m * (2 * hidden + qkv_width + attended_width + gated_width));
  float *next = x + m * hidden, *qkv = next + m * hidden, *attended = qkv + m * qkv_width,
        *h = attended + m * attended_width;
  for (int64_t i = 0; i < m; i++) {
    embed(model.embedding, tokens.data<int32_t>()[i * tokens.strides(0)], x + i * hidden);
  }
  for (size_t layer = 0; layer < model.layers(); layer++, linear += 4) {
    apply(set, model, linear[0], x, m, false, nullptr, qkv);
    attend_rows(model.heads, offset, Matrix<float>(qkv, m, qkv_width), model.inverse_frequency.data<float>(),
                caches[layer], caches[model.layers() + layer], capacity, attended);
    apply(set, model, linear[1], attended, m, false, x, next);
    apply(set, model, linear[2], next, m, true, nullptr, h);
    apply(set, model, linear[3], h, m, false, next, x);
  }
  apply(set, model, *linear, x, m, false, nullptr, logits);
}

class Step : public CpuPrimitive {
 public:
  Step(mx::Stream stream, std::shared_ptr<StepModel> model, int offset)
      : CpuPrimitive(stream), model_(std::move(model)), offset_(offset) {}
  DEFINE_NAME(BitdraftStep)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    drop_spare_inputs(inputs, outputs);
    std::vector<size_t> copied;
    for (size_t i = 1; i < inputs.size(); i++) {
      if (share_cache(inputs[i], outputs[i])) {
        copied.push_back(i);
      }
    }
    dispatch(inputs, outputs,
             [model = model_, offset = offset_, copied](std::vector<mx::array>& in, std::vector<mx::array>& out) {
               for (size_t i : copied) {
                 copy_cache(in[i], out[i]);
               }
               std::vector<float*> caches;
               for (size_t i = 1; i < out.size(); i++) {
                 caches.push_back(out[i].data<float>());
               }
               run(*model, offset, in[0], caches, out[1].shape(1), out[0].data<float>());
             });
  }

 private:
  std::shared_ptr<StepModel> model_;
  int offset_;
};

}  // namespace

std::shared_ptr<StepModel> step_model(const mx::array& embedding, const mx::array& inverse_frequency, int heads,
                                      int kv_heads, float scale, int epilogue, float eps) {
  require(embedding.ndim() == 2 && (embedding.dtype() == mx::bfloat16 || embedding.dtype() == mx::float32),
          "the embedding must be bfloat16 or float32 [vocab, hidden]");
  const int d = 2 * inverse_frequency.shape(0);
  return std::make_shared<StepModel>(StepModel{Heads{heads, kv_heads, d, scale}, inverse_frequency, embedding,
                                               static_cast<Epilogue>(epilogue), eps, {}});
}

void add_linear(StepModel& model, const mx::array& data, const MaybeArray& scale, int n, int k,
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

std::vector<mx::array> step(const std::shared_ptr<StepModel>& model, const mx::array& tokens,
                            const std::vector<mx::array>& caches, int offset) {
  const Heads& h = model->heads;
  require(model->linears.size() % 4 == 1, "a model has four linear layers a layer, and a head");
  require(tokens.ndim() == 1 && tokens.dtype() == mx::int32 && tokens.shape(0) <= kSmallRows,
          "tokens must be int32 [m], m <= 8");
  require(caches.size() == 2 * model->layers(), "a layer has two caches");
  std::vector<mx::Shape> shapes{{tokens.shape(0), model->linears.back().n}};
  std::vector<mx::array> inputs{tokens};
  for (const mx::array& cache : caches) {
    require(cache.ndim() == 3 && cache.dtype() == mx::float32 && cache.shape() == caches[0].shape() &&
                cache.shape(0) == h.kv_heads && cache.shape(2) == h.d,
            "every cache must be float32 [kv_heads, capacity, d]");
    shapes.push_back(cache.shape());
    inputs.push_back(cache);
  }
  require(offset >= 0 && offset + tokens.shape(0) <= caches[0].shape(1), "the new rows do not fit the cache");
  return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
                                std::make_shared<Step>(cpu_stream(), model, offset), inputs);
}

}  // namespace bitdraft
