// What stands for kernels/cuda/ptx.cuh where the kernels are run by the emulator.
namespace bitdraft {

struct bfloat16 {
  uint16_t bits;
  operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};

inline uint4 stream16(const void* p, EMULATED_CALLER) {
  emulator::check(p, 16, emulator::Access::read_only, EMULATED_CALL);
  return *static_cast<const uint4*>(p);
}

// Lane 4g + q has a0, a2 of output g and a1, a3 of output g + 8, b0 and b1 of row g: four inputs each, from 4q
// (a0, a1, b0) and from 16 + 4q on. Its results are of outputs g (c0, c1) and g + 8 (c2, c3), rows 2q and 2q + 1.
template <typename Left>
void multiply_bytes(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMULATED_CALLER) {
  const unsigned mine[] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto& brought = emulator::exchange(emulator::Operation::multiply, ~0u, mine, sizeof mine, EMULATED_CALL);
  const int output = emulator::lane() / 4, row = emulator::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    for (int q = 0; q < 4; ++q) {
      const auto& left = brought[4 * output + q];
      const auto& right = brought[4 * (row + i % 2) + q];
      for (int byte = 0; byte < 4; ++byte) {
        c[i] += int(Left(left[i / 2] >> 8 * byte)) * int8_t(right[4] >> 8 * byte);
        c[i] += int(Left(left[2 + i / 2] >> 8 * byte)) * int8_t(right[5] >> 8 * byte);
      }
    }
  }
}

inline void multiply(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMULATED_CALLER) {
  multiply_bytes<int8_t>(c, a, b0, b1, EMULATED_CALL);
}

inline void multiply_codes(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMULATED_CALLER) {
  multiply_bytes<uint8_t>(c, a, b0, b1, EMULATED_CALL);
}

// Two bfloat16 a word, and sums in float one after the other, in order of the inputs.
inline void multiply_bfloat16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1,
                              EMULATED_CALLER) {
  const unsigned mine[] = {a0, a1, a2, a3, b0, b1};
  const auto& brought = emulator::exchange(emulator::Operation::multiply, ~0u, mine, sizeof mine, EMULATED_CALL);
  const int output = emulator::lane() / 4, row = emulator::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    for (int input = 0; input < 16; ++input) {
      const int q = input % 8 / 2, shift = input % 2 ? 0 : 16, upper = input / 8;
      const unsigned left = brought[4 * output + q][i / 2 + 2 * upper] << shift & 0xffff0000u;
      const unsigned right = brought[4 * (row + i % 2) + q][4 + upper] << shift & 0xffff0000u;
      c[i] += __uint_as_float(left) * __uint_as_float(right);
    }
  }
}

using Packet = uint4;

inline void post(Packet* to, Packet p, EMULATED_CALLER) {
  emulator::may_pause(EMULATED_CALL);
  emulator::check(to, 16, emulator::Access::coherent, EMULATED_CALL);
  *to = p;
}

inline Packet peek(const Packet* from, EMULATED_CALLER) {
  emulator::may_pause(EMULATED_CALL);
  emulator::check(from, 16, emulator::Access::coherent, EMULATED_CALL);
  return *from;
}

inline void look_again(const Packet* missing, unsigned number, unsigned, EMULATED_CALLER) {
  while (emulator::watch(&missing->w, EMULATED_CALL) != number) {
  }
}

// What is copied lies there only when its thread has waited for it.
struct Copy {
  void* to;
  uint4 bytes;
};
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};
inline std::unordered_map<const void*, Copies> copies;  // of a thread

inline void copy_ahead(void* to, const void* from, EMULATED_CALLER) {
  emulator::check(from, 16, emulator::Access::coherent, EMULATED_CALL);
  *static_cast<uint4*>(to) = make_uint4(~0u, ~0u, ~0u, ~0u);
  copies[emulator::running].open.push_back({to, *static_cast<const uint4*>(from)});
}

inline void close_copies() {
  Copies& mine = copies[emulator::running];
  mine.closed.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int groups>
inline void await_copies() {
  for (auto& closed = copies[emulator::running].closed; closed.size() > groups; closed.pop_front()) {
    for (const Copy& copy : closed.front()) *static_cast<uint4*>(copy.to) = copy.bytes;
  }
}

inline void prefetch(const uint8_t* from, unsigned bytes, EMULATED_CALLER) {
  if (bytes % 16) emulator::fail("a prefetch of no whole 16 bytes", EMULATED_CALL);
  emulator::check(from, bytes, emulator::Access::ahead, EMULATED_CALL);
}

}  // namespace bitdraft
