// The product of M = 1..8 int8 rows with a ternary or int8 matrix. A block takes TILES tiles of outputs
// (with a gate: TILES of the gate and their partners). sizes: outputs, spans of inputs.
// Constants: KIND, M, GATE (0, 1 relu2, 2 silu), RESIDUAL, TILES, THREADS, and
// SLOTS of a warp's ring, which is the dynamic shared memory.
constexpr int sets = GATE ? 2 : 1;
using Stream = Product<KIND, M, SLOTS>;
extern __shared__ __align__(128) uint8_t work[];
__shared__ int acc[sets * TILES * kTile * M];
const int outputs = sizes[0], spans = sizes[1], width = outputs / sets, stride = kSpan * spans;
const int tiles = (width + kTile - 1) / kTile, first = blockIdx.x * TILES;
const int count = tiles - first < TILES ? tiles - first : TILES;
for (int i = threadIdx.x; i < sets * TILES * kTile * M; i += THREADS) {
  acc[i] = 0;
}
const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight);
Stream product;
product.start(codes, spans, first, count, GATE ? tiles : 0, THREADS / 32, work);
__syncthreads();
product.run(xq, stride, acc);
__syncthreads();
for (int i = threadIdx.x; i < count * kTile * M; i += THREADS) {
  const int m = i % M, j = kTile * first + i / M;
  if (j < width) {
    float y = scaled(acc[i], scale[j], s[m]);
    if constexpr (GATE != 0) {
      y = gated<GATE == 1>(y, scaled(acc[count * kTile * M + i], scale[width + j], s[m]));
    }
    if constexpr (RESIDUAL) {
      y = __fadd_rn(y, residual[m * width + j]);
    }
    out[m * width + j] = y;
  }
}
