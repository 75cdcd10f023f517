// Weights into the layouts of kernels.h, once at load.
#include <algorithm>
#include <limits>

#include "ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bitdraft {
namespace {

// Memory for `bytes` of tiles as an array.
struct Tiles {
  mx::array array;
  uint8_t* data;
};

Tiles allocate_tiles(int64_t bytes) {
  // A shape holds 32-bit sizes.
  require(bytes + kBlockBytes <= std::numeric_limits<int32_t>::max(), "weights of 2 GiB are not supported");
  // MLX's allocator does not align to cache lines: take a view of a slightly larger array that is.
  mx::array base(memory(static_cast<size_t>(bytes + kBlockBytes)), mx::Shape{static_cast<int>(bytes + kBlockBytes)},
                 mx::uint8);
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
  mx::array view(mx::Shape{static_cast<int>(bytes)}, mx::uint8, nullptr, {});
  view.copy_shared_buffer(base, mx::Strides{1}, {true, true, true}, static_cast<size_t>(bytes), offset);
  view.set_status(mx::array::Status::available);
  return {view, to};
}

// Calls fill(to, from, count) for every output of every (tile, block): `to` is its first lane there, and the
// `count` of 16 inputs that exist start at `from` of the matrix.
template <class Fill>
mx::array pack(int64_t n, int64_t k, int64_t block_bytes, Fill&& fill) {
  const int64_t tiles = round_up(n, kTile) / kTile, blocks = round_up(k, kTile) / kTile;
  const Tiles out = allocate_tiles(tiles * blocks * block_bytes);
  parallel_for(static_cast<int>(tiles), [&](int tile) {
    for (int64_t b = 0; b < blocks; b++) {
      for (int j = 0; j < kTile; j++) {
        const int64_t row = int64_t{tile} * kTile + j;
        const int64_t count = row < n ? std::min<int64_t>(kTile, k - b * kTile) : 0;
        fill(out.data + (tile * blocks + b) * block_bytes + 4 * j, row * k + b * kTile,
             static_cast<size_t>(count));
      }
    }
  });
  return out.array;
}

}  // namespace

mx::array pack_ternary(const int8_t* ternary, int64_t n, int64_t k) {
  uint8_t wrong = 0;
  for (int64_t i = 0; i < n * k; i++) {
    wrong |= static_cast<uint8_t>(ternary[i] + 1) > 2;
  }
  require(wrong == 0, "ternary weights must be -1, 0 or 1");
  return pack(n, k, kBlockBytes, [&](uint8_t* to, int64_t from, size_t count) {
    int8_t weights[kTile] = {};
    std::copy_n(ternary + from, count, weights);
    for (int byte = 0; byte < 4; byte++) {
      to[byte] = static_cast<uint8_t>((weights[byte] + 1) | (weights[4 + byte] + 1) << 2 |
                                      (weights[8 + byte] + 1) << 4 | (weights[12 + byte] + 1) << 6);
    }
  });
}

mx::array pack_int8(const int8_t* weight, int64_t n, int64_t k) {
  return pack(n, k, kInt8BlockBytes, [&](uint8_t* to, int64_t from, size_t count) {
    int8_t weights[kTile] = {};
    std::copy_n(weight + from, count, weights);
    for (int i = 0; i < kTile; i++) {
      to[i / 4 * 64 + i % 4] = static_cast<uint8_t>(weights[i] + 128);
    }
  });
}

}  // namespace bitdraft
