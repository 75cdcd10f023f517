// x [m][k] -> xq [m][padded] int8, s [m]. One block a row. sizes: k (a multiple of 4) and padded.
// Constants: NORM, EPS (bits), THREADS.
__shared__ float scratch[2 * 32];
const int64_t row = blockIdx.x;
const int k = sizes[0], padded = sizes[1];
quantise_row<THREADS>(x + row * k, k, NORM ? norm : nullptr, __int_as_float(EPS), xq + row * padded, padded, s + row,
                      scratch);
