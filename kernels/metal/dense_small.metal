// Float rows times a float matrix, M rows at a time, OUTPUTS outputs a simdgroup, VECTOR inputs a lane in a
// step (k is a multiple of it). Each row is summed in the same order for every M: its bits are its own. The
// threadgroups of all rows follow each other, so that a weight is read from memory once, and from the cache then.
//
// x: float [m, k]; weight: T [n, k]; residual: float [m, width]; dims: m, n, k, gate (0, 1 or 2), has residual.
// out: float [m, width]; gates as in product_small.metal.

const int m = dims[0];
const int n = dims[1];
const int k = dims[2];
const int gate = dims[3];
const int width = gate ? n / 2 : n;
const int share = gate ? OUTPUTS / 2 : OUTPUTS;
const int lane = thread_index_in_simdgroup;
const int first =
    (threadgroup_position_in_grid.y * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * share;
const int first_row = threadgroup_position_in_grid.x * M;
if (first >= width) {
  return;
}

uint starts[OUTPUTS];
for (int r = 0; r < OUTPUTS; ++r) {
  starts[r] = uint(min(first + r % share, width - 1) + r / share * width) * uint(k);
}
float partial[OUTPUTS][M];
for (int r = 0; r < OUTPUTS; ++r) {
  for (int j = 0; j < M; ++j) {
    partial[r][j] = 0.0f;
  }
}
for (int at = lane * VECTOR; at < k; at += LANES * VECTOR) {
  float values[OUTPUTS][VECTOR];
  for (int r = 0; r < OUTPUTS; ++r) {
    for (int i = 0; i < VECTOR; ++i) {
      values[r][i] = float(weight[starts[r] + at + i]);
    }
  }
  for (int j = 0; j < M; ++j) {
    for (int i = 0; i < VECTOR; ++i) {
      const float input = x[min(first_row + j, m - 1) * k + at + i];
      for (int r = 0; r < OUTPUTS; ++r) {
        partial[r][j] = fma(values[r][i], input, partial[r][j]);
      }
    }
  }
}

// Lane r * M + j takes output r of row j, and its partner.
float mine = 0.0f;
float partner = 0.0f;
for (int r = 0; r < OUTPUTS; ++r) {
  for (int j = 0; j < M; ++j) {
    const float total = simd_sum(partial[r][j]);
    if (lane == r % share * M + j) {
      if (r < share) {
        mine = total;
      } else {
        partner = total;
      }
    }
  }
}
const int output = first + lane / M;
const int row = first_row + lane % M;
if (lane < share * M && output < width && row < m) {
  const int target = row * width + output;
  float y = gate ? gated(mine, partner, gate) : mine;
  out[target] = dims[4] ? y + residual[target] : y;
}
