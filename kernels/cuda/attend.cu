// Parts of attention: a block has up to M rows from blockIdx.z * M on, a key/value head and a chunk of keys.
// queries [m][HEADS * DIM], caches [KV_HEADS][capacity][DIM] -> parts [KV_HEADS][chunks][m * GROUP][DIM + 2].
// Constants: M, HEADS, KV_HEADS, DIM, THREADS. rows: m, the offset and the capacity.
constexpr int GROUP = HEADS / KV_HEADS, width = DIM + 2, lines = M * GROUP;
extern __shared__ __align__(128) uint8_t work[];
float* mine = reinterpret_cast<float*>(work);
float* chunk_keys = mine + lines * DIM;
float* chunk_values = chunk_keys + kChunk * padded_dim(DIM);
float* weights = chunk_values + kChunk * DIM;
const int m = rows[0], offset = rows[1], capacity = rows[2];
const int chunk = blockIdx.x, head = blockIdx.y, first = blockIdx.z * M, start = chunk * kChunk;
const int here = m - first < M ? m - first : M, total = offset + first + here;
if (start < total) {
  const int count = total - start < kChunk ? total - start : kChunk;
  const int64_t at = (static_cast<int64_t>(head) * capacity + start) * DIM;
  for (int i = threadIdx.x; i < here * GROUP * DIM; i += THREADS) {
    const int query = i / DIM;
    mine[i] = queries[static_cast<int64_t>(first + query / GROUP) * HEADS * DIM + (head * GROUP + query % GROUP) * DIM + i % DIM];
  }
  for (int i = threadIdx.x; i < count * DIM; i += THREADS) {
    chunk_keys[i / DIM * padded_dim(DIM) + i % DIM] = keys[at + i];
    chunk_values[i] = values[at + i];
  }
  __syncthreads();
  const auto last = [&](int query) {
    const int seen = offset + first + query / GROUP - start;
    return query / GROUP >= here ? -1 : seen < kChunk - 1 ? seen : kChunk - 1;
  };
  float* part = parts + ((static_cast<int64_t>(head) * gridDim.x + chunk) * m + first) * GROUP * width;
  attend_chunk<lines, DIM, THREADS>(mine, chunk_keys, chunk_values, count, last, weights, part);
}
