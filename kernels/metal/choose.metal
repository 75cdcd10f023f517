// A token a row of logits: the highest logit at temperature 0, of equal ones the lowest id; else
// softmax(logits / temperature) inverted at a uniform number. A threadgroup a row. Each simdgroup sums up a stretch
// of ids, 32 at a time; where the sum of stretches passes the number, one simdgroup goes over that stretch again.
//
// logits: float [m, n]; temperature, uniform: float [m]; dims: n. out: uint [m]. A NaN has no probability.

threadgroup float partial[LANES];

const int n = dims[0];
const int row = threadgroup_position_in_grid.x;
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int simdgroups = simdgroups_per_threadgroup;
const auto values = logits + long(row) * n;

float top = -INFINITY;
int id = n;
for (int i = thread_index_in_threadgroup; i < n; i += threads_per_threadgroup.x) {
  if (values[i] > top) {
    top = values[i];
    id = i;
  }
}
const float highest = group_max(top, partial, simdgroup, lane, simdgroups);
if (temperature[row] == 0.0f) {
  // Ids below 2^24 are floats, and the lowest is the highest of what they lack to n.
  const float left = group_max(top == highest ? float(n - id) : 0.0f, partial, simdgroup, lane, simdgroups);
  if (thread_index_in_threadgroup == 0) {
    out[row] = left > 0.0f ? uint(n - int(left)) : 0u;  // where nothing is higher than minus infinity
  }
  return;
}

const float inverse = nearest_quotient(1.0f, fmax(temperature[row], 1e-3f));
const int groups = (n + LANES - 1) / LANES;
const int stretch = (groups + simdgroups - 1) / simdgroups;
float sum = 0.0f;
for (int group = simdgroup * stretch; group < min(groups, (simdgroup + 1) * stretch); ++group) {
  const int i = group * LANES + lane;
  sum += simd_sum(i < n ? weight_of(values[i], highest, inverse) : 0.0f);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (lane == 0) {
  partial[simdgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float rest = 0.0f;
for (int i = 0; i < simdgroups; ++i) {
  rest += partial[i];
}
rest *= uniform[row];
// At each level: the first with any probability whose sum with those before passes what is left of the number, or
// the last with any, if rounding lets none be found.
Found stretch_of = nothing_found();
for (int i = 0; i < simdgroups; ++i) {
  look_at(stretch_of, i, partial[i], rest);
}
if (simdgroup != stretch_of.chosen) {
  return;
}
rest -= stretch_of.before;
Found group_of = nothing_found();
group_of.chosen = simdgroup * stretch;
for (int group = simdgroup * stretch; group < min(groups, (simdgroup + 1) * stretch); ++group) {
  const int i = group * LANES + lane;
  look_at(group_of, group, simd_sum(i < n ? weight_of(values[i], highest, inverse) : 0.0f), rest);
}
rest -= group_of.before;
Found lane_of = nothing_found();
const int mine = group_of.chosen * LANES + lane;
const float weight = mine < n ? weight_of(values[mine], highest, inverse) : 0.0f;
for (int i = 0; i < LANES; ++i) {
  look_at(lane_of, i, simd_broadcast(weight, ushort(i)), rest);
}
if (lane == 0) {
  out[row] = uint(group_of.chosen * LANES + lane_of.chosen);
}
