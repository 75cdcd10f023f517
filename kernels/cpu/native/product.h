// Products with everything around them: of int8 rows with coded weights, ternary or int8 (rows in blocks, threads,
// gate and residual), and of float rows.
#pragma once

#include <algorithm>

#include "ops.h"

namespace bitdraft {

// Scratch slots of these products (threads.h).
enum ProductSlot { kPacked = 0, kRow = 1, kOutput = 2, kFloatRow = 3, kDecoded = 8 };

// How weights are coded (kernels.h).
struct Format {
  int64_t block_bytes;  // of a (tile, block)
  int32_t bias;         // a code less its weight
  void (*Kernels::*dot)(int rows, const Dot& d);
  int64_t most_k;  // inputs up to which sums are exact (ternary: in float32; int8: of codes, in int32)
};

inline constexpr Format kTernary = {kBlockBytes, 1, &Kernels::dot_ternary, 132'104};
inline constexpr Format kInt8 = {kInt8BlockBytes, 128, &Kernels::dot_int8, 65'536};

// The format whose n x k weights fill these tiles.
const Format* format_of(const mx::array& tiles, int64_t n, int64_t k);
// Throws std::invalid_argument unless tiles and scale are a weight of k inputs.
void check_weight(const Format& format, const mx::array& tiles, const mx::array& scale, int64_t k);

// Rows in blocks: one block up to kSmallRows, else as even as can be and at most row_block rows each.
struct RowBlocks {
  int64_t rows;
  int64_t count;

  RowBlocks(int64_t rows, int row_block)
      : rows(rows), count(rows <= kSmallRows ? 1 : (rows + row_block - 1) / row_block) {}
  int64_t begin(int64_t block) const { return block * rows / count; }
  int size(int64_t block) const { return static_cast<int>(begin(block + 1) - begin(block)); }
  // The block that holds a row.
  int64_t of(int64_t row) const {
    int64_t block = row * count / rows;
    while (begin(block + 1) <= row) {
      block++;
    }
    while (begin(block) > row) {
      block--;
    }
    return block;
  }
};

// Activations of a product: int8 rows, packed in blocks or one behind the other for a tile unit, with their sums and
// factors.
struct Activations {
  RowBlocks blocks;
  int64_t k;
  bool tiled;
  int64_t padded;  // k rounded up to a block, or to what a tile unit takes
  int32_t bias;
  int8_t* packed;
  int32_t* sums;  // bias * sum of x
  float* s;

  Activations(int64_t rows, int64_t k, int32_t bias, const Kernels& kernels)
      : blocks(rows, kernels.row_block),
        k(k),
        tiled(kernels.tile_unit != nullptr && rows > kSmallRows),
        padded(round_up(k, tiled ? kTiledInputs : kTile)),
        bias(bias) {
    // One piece of scratch: the rows, then sums, then factors.
    const int64_t bytes = round_up((tiled ? round_up(rows, kTiledRows) : rows) * padded, 64);
    packed = scratch_bytes(kPacked, bytes + 8 * rows);
    sums = reinterpret_cast<int32_t*>(packed + bytes);
    s = reinterpret_cast<float*>(sums + rows);
  }

  const int8_t* block(int64_t b) const { return packed + blocks.begin(b) * padded; }

  // Stores one row; q holds k values and, up to a whole block, zeros.
  void set_row(int64_t row, const int8_t* q, float factor) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) {
      sum += q[i];
    }
    sums[row] = bias * sum;
    s[row] = factor;
    if (tiled) {
      int8_t* to = packed + row * padded;
      std::memcpy(to, q, static_cast<size_t>(k));
      std::memset(to + k, 0, static_cast<size_t>(padded - k));
      return;
    }
    const int64_t b = blocks.of(row);
    const int64_t size = blocks.size(b);
    int8_t* to = packed + blocks.begin(b) * padded + 4 * (row - blocks.begin(b));
    if (size == 1) {
      std::memcpy(to, q, static_cast<size_t>(padded));
    } else {
      for (int64_t i = 0; i < padded; i += 4) {
        std::memcpy(to + i * size, q + i, 4);
      }
    }
  }
};

// Calls body(first, last) over ranges of rows, on all threads when there is enough to do.
template <class Body>
void for_rows(int64_t rows, int64_t k, Body&& body) {
  const int64_t chunks = rows * k < kParallelFlops / 4 ? 1 : std::min<int64_t>(rows, 4 * threads());
  parallel_for(static_cast<int>(chunks), [&](int c) { body(c * rows / chunks, (c + 1) * rows / chunks); });
}

// x -> [norm ->] int8, for each row; put(row, q, s) gets `padded` values, zero from k on.
template <class Put>
void quantise_all(const Kernels& kernels, const Matrix<float>& x, const float* norm, float eps, Put&& put) {
  const int64_t padded = round_up(x.cols, kTile);
  for_rows(x.rows, x.cols, [&](int64_t first, int64_t last) {
    float* space = scratch_floats(kFloatRow, x.cols + padded);
    int8_t* q = scratch_bytes(kRow, padded);
    std::memset(q, 0, static_cast<size_t>(padded));
    for (int64_t r = first; r < last; r++) {
      const float* row = x.row(r, space);
      if (norm != nullptr) {
        kernels.normalise(row, norm, eps, x.cols, space + padded);
        row = space + padded;
      }
      put(r, q, kernels.quantise(row, x.cols, q));
    }
  });
}

struct Product {
  const Format* format;
  const uint8_t* tiles;
  const float* scale;
  int64_t n;
  Epilogue epilogue;
  const float* residual;  // contiguous rows of the output's width, or null
  int64_t residual_stride;
  float* out;
};

// The product with everything behind it.
void multiply(const Kernels& kernels, const Activations& x, const Product& p);

// The same of float rows: norm (or null), int8, product.
inline void multiply_rows(const Kernels& kernels, const Matrix<float>& rows, const float* norm, float eps,
                          const Product& p) {
  Activations x(rows.rows, rows.cols, p.format->bias, kernels);
  quantise_all(kernels, rows, norm, eps, [&](int64_t row, const int8_t* q, float s) { x.set_row(row, q, s); });
  multiply(kernels, x, p);
}

// Rows times a contiguous bfloat16 or float32 weight [n, k]; norm and residual may be null.
void multiply_dense(const Kernels& kernels, const Matrix<float>& x, const mx::array& weight, const float* norm,
                    float eps, Epilogue epilogue, const Matrix<float>* residual, float* out);

}  // namespace bitdraft
