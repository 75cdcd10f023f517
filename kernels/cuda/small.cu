// The product of M = 1..8 int8 rows with a ternary or int8 matrix. A block takes TILES tiles of outputs
// (with a gate: TILES of the gate and their partners). sizes: outputs, spans of inputs.
// Constants: KIND, M, GATE (0, 1 relu2, 2 silu), RESIDUAL, TILES, THREADS.
using namespace bitdraft;
constexpr int sets = GATE ? 2 : 1;
__shared__ int acc[sets * TILES * kTile * M];
__shared__ int sums[M];
const int outputs = sizes[0], spans = sizes[1], width = outputs / sets, stride = kSpan * spans;
const int tiles = (width + kTile - 1) / kTile, first = blockIdx.x * TILES;
const int count = tiles - first < TILES ? tiles - first : TILES;
const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight);
TileProduct<KIND, M, THREADS> product(codes, spans, first, count);
for (int i = threadIdx.x; i < sets * TILES * kTile * M; i += THREADS) {
  acc[i] = 0;
}
if (threadIdx.x < M) {
  sums[threadIdx.x] = 0;
}
__syncthreads();
product.add(xq, stride, acc);
if constexpr (GATE != 0) {
  TileProduct<KIND, M, THREADS>(codes, spans, tiles + first, count).add(xq, stride, acc + TILES * kTile * M);
}
if constexpr (KIND == kTernary) {
  sum_rows<M, THREADS>(xq, stride, sums);
}
__syncthreads();
for (int i = threadIdx.x; i < count * kTile * M; i += THREADS) {
  const int m = i % M, j = kTile * first + i / M;
  if (j < width) {
    float y = scaled(acc[i] - sums[m], scale[j], s[m]);
    if constexpr (GATE != 0) {
      y = gated<GATE == 1>(y, scaled(acc[TILES * kTile * M + i] - sums[m], scale[width + j], s[m]));
    }
    if constexpr (RESIDUAL) {
      y = __fadd_rn(y, residual[m * width + j]);
    }
    out[m * width + j] = y;
  }
}
