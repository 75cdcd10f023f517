// x [m][K] -> xq [m][PADDED] int8, s [m]. One block a row. Constants: K (a multiple of 4), PADDED,
// NORM, EPS, THREADS.
using namespace bitdraft;
__shared__ float scratch[3 * 32];
__shared__ int sums[1];
const int64_t row = blockIdx.x;
quantise_rows<1, THREADS>(x + row * K, K, K, NORM ? norm : nullptr, __int_as_float(EPS), xq + row * PADDED, PADDED,
                          PADDED, s + row, sums, scratch);
