// int8 products in plain C++ vectors: one 32-bit multiplication a weight. Slow, and right anywhere.

inline void int8_tile(int rows, const uint8_t* tile, const int8_t* x, int64_t blocks, int32_t* raw) {
  for (int r = 0; r < rows; r++) {
    IntQuad sums[4] = {};
    for (int64_t group = 0; group < 4 * blocks; group++) {
      IntQuad words[4];
      std::memcpy(words, tile + group * 64, 64);
      const int8_t* four = x + 4 * (group * rows + r);
      for (int byte = 0; byte < 4; byte++) {
        const int32_t factor = four[byte];
        for (int q = 0; q < 4; q++) {
          sums[q] += ((words[q] >> (8 * byte)) & 255) * factor;
        }
      }
    }
    std::memcpy(raw + r * kPairOutputs, sums, sizeof(sums));
  }
}

void dot_int8(int rows, const Dot& d) {
  int8_tile(rows, d.tile0, d.x, d.blocks, d.raw);
  int8_tile(rows, d.tile1, d.x, d.blocks, d.raw + 16);
}
