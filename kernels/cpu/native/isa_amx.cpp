// Products of many rows with the tile unit of x86-64 (AMX-INT8); all else is AVX-512's.
#if defined(__x86_64__)
#include "kernels.h"

#if defined(__linux__) && __has_include(<amxint8intrin.h>)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,amx-tile,amx-int8")
#endif

namespace bitdraft {
namespace {

constexpr int kTileRow = 64;                  // bytes of a tile register's row: inputs
constexpr int kTileBytes = 16 * kTileRow;     // sixteen rows
constexpr int kBlocks = kTileRow / kTile;     // blocks of 16 inputs that fill a register with weights
constexpr int kRows = kTiledRows / 2;         // of rows a register
constexpr int kRawStride = kPairOutputs * 4;  // bytes

// Every register holds sixteen rows of 64 bytes. (A constant in memory: compilers take the instruction to read eight
// bytes of it, and leave out the others where they make it on the spot.)
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kTileRow, kTileRow, kTileRow, kTileRow, kTileRow, kTileRow, kTileRow, kTileRow};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};
extern const Config kConfig;
const Config kConfig;

void configure() { _tile_loadconfig(&kConfig); }

// The codes of a tile, four consecutive inputs of sixteen outputs a row, as the tile unit takes weights.
void decode_ternary(const uint8_t* tile, int64_t blocks, uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(0x03);
  for (int64_t b = 0; b < blocks; b++) {
    const __m512i w = _mm512_loadu_si512(tile + b * kBlockBytes);
    uint8_t* to = out + b * kInt8BlockBytes;
    _mm512_store_si512(to, _mm512_and_si512(w, mask));
    _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(w, 2), mask));
    _mm512_store_si512(to + 128, _mm512_and_si512(_mm512_srli_epi16(w, 4), mask));
    _mm512_store_si512(to + 192, _mm512_and_si512(_mm512_srli_epi16(w, 6), mask));
  }
  const int64_t whole = (blocks + kBlocks - 1) / kBlocks * kBlocks;  // the rows' spare inputs are zero
  std::memset(out + blocks * kInt8BlockBytes, 0, static_cast<size_t>((whole - blocks) * kInt8BlockBytes));
}

// Two tiles of decoded weights times up to 32 rows.
void dot_tiled(const TiledDot& d) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* x = d.x;
  const uint8_t *w0 = d.weights0, *w1 = d.weights1;
  const bool both = d.rows > kRows;
  for (int64_t k = 0; k < d.row_bytes; k += kTileRow, x += kTileRow, w0 += kTileBytes, w1 += kTileBytes) {
    _tile_loadd(4, x, d.row_bytes);
    _tile_loadd(6, w0, kTileRow);
    _tile_loadd(7, w1, kTileRow);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (both) {
      _tile_loadd(5, x + kRows * d.row_bytes, d.row_bytes);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, d.raw, kRawStride);
  _tile_stored(1, d.raw + kTile, kRawStride);
  if (both) {
    _tile_stored(2, d.raw + kRows * kPairOutputs, kRawStride);
    _tile_stored(3, d.raw + kRows * kPairOutputs + kTile, kRawStride);
  }
}

// Gives the registers back: with something in them a thread is slow to be put aside.
void release() { _tile_release(); }

constexpr TileUnit kUnit = {configure, decode_ternary, dot_tiled, release};

// Linux gives the registers to processes that ask for them.
bool granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_tiles() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kAmxTile = 1U << 24, kAmxInt8 = 1U << 25;
  return (d & kAmxTile) != 0 && (d & kAmxInt8) != 0 && granted();
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels set = [] {
    Kernels k = kAvx512Vnni;
    k.name = "amx";
    k.tile_unit = &kUnit;
    return k;
  }();
  static const bool there = has_tiles();
  return there ? &set : nullptr;
}

}  // namespace bitdraft

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else  // a compiler that does not know it
namespace bitdraft {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace bitdraft
#endif
#endif
