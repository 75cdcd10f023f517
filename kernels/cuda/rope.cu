// qkv [m][QKV] -> rotated and scaled queries [m][Q], rotated keys and plain values [m][KV_HEADS * DIM].
// One block a row. positions: of each row. Constants: HEADS, KV_HEADS, DIM, SCALE (bits), THREADS.
constexpr int half = DIM / 2, width = (HEADS + 2 * KV_HEADS) * DIM;
__shared__ float2 turns[half];
const int64_t row = blockIdx.x;
rope_table<1, DIM, THREADS>(frequency, positions[row], turns);
__syncthreads();
const float* from = qkv + row * width;
for (int i = threadIdx.x; i < (HEADS + KV_HEADS) * half; i += THREADS) {
  const int head = i / half, d = i % half;
  const float2 y = rotated(from[head * DIM + d], from[head * DIM + d + half], turns[d]);
  if (head < HEADS) {
    float* to = queries + (row * HEADS + head) * DIM;
    to[d] = __fmul_rn(y.x, __int_as_float(SCALE));
    to[d + half] = __fmul_rn(y.y, __int_as_float(SCALE));
  } else {
    float* to = keys + (row * KV_HEADS + head - HEADS) * DIM;
    to[d] = y.x;
    to[d + half] = y.y;
  }
}
for (int i = threadIdx.x; i < KV_HEADS * DIM; i += THREADS) {
  values[row * KV_HEADS * DIM + i] = from[(HEADS + KV_HEADS) * DIM + i];
}
