// Parts of attention: a block has a group of up to M rows of one sequence, a key/value head and a chunk of keys.
// queries [..][HEADS * DIM], caches [sequences][KV_HEADS][capacity][DIM] -> parts [KV_HEADS][chunks][m * GROUP][DIM + 2]
// of the rows first, first + 1, ..; groups: the sequence, the first row, how many, and its position, of each.
// sizes: m, first and the capacity. Constants: M, HEADS, KV_HEADS, DIM, THREADS.
constexpr int GROUP = HEADS / KV_HEADS, width = DIM + 2, lines = M * GROUP;
extern __shared__ __align__(128) uint8_t work[];
float* mine = reinterpret_cast<float*>(work);
float* chunk_keys = mine + lines * DIM;
float* chunk_values = chunk_keys + kChunk * padded_dim(DIM);
float* weights = chunk_values + kChunk * DIM;
const int chunk = blockIdx.x, head = blockIdx.y, start = chunk * kChunk;
const int sequence = groups[4 * blockIdx.z], row = groups[4 * blockIdx.z + 1], here = groups[4 * blockIdx.z + 2],
          position = groups[4 * blockIdx.z + 3], total = position + here;
if (start < total) {
  const int count = total - start < kChunk ? total - start : kChunk;
  const int64_t at = ((static_cast<int64_t>(sequence) * KV_HEADS + head) * sizes[2] + start) * DIM;
  for (int i = threadIdx.x; i < here * GROUP * DIM; i += THREADS) {
    const int query = i / DIM;
    mine[i] = queries[(static_cast<int64_t>(row + query / GROUP) * HEADS + head * GROUP + query % GROUP) * DIM + i % DIM];
  }
  for (int i = threadIdx.x; i < count * DIM; i += THREADS) {
    chunk_keys[i / DIM * padded_dim(DIM) + i % DIM] = keys[at + i];
    chunk_values[i] = values[at + i];
  }
  __syncthreads();
  const auto last = [&](int query) {
    const int seen = position + query / GROUP - start;
    return query / GROUP >= here ? -1 : seen < kChunk - 1 ? seen : kChunk - 1;
  };
  float* part = parts + ((static_cast<int64_t>(head) * gridDim.x + chunk) * sizes[0] + row - sizes[1]) * GROUP * width;
  attend_chunk<lines, DIM, THREADS>(mine, chunk_keys, chunk_values, count, last, weights, part);
}
