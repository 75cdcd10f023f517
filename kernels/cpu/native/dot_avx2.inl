// Ternary products with AVX2: pairs of products in int16, four of them a lane pair, widened in time.

// Eight outputs. maddubs sums two products of code * x, at most 2 * 2 * 127 = 508 (or -512), so 64 of
// them fit int16: 16 blocks of 4.
template <int M>
inline void dot_half(const uint8_t* half, const int8_t* x, int64_t blocks, int32_t* raw) {
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
void dot_rows(const uint8_t* tile0, const uint8_t* tile1, const int8_t* x, int64_t blocks, int32_t* raw) {
  dot_half<M>(tile0, x, blocks, raw);
  dot_half<M>(tile0 + 32, x, blocks, raw + 8);
  dot_half<M>(tile1, x, blocks, raw + 16);
  dot_half<M>(tile1 + 32, x, blocks, raw + 24);
}

void dot(int rows, const uint8_t* tile0, const uint8_t* tile1, const int8_t* x, int64_t blocks, int32_t* raw) {
  switch (rows) {
    case 1: return dot_rows<1>(tile0, tile1, x, blocks, raw);
    case 2: return dot_rows<2>(tile0, tile1, x, blocks, raw);
    case 3: return dot_rows<3>(tile0, tile1, x, blocks, raw);
    case 4: return dot_rows<4>(tile0, tile1, x, blocks, raw);
    case 5: return dot_rows<5>(tile0, tile1, x, blocks, raw);
    case 6: return dot_rows<6>(tile0, tile1, x, blocks, raw);
    case 7: return dot_rows<7>(tile0, tile1, x, blocks, raw);
    default: return dot_rows<8>(tile0, tile1, x, blocks, raw);
  }
}
