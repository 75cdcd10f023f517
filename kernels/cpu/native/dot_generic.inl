// Ternary products in plain C++ vectors: one 32-bit multiplication a weight. Slow, and right anywhere.

inline void dot_tile(int rows, const uint8_t* tile, const int8_t* x, int64_t blocks, int32_t* raw) {
  for (int r = 0; r < rows; r++) {
    IntQuad sums[4] = {};
    for (int64_t b = 0; b < blocks; b++) {
      IntQuad words[4];
      std::memcpy(words, tile + b * kBlockBytes, kBlockBytes);
      for (int i = 0; i < 4; i++) {
        const int8_t* four = x + 4 * ((b * 4 + i) * rows + r);
        for (int byte = 0; byte < 4; byte++) {
          const int32_t factor = four[byte];
          for (int q = 0; q < 4; q++) {
            sums[q] += ((words[q] >> (8 * byte + 2 * i)) & 3) * factor;
          }
        }
      }
    }
    std::memcpy(raw + r * kPairOutputs, sums, sizeof(sums));
  }
}

void dot_ternary(int rows, const Dot& d) {
  dot_tile(rows, d.tile0, d.x, d.blocks, d.raw);
  dot_tile(rows, d.tile1, d.x, d.blocks, d.raw + 16);
}
