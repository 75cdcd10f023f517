// RMSNorm: a threadgroup a row, whose order of summation does not depend on the other rows.
//
// x: float [m, k]; norm: float [k]; dims: k, bits of eps. y: float [m, k].

threadgroup float partial[LANES];

const int k = dims[0];
const int row = threadgroup_position_in_grid.x;
const int threads = threads_per_threadgroup.x;
const auto values = x + row * k;

float squares = 0.0f;
for (int i = thread_index_in_threadgroup; i < k; i += threads) {
  squares = fma(values[i], values[i], squares);
}
squares = group_sum(
    squares, partial, simdgroup_index_in_threadgroup, thread_index_in_simdgroup, simdgroups_per_threadgroup);
const float inverse = precise::rsqrt(nearest_quotient(squares, float(k)) + as_type<float>(dims[1]));
for (int i = thread_index_in_threadgroup; i < k; i += threads) {
  y[row * k + i] = values[i] * inverse * norm[i];
}
