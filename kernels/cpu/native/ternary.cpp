// BitLinear: packing, int8 rows, and the fused norm + int8 + product + gate or residual.
#include <algorithm>

#include "ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bitdraft {
namespace {

// Scratch slots of this file (threads.h).
enum Slot { kPacked = 0, kRow = 1, kOutput = 2, kFloatRow = 3 };

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

// Activations of a product: packed int8 rows with their sums and factors.
struct Activations {
  RowBlocks blocks;
  int64_t k;
  int64_t padded;  // k rounded up to a block
  int8_t* packed;
  int32_t* sums;
  float* s;

  Activations(int64_t rows, int64_t k, const Kernels& kernels)
      : blocks(rows, kernels.row_block), k(k), padded(round_up(k, kTile)) {
    // One piece of scratch: the packed rows, then sums, then factors.
    packed = scratch_bytes(kPacked, rows * padded + 8 * rows + 64);
    sums = reinterpret_cast<int32_t*>(packed + round_up(rows * padded, 64));
    s = reinterpret_cast<float*>(sums + rows);
  }

  const int8_t* block(int64_t b) const { return packed + blocks.begin(b) * padded; }

  // Stores one row; q holds `padded` values, those from k on zero.
  void set_row(int64_t row, const int8_t* q, float factor) {
    const int64_t b = blocks.of(row);
    const int64_t size = blocks.size(b);
    int8_t* to = packed + blocks.begin(b) * padded + 4 * (row - blocks.begin(b));
    int32_t sum = 0;
    for (int64_t i = 0; i < padded; i++) {
      sum += q[i];
    }
    for (int64_t i = 0; i < padded; i += 4) {
      std::memcpy(to + i * size, q + i, 4);
    }
    sums[row] = sum;
    s[row] = factor;
  }
};

// Calls body(first, last) over ranges of rows, on all threads when there is enough to do.
template <class Body>
void for_rows(int64_t rows, int64_t k, Body&& body) {
  const int64_t chunks = rows * k < kParallelFlops ? 1 : std::min<int64_t>(rows, 4 * threads());
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
  const uint8_t* tiles;
  const float* scale;
  int64_t n;
  Epilogue epilogue;
  const float* residual;  // contiguous rows of the output's width, or null
  int64_t residual_stride;
  float* out;
};

void multiply(const Kernels& kernels, const Activations& x, const Product& p) {
  if (x.blocks.rows == 0) {
    return;
  }
  const int64_t k_blocks = x.padded / kTile, tile_bytes = k_blocks * kBlockBytes;
  const int64_t tiles = (p.n + kTile - 1) / kTile;
  const bool gated = p.epilogue != Epilogue::none;
  const int64_t width = gated ? p.n / 2 : p.n;
  // A pair of tiles is a gate tile and its up tile, or two neighbours; without a partner, itself.
  const int64_t pairs = gated ? tiles / 2 : (tiles + 1) / 2;
  const auto pair_task = [&](int64_t pair, int64_t first_block, int64_t last_block) {
    const int64_t tile0 = gated ? pair : 2 * pair;
    const int64_t tile1 = gated ? pair + pairs : std::min(2 * pair + 1, tiles - 1);
    const int64_t j0 = tile0 * kTile, j1 = tile1 * kTile;
    Finish f{};
    f.scale0 = p.scale + j0;
    f.scale1 = p.scale + j1;
    f.valid0 = static_cast<int>(std::min<int64_t>(kTile, p.n - j0));
    f.valid1 = tile1 == tile0 ? 0 : static_cast<int>(std::min<int64_t>(kTile, p.n - j1));
    f.epilogue = p.epilogue;
    f.out_stride = width;
    f.residual_stride = p.residual_stride;
    alignas(64) int32_t raw[kMaxRowBlock * kPairOutputs];
    for (int64_t b = first_block; b < last_block; b++) {
      const int rows = x.blocks.size(b);
      const int64_t row = x.blocks.begin(b);
      // The next pair is fetched once, while the first block of rows uses this one.
      const int64_t ahead = b > first_block ? 0 : gated ? tile_bytes : 2 * tile_bytes;
      kernels.dot(rows, Dot{p.tiles + tile0 * tile_bytes, p.tiles + tile1 * tile_bytes, k_blocks, ahead,
                            x.block(b), raw});
      f.raw = raw;
      f.sums = x.sums + row;
      f.s = x.s + row;
      f.out0 = p.out + row * width + j0;
      f.out1 = p.out + row * width + j1;
      if (p.residual != nullptr) {
        f.residual0 = p.residual + row * p.residual_stride + j0;
        f.residual1 = p.residual + row * p.residual_stride + j1;
      }
      kernels.finish(rows, f);
    }
  };
  // Rows in groups whose activations stay in a core's cache while the weights pass by.
  constexpr int64_t cached_bytes = 512 * 1024;
  const int64_t group = std::max<int64_t>(1, cached_bytes / (kMaxRowBlock * x.padded));
  const int64_t groups = (x.blocks.count + group - 1) / group;
  const bool parallel = tiles * tile_bytes * x.blocks.rows >= kParallelWork;
  const int64_t spans = parallel ? std::min<int64_t>(pairs, 8 * threads()) : 1;
  parallel_for(static_cast<int>(parallel ? spans * groups : 1), [&](int chunk) {
    const int64_t first_group = parallel ? chunk / spans : 0,
                  last_group = parallel ? first_group + 1 : groups;
    const int64_t span = parallel ? chunk % spans : 0;
    for (int64_t g = first_group; g < last_group; g++) {
      for (int64_t pair = span * pairs / spans; pair < (span + 1) * pairs / spans; pair++) {
        pair_task(pair, g * group, std::min((g + 1) * group, x.blocks.count));
      }
    }
  });
}

// The product with everything behind it; gates whose halves are no whole tiles take a second pass.
void multiply_any(const Kernels& kernels, const Activations& x, Product p) {
  const int64_t half = p.n / 2, rows = x.blocks.rows;
  if (p.epilogue == Epilogue::none || half % kTile == 0) {
    return multiply(kernels, x, p);
  }
  Product plain = p;
  plain.epilogue = Epilogue::none;
  plain.residual = nullptr;
  plain.out = scratch_floats(kOutput, rows * p.n);
  multiply(kernels, x, plain);
  for (int64_t r = 0; r < rows; r++) {
    float* out = p.out + r * half;
    kernels.gate(p.epilogue, plain.out + r * p.n, plain.out + r * p.n + half, half, out);
    for (int64_t j = 0; p.residual != nullptr && j < half; j++) {
      out[j] += p.residual[r * p.residual_stride + j];
    }
  }
}

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

class Bitlinear : public CpuPrimitive {
 public:
  explicit Bitlinear(mx::Stream stream) : CpuPrimitive(stream) {}
  DEFINE_NAME(BitdraftBitlinear)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs, [](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      const Kernels& set = kernels();
      const Matrix<int8_t> xq(in[0]);
      std::vector<float> s_space, scale_space;
      const float* s = vector_data(in[1], s_space);
      Activations x(xq.rows, xq.cols, set);
      for_rows(xq.rows, xq.cols, [&](int64_t first, int64_t last) {
        int8_t* q = scratch_bytes(kRow, x.padded);
        std::memset(q, 0, static_cast<size_t>(x.padded));
        for (int64_t r = first; r < last; r++) {
          for (int64_t c = 0; c < xq.cols; c++) {
            q[c] = xq.data[r * xq.row_stride + c * xq.col_stride];
          }
          x.set_row(r, q, s[r]);
        }
      });
      Product p{};
      p.tiles = in[2].data<uint8_t>();
      p.scale = vector_data(in[3], scale_space);
      p.n = out[0].shape(1);
      p.out = out[0].data<float>();
      multiply(set, x, p);
    });
  }
};

