// Float products (a draft's layers, an LM head), with the same units around them; a row's bits are its own.
#include <algorithm>

#include "product.h"

namespace bitdraft {
namespace {

constexpr int64_t kCachedWeights = 128 * 1024;  // bytes

class DenseLinear : public CpuPrimitive {
 public:
  DenseLinear(mx::Stream stream, float eps, Epilogue epilogue, bool norm, bool residual)
      : CpuPrimitive(stream), eps_(eps), epilogue_(epilogue), norm_(norm), residual_(residual) {}
  DEFINE_NAME(BitdraftDenseLinear)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    require(inputs[1].flags().row_contiguous,
            "a dense weight must be contiguous: make it with prepare_dense");
    allocate(outputs[0]);
    dispatch(inputs, outputs,
             [eps = eps_, epilogue = epilogue_, has_norm = norm_, has_residual = residual_](
                 std::vector<mx::array>& in, std::vector<mx::array>& out) {
               const Kernels& set = kernels();
               const Matrix<float> x(in[0]);
               std::vector<float> norm_space;
               const float* norm = has_norm ? vector_data(in[2], norm_space) : nullptr;
               std::optional<Matrix<float>> residual;
               if (has_residual) {
                 residual.emplace(in.back());
               }
               multiply_dense(set, x, in[1], norm, eps, epilogue, residual ? &*residual : nullptr,
                              out[0].data<float>());
             });
  }

 private:
  float eps_;
  Epilogue epilogue_;
  bool norm_;
  bool residual_;
};

}  // namespace

void multiply_dense(const Kernels& set, const Matrix<float>& x, const mx::array& weight, const float* norm,
                    float eps, Epilogue epilogue, const Matrix<float>* residual, float* out) {
  Dense d{};
  d.n = weight.shape(0);
  d.k = x.cols;
  d.k_padded = round_up(x.cols, 16);
  d.weights = weight.data<void>();
  d.bfloat16 = weight.dtype() == mx::bfloat16;
  d.out_stride = d.n;
  const bool gated = epilogue != Epilogue::none;
  float* products = gated ? scratch_floats(kOutput, x.rows * d.n) : out;

  float* rows = scratch_floats(kPacked, x.rows * d.k_padded);
  for_rows(x.rows, x.cols, [&](int64_t first, int64_t last) {
    float* space = scratch_floats(kFloatRow, x.cols);
    for (int64_t r = first; r < last; r++) {
      const float* row = x.row(r, space);
      float* to = rows + r * d.k_padded;
      if (norm != nullptr) {
        set.normalise(row, norm, eps, x.cols, to);
      } else {
        std::memcpy(to, row, static_cast<size_t>(x.cols) * sizeof(float));
      }
      std::fill(to + x.cols, to + d.k_padded, 0.0f);
    }
  });

  // Outputs in chunks; of a chunk so many at a time that their weights stay in a core's cache while one group of
  // rows after the other passes by.
  const int64_t groups = (x.rows + kSmallRows - 1) / kSmallRows;
  const int64_t work = static_cast<int64_t>(weight.nbytes()) * groups + x.rows * d.n * d.k;
  const int64_t chunks = std::min(d.n, chunks_of(work));
  const int64_t cached = groups == 1 ? d.n : std::max<int64_t>(kTile, kCachedWeights * d.n / static_cast<int64_t>(weight.nbytes()));
  parallel_for(static_cast<int>(chunks), [&](int c) {
    const int64_t end = (c + 1) * d.n / chunks;
    for (int64_t first = c * d.n / chunks; first < end; first += cached) {
      for (int64_t g = 0; g < groups; g++) {
        const int64_t row = g * x.rows / groups;
        Dense part = d;
        part.rows = static_cast<int>((g + 1) * x.rows / groups - row);
        part.x = rows + row * d.k_padded;
        part.out = products + row * d.n;
        set.dense(part, first, std::min(end, first + cached));
      }
    }
  });

  const int64_t width = gated ? d.n / 2 : d.n;
  if (!gated && residual == nullptr) {
    return;
  }
  for_rows(x.rows, d.n, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      float* to = out + r * width;
      if (gated) {
        set.gate(epilogue, products + r * d.n, products + r * d.n + width, width, to);
      }
      for (int64_t j = 0; residual != nullptr && j < width; j++) {
        to[j] += residual->data[r * residual->row_stride + j * residual->col_stride];
      }
    }
  });
}

mx::array dense_linear(const mx::array& x, const mx::array& weight, const MaybeArray& norm, float eps,
                       int epilogue, const MaybeArray& residual) {
  require(weight.ndim() == 2 && (weight.dtype() == mx::bfloat16 || weight.dtype() == mx::float32),
          "a dense weight must be bfloat16 or float32 [n, k]");
  require(x.ndim() == 2 && x.shape(1) == weight.shape(1), "linear takes rows [m, k] of the weight's k");
  require(x.shape(0) > 0, "a product takes at least one row");
  const int n = weight.shape(0), width = epilogue != 0 ? n / 2 : n;
  require(epilogue == 0 || n % 2 == 0, "a gated product needs an even number of outputs");
  std::vector<mx::array> inputs{as_float(x), weight};
  if (norm) {
    require(norm->ndim() == 1 && norm->shape(0) == x.shape(1), "the norm's weight must have k values");
    inputs.push_back(as_float(*norm));
  }
  if (residual) {
    require(residual->ndim() == 2 && residual->shape(0) == x.shape(0) && residual->shape(1) == width,
            "the residual must have the output's shape");
    inputs.push_back(as_float(*residual));
  }
  return mx::array({x.shape(0), width}, mx::float32,
                   std::make_shared<DenseLinear>(cpu_stream(), eps, static_cast<Epilogue>(epilogue),
                                                 norm.has_value(), residual.has_value()),
                   std::move(inputs));
}

}  // namespace bitdraft
