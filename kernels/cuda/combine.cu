// The chunks of every query, combined: parts [KV_HEADS][chunks][m * GROUP][DIM + 2] -> out [m][HEADS * DIM].
// A block has a row and a key/value head. Constants: HEADS, KV_HEADS, DIM, THREADS. rows: m, the offset, the
// number of chunks.
using namespace bitdraft;
constexpr int GROUP = HEADS / KV_HEADS, width = DIM + 2;
__shared__ float factors[kCombineFloats<GROUP>];
const int row = blockIdx.x, head = blockIdx.y, m = rows[0], chunks = rows[2], mine = (rows[1] + row) / kChunk + 1;
const float* first = parts + (static_cast<int64_t>(head) * chunks * m + row) * GROUP * width;
combine_chunks<GROUP, DIM, THREADS>(
    [&](int query) { return first + query * width; }, static_cast<int64_t>(m) * GROUP * width, mine, factors,
    [&](int query, int d, float value) {
      out[(static_cast<int64_t>(row) * HEADS + head * GROUP + query) * DIM + d] = value;
    });
