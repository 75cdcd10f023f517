// Shared by all kernels of this folder; MLX puts it before the kernel's generated signature.
//
// Address spaces: MLX passes an input of fewer than eight elements as `constant`, larger ones as `device`.
// Bodies index their inputs directly, which suits both; what is cast to a pointer type has more elements.

// A product and a sum that the compiler joins into one rounding would not be the reference's.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#else
#pragma clang fp contract(off)
#endif

constant constexpr int LANES = 32;

// a / b rounded to nearest, even where the compiler's own quotient is an ulp off (fast math). For q within an
// ulp of a / b the remainder a - q * b fits a float, so that fma gives it exactly, and the nearest of three
// neighbours is the one that leaves least. A tie cannot happen: no quotient of floats lies midway between two.
// Holds while remainders are normal numbers: |a| above 2^-78. (`divide` is a function of namespace metal, all of
// which MLX makes visible: one of that name here would make every call ambiguous.)
inline float nearest_quotient(float a, float b) {
  const float q = precise::divide(a, b);
  if (isinf(q)) {
    return q;
  }
  const float below = as_type<float>(as_type<uint>(q) - 1u);
  const float above = as_type<float>(as_type<uint>(q) + 1u);
  const float left = fabs(fma(-q, b, a));
  const float nearest = fabs(fma(-below, b, a)) < left ? below : q;
  return fabs(fma(-above, b, a)) < left ? above : nearest;
}

// The gate's activation times the other half: 1 is squared ReLU, 2 is SiLU.
inline float gated(float gate, float up, int kind) {
  if (kind == 1) {
    const float positive = fmax(gate, 0.0f);
    return positive * positive * up;
  }
  return gate * precise::divide(1.0f, 1.0f + precise::exp(-gate)) * up;
}

// Sum and maximum over a threadgroup, in an order that its size alone decides. `partial`: threadgroup memory,
// one element a simdgroup, free for use again after the next barrier.
template <typename T, typename Partial>
T group_sum(T value, Partial partial, uint simdgroup, uint lane, uint simdgroups) {
  value = simd_sum(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    partial[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  T total = partial[0];
  for (uint i = 1; i < simdgroups; ++i) {
    total += partial[i];
  }
  return total;
}

template <typename Partial>
float group_max(float value, Partial partial, uint simdgroup, uint lane, uint simdgroups) {
  value = simd_max(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    partial[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float top = partial[0];
  for (uint i = 1; i < simdgroups; ++i) {
    top = fmax(top, partial[i]);
  }
  return top;
}

// Sixteen weights. A code's bits become the highest of a float's mantissa under the exponent of one:
// 1 + code / 2^BITS costs no conversion, and a row's sum takes the rest off again:
//     sum of weight * x = 2^BITS * sum of value * x - (2^BITS + bias) * sum of x,   weight = code - bias.
template <int BITS>
struct Codes;

template <>
struct Codes<2> {  // ternary: bits 2i..2i+1 of a word are weight i + 1
  static constant constexpr int WORDS = 1;
  static constant constexpr int BIAS = 1;
  // Blocks a lane may sum up in float: 16 * 128 * 6 quarters each, exact below 2^24 of them.
  static constant constexpr int EXACT = 1024;

  uint word;

  void load(const device uint* words) { word = words[0]; }

  float value(int i) const {
    const uint high = i <= 10 ? word << (21 - min(2 * i, 21)) : word >> (max(2 * i, 21) - 21);
    return as_type<float>((high & 0x600000u) | 0x3f800000u);
  }
};

template <>
struct Codes<8> {  // byte i of four words is weight i + 128
  static constant constexpr int WORDS = 4;
  static constant constexpr int BIAS = 128;
  // 16 * 128 * 511 parts of 256 a block.
  static constant constexpr int EXACT = 16;

  uint4 words;

  void load(const device uint* from) { words = *(const device uint4*)from; }

  float value(int i) const {
    const uint byte = (words[i / 4] >> (8 * (i % 4))) & 0xffu;
    return as_type<float>((byte << 15) | 0x3f800000u);
  }
};

// What a logit weighs in a softmax whose highest logit is `highest`; a NaN nothing.
inline float weight_of(float logit, float highest, float inverse) {
  return logit > -INFINITY ? precise::exp((logit - highest) * inverse) : 0.0f;
}

// Where a sum of weights passes a number, as the weights come one by one.
struct Found {
  float sum;
  float before;  // the sum before the chosen one
  int chosen;
  bool passed;
};

inline Found nothing_found() { return {0.0f, 0.0f, 0, false}; }

inline void look_at(thread Found& found, int which, float weight, float number) {
  if (weight > 0.0f && !found.passed) {
    found.chosen = which;
    found.before = found.sum;
    found.passed = found.sum + weight > number;
  }
  found.sum += weight;
}

// Of two logits the one that comes first has the higher rank: by falling logit, of equal ones by id; NaN is the
// last. Zero is no logit's rank.
inline ulong rank_of(float logit, uint id) {
  const uint bits = logit == 0.0f ? 0u : as_type<uint>(logit);  // minus zero equals zero
  const uint ordered = logit != logit ? 1u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ulong(ordered) << 32 | ulong(~id);
}

inline uint id_of(ulong rank) { return ~uint(rank & 0xfffffffful); }

inline float logit_of(ulong rank) {
  const uint ordered = uint(rank >> 32);
  return as_type<float>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Sorts so many keys, a power of two, with all threads of a threadgroup: bitonic.
template <typename Keys>
void sort_falling(Keys keys, int size, int index, int threads) {
  for (int length = 2; length <= size; length *= 2) {
    for (int apart = length / 2; apart > 0; apart /= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = index; i < size; i += threads) {
        const int other = i ^ apart;
        if (other > i) {
          const ulong a = keys[i];
          const ulong b = keys[other];
          if ((a < b) == ((i & length) == 0)) {
            keys[i] = b;
            keys[other] = a;
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
