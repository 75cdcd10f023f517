// int8 rows, their products with ternary and int8 weights, and the fused norm + int8 + product + gate or
// residual.
#include "product.h"

namespace bitdraft {
namespace {

class QuantizeRows : public CpuPrimitive {
 public:
  QuantizeRows(mx::Stream stream, float eps) : CpuPrimitive(stream), eps_(eps) {}
  DEFINE_NAME(BitdraftQuantizeRows)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    allocate(outputs[1]);
    dispatch(inputs, outputs, [eps = eps_](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      const Matrix<float> x(in[0]);
      std::vector<float> space;
      const float* norm = in.size() > 1 ? vector_data(in[1], space) : nullptr;
      int8_t* xq = out[0].data<int8_t>();
      float* s = out[1].data<float>();
      quantise_all(kernels(), x, norm, eps, [&](int64_t row, const int8_t* q, float factor) {
        std::memcpy(xq + row * x.cols, q, static_cast<size_t>(x.cols));
        s[row] = factor;
      });
    });
  }

 private:
  float eps_;
};

// Rows that are int8 already.
class RoundedProduct : public CpuPrimitive {
 public:
  RoundedProduct(mx::Stream stream, const Format& format) : CpuPrimitive(stream), format_(format) {}
  DEFINE_NAME(BitdraftRoundedProduct)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs, [&format = format_](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      const Kernels& set = kernels();
      const Matrix<int8_t> xq(in[0]);
      std::vector<float> s_space, scale_space;
      const float* s = vector_data(in[1], s_space);
      Activations x(xq.rows, xq.cols, format.bias, set);
      for_rows(xq.rows, xq.cols, [&](int64_t first, int64_t last) {
        int8_t* q = scratch_bytes(kRow, x.padded);
        std::memset(q, 0, static_cast<size_t>(x.padded));
        for (int64_t r = first; r < last; r++) {
          if (const int8_t* row = xq.row(r, q); row != q) {
            std::memcpy(q, row, static_cast<size_t>(xq.cols));
          }
          x.set_row(r, q, s[r]);
        }
      });
      Product p{};
      p.format = &format;
      p.tiles = in[2].data<uint8_t>();
      p.scale = vector_data(in[3], scale_space);
      p.n = out[0].shape(1);
      p.out = out[0].data<float>();
      multiply(set, x, p);
    });
  }

 private:
  const Format& format_;
};

// Float rows, and everything around their product.
class RoundedLinear : public CpuPrimitive {
 public:
  RoundedLinear(mx::Stream stream, const Format& format, float eps, Epilogue epilogue, bool norm,
                bool residual)
      : CpuPrimitive(stream),
        format_(format),
        eps_(eps),
        epilogue_(epilogue),
        norm_(norm),
        residual_(residual) {}
  DEFINE_NAME(BitdraftRoundedLinear)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs,
             [&format = format_, eps = eps_, epilogue = epilogue_, has_norm = norm_,
              has_residual = residual_](std::vector<mx::array>& in, std::vector<mx::array>& out) {
               const Kernels& set = kernels();
               const Matrix<float> rows(in[0]);
               std::vector<float> norm_space, scale_space, residual_space;
               const float* norm = has_norm ? vector_data(in[3], norm_space) : nullptr;
               Product p{};
               p.format = &format;
               p.tiles = in[1].data<uint8_t>();
               p.scale = vector_data(in[2], scale_space);
               p.n = static_cast<int64_t>(in[2].size());
               p.epilogue = epilogue;
               p.out = out[0].data<float>();
               if (has_residual) {
                 const Matrix<float> residual(in.back());
                 p.residual = residual.data;
                 p.residual_stride = residual.row_stride;
                 if (residual.col_stride != 1 && residual.cols > 1) {
                   residual_space.resize(static_cast<size_t>(residual.rows * residual.cols));
                   for (int64_t r = 0; r < residual.rows; r++) {
                     residual.row(r, residual_space.data() + r * residual.cols);
                   }
                   p.residual = residual_space.data();
                   p.residual_stride = residual.cols;
                 }
               }
               multiply_rows(set, rows, norm, eps, p);
             });
  }

 private:
  const Format& format_;
  float eps_;
  Epilogue epilogue_;
  bool norm_;
  bool residual_;
};

