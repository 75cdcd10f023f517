// The chunks of every query, folded in order: parts [chunks][rows * HEADS][DIM + 2] -> out [rows][HEADS * DIM]. One block a
// row and head. positions: of the rows; sizes: rows. Constants: HEADS, DIM.
constexpr int width = DIM + 2;
const int64_t query = static_cast<int64_t>(blockIdx.x) * HEADS + blockIdx.y, stride = static_cast<int64_t>(sizes[0]) * HEADS * width;
const int chunks = positions[blockIdx.x] / kChunk + 1, d = threadIdx.x;
const float* part = parts + query * width;
Fold fold = Fold::none();
float value = 0;
#pragma unroll 4
for (int chunk = 0; chunk < chunks; chunk++) {
  const float* now = part + chunk * stride;
  const float2 factors = fold.take(now[DIM], now[DIM + 1]);
  value = folded(value, now[d], factors);
}
out[query * DIM + d] = __fdiv_rn(value, fold.sum);
