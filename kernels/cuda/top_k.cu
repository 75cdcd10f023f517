// The K highest logits of each row [m][n], by falling logit and then by id, and log-sum-exps of logits / temperature.
// One block a row. The K-th best of the threads' own best logits is a bound that at least K logits keep; those are
// gathered and sorted. Where too many keep it, the best are looked for one by one.
// -> ids and values [m][K], lse [m][TEMPERATURES]. sizes: n, at least K. Constants: K, THREADS (a power of two, at least
// K), ROOM (likewise, at least THREADS), TEMPERATURES.
constexpr int warps = THREADS / 32;
__shared__ uint64_t keys[ROOM];
__shared__ float parts[warps];
__shared__ int count;
const int n = sizes[0], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
const float* row = logits + static_cast<int64_t>(blockIdx.x) * n;

// Sorts `size` keys, a power of two, falling.
const auto sort = [&](int size) {
  for (int length = 2; length <= size; length *= 2) {
    for (int apart = length / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += THREADS) {
        const int other = i ^ apart;
        if (other > i) {
          const uint64_t a = keys[i], b = keys[other];
          if ((a < b) == ((i & length) == 0)) {
            keys[i] = b;
            keys[other] = a;
          }
        }
      }
    }
  }
  __syncthreads();
};

uint64_t best = 0;
#pragma unroll 8
for (int i = threadIdx.x; i < n; i += THREADS) {
  const uint64_t key = rank_of(row[i], i);
  best = key > best ? key : best;
}
keys[threadIdx.x] = best;
if (threadIdx.x == 0) {
  count = 0;
}
sort(THREADS);
const uint64_t bound = keys[K - 1];
const float top = logit_of(keys[0]);
__syncthreads();
float inverse[TEMPERATURES], sums[TEMPERATURES] = {};
#pragma unroll
for (int t = 0; t < TEMPERATURES; t++) {
  inverse[t] = __fdiv_rn(1.0f, temperatures[t]);
}
#pragma unroll 4
for (int i = threadIdx.x; i < n; i += THREADS) {
  const float x = row[i];
  const uint64_t key = rank_of(x, i);
  if (key >= bound) {
    const int at = atomicAdd(&count, 1);
    if (at < ROOM) {
      keys[at] = key;
    }
  }
#pragma unroll
  for (int t = 0; t < TEMPERATURES; t++) {
    sums[t] = __fadd_rn(sums[t], expf(__fmul_rn(__fsub_rn(x, top), inverse[t])));
  }
}
__syncthreads();
const int found = count;
if (found <= ROOM) {
  int size = THREADS;
  while (size < found) {
    size *= 2;
  }
  for (int i = found + threadIdx.x; i < size; i += THREADS) {
    keys[i] = 0;
  }
  sort(size);
} else {
  uint64_t before = ~static_cast<uint64_t>(0);
  __shared__ uint64_t bests[warps];
  for (int rank = 0; rank < K; rank++) {
    best = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
      const uint64_t key = rank_of(row[i], i);
      best = key < before && key > best ? key : best;
    }
    for (int other = 16; other > 0; other /= 2) {
      const uint64_t theirs = __shfl_xor_sync(kAllLanes, best, other);
      best = theirs > best ? theirs : best;
    }
    if (lane == 0) {
      bests[warp] = best;
    }
    __syncthreads();
    before = 0;
    for (int w = 0; w < warps; w++) {
      before = bests[w] > before ? bests[w] : before;
    }
    if (threadIdx.x == 0) {
      keys[rank] = before;
    }
    __syncthreads();
  }
}
for (int i = threadIdx.x; i < K; i += THREADS) {
  ids[static_cast<int64_t>(blockIdx.x) * K + i] = id_of(keys[i]);
  values[static_cast<int64_t>(blockIdx.x) * K + i] = logit_of(keys[i]);
}
#pragma unroll
for (int t = 0; t < TEMPERATURES; t++) {
  const float sum = sum_lanes(sums[t]);
  __syncthreads();
  if (lane == 0) {
    parts[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < warps; w++) {
      total = __fadd_rn(total, parts[w]);
    }
    lse[static_cast<int64_t>(blockIdx.x) * TEMPERATURES + t] = __fadd_rn(__fmul_rn(top, inverse[t]), logf(total));
  }
}