mx::array rounded_product(const Format& format, const mx::array& xq, const mx::array& s,
                          const mx::array& tiles, const mx::array& scale, int k) {
  require(xq.ndim() == 2 && xq.dtype() == mx::int8 && xq.shape(1) == k,
          "a product takes int8 rows [m, k] of the weight's k");
  require(s.ndim() == 1 && s.dtype() == mx::float32 && s.shape(0) == xq.shape(0), "s must be float32 [m]");
  check_weight(format, tiles, scale, k);
  return mx::array({xq.shape(0), scale.shape(0)}, mx::float32,
                   std::make_shared<RoundedProduct>(cpu_stream(), format), {xq, s, tiles, scale});
}

mx::array rounded_linear(const Format& format, const mx::array& x, const mx::array& tiles,
                         const mx::array& scale, int k, const MaybeArray& norm, float eps, int epilogue,
                         const MaybeArray& residual) {
  require(x.ndim() == 2 && x.shape(1) == k, "linear takes rows [m, k] of the weight's k");
  check_weight(format, tiles, scale, k);
  const int n = scale.shape(0), width = epilogue != 0 ? n / 2 : n;
  require(epilogue == 0 || n % 2 == 0, "a gated product needs an even number of outputs");
  std::vector<mx::array> inputs{as_float(x), tiles, scale};
  if (norm) {
    require(norm->ndim() == 1 && norm->shape(0) == k, "the norm's weight must have k values");
    inputs.push_back(as_float(*norm));
  }
  if (residual) {
    require(residual->ndim() == 2 && residual->shape(0) == x.shape(0) && residual->shape(1) == width,
            "the residual must have the output's shape");
    inputs.push_back(as_float(*residual));
  }
  return mx::array({x.shape(0), width}, mx::float32,
                   std::make_shared<RoundedLinear>(cpu_stream(), format, eps, static_cast<Epilogue>(epilogue),
                                                   norm.has_value(), residual.has_value()),
                   std::move(inputs));
}

}  // namespace

void check_weight(const Format& format, const mx::array& tiles, const mx::array& scale, int64_t k) {
  require(scale.dtype() == mx::float32 && scale.ndim() == 1, "a weight's scale must be float32 [n]");
  require(k > 0 && k <= format.most_k, "sums over so many inputs are not exact");
  const int64_t count = round_up(static_cast<int64_t>(scale.size()), kTile) / kTile;
  require(tiles.dtype() == mx::uint8 && tiles.ndim() == 1 &&
              static_cast<int64_t>(tiles.size()) == count * (round_up(k, kTile) / kTile) * format.block_bytes,
          "a weight's data does not have the size that n and k ask for");
}

const Format* format_of(const mx::array& tiles, int64_t n, int64_t k) {
  const int64_t blocks = round_up(n, kTile) / kTile * (round_up(k, kTile) / kTile);
  return static_cast<int64_t>(tiles.size()) == blocks * kInt8.block_bytes ? &kInt8 : &kTernary;
}

std::vector<mx::array> quantize_rows(const mx::array& x, const MaybeArray& norm, float eps) {
  require(x.ndim() == 2 && x.shape(1) > 0, "quantize_rows takes rows [m, k]");
  std::vector<mx::array> inputs{as_float(x)};
  if (norm) {
    require(norm->ndim() == 1 && norm->shape(0) == x.shape(1), "the norm's weight must have k values");
    inputs.push_back(as_float(*norm));
  }
  return mx::array::make_arrays({x.shape(), {x.shape(0)}}, {mx::int8, mx::float32},
                                std::make_shared<QuantizeRows>(cpu_stream(), eps), inputs);
}

mx::array bitlinear(const mx::array& xq, const mx::array& s, const mx::array& tiles, const mx::array& scale,
                    int k) {
  return rounded_product(kTernary, xq, s, tiles, scale, k);
}

mx::array int8_product(const mx::array& xq, const mx::array& s, const mx::array& tiles,
                       const mx::array& scale, int k) {
  return rounded_product(kInt8, xq, s, tiles, scale, k);
}

mx::array ternary_linear(const mx::array& x, const mx::array& tiles, const mx::array& scale, int k,
                         const MaybeArray& norm, float eps, int epilogue, const MaybeArray& residual) {
  return rounded_linear(kTernary, x, tiles, scale, k, norm, eps, epilogue, residual);
}

mx::array int8_linear(const mx::array& x, const mx::array& tiles, const mx::array& scale, int k,
                      const MaybeArray& norm, float eps, int epilogue, const MaybeArray& residual) {
  return rounded_linear(kInt8, x, tiles, scale, k, norm, eps, epilogue, residual);
}

}  // namespace bitdraft
