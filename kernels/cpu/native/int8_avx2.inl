// int8 products with AVX2, in 16 bits: maddubs would saturate where two products of code * x add up, madd
// of codes and x in int16 sums two of them exactly in int32.

constexpr int kStretch = 16;  // blocks whose widened activations are kept at a time

// Bytes 0 and 2, and 1 and 3, of every 32-bit lane, each pair as int16.
struct Pairs {
  int32_t even, odd;
};

inline Pairs widen(const int8_t* x) {
  const auto lane = [](int8_t low, int8_t high) {
    return static_cast<int32_t>(static_cast<uint16_t>(int16_t{low}) |
                                static_cast<uint32_t>(static_cast<uint16_t>(int16_t{high})) << 16);
  };
  return {lane(x[0], x[2]), lane(x[1], x[3])};
}

// Adds eight outputs' products over `groups` groups of four inputs to raw.
template <int M>
inline void int8_half(const uint8_t* half, int64_t ahead, const Pairs* x, int64_t groups, int32_t* raw) {
  const __m256i low = _mm256_set1_epi16(0xff);
  __m256i sums[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
    sums[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw + r * kPairOutputs));
  }
  for (int64_t g = 0; g < groups; g++, x += M) {
    __builtin_prefetch(half + g * 64 + ahead);
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + g * 64));
    const __m256i even = _mm256_and_si256(w, low), odd = _mm256_srli_epi16(w, 8);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(x[r].even)),
                                                _mm256_madd_epi16(odd, _mm256_set1_epi32(x[r].odd)));
      sums[r] = _mm256_add_epi32(sums[r], products);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(raw + r * kPairOutputs), sums[r]);
  }
}

template <int M>
void int8_rows(const Dot& d) {
  Pairs wide[kStretch * 4 * M];
  std::memset(d.raw, 0, M * kPairOutputs * sizeof(int32_t));
  for (int64_t start = 0; start < d.blocks; start += kStretch) {
    const int64_t groups = 4 * (start + kStretch < d.blocks ? kStretch : d.blocks - start);
    for (int64_t i = 0; i < groups * M; i++) {
      wide[i] = widen(d.x + 4 * (start * 4 * M + i));
    }
    const uint8_t *from0 = d.tile0 + start * kInt8BlockBytes, *from1 = d.tile1 + start * kInt8BlockBytes;
    int8_half<M>(from0, d.ahead, wide, groups, d.raw);
    int8_half<M>(from0 + 32, 0, wide, groups, d.raw + 8);
    int8_half<M>(from1, d.ahead, wide, groups, d.raw + 16);
    int8_half<M>(from1 + 32, 0, wide, groups, d.raw + 24);
  }
}

void dot_int8(int rows, const Dot& d) {
  switch (rows) {
    case 1:
      return int8_rows<1>(d);
    case 2:
      return int8_rows<2>(d);
    case 3:
      return int8_rows<3>(d);
    case 4:
      return int8_rows<4>(d);
    case 5:
      return int8_rows<5>(d);
    case 6:
      return int8_rows<6>(d);
    case 7:
      return int8_rows<7>(d);
    default:
      return int8_rows<8>(d);
  }
}