class TernaryLinear : public CpuPrimitive {
 public:
  TernaryLinear(mx::Stream stream, float eps, Epilogue epilogue, bool norm, bool residual)
      : CpuPrimitive(stream), eps_(eps), epilogue_(epilogue), norm_(norm), residual_(residual) {}
  DEFINE_NAME(BitdraftTernaryLinear)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs,
             [eps = eps_, epilogue = epilogue_, has_norm = norm_, has_residual = residual_](
                 std::vector<mx::array>& in, std::vector<mx::array>& out) {
               const Kernels& set = kernels();
               const Matrix<float> rows(in[0]);
               std::vector<float> norm_space, scale_space, residual_space;
               const float* norm = has_norm ? vector_data(in[3], norm_space) : nullptr;
               Activations x(rows.rows, rows.cols, set);
               quantise_all(set, rows, norm, eps,
                            [&](int64_t row, const int8_t* q, float s) { x.set_row(row, q, s); });
               Product p{};
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
               multiply_any(set, x, p);
             });
  }

 private:
  float eps_;
  Epilogue epilogue_;
  bool norm_;
  bool residual_;
};

void check_tiles(const mx::array& tiles, const mx::array& scale, int64_t k) {
  require(scale.dtype() == mx::float32 && scale.ndim() == 1, "a ternary weight's scale must be float32 [n]");
  require(tiles.dtype() == mx::uint8 && tiles.ndim() == 1 && k > 0 &&
              static_cast<int64_t>(tiles.size()) == round_up(static_cast<int64_t>(scale.size()), kTile) /
                                                        kTile * (round_up(k, kTile) / kTile) * kBlockBytes,
          "a ternary weight's data does not have the size that n and k ask for");
}

}  // namespace

