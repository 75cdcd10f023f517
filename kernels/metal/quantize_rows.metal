// [RMSNorm,] int8: a threadgroup a row.
//
// x: float [m, k]; norm: float [k]; dims: k, stride, has norm, bits of eps.
// q: T [m, stride], whole numbers within -128..127, zeros behind k; s: float [m]; sums: int [m], of q.
// Without a norm every operation is rounded once, as in the reference: the bits are the same.

threadgroup float partial[LANES];
threadgroup int partial_sums[LANES];

const int k = dims[0];
const int stride = dims[1];
const bool has_norm = dims[2] != 0;
const int row = threadgroup_position_in_grid.x;
const int thread_index = thread_index_in_threadgroup;
const int threads = threads_per_threadgroup.x;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const auto values = x + row * k;

float inverse = 1.0f;
if (has_norm) {
  float squares = 0.0f;
  for (int i = thread_index; i < k; i += threads) {
    squares = fma(values[i], values[i], squares);
  }
  squares = group_sum(squares, partial, simdgroup, lane, simdgroups);
  inverse = precise::rsqrt(nearest_quotient(squares, float(k)) + as_type<float>(dims[3]));
}

float largest = 0.0f;
for (int i = thread_index; i < k; i += threads) {
  const float value = has_norm ? values[i] * inverse * norm[i] : values[i];
  largest = fmax(largest, fabs(value));
}
largest = group_max(largest, partial, simdgroup, lane, simdgroups);
const float factor = nearest_quotient(127.0f, fmax(largest, 1e-5f));

int sum = 0;
for (int i = thread_index; i < stride; i += threads) {
  float rounded = 0.0f;
  if (i < k) {
    const float value = has_norm ? values[i] * inverse * norm[i] : values[i];
    rounded = clamp(rint(value * factor), -128.0f, 127.0f);
  }
  q[row * stride + i] = T(rounded);
  sum += int(rounded);
}
sum = group_sum(sum, partial_sums, simdgroup, lane, simdgroups);
if (thread_index == 0) {
  s[row] = factor;
  sums[row] = sum;
}
