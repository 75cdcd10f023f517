// Attention of queries that share a key/value head, in blocks of keys that stay in the first cache.
//
// Keys and values are bfloat16, all else is float. A query of length n sees: each score summed in sixteen lanes
// over d and across lanes by one tree; the exact maximum; exp in lanes, key j in lane j % 16, summed in order and
// across lanes; values added key after key. Nothing here depends on the other queries of the call, and no key or
// value from n on is ever read.

void rotate(const float* x, const float* table, int d, float scale, float* out) {
  const int half = d / 2;
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i], cos = table[i], sin = table[half + i];
    out[i] = (a * cos - b * sin) * scale;
    out[half + i] = (b * cos + a * sin) * scale;
  }
}

void narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out[i] = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// Scores of sixteen keys from `first` on for Q queries, each by the same steps whatever Q is. Keys past
// `length` are read as the last one. `ahead`: how many keys further on to fetch into the cache.
template <int Q, bool fetch>
inline void score_block(const Attend& a, const float* queries, int first, int length, float* scores,
                        int ahead) {
  const int whole = a.d / 16, rest = a.d % 16;
  F groups[Q][4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) {
    const uint16_t* key[4];
    F sums[Q][4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) {
      const int j = first + 4 * g + l;
      key[l] = a.keys + static_cast<int64_t>(j < length ? j : length - 1) * a.d;
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) {
        sums[q][l] = set1(0.0f);
      }
    }
    for (int c = 0; c < whole; c++) {
      F query[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) {
        query[q] = load(queries + q * a.padded + 16 * c);
      }
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++) {
        if (fetch && c % 2 == 0) {  // 64 bytes at once
          __builtin_prefetch(key[l] + 16 * c + static_cast<int64_t>(ahead) * a.d);
        }
        const F k = load_bf16(key[l] + 16 * c);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
          sums[q][l] = fma(k, query[q], sums[q][l]);
        }
      }
    }
    if (rest > 0) {
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++) {
        const F k = load_bf16_part(key[l] + 16 * whole, rest);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
          sums[q][l] = fma(k, load(queries + q * a.padded + 16 * whole), sums[q][l]);
        }
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
      groups[q][g] = reduce4(sums[q][0], sums[q][1], sums[q][2], sums[q][3]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
    store(scores + q * a.score_stride, reduce_groups(groups[q][0], groups[q][1], groups[q][2], groups[q][3]));
  }
}

template <int Q>
inline void score_some(const Attend& a, const float* queries, bool fetch, int first, int length, float* scores) {
  if constexpr (Q <= kScoreQueries) {
    fetch ? score_block<Q, true>(a, queries, first, length, scores, kKeyBlock)
          : score_block<Q, false>(a, queries, first, length, scores, 0);
  }
}

// Scores of one block of keys for all queries.
inline void score_all(const Attend& a, int block) {
  for (int i = 0; i < a.count;) {
    // Queries that have all of the block share its loads.
    int together = a.count - i < kScoreQueries ? a.count - i : kScoreQueries;
    for (int q = 0; q < together; q++) {
      together = a.lengths[i + q] < block + kKeyBlock ? 1 : together;
    }
    const float* query = a.queries + i * a.padded;
    float* scores = a.scores + i * a.score_stride;
    for (int j = block; j < block + kKeyBlock && j < a.lengths[i]; j += 16) {
      switch (together) {
        case 1:
          score_some<1>(a, query, i == 0, j, a.lengths[i], scores + j);
          break;
        case 2:
          score_some<2>(a, query, i == 0, j, a.lengths[i], scores + j);
          break;
        default:
          score_some<3>(a, query, i == 0, j, a.lengths[i], scores + j);
      }
    }
    i += together;
  }
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
                       int last, int ahead) {
  F sums[Q][C];
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      sums[q][c] = load(out[q] + column + 16 * c);
    }
  }
  for (int j = first; j < last; j++) {
    const uint16_t* value = a.values + static_cast<int64_t>(j) * a.d + column;
    F v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      if (c % 2 == 0) {
        __builtin_prefetch(value + 16 * c + static_cast<int64_t>(ahead) * a.d);
      }
      v[c] = load_bf16(value + 16 * c);
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
                              int last, int ahead) {
  int column = 0;
  for (; column + 16 * kValueStrip <= a.d; column += 16 * kValueStrip) {
    add_values<Q, kValueStrip>(a, out, weights, column, first, last, ahead);
  }
  for (; column + 16 <= a.d; column += 16) {
    add_values<Q, 1>(a, out, weights, column, first, last, ahead);
  }
  if (const int rest = a.d - column; rest > 0) {
    for (int q = 0; q < Q; q++) {
      F sum = load(out[q] + column);
      for (int j = first; j < last; j++) {
        const uint16_t* value = a.values + static_cast<int64_t>(j) * a.d + column;
        sum = fma(set1(weights[q][j]), load_bf16_part(value, rest), sum);
      }
      store(out[q] + column, sum);
    }
  }
}

// The weighted values of one block of keys for up to four queries.
inline void add_block(const Attend& a, int count, float* const* out, const float* const* weights,
                      const int* lengths, int block, int ahead) {
  // Where the lengths part, each query goes on alone, in the same order.
  int common = block + kKeyBlock;
  for (int q = 0; q < count; q++) {
    common = lengths[q] < common ? lengths[q] : common;
  }
  if (common > block) {
    switch (count) {
      case 1:
        add_values_strips<1>(a, out, weights, block, common, ahead);
        break;
      case 2:
        add_values_strips<2>(a, out, weights, block, common, ahead);
        break;
      case 3:
        add_values_strips<3>(a, out, weights, block, common, ahead);
        break;
      default:
        add_values_strips<4>(a, out, weights, block, common, ahead);
    }
  }
  const int start = common > block ? common : block;
  for (int q = 0; q < count; q++) {
    const int end = lengths[q] < block + kKeyBlock ? lengths[q] : block + kKeyBlock;
    if (end > start) {
      add_values_strips<1>(a, out + q, weights + q, start, end, 0);
    }
  }
}

void attend(const Attend& a) {
  int longest = 0;
  for (int i = 0; i < a.count; i++) {
    longest = a.lengths[i] > longest ? a.lengths[i] : longest;
  }
  for (int block = 0; block < longest; block += kKeyBlock) {
    score_all(a, block);
  }
  alignas(64) float space[kMaxQueries * kMaxHeadDim];
  float totals[kMaxQueries];
  float* sums[kMaxQueries];
  const float* weights[kMaxQueries];
  for (int i = 0; i < a.count; i++) {
    float* scores = a.scores + i * a.score_stride;
    totals[i] = softmax_weights(scores, a.lengths[i]);
    weights[i] = scores;
    sums[i] = space + i * a.padded;
    std::memset(sums[i], 0, static_cast<size_t>(a.padded) * sizeof(float));
  }
  for (int block = 0; block < longest; block += kKeyBlock) {
    for (int i = 0; i < a.count; i += 4) {
      const int count = a.count - i < 4 ? a.count - i : 4;
      add_block(a, count, sums + i, weights + i, a.lengths + i, block, i == 0 ? kKeyBlock : 0);
    }
  }
  for (int i = 0; i < a.count; i++) {
    const F factor = set1(1.0f / totals[i]);
    for (int c = 0; c < a.d; c += 16) {
      store_valid(a.out[i] + c, load(sums[i] + c) * factor, a.d - c < 16 ? a.d - c : 16);
    }
  }
}
