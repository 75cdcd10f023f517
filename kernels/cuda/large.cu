// The product of many int8 rows with a ternary or int8 matrix: a block of four warps takes 64 rows and 128
// outputs, a warp 32 of these, and every weight in registers serves 64 rows. sizes: outputs, spans, rows.
// Constants: KIND, RESIDUAL.
constexpr int row_tile = 64, groups = row_tile / 8, mine = 2, line = kSpan + 16;  // bytes, spread over banks
__shared__ __align__(16) int8_t tile[row_tile * line];
__shared__ int sums[row_tile];
const int outputs = sizes[0], spans = sizes[1], m = sizes[2], first_row = blockIdx.y * row_tile;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = lane / 4, part = lane % 4;
const int tiles = (outputs + kTile - 1) / kTile, first_tile = (blockIdx.x * 4 + warp) * mine;
const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight);
int acc[mine][groups][4] = {};
int sum = 0;  // of half a row: thread t sums half t % 2 of row t / 2

for (int span = 0; span < spans; span++) {
  Piece<KIND> pieces[mine];
#pragma unroll
  for (int t = 0; t < mine; t++) {
    const int which = first_tile + t < tiles ? first_tile + t : tiles - 1;
    pieces[t].load(codes + (static_cast<int64_t>(which) * spans + span) * kPieceBytes<KIND> + 16 * lane);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row_tile * kSpan / 16; i += 128) {
    const int row = i / (kSpan / 16), column = i % (kSpan / 16) * 16;
    int4 v = make_int4(0, 0, 0, 0);
    if (first_row + row < m) {
      v = *reinterpret_cast<const int4*>(xq + (static_cast<int64_t>(first_row + row) * spans + span) * kSpan + column);
    }
    *reinterpret_cast<int4*>(tile + row * line + column) = v;
  }
  __syncthreads();
  if constexpr (KIND == kTernary) {
    const int* half = reinterpret_cast<const int*>(tile + threadIdx.x / 2 * line + threadIdx.x % 2 * (kSpan / 2));
    for (int i = 0; i < kSpan / 8; i++) {
      sum = __dp4a(0x01010101, half[i], sum);
    }
  }
#pragma unroll
  for (int g = 0; g < groups; g++) {
    RowPiece rows;
    rows.load(tile + (8 * g + team) * line + 32 * part);
#pragma unroll
    for (int t = 0; t < mine; t++) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        unsigned a[4];
        pieces[t].operands(step, a);
        if constexpr (KIND == kTernary) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            a[i] >>= 2 * step;
          }
        }
        multiply(acc[t][g], a, rows.operand(step, 0), rows.operand(step, 1));
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
for (int t = 0; t < mine; t++) {
#pragma unroll
  for (int g = 0; g < groups; g++) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int local = 8 * g + 2 * part + c % 2, row = first_row + local;
      const int output = (first_tile + t) * kTile + team + c / 2 * 8;
      if (row < m && output < outputs) {
        float y = scaled(acc[t][g][c] - sums[local], scale[output], s[row]);
        const int64_t at = static_cast<int64_t>(row) * outputs + output;
        if constexpr (RESIDUAL) {
          y = __fadd_rn(y, residual[at]);
        }
        out[at] = y;
      }
    }
  }
}
