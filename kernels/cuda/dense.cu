// M = 1..8 float rows times a bfloat16 or float32 matrix [n][k]; a warp has four outputs (with a gate, four
// of the gate and their partners) to itself. sizes: n.
// Constants: T, K, M, GATE, RESIDUAL, THREADS.
extern __shared__ __align__(128) uint8_t work[];
const int n = sizes[0], width = GATE ? n / 2 : n;
float* rows = reinterpret_cast<float*>(work);
for (int i = threadIdx.x; i < M * K; i += THREADS) {
  rows[i] = x[i];
}
__syncthreads();
const int lane = threadIdx.x % 32, j = lane / M, m = lane % M;
const int64_t first = 4 * (static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32);
if (first < width) {
  float y = dense_quad<T, M>(weight, K, n, first, rows);
  if constexpr (GATE != 0) {
    y = gated<GATE == 1>(y, dense_quad<T, M>(weight, K, n, width + first, rows));
  }
  if (j < 4 && first + j < width) {
    const int64_t at = m * static_cast<int64_t>(width) + first + j;
    if constexpr (RESIDUAL) {
      y = __fadd_rn(y, residual[at]);
    }
    out[at] = y;
  }
}
