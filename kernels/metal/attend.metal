// Attention of up to 8 rows of a sequence to one chunk of 32 keys of one key-value head, to be combined by
// combine.metal. Their `count * group` queries of the head ("lines", rows first) are shared out LINES a simdgroup,
// which reads keys and values once for them. A lane holds DIM / 32 elements of a key, or the weight of one key.
//
// queries: float [m, heads, DIM]; keys, values: bfloat16 [sequences, kv_heads, capacity, DIM]; groups: int [.., 4], the
// sequence, the first row, how many rows (count), and the first one's position; dims: m, kv_heads, capacity, group.
// tops, totals: float [kv_heads, chunks, m * group], the largest score and the sum of exponentials; parts: float
// [kv_heads, chunks, m * group, DIM], the weighted sum of values. Nothing is written for a line that stands before the
// chunk. Chunks lie at fixed keys, and a line's loops end at its own key, so its bits depend on its own position only.

constexpr int PART = DIM / LANES;
const int kv_heads = dims[1];
const int capacity = dims[2];
const int group = dims[3];
const int chunks = threadgroups_per_grid.x;
const int start = threadgroup_position_in_grid.x * LANES;
const int kv_head = int(threadgroup_position_in_grid.y) % kv_heads;
const int heads = kv_heads * group;
const int lane = thread_index_in_simdgroup;
const int sequence = groups[threadgroup_position_in_grid.z * 4];
const int row = groups[threadgroup_position_in_grid.z * 4 + 1];
const int lines = groups[threadgroup_position_in_grid.z * 4 + 2] * group;
const int offset = groups[threadgroup_position_in_grid.z * 4 + 3];
const int first =
    (int(threadgroup_position_in_grid.y) / kv_heads * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) *
    LINES;
if (first >= lines) {
  return;
}

float query[LINES][PART];
int seen[LINES];  // keys of this chunk
int most = 0;
for (int l = 0; l < LINES; ++l) {
  const int line = min(first + l, lines - 1);
  const int head = kv_head * group + line % group;
  for (int i = 0; i < PART; ++i) {
    query[l][i] = queries[((row + line / group) * heads + head) * DIM + i * LANES + lane];
  }
  seen[l] = clamp(offset + line / group + 1 - start, 0, LANES);
  most = max(most, seen[l]);
}

float score[LINES];
for (int l = 0; l < LINES; ++l) {
  score[l] = -INFINITY;
}
const long base = (long(sequence * kv_heads + kv_head) * capacity + start) * DIM + lane;
const int place = (kv_head * chunks + int(threadgroup_position_in_grid.x)) * dims[0] * group + row * group + first;
for (int key = 0; key < most; ++key) {
  float elements[PART];
  for (int i = 0; i < PART; ++i) {
    elements[i] = float(keys[base + key * DIM + i * LANES]);
  }
  for (int l = 0; l < LINES; ++l) {
    if (key < seen[l]) {
      float product = 0.0f;
      for (int i = 0; i < PART; ++i) {
        product = fma(query[l][i], elements[i], product);
      }
      product = simd_sum(product);
      if (lane == key) {
        score[l] = product;
      }
    }
  }
}

float weight[LINES];
float part[LINES][PART];
for (int l = 0; l < LINES; ++l) {
  const int at = place + l;
  const float top = simd_max(score[l]);
  weight[l] = lane < seen[l] ? precise::exp(score[l] - top) : 0.0f;
  const float total = simd_sum(weight[l]);
  if (lane == 0 && first + l < lines && seen[l] > 0) {
    tops[at] = top;
    totals[at] = total;
  }
  for (int i = 0; i < PART; ++i) {
    part[l][i] = 0.0f;
  }
}
for (int key = 0; key < most; ++key) {
  float elements[PART];
  for (int i = 0; i < PART; ++i) {
    elements[i] = float(values[base + key * DIM + i * LANES]);
  }
  for (int l = 0; l < LINES; ++l) {
    if (key < seen[l]) {
      const float share = simd_broadcast(weight[l], ushort(key));
      for (int i = 0; i < PART; ++i) {
        part[l][i] = fma(share, elements[i], part[l][i]);
      }
    }
  }
}
for (int l = 0; l < LINES; ++l) {
  if (first + l < lines && seen[l] > 0) {
    for (int i = 0; i < PART; ++i) {
      parts[(place + l) * DIM + i * LANES + lane] = part[l][i];
    }
  }
}
