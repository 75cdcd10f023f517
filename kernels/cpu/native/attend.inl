// Attention of queries that share a key/value head, in blocks of keys that stay in the first cache.
//
// A query of length n sees: each score summed in sixteen lanes over d and across lanes by one tree;
// the exact maximum; exp in lanes, key j in lane j % 16, summed in order and across lanes; values
// added key after key. Nothing here depends on the other queries of the call, and no key or value
// from n on is ever read.

// Scores of `keys` 16 keys from `first` on; those past the query's last are copies of its last.
inline void score_block(const Attend& a, const float* query, int first, int length, float* scores) {
  const int whole = a.d / 16, rest = a.d % 16;
  F groups[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) {
    const float* key[4];
    F sums[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) {
      const int j = first + 4 * g + l;
      key[l] = a.keys + static_cast<int64_t>(j < length ? j : length - 1) * a.d;
      sums[l] = set1(0.0f);
    }
    for (int c = 0; c < whole; c++) {
      const F q = load(query + 16 * c);
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++) {
        sums[l] = fma(load(key[l] + 16 * c), q, sums[l]);
      }
    }
    if (rest > 0) {
      const F q = load(query + 16 * whole);
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++) {
        sums[l] = fma(load_part(key[l] + 16 * whole, rest), q, sums[l]);
      }
    }
    groups[g] = reduce4(sums[0], sums[1], sums[2], sums[3]);
  }
  store(scores, reduce_groups(groups[0], groups[1], groups[2], groups[3]));
}

// Scores to exp(score - max), zeros behind the last key. Returns the sum.
inline float softmax_weights(float* scores, int length) {
  const int padded = static_cast<int>(round_up(length, 16));
  for (int j = length; j < padded; j++) {
    scores[j] = scores[length - 1];
  }
  F top = load(scores);
  for (int j = 16; j < padded; j += 16) {
    top = max(top, load(scores + j));
  }
  const F highest = set1(max_lanes(top));
  F total = set1(0.0f);
  for (int j = 0; j < padded; j += 16) {
    F w = exp_lanes(load(scores + j) - highest);
    if (j + 16 > length) {
      store(scores + j, w);
      for (int l = length; l < padded; l++) {
        scores[l] = 0.0f;
      }
      w = load(scores + j);
    }
    store(scores + j, w);
    total = total + w;
  }
  return sum_lanes(total);
}

// out[q][0..16C) += sum over keys first..last-1 of weight * value, in order, at column `column`.
template <int Q, int C>
inline void add_values(const Attend& a, float* const* out, const float* const* weights, int column, int first,
                       int last) {
  F sums[Q][C];
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      sums[q][c] = load(out[q] + column + 16 * c);
    }
  }
  for (int j = first; j < last; j++) {
    const float* value = a.values + static_cast<int64_t>(j) * a.d + column;
    F v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      v[c] = load(value + 16 * c);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
      const F w = set1(weights[q][j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        sums[q][c] = fma(w, v[c], sums[q][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      store(out[q] + column + 16 * c, sums[q][c]);
    }
  }
}

template <int Q>
inline void add_values_strips(const Attend& a, float* const* out, const float* const* weights, int first,
                              int last) {
  int column = 0;
  for (; column + 16 * kValueStrip <= a.d; column += 16 * kValueStrip) {
    add_values<Q, kValueStrip>(a, out, weights, column, first, last);
  }
  for (; column + 16 <= a.d; column += 16) {
    add_values<Q, 1>(a, out, weights, column, first, last);
  }
  if (const int rest = a.d - column; rest > 0) {
    for (int q = 0; q < Q; q++) {
      F sum = load(out[q] + column);
      for (int j = first; j < last; j++) {
        sum = fma(set1(weights[q][j]), load_part(a.values + static_cast<int64_t>(j) * a.d + column, rest), sum);
      }
      store(out[q] + column, sum);
    }
  }
}

void attend(const Attend& a) {
  constexpr int key_block = 32;
  int longest = 0;
  for (int i = 0; i < a.count; i++) {
    longest = a.lengths[i] > longest ? a.lengths[i] : longest;
  }
  for (int block = 0; block < longest; block += key_block) {
    for (int i = 0; i < a.count; i++) {
      for (int j = block; j < block + key_block && j < a.lengths[i]; j += 16) {
        score_block(a, a.queries + i * a.padded, j, a.lengths[i], a.scores + i * a.score_stride + j);
      }
    }
  }
  // Four queries at a time; where their lengths part, each goes on alone, in the same order.
  for (int i = 0; i < a.count; i += 4) {
    const int count = a.count - i < 4 ? a.count - i : 4;
    alignas(64) float space[4 * kMaxHeadDim];
    float totals[4];
    float* sums[4];
    const float* weights[4];
    int shortest = longest;
    for (int q = 0; q < count; q++) {
      float* scores = a.scores + (i + q) * a.score_stride;
      totals[q] = softmax_weights(scores, a.lengths[i + q]);
      weights[q] = scores;
      sums[q] = space + q * kMaxHeadDim;
      std::memset(sums[q], 0, static_cast<size_t>(a.padded) * sizeof(float));
      shortest = a.lengths[i + q] < shortest ? a.lengths[i + q] : shortest;
    }
    for (int block = 0; block < shortest; block += key_block) {
      const int end = block + key_block < shortest ? block + key_block : shortest;
      switch (count) {
        case 1: add_values_strips<1>(a, sums, weights, block, end); break;
        case 2: add_values_strips<2>(a, sums, weights, block, end); break;
        case 3: add_values_strips<3>(a, sums, weights, block, end); break;
        default: add_values_strips<4>(a, sums, weights, block, end);
      }
    }
    for (int q = 0; q < count; q++) {
      add_values_strips<1>(a, sums + q, weights + q, shortest, a.lengths[i + q]);
      const F factor = set1(1.0f / totals[q]);
      float* out = a.out[i + q];
      for (int c = 0; c < a.d; c += 16) {
        store_valid(out + c, load(sums[q] + c) * factor, a.d - c < 16 ? a.d - c : 16);
      }
    }
  }
}
