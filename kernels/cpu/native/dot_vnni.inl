// Ternary products with AVX-512 VNNI: one dot-product instruction takes 16 outputs x 4 inputs.

inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

// One row: the codes are masked where they stand, so those of shift 2i count 4^i times. They have
// accumulators of their own, whose sums (below 128 * 127 * k < 2^31, all multiples of 4^i) are shifted
// back at the end. No shifts in the loop. While a tile is used, as much is fetched from `next`.
inline void one_row(const uint8_t* tile, const uint8_t* next, const Dot& d, int32_t* raw) {
  const __m512i mask[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                           _mm512_set1_epi8(static_cast<char>(0xc0))};
  __m512i sums[2][4];  // of even and odd blocks: eight independent sums hide latency
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    sums[0][i] = sums[1][i] = _mm512_setzero_si512();
  }
  for (int64_t b = 0; b < d.blocks; b += 2) {
#pragma GCC unroll 2
    for (int64_t odd = 0; odd < 2; odd++) {
      if (b + odd == d.blocks) {
        break;
      }
      __builtin_prefetch(next + (b + odd) * kBlockBytes);
      const __m512i w = _mm512_loadu_si512(tile + (b + odd) * kBlockBytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512i four = broadcast4(d.x + 16 * (b + odd) + 4 * i);
        sums[odd][i] = _mm512_dpbusd_epi32(sums[odd][i], _mm512_and_si512(w, mask[i]), four);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    sums[0][i] = _mm512_srai_epi32(_mm512_add_epi32(sums[0][i], sums[1][i]), 2 * i);
  }
  const __m512i low = _mm512_add_epi32(sums[0][0], sums[0][1]), high = _mm512_add_epi32(sums[0][2], sums[0][3]);
  _mm512_storeu_si512(raw, _mm512_add_epi32(low, high));
}

// One row waits for memory, which is fastest read in one stream: a tile after the other.
void dot_one(const Dot& d) {
  one_row(d.tile0, d.tile1, d, d.raw);
  one_row(d.tile1, d.tile0 + d.ahead, d, d.raw + 16);
}

// More rows: each decoded vector serves M rows, whose accumulators are independent sums enough; fewer
// than ten would wait for each other, so up to four rows take two accumulators an output. The next two
// tiles are fetched one after the other.
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
    const uint8_t* tile = 2 * b < d.blocks ? d.tile0 : d.tile1 - d.blocks * kBlockBytes;
    const uint8_t* next = tile + d.ahead + 2 * b * kBlockBytes;
    __builtin_prefetch(next);
    __builtin_prefetch(next + kBlockBytes);
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