mx::array pack_ternary(const int8_t* ternary, int64_t n, int64_t k) {
  uint8_t wrong = 0;
  for (int64_t i = 0; i < n * k; i++) {
    wrong |= static_cast<uint8_t>(ternary[i] + 1) > 2;
  }
  require(wrong == 0, "ternary weights must be -1, 0 or 1");
  const int64_t tiles = round_up(n, kTile) / kTile, blocks = round_up(k, kTile) / kTile;
  const int64_t bytes = tiles * blocks * kBlockBytes;

  // MLX's allocator does not align to cache lines: take a view of a slightly larger array that is.
  mx::array base(mx::allocator::malloc(static_cast<size_t>(bytes + kBlockBytes)),
                 mx::Shape{static_cast<int>(bytes + kBlockBytes)}, mx::uint8);
  auto* start = base.data<uint8_t>();
  const auto address = reinterpret_cast<uintptr_t>(start);
  const int64_t offset = round_up(static_cast<int64_t>(address), kBlockBytes) - static_cast<int64_t>(address);
  uint8_t* to = start + offset;
#if defined(__linux__)
  // Large pages, where the system gives them, spare the weights' stream its address translations.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif

  parallel_for(static_cast<int>(tiles), [&](int tile) {
    for (int64_t b = 0; b < blocks; b++) {
      for (int j = 0; j < kTile; j++) {
        const int64_t row = int64_t{tile} * kTile + j;
        int8_t weights[kTile] = {};
        if (row < n) {
          std::memcpy(weights, ternary + row * k + b * kTile,
                      static_cast<size_t>(std::min<int64_t>(kTile, k - b * kTile)));
        }
        uint8_t lane[4];
        for (int byte = 0; byte < 4; byte++) {
          lane[byte] = static_cast<uint8_t>((weights[byte] + 1) | (weights[4 + byte] + 1) << 2 |
                                            (weights[8 + byte] + 1) << 4 | (weights[12 + byte] + 1) << 6);
        }
        std::memcpy(to + (tile * blocks + b) * kBlockBytes + 4 * j, lane, 4);
      }
    }
  });

  mx::array view(mx::Shape{static_cast<int>(bytes)}, mx::uint8, nullptr, {});
  view.copy_shared_buffer(base, mx::Strides{1}, {true, true, true}, static_cast<size_t>(bytes), offset);
  view.set_status(mx::array::Status::available);
  return view;
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
  require(xq.ndim() == 2 && xq.dtype() == mx::int8 && xq.shape(1) == k, "bitlinear takes int8 rows [m, k]");
  require(s.ndim() == 1 && s.dtype() == mx::float32 && s.shape(0) == xq.shape(0), "s must be float32 [m]");
  check_tiles(tiles, scale, k);
  return mx::array({xq.shape(0), scale.shape(0)}, mx::float32, std::make_shared<Bitlinear>(cpu_stream()),
                   {xq, s, tiles, scale});
}

mx::array ternary_linear(const mx::array& x, const mx::array& tiles, const mx::array& scale, int k,
                         const MaybeArray& norm, float eps, int epilogue, const MaybeArray& residual) {
  require(x.ndim() == 2 && x.shape(1) == k, "linear takes rows [m, k] of the weight's k");
  check_tiles(tiles, scale, k);
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
                   std::make_shared<TernaryLinear>(cpu_stream(), eps, static_cast<Epilogue>(epilogue),
                                                   norm.has_value(), residual.has_value()),
                   std::move(inputs));
}

}  // namespace bitdraft
