// Ternary products with AVX2: pairs of products in int16, four of them a lane pair, widened in time.

// Eight outputs. maddubs sums two products of code * x, at most 2 * 2 * 127 = 508 (or -512), so 64 of
// them fit int16: 16 blocks of 4.
template <int M>
inline void dot_half(const uint8_t* half, int64_t ahead, const int8_t* x, int64_t blocks, int32_t* raw) {
  constexpr int64_t stretch = 16;
  const __m256i mask = _mm256_set1_epi8(0x03), ones = _mm256_set1_epi16(1);
  __m256i wide[M];
  for (int r = 0; r < M; r++) {
    wide[r] = _mm256_setzero_si256();
  }
  for (int64_t start = 0; start < blocks; start += stretch) {
    const int64_t end = start + stretch < blocks ? start + stretch : blocks;
    __m256i sums[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      sums[r] = _mm256_setzero_si256();
    }
    for (int64_t b = start; b < end; b++, x += 16 * M) {
      __builtin_prefetch(half + b * kBlockBytes + ahead);
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + b * kBlockBytes));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(w, 2 * i), mask);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) {
          int32_t four;
          std::memcpy(&four, x + 4 * (i * M + r), sizeof(four));
          sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four)));
        }
      }
    }
    for (int r = 0; r < M; r++) {
      wide[r] = _mm256_add_epi32(wide[r], _mm256_madd_epi16(sums[r], ones));
    }
  }
  for (int r = 0; r < M; r++) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(raw + r * kPairOutputs), wide[r]);
  }
}

template <int M>
void dot_rows(const Dot& d) {
  dot_half<M>(d.tile0, d.ahead, d.x, d.blocks, d.raw);
  dot_half<M>(d.tile0 + 32, 0, d.x, d.blocks, d.raw + 8);
  dot_half<M>(d.tile1, d.ahead, d.x, d.blocks, d.raw + 16);
  dot_half<M>(d.tile1 + 32, 0, d.x, d.blocks, d.raw + 24);
}

void dot_ternary(int rows, const Dot& d) {
  switch (rows) {
    case 1:
      return dot_rows<1>(d);
    case 2:
      return dot_rows<2>(d);
    case 3:
      return dot_rows<3>(d);
    case 4:
      return dot_rows<4>(d);
    case 5:
      return dot_rows<5>(d);
    case 6:
      return dot_rows<6>(d);
    case 7:
      return dot_rows<7>(d);
    default:
      return dot_rows<8>(d);
  }
}
