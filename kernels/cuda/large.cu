// The product of many int8 rows with a ternary or int8 matrix, on the int8 tensor cores: a block of four
// warps takes 64 rows and 128 outputs, a warp 32 of these. The weights go straight into registers: four
// consecutive inputs of an output are what a lane holds of a fragment. Constants: KIND, N, OUTPUTS,
// BLOCKS (of 16 inputs), RESIDUAL. rows: m as an array of one.
using namespace bitdraft;
constexpr int row_tile = 64, k_tile = 128, stride = 16 * BLOCKS, line = k_tile + 16;  // spreads rows over banks
__shared__ __align__(16) int8_t tile[row_tile * line];
__shared__ int sums[row_tile];
const int m = rows[0], first_row = blockIdx.y * row_tile;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = lane / 4, part = lane % 4;
const int first_output = (blockIdx.x * 4 + warp) * 32;
int acc[4][4][4] = {};  // [row fragment of 16][output fragment of 8][register]
int sum = 0;            // of half a row: thread t sums half t % 2 of row t / 2

for (int k = 0; k < stride; k += k_tile) {
  __syncthreads();
  for (int i = threadIdx.x; i < row_tile * k_tile / 16; i += 128) {
    const int row = i / (k_tile / 16), column = i % (k_tile / 16) * 16;
    int4 v = make_int4(0, 0, 0, 0);
    if (first_row + row < m && k + column < stride) {
      v = *reinterpret_cast<const int4*>(xq + static_cast<int64_t>(first_row + row) * stride + k + column);
    }
    *reinterpret_cast<int4*>(tile + row * line + column) = v;
  }
  __syncthreads();
  if constexpr (KIND == kTernary) {
    for (int i = 0; i < k_tile / 8; i++) {
      sum = __dp4a(0x01010101, *reinterpret_cast<const int*>(tile + threadIdx.x / 2 * line + threadIdx.x % 2 * (k_tile / 2) + 4 * i), sum);
    }
  }
#pragma unroll
  for (int step = 0; step < k_tile / 32; step++) {
    const int block = k / 16 + 2 * step;
    int b[4][2];
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const int output = first_output + 8 * f + team;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t at = (static_cast<int64_t>(output / 4) * BLOCKS + block + half) * 4 + output % 4;
        b[f][half] = 0;
        if (output < N && block + half < BLOCKS) {
          b[f][half] = KIND == kTernary ? static_cast<int>(weight[at] >> (2 * part) & 0x03030303u)
                                        : static_cast<int>(weight[4 * at + part]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int8_t* from = tile + (16 * r + team) * line + 32 * step + 4 * part;
      const int a0 = *reinterpret_cast<const int*>(from), a1 = *reinterpret_cast<const int*>(from + 8 * line);
      const int a2 = *reinterpret_cast<const int*>(from + 16), a3 = *reinterpret_cast<const int*>(from + 8 * line + 16);
#pragma unroll
      for (int f = 0; f < 4; f++) {
        int* c = acc[r][f];
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[f][0]), "r"(b[f][1]));
      }
    }
  }
}
sum += __shfl_xor_sync(kAllLanes, sum, 1);
if (threadIdx.x % 2 == 0) {
  sums[threadIdx.x / 2] = sum;
}
__syncthreads();
#pragma unroll
for (int r = 0; r < 4; r++) {
#pragma unroll
  for (int f = 0; f < 4; f++) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int local = 16 * r + team + c / 2 * 8, row = first_row + local, output = first_output + 8 * f + 2 * part + c % 2;
      if (row < m && output < OUTPUTS) {
        float y = scaled(acc[r][f][c] - sums[local], scale[output], s[row]);
        const int64_t at = static_cast<int64_t>(row) * OUTPUTS + output;
        if constexpr (RESIDUAL) {
          y = __fadd_rn(y, residual[at]);
        }
        out[at] = y;
      }
    }
  }
}
