// int8 rows times ternary weights by the matrix units: 32 rows x 64 outputs a threadgroup of four simdgroups,
// each with 16 x 32 of them. With a gate, columns 32..63 are the partners of columns 0..31.
//
// Arguments as in product_small.metal, BITS = 2. Exact: the operands are whole numbers up to 128, which half
// holds, their products go into float sums, and those stay below 2^24 for k up to 131,072.

constexpr int ROWS = 32;
constexpr int COLUMNS = 64;
constexpr int DEPTH = 32;             // inputs of a round: two words of weights
constexpr int STRIDE = DEPTH + 8;     // of a row in threadgroup memory, off the same banks
threadgroup half left[ROWS * STRIDE];
threadgroup half right[COLUMNS * STRIDE];
threadgroup float result[ROWS * COLUMNS];

const int m = dims[0];
const int n = dims[1];
const int blocks = dims[2];
const int gate = dims[3];
const int width = gate ? n / 2 : n;
const int share = gate ? COLUMNS / 2 : COLUMNS;
const int first = threadgroup_position_in_grid.x * share;
const int first_row = threadgroup_position_in_grid.y * ROWS;
const int thread_index = thread_index_in_threadgroup;
const int top = simdgroup_index_in_threadgroup / 2 * 16;
const int side = simdgroup_index_in_threadgroup % 2 * 32;

// What this thread brings in a round: eight inputs of a row, one word of an output.
const int row = thread_index / 4;
const int part = thread_index % 4;
const device half4* inputs = (const device half4*)q + min(first_row + row, m - 1) * blocks * 4;
const int column = thread_index / 2;
const int word_part = thread_index % 2;
const device uint* words =
    weight + (min(first + column % share, width - 1) + column / share * width) * blocks;

simdgroup_matrix<float, 8, 8> sums_of[2][4];
for (int i = 0; i < 2; ++i) {
  for (int j = 0; j < 4; ++j) {
    sums_of[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
  }
}
for (int block = 0; block < blocks; block += 2) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool inside = block + part / 2 < blocks;
  for (int i = 0; i < 2; ++i) {
    const half4 four = inside ? inputs[4 * block + 2 * part + i] : half4(half(0));
    for (int e = 0; e < 4; ++e) {
      left[row * STRIDE + 8 * part + 4 * i + e] = four[e];
    }
  }
  const uint word = block + word_part < blocks ? words[block + word_part] : 0x55555555u;
  for (int i = 0; i < 16; ++i) {
    right[column * STRIDE + 16 * word_part + i] = half(int(word >> (2 * i) & 3u) - 1);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int depth = 0; depth < DEPTH; depth += 8) {
    simdgroup_matrix<half, 8, 8> a[2];
    simdgroup_matrix<half, 8, 8> b[4];
    for (int i = 0; i < 2; ++i) {
      simdgroup_load(a[i], &left[(top + 8 * i) * STRIDE + depth], STRIDE);
    }
    for (int j = 0; j < 4; ++j) {
      simdgroup_load(b[j], &right[(side + 8 * j) * STRIDE + depth], STRIDE, ulong2(0), true);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        simdgroup_multiply_accumulate(sums_of[i][j], a[i], b[j], sums_of[i][j]);
      }
    }
  }
}
for (int i = 0; i < 2; ++i) {
  for (int j = 0; j < 4; ++j) {
    simdgroup_store(sums_of[i][j], &result[(top + 8 * i) * COLUMNS + side + 8 * j], COLUMNS);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int i = thread_index; i < ROWS * share; i += 128) {
  const int local = i / share;
  const int output = first + i % share;
  if (first_row + local < m && output < width) {
    const float factor = s[first_row + local];
    float y = result[local * COLUMNS + i % share] * nearest_quotient(scale[output], factor);
    if (gate) {
      y = gated(y, result[local * COLUMNS + share + i % share] * nearest_quotient(scale[width + output], factor), gate);
    }
    const int at = (first_row + local) * width + output;
    out[at] = dims[4] ? y + residual[at] : y;
  }
}
