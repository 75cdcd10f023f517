// Float rows times a bfloat16 or float32 matrix [n][k], M = 1..8 of them a block; a warp has four outputs (with a gate,
// four of the gate and their partners) to itself. sizes: n, rows in all.
// Constants: T, K, M, GATE, RESIDUAL, THREADS.
extern __shared__ __align__(128) uint8_t work[];
const int n = sizes[0], width = GATE ? n / 2 : n, first_row = blockIdx.y * M;
const int here = sizes[1] - first_row < M ? sizes[1] - first_row : M;
float* rows = reinterpret_cast<float*>(work);
for (int i = threadIdx.x; i < M * K; i += THREADS) {
  rows[i] = i < here * K ? x[static_cast<int64_t>(first_row) * K + i] : 0.0f;
}
__syncthreads();
const int lane = threadIdx.x % 32, j = lane / M, m = lane % M;
const int64_t first = 4 * (static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32);
if (first < width) {
  float y = dense_quad<T, M>(weight, K, n, first, rows);
  if constexpr (GATE != 0) {
    y = gated<GATE == 1>(y, dense_quad<T, M>(weight, K, n, width + first, rows));
  }
  if (j < 4 && m < here && first + j < width) {
    const int64_t at = (first_row + m) * static_cast<int64_t>(width) + first + j;
    if constexpr (RESIDUAL) {
      y = __fadd_rn(y, residual[at]);
    }
    out[at] = y;
  }
}
