// Float matrix rows times 1..8 rows of x. Every output is summed in sixteen lanes over k in order and
// then across lanes by one fixed tree, however many rows and outputs share a pass.

inline F load_bf16_part(const uint16_t* p, int n) {
  uint16_t lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_bf16(lanes);
}

template <bool bf16>
inline F load_weights(const void* p, int64_t at) {
  if constexpr (bf16) {
    return load_bf16(static_cast<const uint16_t*>(p) + at);
  } else {
    return load(static_cast<const float*>(p) + at);
  }
}
template <bool bf16>
inline F load_weights_part(const void* p, int64_t at, int n) {
  if constexpr (bf16) {
    return load_bf16_part(static_cast<const uint16_t*>(p) + at, n);
  } else {
    return load_part(static_cast<const float*>(p) + at, n);
  }
}

constexpr int kDenseAhead = 2048;  // bytes of a stream to fetch before they are needed

// Outputs first, first + stride, ...: J of them, those from `last` on as copies of the last one and dropped.
template <bool bf16, int M, int J>
void dense_pass(const Dense& a, int64_t first, int64_t stride, int64_t last) {
  int64_t rows[J];
  for (int j = 0; j < J; j++) {
    rows[j] = (first + j * stride < last ? first + j * stride : last - 1) * a.k;
  }
  constexpr int count = M * J, padded = (count + 3) / 4 * 4;
  F sums[padded];
#pragma GCC unroll 32
  for (int i = 0; i < padded; i++) {
    sums[i] = set1(0.0f);
  }
  int64_t c = 0;
  for (; c + 16 <= a.k; c += 16) {
    F w[J];
#pragma GCC unroll 32
    for (int j = 0; j < J; j++) {
      __builtin_prefetch(static_cast<const char*>(a.weights) + (rows[j] + c) * (bf16 ? 2 : 4) + kDenseAhead);
      w[j] = load_weights<bf16>(a.weights, rows[j] + c);
    }
#pragma GCC unroll 32
    for (int m = 0; m < M; m++) {
      const F x = load(a.x + m * a.k_padded + c);
#pragma GCC unroll 32
      for (int j = 0; j < J; j++) {
        sums[m * J + j] = fma(w[j], x, sums[m * J + j]);
      }
    }
  }
  if (const int rest = static_cast<int>(a.k - c); rest > 0) {
#pragma GCC unroll 32
    for (int j = 0; j < J; j++) {
      const F w = load_weights_part<bf16>(a.weights, rows[j] + c, rest);
#pragma GCC unroll 32
      for (int m = 0; m < M; m++) {
        sums[m * J + j] = fma(w, load(a.x + m * a.k_padded + c), sums[m * J + j]);
      }
    }
  }
  const F zero = set1(0.0f);
  float totals[16];
#pragma GCC unroll 32
  for (int i = 0; i < padded; i += 4) {
    store(totals, reduce_groups(reduce4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]), zero, zero, zero));
    for (int l = 0; l < 4 && i + l < count; l++) {
      const int m = (i + l) / J, j = (i + l) % J;
      if (first + j * stride < last) {
        a.out[m * a.out_stride + first + j * stride] = totals[l];
      }
    }
  }
}

// J streams, each of outputs that follow one another: as a processor foresees, which two streams in one page confuse.
template <bool bf16, int M>
void dense_rows(const Dense& a, int64_t first, int64_t last) {
  constexpr int J = kDenseAccumulators / M > 8 ? 8 : kDenseAccumulators / M > 0 ? kDenseAccumulators / M : 1;
  const int64_t stride = (last - first + J - 1) / J;
  for (int64_t j = first; j < first + stride; j++) {
    dense_pass<bf16, M, J>(a, j, stride, last);
  }
}

template <bool bf16>
void dense_typed(const Dense& a, int64_t first, int64_t last) {
  switch (a.rows) {
    case 1:
      return dense_rows<bf16, 1>(a, first, last);
    case 2:
      return dense_rows<bf16, 2>(a, first, last);
    case 3:
      return dense_rows<bf16, 3>(a, first, last);
    case 4:
      return dense_rows<bf16, 4>(a, first, last);
    case 5:
      return dense_rows<bf16, 5>(a, first, last);
    case 6:
      return dense_rows<bf16, 6>(a, first, last);
    case 7:
      return dense_rows<bf16, 7>(a, first, last);
    default:
      return dense_rows<bf16, 8>(a, first, last);
  }
}

void dense(const Dense& a, int64_t first, int64_t last) {
  a.bfloat16 ? dense_typed<true>(a, first, last) : dense_typed<false>(a, first, last);
}
