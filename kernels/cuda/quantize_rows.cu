// x [m][K] -> xq [m][PADDED] int8, s [m]. One block a row. Constants: K (a multiple of 4), PADDED, NORM, EPS
// (bits), THREADS.
using namespace bitdraft;
__shared__ RowScratch scratch;
const int64_t row = blockIdx.x;
quantise_row<K, THREADS>([&](int i) { return load_shared4(x + row * K + i); }, NORM ? norm : nullptr,
                         __int_as_float(EPS), xq + row * PADDED, PADDED, scratch);
if (threadIdx.x == 0) {
  s[row] = scratch.s;
}
