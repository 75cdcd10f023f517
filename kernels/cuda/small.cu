// The product of M = 1..8 int8 rows with a ternary or int8 matrix. A block takes QUADS quads of outputs (with a
// gate: QUADS of the gate and their partners). Constants: KIND, M, N (outputs, padded to quads of four),
// OUTPUTS (those that exist), BLOCKS (of 16 inputs), GATE (0, 1 relu2, 2 silu), RESIDUAL, QUADS, THREADS.
using namespace bitdraft;
constexpr int sets = GATE ? 2 : 1, quads = N / 4 / sets, width = OUTPUTS / sets, stride = 16 * BLOCKS;
__shared__ int acc[sets * QUADS * 4 * M];
__shared__ int sums[M];
const int first = blockIdx.x * QUADS, count = quads - first < QUADS ? quads - first : QUADS;
for (int i = threadIdx.x; i < sets * QUADS * 4 * M; i += THREADS) {
  acc[i] = 0;
}
if (threadIdx.x < M) {
  sums[threadIdx.x] = 0;
}
__syncthreads();
if constexpr (KIND == kTernary) {
  sum_rows<M, THREADS>(xq, stride, sums);
}
const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight);
multiply_quads<KIND, M, THREADS>(codes, BLOCKS, first, count, xq, stride, acc);
if constexpr (GATE != 0) {
  multiply_quads<KIND, M, THREADS>(codes, BLOCKS, quads + first, count, xq, stride, acc + QUADS * 4 * M);
}
__syncthreads();
for (int i = threadIdx.x; i < count * 4 * M; i += THREADS) {
  const int m = i % M, j = 4 * first + i / M;
  if (j < width) {
    float y = scaled(acc[i] - sums[m], scale[j], s[m]);
    if constexpr (GATE != 0) {
      y = gated<GATE == 1>(y, scaled(acc[QUADS * 4 * M + i] - sums[m], scale[width + j], s[m]));
    }
    if constexpr (RESIDUAL) {
      y = __fadd_rn(y, residual[m * width + j]);
    }
    out[m * width + j] = y;
  }
}
