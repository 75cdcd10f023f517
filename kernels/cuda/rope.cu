// qkv [m][QKV] -> rotated and scaled queries [m][Q], rotated keys and plain values [KV_HEADS][m][DIM].
// One block a row. Constants: HEADS, KV_HEADS, DIM, SCALE (bits), THREADS. rows: m and the offset.
constexpr int half = DIM / 2, width = (HEADS + 2 * KV_HEADS) * DIM;
__shared__ float2 turns[half];
const int row = blockIdx.x, m = rows[0], offset = rows[1];
rope_table<1, DIM, THREADS>(frequency, offset + row, turns);
__syncthreads();
const float* from = qkv + static_cast<int64_t>(row) * width;
for (int i = threadIdx.x; i < (HEADS + KV_HEADS) * half; i += THREADS) {
  const int head = i / half, d = i % half;
  const float2 y = rotated(from[head * DIM + d], from[head * DIM + d + half], turns[d]);
  if (head < HEADS) {
    float* to = queries + static_cast<int64_t>(row) * HEADS * DIM + head * DIM;
    to[d] = __fmul_rn(y.x, __int_as_float(SCALE));
    to[d + half] = __fmul_rn(y.y, __int_as_float(SCALE));
  } else {
    float* to = keys + (static_cast<int64_t>(head - HEADS) * m + row) * DIM;
    to[d] = y.x;
    to[d + half] = y.y;
  }
}
for (int i = threadIdx.x; i < KV_HEADS * DIM; i += THREADS) {
  values[(static_cast<int64_t>(i / DIM) * m + row) * DIM + i % DIM] = from[(HEADS + KV_HEADS) * DIM + i];
}
