// Over a row of logits: the largest, sums of exponentials, and what lies above a threshold.

// The largest of n > 0 values; a NaN counts as none.
float largest(const float* x, int64_t n) {
  F top[2] = {set1(-INFINITY), set1(-INFINITY)};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    top[0] = max(load(x + i), top[0]);
    top[1] = max(load(x + i + 16), top[1]);
  }
  float best = max_lanes(max(top[0], top[1]));
  for (; i < n; i++) {
    best = x[i] > best ? x[i] : best;
  }
  return best;
}

// The sum of exp((x - top) * factor), in sixteen lanes in order and then across lanes.
float exp_sum(const float* x, int64_t n, float top, float factor) {
  const F highest = set1(top), scale = set1(factor);
  F total = set1(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    total = total + exp_lanes((load(x + i) - highest) * scale);
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    float lanes[16];
    store(lanes, exp_lanes((load_part(x + i, rest) - highest) * scale));
    total = total + load_part(lanes, rest);
  }
  return sum_lanes(total);
}

// The first index from `from` on whose value is above the threshold, or n.
int64_t next_above(const float* x, int64_t from, int64_t n, float threshold) {
  const F limit = set1(threshold);
  for (; from + 16 <= n && !any_above(load(x + from), limit); from += 16) {
  }
  for (; from < n && !(x[from] > threshold); from++) {
  }
  return from;
}
