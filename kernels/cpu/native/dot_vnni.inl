// Ternary products with AVX-512 VNNI: one dot-product instruction takes 16 outputs x 4 inputs.

inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

// One row: the codes are masked where they stand, so those of shift 2i count 4^i times. They have
// accumulators of their own, whose sums (below 128 * 127 * k < 2^31, all multiples of 4^i) are shifted
// back at the end. No shifts in the loop, and eight independent sums to hide latency.
void dot_one(const Dot& d) {
  const __m512i mask[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                           _mm512_set1_epi8(static_cast<char>(0xc0))};
  __m512i sums[2][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    sums[0][i] = sums[1][i] = _mm512_setzero_si512();
  }
  const int8_t* x = d.x;
  for (int64_t b = 0; b < d.blocks; b++, x += 16) {
    const uint8_t *block0 = d.tile0 + b * kBlockBytes, *block1 = d.tile1 + b * kBlockBytes;
    __builtin_prefetch(block0 + d.ahead);
    __builtin_prefetch(block1 + d.ahead);
    const __m512i w0 = _mm512_loadu_si512(block0);
    const __m512i w1 = _mm512_loadu_si512(block1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i four = broadcast4(x + 4 * i);
      sums[0][i] = _mm512_dpbusd_epi32(sums[0][i], _mm512_and_si512(w0, mask[i]), four);
      sums[1][i] = _mm512_dpbusd_epi32(sums[1][i], _mm512_and_si512(w1, mask[i]), four);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < 2; t++) {
    const __m512i low = _mm512_add_epi32(sums[t][0], _mm512_srai_epi32(sums[t][1], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(sums[t][2], 4), _mm512_srai_epi32(sums[t][3], 6));
    _mm512_storeu_si512(d.raw + 16 * t, _mm512_add_epi32(low, high));
  }
}

// More rows: each decoded vector serves M rows, whose accumulators are independent sums enough; fewer
// than ten would wait for each other, so up to four rows take two accumulators an output.
template <int M>
void dot_shifted(const Dot& d) {
  constexpr int ways = M <= 4 ? 2 : 1;
  const __m512i mask = _mm512_set1_epi8(0x03);
  __m512i sums[2][M][ways];
#pragma GCC unroll 32
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 2
    for (int i = 0; i < ways; i++) {
      sums[0][r][i] = sums[1][r][i] = _mm512_setzero_si512();
    }
  }
  const int8_t* x = d.x;
  for (int64_t b = 0; b < d.blocks; b++, x += 16 * M) {
    const uint8_t *block0 = d.tile0 + b * kBlockBytes, *block1 = d.tile1 + b * kBlockBytes;
    __builtin_prefetch(block0 + d.ahead);
    __builtin_prefetch(block1 + d.ahead);
    const __m512i w0 = _mm512_loadu_si512(block0);
    const __m512i w1 = _mm512_loadu_si512(block1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i codes0 = _mm512_and_si512(_mm512_srli_epi16(w0, 2 * i), mask);
      const __m512i codes1 = _mm512_and_si512(_mm512_srli_epi16(w1, 2 * i), mask);
#pragma GCC unroll 32
      for (int r = 0; r < M; r++) {
        const __m512i four = broadcast4(x + 4 * (i * M + r));
        sums[0][r][i % ways] = _mm512_dpbusd_epi32(sums[0][r][i % ways], codes0, four);
        sums[1][r][i % ways] = _mm512_dpbusd_epi32(sums[1][r][i % ways], codes1, four);
      }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++) {
      const __m512i sum = ways == 2 ? _mm512_add_epi32(sums[t][r][0], sums[t][r][ways - 1]) : sums[t][r][0];
      _mm512_storeu_si512(d.raw + r * kPairOutputs + 16 * t, sum);
    }
  }
}

void dot_ternary(int rows, const Dot& d) {
  switch (rows) {
    case 1:
      return dot_one(d);
    case 2:
      return dot_shifted<2>(d);
    case 3:
      return dot_shifted<3>(d);
    case 4:
      return dot_shifted<4>(d);
    case 5:
      return dot_shifted<5>(d);
    case 6:
      return dot_shifted<6>(d);
    case 7:
      return dot_shifted<7>(d);
    case 8:
      return dot_shifted<8>(d);
    case 9:
      return dot_shifted<9>(d);
    case 10:
      return dot_shifted<10>(d);
    case 11:
      return dot_shifted<11>(d);
    default:
      return dot_shifted<12>(d);
  }
}
