// int8 products with the NEON dot product, which takes both sides signed: the codes become weights again,
// and what every other kernel leaves in its sums for `finish` to take off is put there at the start.

template <int M>
inline void int8_tile(const uint8_t* tile, int64_t ahead, const int8_t* x, const int32_t* bias,
                      int64_t blocks, int32_t* raw) {
  const uint8x16_t flip = vdupq_n_u8(0x80);
  int32x4_t sums[M][4];
  for (int r = 0; r < M; r++) {
    for (int q = 0; q < 4; q++) {
      sums[r][q] = vdupq_n_s32(bias[r]);
    }
  }
  for (int64_t group = 0; group < 4 * blocks; group++, x += 4 * M) {
    const uint8_t* words = tile + group * 64;
    __builtin_prefetch(words + ahead);
    int8x16_t weights[4];
    for (int q = 0; q < 4; q++) {
      weights[q] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(words + 16 * q), flip));
    }
    for (int r = 0; r < M; r++) {
      int32_t four;
      std::memcpy(&four, x + 4 * r, sizeof(four));
      const int8x16_t rep = vreinterpretq_s8_s32(vdupq_n_s32(four));
      for (int q = 0; q < 4; q++) {
        sums[r][q] = vdotq_s32(sums[r][q], weights[q], rep);
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
void int8_rows(const Dot& d) {
  int8_tile<M>(d.tile0, d.ahead, d.x, d.sums, d.blocks, d.raw);
  int8_tile<M>(d.tile1, d.ahead, d.x, d.sums, d.blocks, d.raw + 16);
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
