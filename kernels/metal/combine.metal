// Joins the chunks of attend.metal in order, up to the row's own: a threadgroup a row and head, a thread an
// element of the head.
//
// tops, totals: float [kv_heads, chunks, lines]; parts: float [kv_heads, chunks, lines, DIM]; positions: int [m];
// dims: m, chunks, group. out: float [m, heads, DIM].

const int chunks = dims[1];
const int group = dims[2];
const int lines = dims[0] * group;
const int head = threadgroup_position_in_grid.x;
const int row = threadgroup_position_in_grid.y;
const int element = thread_index_in_threadgroup;
const int first = head / group * chunks * lines + row * group + head % group;
const int seen = positions[row] / LANES + 1;

float top = -INFINITY;
for (int chunk = 0; chunk < seen; ++chunk) {
  top = fmax(top, tops[first + chunk * lines]);
}
float total = 0.0f;
float sum = 0.0f;
for (int chunk = 0; chunk < seen; ++chunk) {
  const int at = first + chunk * lines;
  const float factor = precise::exp(tops[at] - top);
  total = fma(factor, totals[at], total);
  sum = fma(factor, parts[at * DIM + element], sum);
}
out[(row * int(threadgroups_per_grid.x) + head) * DIM + element] = precise::divide(sum, total);
