// The chunks of every query, combined in order: parts -> out [m][HEADS * DIM]. One block a row and head.
// Constants: HEADS, KV_HEADS, DIM. rows: m, the offset, the number of chunks.
constexpr int GROUP = HEADS / KV_HEADS, width = DIM + 2;
const int row = blockIdx.x, head = blockIdx.y, m = rows[0], chunks = rows[2];
const int64_t line = static_cast<int64_t>(m) * GROUP * width;
const float* first = parts + head / GROUP * chunks * line + (static_cast<int64_t>(row) * GROUP + head % GROUP) * width;
out[(static_cast<int64_t>(row) * HEADS + head) * DIM + threadIdx.x] =
    combine_chunks<DIM>(first, line, (rows[1] + row) / kChunk + 1, threadIdx.x);
