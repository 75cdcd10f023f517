// Ternary products with the NEON dot product: codes 0..2 are as good signed as unsigned.

template <int M>
inline void dot_tile(const uint8_t* tile, int64_t ahead, const int8_t* x, int64_t blocks, int32_t* raw) {
  const uint8x16_t mask = vdupq_n_u8(0x03);
  int32x4_t sums[M][4];
  for (int r = 0; r < M; r++) {
    for (int q = 0; q < 4; q++) {
      sums[r][q] = vdupq_n_s32(0);
    }
  }
  for (int64_t b = 0; b < blocks; b++, x += 16 * M) {
    __builtin_prefetch(tile + b * kBlockBytes + ahead);
    uint8x16_t words[4];
    for (int q = 0; q < 4; q++) {
      words[q] = vld1q_u8(tile + b * kBlockBytes + 16 * q);
    }
    for (int i = 0; i < 4; i++) {
      int8x16_t codes[4];
      for (int q = 0; q < 4; q++) {
        codes[q] = vreinterpretq_s8_u8(vandq_u8(words[q], mask));
        words[q] = vshrq_n_u8(words[q], 2);
      }
      for (int r = 0; r < M; r++) {
        int32_t four;
        std::memcpy(&four, x + 4 * (i * M + r), sizeof(four));
        const int8x16_t rep = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int q = 0; q < 4; q++) {
          sums[r][q] = vdotq_s32(sums[r][q], codes[q], rep);
        }
      }
    }
  }
  for (int r = 0; r < M; r++) {
    for (int q = 0; q < 4; q++) {
      vst1q_s32(raw + r * kPairOutputs + 4 * q, sums[r][q]);
    }
  }
}

template <int M>
void dot_rows(const Dot& d) {
  dot_tile<M>(d.tile0, d.ahead, d.x, d.blocks, d.raw);
  dot_tile<M>(d.tile1, d.ahead, d.x, d.blocks, d.raw + 16);
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
