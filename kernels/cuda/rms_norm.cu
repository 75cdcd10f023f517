// x [m][k] -> y [m][k]. One block a row. sizes: k. Constants: EPS (bits), THREADS.
__shared__ float scratch[32];
const int64_t row = blockIdx.x;
const int k = sizes[0];
normalise_row<THREADS>(x + row * k, k, norm, __int_as_float(EPS), y + row * k, scratch);
