// int8 rows times ternary (BITS = 2) or int8 (BITS = 8) weights, M rows at a time. A simdgroup computes
// OUTPUTS outputs: its lanes share out the inputs, sixteen at a time, and decode a weight once for all rows. The
// threadgroups of all rows follow each other, so that a weight is read from memory once, and from the cache then.
//
// q: half [m, 16 * blocks], whole numbers; s: float [m]; sums: int [m], of q; weight: uint [>= n, blocks *
// WORDS]; scale: float [n]; residual: float [m, width]; dims: m, n, blocks, gate (0, 1 or 2), has residual.
// out: float [m, width], width = n, or n / 2 with a gate. Then a simdgroup's second half of outputs are the
// partners of its first.
//
// Exact: a lane's products are multiples of 2^-BITS and so are its sums, which go over to int before they
// can leave float's 24 bits. Hence the order of summation decides nothing.

const int m = dims[0];
const int n = dims[1];
const int blocks = dims[2];
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

const device uint* words[OUTPUTS];
for (int r = 0; r < OUTPUTS; ++r) {
  const int output = min(first + r % share, width - 1) + r / share * width;
  words[r] = weight + output * blocks * Codes<BITS>::WORDS;
}
const device half4* rows[M];
for (int j = 0; j < M; ++j) {
  rows[j] = (const device half4*)q + min(first_row + j, m - 1) * blocks * 4;
}

uint exact[OUTPUTS][M];  // modulo 2^32: only the last difference must fit an int
for (int r = 0; r < OUTPUTS; ++r) {
  for (int j = 0; j < M; ++j) {
    exact[r][j] = 0u;
  }
}
for (int begin = lane; begin < blocks; begin += LANES * Codes<BITS>::EXACT) {
  const int end = min(blocks, begin + LANES * Codes<BITS>::EXACT);
  float partial[OUTPUTS][M];
  for (int r = 0; r < OUTPUTS; ++r) {
    for (int j = 0; j < M; ++j) {
      partial[r][j] = 0.0f;
    }
  }
  for (int block = begin; block < end; block += LANES) {
    Codes<BITS> codes[OUTPUTS];
    for (int r = 0; r < OUTPUTS; ++r) {
      codes[r].load(words[r] + block * Codes<BITS>::WORDS);
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      float values[OUTPUTS][4];
      for (int r = 0; r < OUTPUTS; ++r) {
        for (int i = 0; i < 4; ++i) {
          values[r][i] = codes[r].value(4 * quarter + i);
        }
      }
      for (int j = 0; j < M; ++j) {
        const half4 inputs = rows[j][4 * block + quarter];
        for (int i = 0; i < 4; ++i) {
          const float input = float(inputs[i]);
          for (int r = 0; r < OUTPUTS; ++r) {
            partial[r][j] = fma(values[r][i], input, partial[r][j]);
          }
        }
      }
    }
  }
  for (int r = 0; r < OUTPUTS; ++r) {
    for (int j = 0; j < M; ++j) {
      exact[r][j] += uint(int(partial[r][j] * float(1 << BITS)));
    }
  }
}

// Lane r * M + j takes output r of row j, and its partner.
int mine = 0;
int partner = 0;
for (int r = 0; r < OUTPUTS; ++r) {
  for (int j = 0; j < M; ++j) {
    const uint rest = uint((1 << BITS) + Codes<BITS>::BIAS) * uint(sums[min(first_row + j, m - 1)]);
    const int total = int(simd_sum(exact[r][j]) - rest);
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
  float y = float(mine) * nearest_quotient(scale[output], s[row]);
  if (gate) {
    y = gated(y, float(partner) * nearest_quotient(scale[width + output], s[row]), gate);
  }
  if (dims[4]) {
    y += residual[row * width + output];
  }
  out[row * width + output] = y;
}
