// Sixteen float lanes as four vectors of the compiler's own, for any processor; see simd_avx512.inl.

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t IntQuad __attribute__((vector_size(16)));
typedef uint16_t ShortQuad __attribute__((vector_size(8)));

struct F {
  Quad q[4];
};

template <class Op>
inline F each(Op op) {
  return {{op(0), op(1), op(2), op(3)}};
}
inline Quad load_quad(const float* p) {
  Quad q;
  std::memcpy(&q, p, sizeof(q));
  return q;
}
inline Quad quad(float x) { return Quad{x, x, x, x}; }
inline Quad select(IntQuad mask, Quad yes, Quad no) {
  return reinterpret_cast<Quad>((mask & reinterpret_cast<IntQuad>(yes)) |
                                (~mask & reinterpret_cast<IntQuad>(no)));
}

inline F load(const float* p) {
  return each([&](int i) { return load_quad(p + 4 * i); });
}
inline F load_part(const float* p, int n) {
  float lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
  return load(lanes);
}
inline F load_bf16(const uint16_t* p) {
  return each([&](int i) {
    ShortQuad bits;
    std::memcpy(&bits, p + 4 * i, sizeof(bits));
    return reinterpret_cast<Quad>(__builtin_convertvector(bits, IntQuad) << 16);
  });
}
inline void store(float* p, F x) { std::memcpy(p, x.q, sizeof(x.q)); }
inline void store_part(float* p, F x, int n) { std::memcpy(p, x.q, static_cast<size_t>(n) * sizeof(float)); }
inline F set1(float x) { return {{quad(x), quad(x), quad(x), quad(x)}}; }
inline F operator+(F a, F b) {
  return each([&](int i) { return a.q[i] + b.q[i]; });
}
inline F operator-(F a, F b) {
  return each([&](int i) { return a.q[i] - b.q[i]; });
}
inline F operator*(F a, F b) {
  return each([&](int i) { return a.q[i] * b.q[i]; });
}
inline F operator/(F a, F b) {
  return each([&](int i) { return a.q[i] / b.q[i]; });
}
inline F fma(F a, F b, F c) {
#if defined(__aarch64__)
  return each(
      [&](int i) { return Quad(vfmaq_f32(float32x4_t(c.q[i]), float32x4_t(a.q[i]), float32x4_t(b.q[i]))); });
#else
  return each([&](int i) { return a.q[i] * b.q[i] + c.q[i]; });
#endif
}
inline F max(F a, F b) {
  return each([&](int i) { return select(a.q[i] > b.q[i], a.q[i], b.q[i]); });
}
inline F min(F a, F b) {
  return each([&](int i) { return select(a.q[i] < b.q[i], a.q[i], b.q[i]); });
}
inline F abs(F a) {
  return each([&](int i) { return reinterpret_cast<Quad>(reinterpret_cast<IntQuad>(a.q[i]) & 0x7fffffff); });
}
inline bool any_above(F a, F b) {
  const IntQuad above = (a.q[0] > b.q[0]) | (a.q[1] > b.q[1]) | (a.q[2] > b.q[2]) | (a.q[3] > b.q[3]);
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}
inline F from_int(const int32_t* p, int32_t minus) {
  return each([&](int i) {
    IntQuad q;
    std::memcpy(&q, p + 4 * i, sizeof(q));
    return __builtin_convertvector(q - minus, Quad);
  });
}
inline F pow2(F n) {
  return each(
      [&](int i) { return reinterpret_cast<Quad>((__builtin_convertvector(n.q[i], IntQuad) + 127) << 23); });
}
// Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds half to even.
inline F round_even(F a) {
  const F magic = set1(12582912.0f);
  return (a + magic) - magic;
}
inline void store_i8(int8_t* p, F a) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < 16; i++) {
    p[i] = static_cast<int8_t>(lanes[i]);
  }
}

inline F reduce4(F a, F b, F c, F d) {
  return each([&](int i) {
    const Quad x = a.q[i], y = b.q[i], z = c.q[i], w = d.q[i];
    return Quad{(x[0] + x[2]) + (x[1] + x[3]), (y[0] + y[2]) + (y[1] + y[3]), (z[0] + z[2]) + (z[1] + z[3]),
                (w[0] + w[2]) + (w[1] + w[3])};
  });
}
inline Quad fold(F x) { return (x.q[0] + x.q[1]) + (x.q[2] + x.q[3]); }
inline F reduce_groups(F x, F y, F z, F w) { return {{fold(x), fold(y), fold(z), fold(w)}}; }
