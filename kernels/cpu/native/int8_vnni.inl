// int8 products with AVX-512 VNNI: a vector of codes is an operand as it stands.

// T tiles at once. Sums that wait for each other are too slow, so few rows take several an output.
template <int M, int T>
inline void int8_tiles(const Dot& d, const uint8_t* tile0, const uint8_t* tile1, int32_t* raw) {
  constexpr int ways = M * T >= 6 ? 1 : M * T >= 3 ? 2 : 4;
  __m512i sums[T][M][ways];
#pragma GCC unroll 32
  for (int i = 0; i < T * M; i++) {
#pragma GCC unroll 4
    for (int w = 0; w < ways; w++) {
      sums[i / M][i % M][w] = _mm512_setzero_si512();
    }
  }
  const uint8_t* tiles[2] = {tile0, tile1};
  const int8_t* x = d.x;
  for (int64_t b = 0; b < d.blocks; b++, x += 16 * M) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      __m512i codes[T];
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        const uint8_t* from = tiles[t] + b * kInt8BlockBytes + 64 * i;
        __builtin_prefetch(from + d.ahead);
        codes[t] = _mm512_loadu_si512(from);
      }
#pragma GCC unroll 32
      for (int r = 0; r < M; r++) {
        const __m512i four = broadcast4(x + 4 * (i * M + r));
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
          sums[t][r][i % ways] = _mm512_dpbusd_epi32(sums[t][r][i % ways], codes[t], four);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      __m512i sum = sums[t][r][0];
#pragma GCC unroll 4
      for (int i = 1; i < ways; i++) {
        sum = _mm512_add_epi32(sum, sums[t][r][i]);
      }
      _mm512_storeu_si512(raw + r * kPairOutputs + 16 * t, sum);
    }
  }
}

// Up to four rows wait for memory, which is fastest read in one stream: a tile after the other. More of
// them wait for arithmetic, and two tiles share the loads of x.
template <int M>
void int8_rows(const Dot& d) {
  if constexpr (M <= 4) {
    int8_tiles<M, 1>(d, d.tile0, d.tile0, d.raw);
    int8_tiles<M, 1>(d, d.tile1, d.tile1, d.raw + 16);
  } else {
    int8_tiles<M, 2>(d, d.tile0, d.tile1, d.raw);
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
    case 8:
      return int8_rows<8>(d);
    case 9:
      return int8_rows<9>(d);
    case 10:
      return int8_rows<10>(d);
    case 11:
      return int8_rows<11>(d);
    default:
      return int8_rows<12>(d);
  }
}
