// Products of 1..8 rows with ternary, int8 and bfloat16 matrices: weights are read once for all rows.
//
// The tensor cores' m16n8k32 takes sixteen outputs, eight rows and 32 inputs, so one row costs what eight
// do, and its integer sums are exact in any order. Weights lie as the fragments that lanes hold, which
// are loaded straight into registers. Outputs in tiles of 16, inputs in spans of 128; in each (tile,
// span), lane 4g + q holds for each of four steps s the operands a0..a3 of four consecutive inputs each:
//   a0: output g,     inputs 32q + 8s + 0..3      a2: output g,     inputs 32q + 8s + 4..7
//   a1: output g + 8, the same                    a3: output g + 8, the same
//   ternary: a 32-bit word for each of a0..a3; bits 2s..2s+1 of its byte b are weight + 1 of step s's byte b; [lane][i];
//   int8:    sixteen bytes, a0..a3, a step; [step][lane].
// bfloat16 matrices stay as they are, [n][k].
#pragma once

#include "rows.cuh"

namespace bitdraft {

enum Kind { kTernary = 0, kInt8 = 1 };

constexpr int kTile = 16;   // outputs
constexpr int kSpan = 128;  // inputs
constexpr int kSteps = 4;   // of 32 inputs a span

template <int KIND>
constexpr int kPieceBytes = KIND == kTernary ? 512 : 2048;  // of a (tile, span)

constexpr int spans_of(int k) { return (k + kSpan - 1) / kSpan; }

// Rows in shared memory stand this far apart: sixteen bytes more spread them over the banks.
constexpr int row_stride(int k) { return spans_of(k) * kSpan + 16; }

// What a lane holds of a (tile, span): sixteen bytes, or as many a step, that lie 512 bytes apart.
template <int KIND>
struct Piece {
  uint4 words[KIND == kTernary ? 1 : kSteps];

  // from: this lane's first.
  __device__ void load(const uint8_t* from) {
#pragma unroll
    for (int i = 0; i < (KIND == kTernary ? 1 : kSteps); i++) {
      words[i] = *reinterpret_cast<const uint4*>(from + 512 * i);
    }
  }

  // The operands of a step; of ternary codes where they stand in their words, which is times 4^step.
  __device__ void operands(int step, unsigned (&a)[4]) const {
    const uint4 v = words[KIND == kTernary ? 0 : step];
    const unsigned mask = KIND == kTernary ? 0x03030303u << (2 * step) : ~0u;
    a[0] = v.x & mask;
    a[1] = v.y & mask;
    a[2] = v.z & mask;
    a[3] = v.w & mask;
  }
};

// A lane's operands of eight rows and a span: 32 consecutive inputs of one row.
struct RowPiece {
  uint4 halves[2];

  __device__ void load(const int8_t* x) {
    halves[0] = *reinterpret_cast<const uint4*>(x);
    halves[1] = *reinterpret_cast<const uint4*>(x + 16);
  }
  __device__ void clear() { halves[0] = halves[1] = make_uint4(0, 0, 0, 0); }
  __device__ unsigned operand(int step, int which) const {
    const uint4 v = halves[step / 2];
    return step % 2 == 0 ? (which == 0 ? v.x : v.y) : (which == 0 ? v.z : v.w);
  }
};

// A warp's part of the products of a range of tiles: warps take equal, contiguous parts of its pieces (tile, span).
// SLOTS pieces are on their way to shared memory while one is multiplied, the first of them from `start` on.
template <int KIND, int M, int SLOTS>
struct Product {
  static constexpr int kRing = SLOTS * kPieceBytes<KIND>;  // bytes of shared memory a warp needs

  const uint8_t* from;
  int64_t jump;
  uint8_t* ring;
  int spans, begin, end, half;

  // gate: 0, or how many tiles behind a gate's tiles their partners are, which come behind them in `run`, too.
  // rings: kRing bytes a warp; of its pieces a lane reads what it has copied itself.
  __device__ void start(const uint8_t* weights, int spans_of_row, int first_tile, int tiles, int gate, int warps,
                        uint8_t* rings) {
    const int warp = threadIdx.x / 32, pieces = (gate ? 2 : 1) * tiles * spans_of_row;
    ring = rings + warp * kRing + threadIdx.x % 32 * 16;
    spans = spans_of_row;
    half = tiles * spans;
    jump = static_cast<int64_t>(gate - tiles) * spans * kPieceBytes<KIND>;
    begin = pieces * warp / warps;
    end = pieces * (warp + 1) / warps;
    from = weights + static_cast<int64_t>(first_tile) * spans * kPieceBytes<KIND> + threadIdx.x % 32 * 16;
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; slot++) {
      fetch(begin + slot, slot);
    }
  }

