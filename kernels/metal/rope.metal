// Splits rows into queries, keys and values and rotates queries and keys (rotate-half): a thread a pair.
//
// qkv: float [m, (heads + 2 kv_heads) * d]; frequency: float [d / 2]; positions: int [m]; dims: m, heads, kv_heads, d,
// bits of the scale of queries. queries: float [m, heads, d], scaled; keys, values: bfloat16 [m, kv_heads, d].

const int heads = dims[1];
const int kv_heads = dims[2];
const int half_dim = dims[3] / 2;
const int all_heads = heads + 2 * kv_heads;
const int index = thread_position_in_grid.x;
const int pair = index % half_dim;
const int head = index / half_dim % all_heads;
const int row = index / half_dim / all_heads;
if (row >= dims[0]) {
  return;
}

const int source = (row * all_heads + head) * 2 * half_dim + pair;
const float a = qkv[source];
const float b = qkv[source + half_dim];
if (head >= heads + kv_heads) {
  const int target = (row * kv_heads + head - heads - kv_heads) * 2 * half_dim + pair;
  values[target] = bfloat16_t(a);
  values[target + half_dim] = bfloat16_t(b);
  return;
}
const float angle = float(positions[row]) * frequency[pair];
const float c = precise::cos(angle);
const float s = precise::sin(angle);
const float turned_a = a * c - b * s;
const float turned_b = b * c + a * s;
if (head < heads) {
  const float scale = as_type<float>(dims[4]);
  const int target = (row * heads + head) * 2 * half_dim + pair;
  queries[target] = turned_a * scale;
  queries[target + half_dim] = turned_b * scale;
} else {
  const int target = (row * kv_heads + head - heads) * 2 * half_dim + pair;
  keys[target] = bfloat16_t(turned_a);
  keys[target + half_dim] = bfloat16_t(turned_b);
}
