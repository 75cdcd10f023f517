// The operations as MLX arrays see them. Shapes and meanings are those of kernels/reference.py.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "threads.h"

namespace bitdraft {

namespace mx = mlx::core;

using MaybeArray = std::optional<mx::array>;

// int8 [n, k] in {-1, 0, 1} -> uint8 tiles. Throws std::invalid_argument on any other value.
mx::array pack_ternary(const int8_t* ternary, int64_t n, int64_t k);
// int8 [n, k] -> uint8 tiles.
mx::array pack_int8(const int8_t* weight, int64_t n, int64_t k);

std::vector<mx::array> quantize_rows(const mx::array& x, const MaybeArray& norm, float eps);
mx::array bitlinear(const mx::array& xq, const mx::array& s, const mx::array& tiles, const mx::array& scale,
                    int k);
mx::array int8_product(const mx::array& xq, const mx::array& s, const mx::array& tiles,
                       const mx::array& scale, int k);
mx::array ternary_linear(const mx::array& x, const mx::array& tiles, const mx::array& scale, int k,
                         const MaybeArray& norm, float eps, int epilogue, const MaybeArray& residual);
mx::array int8_linear(const mx::array& x, const mx::array& tiles, const mx::array& scale, int k,
                      const MaybeArray& norm, float eps, int epilogue, const MaybeArray& residual);
mx::array dense_linear(const mx::array& x, const mx::array& weight, const MaybeArray& norm, float eps,
                       int epilogue, const MaybeArray& residual);
std::vector<mx::array> attention(const mx::array& qkv, const mx::array& k_cache, const mx::array& v_cache,
                                 const std::vector<int>& offsets, const std::vector<int>& counts, int heads,
                                 int kv_heads, const mx::array& inverse_frequency, float scale);

mx::array argmax(const mx::array& x);
mx::array choose(const mx::array& logits, const mx::array& temperature, const mx::array& uniform);
std::vector<mx::array> top_k(const mx::array& logits, int k, const std::vector<float>& temperatures);
// Nanoseconds of the steady clock when x had been computed, int64.
mx::array clock(const mx::array& x);

// Points libmlx's sgemm, dgemm and cgemm at the OpenBLAS in `path`; returns the slots written.
int install_blas(const std::string& path);
bool blas_installed();

// From here on: shared by the operations' implementations.

// Bytes of codes times rows from which a helper thread pays for being woken.
constexpr int64_t kParallelWork = 48 * 1024;
// Float multiplications from which it does, in attention and elementwise work.
constexpr int64_t kParallelFlops = 64 * 1024;

// Into how many chunks to cut work of this many bytes of codes times rows: small work into one a thread, since each
// is claimed, large work into more, since threads are not equally fast.
inline int64_t chunks_of(int64_t work) {
  return work < kParallelWork ? 1 : threads() * std::clamp<int64_t>(work / threads() / (64 * 1024), 1, 8);
}

inline void require(bool holds, const char* message) {
  if (!holds) {
    throw std::invalid_argument(message);
  }
}

// The lowest index of the highest value; 0 where there is none (NaN).
uint32_t best_index(const float* x, int64_t n);

inline mx::array as_float(const mx::array& a) {
  return a.dtype() == mx::float32 ? a : mx::astype(a, mx::float32);
}

// A matrix of any strides, as slices and transposes leave them.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols, row_stride, col_stride;

  Matrix(const T* data, int64_t rows, int64_t cols) : Matrix(data, rows, cols, cols, 1) {}
  Matrix(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}
  explicit Matrix(const mx::array& a)
      : data(a.data<T>()),
        rows(a.shape(0)),
        cols(a.shape(1)),
        row_stride(a.strides(0)),
        col_stride(a.strides(1)) {}

  // A contiguous row; `space` holds `cols` values and is used when the row is not contiguous yet.
  const T* row(int64_t r, T* space) const {
    const T* p = data + r * row_stride;
    if (col_stride == 1 || cols == 1) {
      return p;
    }
    for (int64_t c = 0; c < cols; c++) {
      space[c] = p[c * col_stride];
    }
    return space;
  }
};

// A one-dimensional array's values, gathered into `space` when they are strided.
inline const float* vector_data(const mx::array& a, std::vector<float>& space) {
  const float* p = a.data<float>();
  if (a.size() <= 1 || a.strides(0) == 1) {
    return p;
  }
  space.resize(a.size());
  for (size_t i = 0; i < a.size(); i++) {
    space[i] = p[static_cast<int64_t>(i) * a.strides(0)];
  }
  return space.data();
}

// The choice of a token for every row of logits (kernels/reference.py, choose).
void choose_rows(const Matrix<float>& logits, const float* temperature, const float* uniform, uint32_t* chosen);

// out = a b with an installed BLAS; out's rows are contiguous, and those of a and b, or their columns.
void matmul(const Matrix<float>& a, const Matrix<float>& b, float* out, int64_t out_stride);

// Memory of MLX's, which gives a null pointer where there is none.
inline mx::allocator::Data memory(size_t bytes) {
  mx::allocator::Data data = mx::allocator::malloc(bytes);
  if (data.buffer().ptr() == nullptr) throw std::bad_alloc();
  return data;
}

inline void allocate(mx::array& out) { out.set_data(memory(out.nbytes())); }

// The base of our primitives: the CPU only, one task a call.
class CpuPrimitive : public mx::Primitive {
 public:
  explicit CpuPrimitive(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + " runs on the CPU only");
  }

 protected:
  // Runs body(inputs, outputs) on the stream's thread, over arrays that do not keep memory alive: MLX does.
  template <class Body>
  void dispatch(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, Body body) {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    std::vector<mx::array> in, out;
    in.reserve(inputs.size());
    out.reserve(outputs.size());
    for (const auto& a : inputs) {
      encoder.set_input_array(a);
      in.push_back(mx::array::unsafe_weak_copy(a));
    }
    for (auto& a : outputs) {
      encoder.set_output_array(a);
      out.push_back(mx::array::unsafe_weak_copy(a));
    }
    encoder.dispatch([in = std::move(in), out = std::move(out), body]() mutable { body(in, out); });
  }
};

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device(mx::Device::cpu)); }

}  // namespace bitdraft