  __device__ void fetch(int piece, int slot) const {
    if (piece < end) {
      const uint8_t* at = from + static_cast<int64_t>(piece) * kPieceBytes<KIND> + (piece < half ? 0 : jump);
#pragma unroll
      for (int i = 0; i < kPieceBytes<KIND>; i += 512) {
        copy_ahead(ring + slot * kPieceBytes<KIND> + i, at + i);
      }
    }
    close_copies();
  }

  // Adds to acc, [tiles][kTile][M] int32 of shared memory. x: M rows of int8, `stride` bytes apart; what lies
  // behind their end up to whole spans meets weights of zero.
  __device__ void run(const int8_t* x, int stride, int* acc) const {
    const int lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
    const int8_t* mine = x + (row < M ? row : 0) * stride + 32 * part;
    int sums[kSteps][4] = {}, ones[4] = {};  // of each step, since its codes stand elsewhere; of the rows alone
    int tile = begin / spans, span = begin % spans, slot = 0;
#pragma unroll 1
    for (int piece = begin; piece < end; piece++) {
      await_copies<SLOTS - 1>();
      Piece<KIND> now;
      now.load(ring + slot * kPieceBytes<KIND>);
      fetch(piece + SLOTS, slot);
      slot = slot + 1 < SLOTS ? slot + 1 : 0;
      RowPiece rows;
      rows.clear();
      if (row < M) {
        rows.load(mine + span * kSpan);
      }
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        unsigned a[4];
        now.operands(step, a);
        const unsigned b0 = rows.operand(step, 0), b1 = rows.operand(step, 1);
        if constexpr (KIND == kTernary) {  // codes are weights plus one
          multiply_codes(sums[step], a, b0, b1);
          multiply_codes(ones, {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u}, b0, b1);
        } else {
          multiply(sums[step], a, b0, b1);
        }
      }
      if (++span == spans || piece + 1 == end) {
        int* to = acc + (tile * kTile + row) * M + 2 * part;  // here `row` is an output, `part` two rows
        int total[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          total[i] = -ones[i];
          ones[i] = 0;
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            total[i] += sums[step][i] >> (KIND == kTernary ? 2 * step : 0);
            sums[step][i] = 0;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (2 * part + i < M) {
            atomicAdd(to + i, total[i]);
            atomicAdd(to + 8 * M + i, total[2 + i]);
          }
        }
        span = 0;
        tile++;
      }
    }
  }
};

// float(sum) * (scale / s), the division first and nothing fused, as the reference has it.
__device__ inline float scaled(int sum, float scale, float s) {
  return __fmul_rn(__int2float_rn(sum), __fdiv_rn(scale, s));
}

// Four outputs of a bfloat16 or float32 matrix times M rows of x in shared memory, by one warp: every
// lane's part in order of k, then one fixed tree. Lane j * M + m holds the result.
template <typename T, int M>
__device__ inline float dense_quad(const T* weights, int k, int64_t n, int64_t first, const float* x) {
  const int lane = threadIdx.x % 32;
  float sums[4][M] = {};
  const T* rows[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    rows[j] = weights + (first + j < n ? first + j : n - 1) * k;
  }
  int at = 0;
  if constexpr (sizeof(T) == 2) {
    if (k % 8 == 0) {
      for (at = 8 * lane; at < k; at += 256) {
        float w[4][8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint4 v = stream16(rows[j] + at);
          const unsigned parts[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            w[j][2 * i] = __uint_as_float(parts[i] << 16);
            w[j][2 * i + 1] = __uint_as_float(parts[i] & 0xffff0000u);
          }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
          const float4 a = *reinterpret_cast<const float4*>(x + m * k + at);
          const float4 b = *reinterpret_cast<const float4*>(x + m * k + at + 4);
          const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
              sums[j][m] = __fmaf_rn(w[j][i], v[i], sums[j][m]);
            }
          }
        }
      }
      at = k;
    }
  }
  for (at = at < k ? lane : k; at < k; at += 32) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[j][m] = __fmaf_rn(static_cast<float>(rows[j][at]), x[m * k + at], sums[j][m]);
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float total = sum_lanes(sums[j][m]);
      mine = lane == j * M + m ? total : mine;
    }
  }
  return mine;
}

}  // namespace bitdraft
