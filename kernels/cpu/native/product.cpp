#include "product.h"

namespace bitdraft {
namespace {

// The outputs of a product in pairs of tiles: a gate tile and its up tile, or two neighbours; without a partner, itself.
struct Pairs {
  const Product& p;
  bool gated;
  int64_t tiles, count, width;

  explicit Pairs(const Product& p)
      : p(p),
        gated(p.epilogue != Epilogue::none),
        tiles((p.n + kTile - 1) / kTile),
        count(gated ? tiles / 2 : (tiles + 1) / 2),
        width(gated ? p.n / 2 : p.n) {}
  int64_t tile0(int64_t pair) const { return gated ? pair : 2 * pair; }
  int64_t tile1(int64_t pair) const { return gated ? pair + count : std::min(2 * pair + 1, tiles - 1); }

  // How sums of a pair for some rows from `row` on become outputs.
  Finish finish(int64_t pair, const int32_t* raw, const Activations& x, int64_t row) const {
    const int64_t j0 = tile0(pair) * kTile, j1 = tile1(pair) * kTile;
    Finish f{};
    f.raw = raw;
    f.sums = x.sums + row;
    f.s = x.s + row;
    f.scale0 = p.scale + j0;
    f.scale1 = p.scale + j1;
    f.valid0 = static_cast<int>(std::min<int64_t>(kTile, p.n - j0));
    f.valid1 = j1 == j0 ? 0 : static_cast<int>(std::min<int64_t>(kTile, p.n - j1));
    f.epilogue = p.epilogue;
    f.out_stride = width;
    f.out0 = p.out + row * width + j0;
    f.out1 = p.out + row * width + j1;
    if (p.residual != nullptr) {
      f.residual_stride = p.residual_stride;
      f.residual0 = p.residual + row * p.residual_stride + j0;
      f.residual1 = p.residual + row * p.residual_stride + j1;
    }
    return f;
  }
};

constexpr int64_t kCachedRows = 512 * 1024;  // bytes of activations that stay in a core's cache while weights pass by

// With the kernels for a few rows.
void multiply_blocks(const Kernels& kernels, const Activations& x, const Product& p) {
  const Pairs pairs(p);
  const int64_t k_blocks = x.padded / kTile, tile_bytes = k_blocks * p.format->block_bytes;
  const auto dot = kernels.*p.format->dot;
  const auto pair_task = [&](int64_t pair, int64_t first_block, int64_t last_block) {
    alignas(64) int32_t raw[kMaxRowBlock * kPairOutputs];
    for (int64_t b = first_block; b < last_block; b++) {
      const int rows = x.blocks.size(b);
      const int64_t row = x.blocks.begin(b);
      // The next pair is fetched once, while the first block of rows uses this one.
      const int64_t ahead = b > first_block ? 0 : pairs.gated ? tile_bytes : 2 * tile_bytes;
      dot(rows, Dot{p.tiles + pairs.tile0(pair) * tile_bytes, p.tiles + pairs.tile1(pair) * tile_bytes, k_blocks,
                    ahead, x.block(b), x.sums + row, raw});
      kernels.finish(rows, pairs.finish(pair, raw, x, row));
    }
  };
  // Rows in groups whose activations stay in a core's cache while the weights pass by.
  const int64_t group = std::max<int64_t>(1, kCachedRows / (kMaxRowBlock * x.padded));
  const int64_t groups = (x.blocks.count + group - 1) / group;
  const int64_t spans = std::min(pairs.count, chunks_of(pairs.tiles * tile_bytes * x.blocks.rows));
  const bool parallel = spans > 1;
  parallel_for(static_cast<int>(parallel ? spans * groups : 1), [&](int chunk) {
    const int64_t first_group = parallel ? chunk / spans : 0,
                  last_group = parallel ? first_group + 1 : groups;
    const int64_t span = parallel ? chunk % spans : 0;
    for (int64_t g = first_group; g < last_group; g++) {
      for (int64_t pair = span * pairs.count / spans; pair < (span + 1) * pairs.count / spans; pair++) {
        pair_task(pair, g * group, std::min((g + 1) * group, x.blocks.count));
      }
    }
  });
}

// With a tile unit.
void multiply_tiled(const Kernels& kernels, const Activations& x, const Product& p) {
  const Pairs pairs(p);
  const TileUnit& unit = *kernels.tile_unit;
  const int64_t rows = x.blocks.rows, k_blocks = round_up(x.k, kTile) / kTile;
  const int64_t tile_bytes = k_blocks * p.format->block_bytes, operand_bytes = x.padded * kTile;
  const auto operand = [&](int64_t tile, int8_t* space) {
    const uint8_t* from = p.tiles + tile * tile_bytes;
    auto* to = reinterpret_cast<uint8_t*>(space);
    if (p.format->block_bytes == kBlockBytes) {
      unit.decode_ternary(from, k_blocks, to);
    } else if (tile_bytes == operand_bytes) {
      return from;
    } else {
      std::memcpy(to, from, static_cast<size_t>(tile_bytes));
      std::memset(to + tile_bytes, 0, static_cast<size_t>(operand_bytes - tile_bytes));
    }
    return static_cast<const uint8_t*>(to);
  };
  const int64_t group = std::max<int64_t>(1, kCachedRows / (kTiledRows * x.padded)) * kTiledRows;
  const int64_t groups = (rows + group - 1) / group;
  const int64_t spans = std::min(pairs.count, chunks_of(pairs.tiles * tile_bytes * rows / 4));
  parallel_for(static_cast<int>(spans * groups), [&](int chunk) {
    const int64_t first = chunk / spans * group, last = std::min(first + group, rows), span = chunk % spans;
    int8_t* decoded = scratch_bytes(kDecoded, 2 * operand_bytes);
    alignas(64) int32_t raw[kTiledRows * kPairOutputs];
    unit.configure();
    for (int64_t pair = span * pairs.count / spans; pair < (span + 1) * pairs.count / spans; pair++) {
      const uint8_t* weights0 = operand(pairs.tile0(pair), decoded);
      const uint8_t* weights1 = operand(pairs.tile1(pair), decoded + operand_bytes);
      for (int64_t row = first; row < last; row += kTiledRows) {
        const int count = static_cast<int>(std::min<int64_t>(kTiledRows, last - row));
        unit.dot({weights0, weights1, x.packed + row * x.padded, x.padded, count, raw});
        kernels.finish(count, pairs.finish(pair, raw, x, row));
      }
    }
    unit.release();
  });
}

void multiply_tiles(const Kernels& kernels, const Activations& x, const Product& p) {
  if (x.blocks.rows > 0) {
    x.tiled ? multiply_tiled(kernels, x, p) : multiply_blocks(kernels, x, p);
  }
}

}  // namespace

// Gates whose halves are no whole tiles take a second pass.
void multiply(const Kernels& kernels, const Activations& x, const Product& p) {
  const int64_t half = p.n / 2, rows = x.blocks.rows;
  if (p.epilogue == Epilogue::none || half % kTile == 0) {
    return multiply_tiles(kernels, x, p);
  }
  Product plain = p;
  plain.epilogue = Epilogue::none;
  plain.residual = nullptr;
  plain.out = scratch_floats(kOutput, rows * p.n);
  multiply_tiles(kernels, x, plain);
  for (int64_t r = 0; r < rows; r++) {
    float* out = p.out + r * half;
    kernels.gate(p.epilogue, plain.out + r * p.n, plain.out + r * p.n + half, half, out);
    for (int64_t j = 0; p.residual != nullptr && j < half; j++) {
      out[j] += p.residual[r * p.residual_stride + j];
    }
  }
}

}  // namespace bitdraft
