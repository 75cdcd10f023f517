// qkv [m][QKV] -> rotated and scaled queries [m][Q]; rotated keys and plain values go, rounded, to where they stand, in place.
// One block a row. sequences, positions: of each row; keys, values: position p of a head of a sequence is DIM values at
// DIM * (p * sizes[0] + head * sizes[1] + sequence * sizes[2]). after: what must have been done before.
// Constants: HEADS, KV_HEADS, DIM, SCALE (bits), THREADS.
constexpr int half = DIM / 2, width = (HEADS + 2 * KV_HEADS) * DIM;
__shared__ float2 turns[half];
const int64_t row = blockIdx.x;
rope_table<1, DIM, THREADS>(frequency, positions[row], turns);
__syncthreads();
const float* from = qkv + row * width;
const int64_t base = static_cast<int64_t>(positions[row]) * sizes[0] + static_cast<int64_t>(sequences[row]) * sizes[2];
for (int i = threadIdx.x; i < (HEADS + KV_HEADS) * half; i += THREADS) {
  const int head = i / half, d = i % half;
  const float2 y = rotated(from[head * DIM + d], from[head * DIM + d + half], turns[d]);
  if (head < HEADS) {
    float* to = queries + (row * HEADS + head) * DIM;
    to[d] = __fmul_rn(y.x, __int_as_float(SCALE));
    to[d + half] = __fmul_rn(y.y, __int_as_float(SCALE));
  } else {
    bfloat16* to = const_cast<bfloat16*>(keys) + (base + static_cast<int64_t>(head - HEADS) * sizes[1]) * DIM;
    to[d] = to_bfloat16(y.x);
    to[d + half] = to_bfloat16(y.y);
  }
}
for (int i = threadIdx.x; i < KV_HEADS * DIM; i += THREADS) {
  bfloat16* to = const_cast<bfloat16*>(values) + (base + static_cast<int64_t>(i / DIM) * sizes[1]) * DIM;
  to[i % DIM] = to_bfloat16(from[(HEADS + KV_HEADS) * DIM + i]);
}
