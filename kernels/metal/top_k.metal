// The K highest logits of each row, by falling logit and then by id, and log-sum-exps of logits / temperature. A
// threadgroup a row. The K-th best of the threads' own best logits is a bound that at least K logits keep; those
// are gathered, each thread's behind those of the threads before it, and sorted. Where too many keep it, the best
// are looked for one by one.
//
// logits: float [m, n]; temperatures: float [TEMPERATURES]; dims: n, at least K. ids: uint [m, K]; values: float
// [m, K]; lse: float [m, TEMPERATURES]. THREADS, a power of two, is at least K; ROOM is twice that.

threadgroup ulong keys[ROOM];
threadgroup int counts[THREADS];
threadgroup float partial[LANES];

const int n = dims[0];
const int row = threadgroup_position_in_grid.x;
const int index = thread_index_in_threadgroup;
const auto line = logits + long(row) * n;

ulong best = 0ul;
for (int i = index; i < n; i += THREADS) {
  const ulong key = rank_of(line[i], uint(i));
  best = key > best ? key : best;
}
keys[index] = best;
sort_falling(keys, THREADS, index, THREADS);
const ulong bound = keys[K - 1];
const float top = logit_of(keys[0]);

int found = 0;
float sums[TEMPERATURES];
for (int t = 0; t < TEMPERATURES; ++t) {
  sums[t] = 0.0f;
}
for (int i = index; i < n; i += THREADS) {
  found += rank_of(line[i], uint(i)) >= bound ? 1 : 0;
  for (int t = 0; t < TEMPERATURES; ++t) {
    sums[t] += precise::exp(nearest_quotient(line[i] - top, temperatures[t]));
  }
}
for (int t = 0; t < TEMPERATURES; ++t) {
  const float sum = group_sum(
      sums[t], partial, simdgroup_index_in_threadgroup, thread_index_in_simdgroup, simdgroups_per_threadgroup);
  if (index == 0) {
    lse[row * TEMPERATURES + t] = nearest_quotient(top, temperatures[t]) + precise::log(sum);
  }
}

counts[index] = found;
for (int apart = 1; apart < THREADS; apart *= 2) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int before = index >= apart ? counts[index - apart] : 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  counts[index] += before;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const int all = counts[THREADS - 1];
if (all <= ROOM) {
  for (int i = index; i < ROOM; i += THREADS) {
    keys[i] = 0ul;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int at = counts[index] - found;
  for (int i = index; i < n; i += THREADS) {
    const ulong key = rank_of(line[i], uint(i));
    if (key >= bound) {
      keys[at] = key;
      ++at;
    }
  }
  sort_falling(keys, all <= THREADS ? THREADS : ROOM, index, THREADS);
} else {
  ulong before = ~0ul;
  for (int rank = 0; rank < K; ++rank) {
    best = 0ul;
    for (int i = index; i < n; i += THREADS) {
      const ulong key = rank_of(line[i], uint(i));
      best = key < before && key > best ? key : best;
    }
    // The second half of the room is for the search, the first for what it finds.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    keys[THREADS + index] = best;
    for (int half_of = THREADS / 2; half_of > 0; half_of /= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (index < half_of && keys[THREADS + index] < keys[THREADS + index + half_of]) {
        keys[THREADS + index] = keys[THREADS + index + half_of];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    before = keys[THREADS];
    if (index == 0) {
      keys[rank] = before;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (int i = index; i < K; i += THREADS) {
  ids[row * K + i] = id_of(keys[i]);
  values[row * K + i] = logit_of(keys[i]);
}
