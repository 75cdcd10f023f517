// The product of many int8 rows with a ternary or int8 matrix. A block takes 8 * GROUPS * WARPS_M rows and
// 16 * TILES * WARPS_N outputs (with a gate, half of them gates, the others their partners, which the same lanes have),
// and has STAGES spans of both in its dynamic shared memory, all but one of them on their way.
// s: the rows' factors, then the sums of their int8, [2][m]. sizes: outputs, spans, rows.
// Constants: KIND, GATE (0, 1 relu2, 2 silu), RESIDUAL, GROUPS, TILES, WARPS_M, WARPS_N, STAGES.
constexpr int row_tile = 8 * GROUPS * WARPS_M, block_tiles = TILES * WARPS_N, threads = 32 * WARPS_M * WARPS_N;
constexpr int line = kSpan + 16;  // bytes: sixteen more spread rows over the banks
constexpr int rows_bytes = row_tile * line, stage_bytes = rows_bytes + block_tiles * kPieceBytes<KIND>;
constexpr int own = GATE ? TILES / 2 : TILES;  // a warp's tiles of the result
extern __shared__ __align__(128) uint8_t work[];
const int outputs = sizes[0], spans = sizes[1], m = sizes[2], first_row = blockIdx.y * row_tile;
const int width = GATE ? outputs / 2 : outputs, tiles = (width + kTile - 1) / kTile;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = lane / 4, part = lane % 4;
const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N, first_tile = blockIdx.x * own * WARPS_N;
const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight);

const auto fetch = [&](int span) {
  if (span < spans) {
    uint8_t* to = work + span % STAGES * stage_bytes;
#pragma unroll
    for (int i = threadIdx.x; i < row_tile * kSpan / 16; i += threads) {
      const int row = first_row + i / (kSpan / 16), column = i % (kSpan / 16) * 16;
      copy_ahead(to + i / (kSpan / 16) * line + column,
                 xq + (static_cast<int64_t>(row < m ? row : m - 1) * spans + span) * kSpan + column);
    }
#pragma unroll
    for (int i = threadIdx.x; i < block_tiles * kPieceBytes<KIND> / 16; i += threads) {
      constexpr int each = kPieceBytes<KIND> / 16;
      const int t = i / each % TILES, tile = first_tile + i / each / TILES * own + t % own;
      const int64_t at = (tile < tiles ? tile : tiles - 1) + (t < own ? 0 : tiles);
      copy_ahead(to + rows_bytes + 16 * i, codes + (at * spans + span) * kPieceBytes<KIND> + i % each * 16);
    }
  }
  close_copies();
};

int acc[TILES][GROUPS][4] = {};
#pragma unroll 1
for (int span = 0; span < STAGES - 1; span++) {
  fetch(span);
}
#pragma unroll 1
for (int span = 0; span < spans; span++) {
  await_copies<STAGES - 2>();
  __syncthreads();  // this span is here, and the one before has been read
  fetch(span + STAGES - 1);
  const uint8_t* stage = work + span % STAGES * stage_bytes;
  const uint8_t* rows = stage + (8 * GROUPS * warp_m + team) * line + 32 * part;
  const uint8_t* pieces = stage + rows_bytes + warp_n * TILES * kPieceBytes<KIND> + 16 * lane;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    unsigned a[TILES][2][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const int step = 2 * half + s;
        const uint4 v = *reinterpret_cast<const uint4*>(pieces + t * kPieceBytes<KIND> + (KIND == kTernary ? 0 : 512 * step));
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          a[t][s][i] = KIND == kTernary ? words[i] >> (2 * step) & 0x03030303u : words[i];
        }
      }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g += 2) {
      uint4 v[2];
      v[0] = *reinterpret_cast<const uint4*>(rows + 8 * g * line + 16 * half);
      v[1] = *reinterpret_cast<const uint4*>(rows + 8 * (g + 1) * line + 16 * half);
#pragma unroll
      for (int s = 0; s < 2; s++) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
          for (int t = 0; t < TILES; t++) {
            multiply(acc[t][g + u], a[t][s], s ? v[u].z : v[u].x, s ? v[u].w : v[u].y);
          }
        }
      }
    }
  }
}

#pragma unroll
for (int g = 0; g < GROUPS; g++) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + 8 * (GROUPS * warp_m + g) + 2 * part + r;
    if (row < m) {
      const float factor = s[row];
      const int sum = KIND == kTernary ? __float2int_rn(s[m + row]) : 0;  // codes are weights plus one
#pragma unroll
      for (int t = 0; t < own; t++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int output = (first_tile + warp_n * own + t) * kTile + team + 8 * c;
          if (output < width) {
            float y = scaled(acc[t][g][2 * c + r] - sum, scale[output], factor);
            if constexpr (GATE != 0) {
              y = gated<GATE == 1>(y, scaled(acc[t + own][g][2 * c + r] - sum, scale[width + output], factor));
            }
            const int64_t at = static_cast<int64_t>(row) * width + output;
            if constexpr (RESIDUAL) {
              y = __fadd_rn(y, residual[at]);
            }
            out[at] = y;
          }
        }
      }
    }
  }
}
