// x [m][k] -> parts [3][m][padded] of bfloat16, which add up to each float, the largest first, with zeros behind k.
// One block a row. sizes: k, padded and m. Constants: NORM, EPS (bits), THREADS.
__shared__ float scratch[32];
const int64_t row = blockIdx.x;
const int k = sizes[0], padded = sizes[1];
const int64_t apart = static_cast<int64_t>(sizes[2]) * padded;
const float r = NORM ? row_inverse_rms<THREADS>(x + row * k, k, __int_as_float(EPS), scratch) : 1.0f;
for (int i = threadIdx.x; i < padded; i += THREADS) {
  float left = i < k ? x[row * k + i] : 0.0f;
  if (NORM && i < k) {
    left = normed(left, r, norm + i);
  }
#pragma unroll
  for (int part = 0; part < 3; part++) {
    const bfloat16 nearest = to_bfloat16(left);
    parts[part * apart + row * padded + i] = nearest;
    left = __fsub_rn(left, static_cast<float>(nearest));
  }
}
