// x [m][K] -> y [m][K]. One block a row. Constants: K, EPS, THREADS.
using namespace bitdraft;
__shared__ float scratch[32];
const int64_t row = blockIdx.x;
normalise_rows<1, THREADS>(x + row * K, K, K, norm, __int_as_float(EPS), y + row * K, scratch);
