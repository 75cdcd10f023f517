// The chunks of every query, combined in order: parts of the rows first, first + 1, .. -> out [m][HEADS * DIM]. One
// block a row and head. positions: of all rows; sizes: m, first and the number of chunks.
// Constants: HEADS, KV_HEADS, DIM.
constexpr int GROUP = HEADS / KV_HEADS, width = DIM + 2;
const int row = blockIdx.x, head = blockIdx.y;
const int64_t line = static_cast<int64_t>(sizes[0]) * GROUP * width;
const float* first =
    parts + head / GROUP * sizes[2] * line + (static_cast<int64_t>(row) * GROUP + head % GROUP) * width;
out[(static_cast<int64_t>(row) * HEADS + head) * DIM + threadIdx.x] =
    combine_chunks<DIM>(first, line, positions[sizes[1] + row] / kChunk + 1, threadIdx.x);
