// Any number of float rows times a bfloat16 matrix [n][k], k a multiple of 8, each output in the order of sums that
// `dense_quad` has: a lane's part in order of k, then one fixed tree. A block of eight warps has 32 rows and 32 outputs
// (with a gate, 16 of the gate and their partners), a warp 16 rows and 8 outputs, of which a lane has eight inputs in
// 256; two such parts of rows and weights are in shared memory, one of them on its way.
// sizes: n, k, m. Constants: GATE, RESIDUAL.
constexpr int row_tile = 32, output_tile = 32, rows = 16, columns = 8, own = GATE ? 4 : 8, threads = 256;
constexpr int part = 256, x_floats = row_tile * part, stage_bytes = 4 * x_floats + 2 * output_tile * part;
extern __shared__ __align__(128) uint8_t work[];
const int n = sizes[0], k = sizes[1], m = sizes[2], width = GATE ? n / 2 : n, steps = (k + part - 1) / part;
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp % 2, warp_n = warp / 2;
const int first_row = blockIdx.x * row_tile, first = blockIdx.y * 4 * own;

const auto fetch = [&](int step) {
  if (step < steps) {
    uint8_t* to = work + step % 2 * stage_bytes;
#pragma unroll 4
    for (int i = threadIdx.x; i < row_tile * part / 4; i += threads) {
      const int local = i / (part / 4), piece = i % (part / 4), at = part * step + 4 * piece;
      const int row = first_row + local < m ? first_row + local : m - 1;
      if (at < k) {  // a lane's first four inputs, then its others: so lanes read from different banks
        copy_ahead(to + 4 * part * local + 16 * (piece % 2 * 32 + piece / 2), x + static_cast<int64_t>(row) * k + at);
      }
    }
#pragma unroll
    for (int i = threadIdx.x; i < output_tile * part / 8; i += threads) {
      const int local = i / (part / 8), piece = i % (part / 8), at = part * step + 8 * piece;
      const int c = local % columns, output = first + local / columns * own + c % own;
      const int64_t line = (output < width ? output : width - 1) + (c < own ? 0 : width);
      if (at < k) {
        copy_ahead(to + 4 * x_floats + 2 * part * local + 16 * piece, weight + line * k + at);
      }
    }
  }
  close_copies();
};

// The bits of a sum's index: rows 4, 2, 1, outputs 2, 1, then row 8 and output 4, which the same lane will have.
const auto index = [](int r, int c) {
  return ((r >> 2 & 1) << 6) | ((r >> 1 & 1) << 5) | ((r & 1) << 4) | ((c & 3) << 2) | (r >> 3 << 1) | c >> 2;
};
float sums[rows * columns] = {};
const bool working = first_row + rows * warp_m < m;
fetch(0);
#pragma unroll 1
for (int step = 0; step < steps; step++) {
  fetch(step + 1);
  await_copies<1>();
  __syncthreads();
  if (working && part * step + 8 * lane < k) {
    const float* from = reinterpret_cast<const float*>(work + step % 2 * stage_bytes) + rows * warp_m * part + 4 * lane;
    const uint8_t* codes = work + step % 2 * stage_bytes + 4 * x_floats + warp_n * columns * 2 * part + 16 * lane;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float w[columns][4];
#pragma unroll
      for (int c = 0; c < columns; c++) {
        const uint4 v = *reinterpret_cast<const uint4*>(codes + 2 * part * c);
        const unsigned low = half ? v.z : v.x, high = half ? v.w : v.y;
        w[c][0] = __uint_as_float(low << 16);
        w[c][1] = __uint_as_float(low & 0xffff0000u);
        w[c][2] = __uint_as_float(high << 16);
        w[c][3] = __uint_as_float(high & 0xffff0000u);
      }
#pragma unroll
      for (int r = 0; r < rows; r++) {
        float v[4];
        const float4 four = *reinterpret_cast<const float4*>(from + part * r + 128 * half);
        v[0] = four.x;
        v[1] = four.y;
        v[2] = four.z;
        v[3] = four.w;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int c = 0; c < columns; c++) {
            sums[index(r, c)] = __fmaf_rn(w[c][i], v[i], sums[index(r, c)]);
          }
        }
      }
    }
  }
  __syncthreads();  // read, before the next part but one comes
}
sum_lanes_apart<16, rows * columns>(sums);
#pragma unroll
for (int r = 0; r < 2; r++) {
  const int row = first_row + rows * warp_m + 8 * r + lane / 4;
#pragma unroll
  for (int c = 0; c < (GATE ? 1 : 2); c++) {
    const int output = first + own * warp_n + lane % 4 + 4 * c;
    if (row < m && output < width) {
      float y = sums[2 * r + c];
      if constexpr (GATE != 0) {
        y = gated<GATE == 1>(y, sums[2 * r + 1]);
      }
      const int64_t at = static_cast<int64_t>(row) * width + output;
      if constexpr (RESIDUAL) {
        y = __fadd_rn(y, residual[at]);
      }
      out[at] = y;
    }
  }
}
