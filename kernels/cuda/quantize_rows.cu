// x [m][k] -> xq [m][padded] int8, s [2][m]: the rows' factors, then the sums of their int8. One block a row.
// sizes: k (a multiple of 4), padded and m. Constants: NORM, EPS (bits), THREADS.
__shared__ float scratch[3 * 32];
const int64_t row = blockIdx.x;
const int k = sizes[0], padded = sizes[1];
quantise_row<THREADS>(x + row * k, k, NORM ? norm : nullptr, __int_as_float(EPS), xq + row * padded, padded, s + row,
                      s + sizes[2] + row, scratch);
