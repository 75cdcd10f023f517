#include "product.h"

namespace bitdraft {
namespace {

void multiply_tiles(const Kernels& kernels, const Activations& x, const Product& p) {
  if (x.blocks.rows == 0) {
    return;
  }
  const int64_t k_blocks = x.padded / kTile, tile_bytes = k_blocks * p.format->block_bytes;
  const int64_t tiles = (p.n + kTile - 1) / kTile;
  const auto dot = kernels.*p.format->dot;
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
      dot(rows, Dot{p.tiles + tile0 * tile_bytes, p.tiles + tile1 * tile_bytes, k_blocks, ahead, x.block(b),
                    x.sums + row, raw});
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
  const int64_t spans = std::min(pairs, chunks_of(tiles * tile_bytes * x.blocks.rows));
  const bool parallel = spans > 1;
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
