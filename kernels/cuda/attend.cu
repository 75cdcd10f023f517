// Parts of attention: a block has up to M rows from blockIdx.z * M on, a key/value head and a chunk of keys.
// queries [m][HEADS * DIM], caches [KV_HEADS][capacity][DIM] -> parts [KV_HEADS][chunks][m * GROUP][DIM + 2].
// Constants: M, HEADS, KV_HEADS, DIM, THREADS. rows: m, the offset and the capacity.
using namespace bitdraft;
constexpr int GROUP = HEADS / KV_HEADS, width = DIM + 2, lines = M * GROUP;
extern __shared__ __align__(128) uint8_t work[];
const ChunkMemory<lines, DIM> memory(work);
const int m = rows[0], offset = rows[1], capacity = rows[2];
const int chunk = blockIdx.x, head = blockIdx.y, first = blockIdx.z * M, start = chunk * kChunk;
const int here = m - first < M ? m - first : M, total = offset + first + here;
if (start < total) {
  const int count = total - start < kChunk ? total - start : kChunk;
  const int64_t at = (static_cast<int64_t>(head) * capacity + start) * DIM;
  memory.load<THREADS>(keys + at, values + at, count);
  for (int i = threadIdx.x; i < (kChunk - count) * DIM; i += THREADS) {
    memory.values[count * DIM + i] = 0;  // weighs zero, but must be a number
  }
  for (int i = threadIdx.x; i < here * GROUP * DIM; i += THREADS) {
    const int query = i / DIM, h = head * GROUP + query % GROUP;
    memory.queries[i] = queries[(static_cast<int64_t>(first + query / GROUP) * HEADS + h) * DIM + i % DIM];
  }
  __syncthreads();
  const auto last = [&](int query) {
    const int seen = offset + first + query / GROUP - start;
    return query / GROUP >= here ? -1 : seen < kChunk - 1 ? seen : kChunk - 1;
  };
  attend_chunk<lines, DIM, THREADS>(
      memory, last, parts + ((static_cast<int64_t>(head) * gridDim.x + chunk) * m + first) * GROUP * width);
}
