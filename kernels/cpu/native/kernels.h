// The inner loops, compiled once for each instruction set and chosen at run time.
//
// Packed ternary layout ("tiles"): 16 outputs a tile, 16 inputs a block, 64 bytes a (tile, block).
// As 16 little-endian 32-bit lanes, lane j belongs to output j; bits 2i..2i+1 of its byte b hold
// W[16 * tile + j, 16 * block + 4i + b] + 1. Shifting by 2i and masking leaves four consecutive
// inputs of 16 outputs, the operand of a u8 x s8 dot product whose 32-bit lanes are outputs: no
// horizontal sum is ever needed. Spare outputs and inputs hold code 1 (a zero weight).
//
// Packed int8 layout: the same tiles and blocks, 256 bytes each: four such operands side by side. Byte
// 64i + 4j + b is W[16 * tile + j, 16 * block + 4i + b] + 128; spare ones hold 128.
//
// Packed activations: rows in blocks of up to `row_block`; [inputs / 4][rows of the block][4] int8.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bitdraft {

constexpr int kTile = 16;             // outputs a tile, inputs a block
constexpr int kBlockBytes = 64;       // packed bytes of a (tile, block), ternary
constexpr int kInt8BlockBytes = 256;  // and int8
constexpr int kPairOutputs = 32;      // outputs of one call of `dot`
constexpr int kMaxRowBlock = 12;
constexpr int kTiledRows = 32;    // of a call of a tile unit
constexpr int kTiledInputs = 64;  // a multiple of which its rows hold
constexpr int kSmallRows = 8;  // of a call of `dense`
constexpr int kMaxHeadDim = 512;
constexpr int kMaxQueries = 16;  // of one call of `attend`
constexpr int kKeyBlock = 32;    // keys and values that stay in the first cache while queries share them

enum class Epilogue : int { none = 0, relu2_mul = 1, silu_mul = 2 };

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// The product of a pair of tiles with a block of rows.
struct Dot {
  const uint8_t* tile0;
  const uint8_t* tile1;
  int64_t blocks;  // of 16 inputs
  // From a tile to the one that will be read next in its place, which is fetched into the cache
  // meanwhile: two interleaved streams are more than the processor foresees by itself.
  int64_t ahead;
  const int8_t* x;      // one block of packed rows
  const int32_t* sums;  // as in Finish, for where only a signed product is to be had
  int32_t* raw;         // [rows][32]: sums of code * x
};

// The product of a pair of tiles with rows that lie one behind the other, by a unit for such.
struct TiledDot {
  const uint8_t* weights0;  // operands of four inputs of sixteen outputs: int8 tiles, or decoded ternary ones
  const uint8_t* weights1;
  const int8_t* x;    // [rows, filled up to kTiledRows][row_bytes]
  int64_t row_bytes;  // a multiple of kTiledInputs; the spare ones are zero
  int rows;           // 1..kTiledRows
  int32_t* raw;       // [kTiledRows][32]: sums of code * x
};

// A unit that multiplies small matrices. A thread configures it before and releases it after its products.
struct TileUnit {
  void (*configure)();
  // blocks of ternary codes -> the same as those of int8 tiles, filled up to kTiledInputs
  void (*decode_ternary)(const uint8_t* tile, int64_t blocks, uint8_t* out);
  void (*dot)(const TiledDot& d);
  void (*release)();
};

// How the raw sums of a pair of tiles become outputs; pointers are to the tiles' first outputs.
struct Finish {
  const int32_t* raw;   // [rows][32], sums of code * x
  const int32_t* sums;  // [rows], bias * sum of x: taken off because a code is its weight plus the bias
  const float* s;       // [rows], quantisation factors
  const float* scale0;  // scales of both tiles' outputs
  const float* scale1;
  int valid0;  // outputs of each tile that exist, 0..16
  int valid1;
  Epilogue epilogue;  // other than none: tile 0 is the gate, tile 1 the up part, out0 the result
  float* out0;        // row r at out0 + r * out_stride
  float* out1;
  int64_t out_stride;
  const float* residual0;  // as out0 and out1, or null
  const float* residual1;
  int64_t residual_stride;
};

// Queries that share one key/value head. Query i attends keys 0..lengths[i]-1.
struct Attend {
  const float* queries;  // [count][padded], rotated, scaled, zero-padded to a multiple of 16
  const int* lengths;    // [count]
  float* const* out;     // [count] pointers to d floats
  const uint16_t* keys;  // bfloat16 [capacity][d]
  const uint16_t* values;
  int count;
  int d;
  int padded;
  float* scores;  // [count][score_stride], score_stride a multiple of 16
  int64_t score_stride;
};

// A few rows times rows of a float matrix, float32 accumulation.
struct Dense {
  const float* x;  // [rows][k_padded], zero-padded
  int64_t k_padded;
  int rows;             // 1..8
  const void* weights;  // [n][k]
  bool bfloat16;
  int64_t n, k;
  float* out;  // [rows][out_stride]
  int64_t out_stride;
};

struct Kernels {
  const char* name;
  int row_block;  // rows of a block of packed activations when there are more than kSmallRows

  void (*dot_ternary)(int rows, const Dot& d);
  void (*dot_int8)(int rows, const Dot& d);
  void (*finish)(int rows, const Finish& f);
  // RMSNorm of a row of k floats; `weight` holds k floats.
  void (*normalise)(const float* x, const float* weight, float eps, int64_t k, float* out);
  // int8 rounding of a row; returns s. q holds k values.
  float (*quantise)(const float* x, int64_t k, int8_t* q);
  // out = activation(gate) * up, elementwise over `count`.
  void (*gate)(Epilogue epilogue, const float* gate, const float* up, int64_t count, float* out);
  void (*dense)(const Dense& args, int64_t first, int64_t last);
  // out = rotate-half RoPE of a head of d floats, times `scale`; table: d/2 cosines, then d/2 sines.
  void (*rotate)(const float* x, const float* table, int d, float scale, float* out);
  // n floats to bfloat16, to the nearest, ties to even.
  void (*narrow)(const float* x, int64_t n, uint16_t* out);
  void (*attend)(const Attend& args);
  // The largest of n > 0 values; a NaN counts as none.
  float (*largest)(const float* x, int64_t n);
  // The sum of exp((x - top) * factor).
  float (*exp_sum)(const float* x, int64_t n, float top, float factor);
  // The first index from `from` on whose value is above the threshold, or n.
  int64_t (*next_above)(const float* x, int64_t from, int64_t n, float threshold);
  const TileUnit* tile_unit = nullptr;  // for products of more than kSmallRows rows
};

const Kernels& kernels();                   // the chosen set
std::vector<std::string> available_isas();  // best first
void select_isa(const std::string& name);   // throws std::invalid_argument

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx2;
const Kernels* amx_kernels();  // null where the processor or the system has no tile unit
#elif defined(__aarch64__)
extern const Kernels kNeonDot;
#endif

}  // namespace bitdraft
