// Float rows, each as three bfloat16 (split_rows.cu), times a bfloat16 matrix [n][k], k a multiple of 8, on the tensor
// cores, which multiply them exactly and add in float. An output's order of sums is one, however many rows there are: 32
// inputs after the other, of sixteen the smallest parts first, and sums over 256 inputs added in their order.
// A block takes 8 * GROUPS * WARPS_M rows and 16 * TILES * WARPS_N outputs (with a gate, half of them gates, the others
// their partners, which the same lanes have), and has STAGES times 32 inputs of both in its dynamic shared memory, all
// but one of them on their way. Of a row's 32 inputs a lane has eight side by side, as operands of two products.
// parts: [3][m][padded]. sizes: n, k, m. Constants: GATE, RESIDUAL, GROUPS, TILES, WARPS_M, WARPS_N, STAGES.
constexpr int row_tile = 8 * GROUPS * WARPS_M, output_tile = kTile * TILES * WARPS_N, threads = 32 * WARPS_M * WARPS_N;
constexpr int inputs = 32, line = 2 * inputs, pieces = line / 16, steps_of_sum = 256 / inputs;
constexpr int weights_bytes = output_tile * line, stage_bytes = weights_bytes + 3 * row_tile * line;
constexpr int own = GATE ? TILES / 2 : TILES;  // a warp's tiles of the result
extern __shared__ __align__(128) uint8_t work[];
const int n = sizes[0], k = sizes[1], m = sizes[2], steps = (k + inputs - 1) / inputs;
const int width = GATE ? n / 2 : n, first = blockIdx.x * own * WARPS_N * kTile, first_row = blockIdx.y * row_tile;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = lane / 4, part = lane % 4;
const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;

const auto fetch = [&](int step) {
  if (step < steps) {
    uint8_t* to = work + step % STAGES * stage_bytes;
#pragma unroll
    for (int i = threadIdx.x; i < output_tile * pieces; i += threads) {
      const int tile = i / pieces / kTile, t = tile % TILES, at = step * inputs + i % pieces * 8;
      const int output = first + (tile / TILES * own + t % own) * kTile + i / pieces % kTile;
      const int64_t row = (output < width ? output : width - 1) + (t < own ? 0 : width);
      if (at < k) {
        copy_ahead(to + 16 * i, weight + row * k + at);
      } else {
        *reinterpret_cast<uint4*>(to + 16 * i) = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = threadIdx.x; i < 3 * row_tile * pieces; i += threads) {
      const int which = i / pieces / row_tile, row = first_row + i / pieces % row_tile;
      const int64_t from = (static_cast<int64_t>(which) * m + (row < m ? row : m - 1)) * steps + step;
      copy_ahead(to + weights_bytes + 16 * i, parts + from * inputs + i % pieces * 8);
    }
  }
  close_copies();
};

float sums[TILES][GROUPS][4] = {}, totals[TILES][GROUPS][4] = {};
#pragma unroll 1
for (int step = 0; step < STAGES - 1; step++) {
  fetch(step);
}
#pragma unroll 1
for (int step = 0; step < steps; step++) {
  await_copies<STAGES - 2>();
  __syncthreads();  // this step is here, and the one before has been read
  fetch(step + STAGES - 1);
  const uint8_t* stage = work + step % STAGES * stage_bytes + team * line + 16 * part;
  uint4 a[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      a[t][upper] = *reinterpret_cast<const uint4*>(stage + (kTile * (warp_n * TILES + t) + 8 * upper) * line);
    }
  }
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    uint4 b[3];
#pragma unroll
    for (int p = 0; p < 3; p++) {
      b[p] = *reinterpret_cast<const uint4*>(stage + weights_bytes + (p * row_tile + 8 * (GROUPS * warp_m + g)) * line);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int p = 2; p >= 0; p--) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          const uint4 low = a[t][0], high = a[t][1];
          multiply_bfloat16(sums[t][g], half ? low.z : low.x, half ? high.z : high.x, half ? low.w : low.y,
                            half ? high.w : high.y, half ? b[p].z : b[p].x, half ? b[p].w : b[p].y);
        }
      }
    }
  }
  if ((step + 1) % steps_of_sum == 0 || step + 1 == steps) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          totals[t][g][i] = __fadd_rn(totals[t][g][i], sums[t][g][i]);
          sums[t][g][i] = 0;
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
#pragma unroll
      for (int t = 0; t < own; t++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int output = first + (warp_n * own + t) * kTile + team + 8 * c;
          if (output < width) {
            float y = totals[t][g][2 * c + r];
            if constexpr (GATE != 0) {
              y = gated<GATE == 1>(y, totals[t + own][g][2 * c + r]);
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
