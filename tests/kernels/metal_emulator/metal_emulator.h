// The part of the Metal Shading Language that kernels/metal uses, as C++ for g++: the kernels' own text is
// compiled behind this header and executed (metal_emulator.cpp) to test what it computes.
//
// A thread of a threadgroup is a fiber that hands over at each simdgroup operation and barrier, so lanes meet
// there in lockstep. What Metal leaves undefined is an error here: lanes of a simdgroup at different
// operations, a barrier that some threads miss, reads and writes outside of buffers and arrays, overflow of
// signed integers, and names that Metal or MLX have taken (metal_names.h). Memory that nothing was written to holds
// NaN. Address spaces are not told apart: metal_spaces.h does that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define device
#define constant
#define thread
// Threadgroup memory is shared by all fibers and lies together, where the scheduler can poison it.
#define threadgroup static __attribute__((section("threadgroup_memory")))
#define INFINITY __builtin_inff()

using uchar = uint8_t;
using uint = uint32_t;
using ushort = uint16_t;
using ulong = uint64_t;
using half = _Float16;
using float16_t = half;

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};
using bfloat16_t = bfloat;

namespace emulator {

// What a lane brings to an operation, and which one it is.
enum class Operation : int { none, barrier, sum, max, broadcast, multiply };

// Waits until all lanes of the simdgroup are at this operation; returns what each of them brought.
const uint64_t* exchange(Operation operation, uint64_t brought);
void wait_for_threadgroup();
extern int running;  // the thread, by its index in the threadgroup
inline int lane() { return running % 32; }

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t packed = 0;
  std::memcpy(&packed, &value, sizeof(T));
  return packed;
}

template <typename T>
T unpack(uint64_t packed) {
  T value;
  std::memcpy(&value, &packed, sizeof(T));
  return value;
}

}  // namespace emulator

namespace metal {

template <typename T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec {
  T elements[N];
  vec() = default;
  explicit vec(T all) {
    for (T& element : elements) element = all;
  }
  vec(T x, T y) : elements{x, y} { static_assert(N == 2); }
  T& operator[](int i) { return elements[check(i)]; }
  const T& operator[](int i) const { return elements[check(i)]; }

 private:
  static int check(int i) {
    if (i < 0 || i >= N) __builtin_trap();
    return i;
  }
};
using half4 = vec<half, 4>;
using uint4 = vec<uint, 4>;
using ulong2 = vec<ulong, 2>;
static_assert(sizeof(half) == 2 && sizeof(bfloat) == 2 && sizeof(half4) == 8);

struct uint3 {
  uint x, y, z;
};

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return emulator::unpack<To>(emulator::pack(from));
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int clamp(int x, int low, int high) { return min(max(x, low), high); }
inline float clamp(float x, float low, float high) { return __builtin_fminf(__builtin_fmaxf(x, low), high); }

namespace precise {
inline float exp(float x) { return __builtin_expf(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
// An ulp off where EMULATED_DIVISION_ERROR says so: `nearest_quotient` of common.metal must not need a better one.
#ifndef EMULATED_DIVISION_ERROR
#define EMULATED_DIVISION_ERROR 0
#endif
inline float divide(float a, float b) {
  const float q = a / b;
  const bool plain = __builtin_isfinite(q) && q != 0;
  return plain ? as_type<float>(as_type<int>(q) + EMULATED_DIVISION_ERROR) : q;
}
}  // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { emulator::wait_for_threadgroup(); }

// What all lanes of an operation get is worked out by lane 0, which the scheduler always resumes first.

// Pairs of lanes, then pairs of pairs: an order that, as on a GPU, is not the lanes' own.
template <typename T>
T sum_of_lanes(T value) {
  static T total;
  const uint64_t* brought = emulator::exchange(emulator::Operation::sum, emulator::pack(value));
  if (emulator::lane() == 0) {
    T sums[32];
    for (int i = 0; i < 32; ++i) sums[i] = emulator::unpack<T>(brought[i]);
    for (int width = 16; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    total = sums[0];
  }
  return total;
}
inline float simd_sum(float value) { return sum_of_lanes(value); }
inline int simd_sum(int value) { return sum_of_lanes(value); }
inline uint simd_sum(uint value) { return sum_of_lanes(value); }

inline float simd_max(float value) {
  static float top;
  const uint64_t* brought = emulator::exchange(emulator::Operation::max, emulator::pack(value));
  if (emulator::lane() == 0) {
    top = value;
    for (int i = 1; i < 32; ++i) top = fmax(top, emulator::unpack<float>(brought[i]));
  }
  return top;
}

inline float simd_broadcast(float value, ushort from) {
  const uint64_t* brought = emulator::exchange(emulator::Operation::broadcast, emulator::pack(value));
  if (from >= 32) __builtin_trap();
  return emulator::unpack<float>(brought[from]);
}

// A lane holds the elements 2 * lane and 2 * lane + 1 of the matrix, by rows. (On a GPU it holds others.)
template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8);
  T own[2];
};

template <typename T, int Columns, int Rows = Columns>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  return {{value, value}};
}

template <typename T>
void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& matrix, const T* source, ulong stride = 8, ulong2 origin = ulong2(0, 0),
    bool transpose = false) {
  for (int i = 0; i < 2; ++i) {
    const int row = emulator::lane() / 4, column = emulator::lane() % 4 * 2 + i;
    const ulong down = transpose ? column : row, along = transpose ? row : column;
    matrix.own[i] = source[(origin[1] + down) * stride + origin[0] + along];
  }
}

template <typename T>
void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, T* target, ulong stride = 8) {
  for (int i = 0; i < 2; ++i) target[emulator::lane() / 4 * stride + emulator::lane() % 4 * 2 + i] = matrix.own[i];
}

inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<half, 8, 8> a, simdgroup_matrix<half, 8, 8> b,
    simdgroup_matrix<float, 8, 8> c) {
  struct Operands {
    half a[2], b[2];
  };
  const uint64_t* brought = emulator::exchange(
      emulator::Operation::multiply, emulator::pack(Operands{{a.own[0], a.own[1]}, {b.own[0], b.own[1]}}));
  static float left[8][8], right[8][8];
  if (emulator::lane() == 0) {
    for (int i = 0; i < 64; ++i) {
      const Operands operands = emulator::unpack<Operands>(brought[i / 2]);
      left[i / 8][i % 8] = operands.a[i % 2];
      right[i / 8][i % 8] = operands.b[i % 2];
    }
  }
  const int row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  d = c;
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 2; ++i) d.own[i] = fma(left[row][k], right[k][column + i], d.own[i]);
  }
}

}  // namespace metal

#include "metal_names.h"

namespace emulator {

// The kernel's attributes, as MLX names them.
struct Attributes {
  uint3 thread_position_in_grid;
  uint3 threadgroup_position_in_grid;
  uint3 threadgroups_per_grid;
  uint3 threads_per_threadgroup;
  uint simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
  uint thread_index_in_simdgroup;
  uint thread_index_in_threadgroup;
};

}  // namespace emulator

// What a test's generated file defines: the kernel of one thread.
void emulated_kernel(void* const* buffers, const emulator::Attributes& at);
