// The same part of the Metal Shading Language as metal_emulator.h, declared for clang, which tells address spaces
// apart. Nothing is executed: the kernels' text is compiled behind this header to see whether it would be on a Mac.
#pragma once

#define IN_DEVICE __attribute__((address_space(1)))
#define IN_CONSTANT __attribute__((address_space(2)))
#define IN_THREADGROUP __attribute__((address_space(3)))
#define device IN_DEVICE
#define constant IN_CONSTANT
#define thread
#define threadgroup static IN_THREADGROUP
#define INFINITY __builtin_inff()

using int8_t = signed char;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using int32_t = int;
using int64_t = long;
using uint8_t = uchar;
using uint16_t = ushort;
using uint32_t = uint;
using uint64_t = ulong;
using half = _Float16;
using float16_t = half;
using bfloat = char16_t;  // a number of two bytes that is no other type
using bfloat16_t = bfloat;

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
using half4 = vec<half, 4>;
using uint3 = vec<uint, 3>;
using uint4 = vec<uint, 4>;
using ulong2 = vec<ulong, 2>;

template <typename To, typename From>
To as_type(From from);

float fma(float a, float b, float c);
float fabs(float x);
float rint(float x);
float fmax(float a, float b);
bool isinf(float x);
int min(int a, int b);
int max(int a, int b);
int clamp(int x, int low, int high);
float clamp(float x, float low, float high);

namespace precise {
float exp(float x);
float log(float x);
float sin(float x);
float cos(float x);
float rsqrt(float x);
float divide(float a, float b);
}  // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags flags);
float simd_sum(float value);
int simd_sum(int value);
uint simd_sum(uint value);
float simd_max(float value);
float simd_broadcast(float value, ushort from);

template <typename T, int Columns, int Rows>
struct simdgroup_matrix {};

template <typename T, int Columns, int Rows = Columns>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value);

#define LOAD_AND_STORE(SPACE)                                                                          \
  template <typename T, int Columns, int Rows>                                                         \
  void simdgroup_load(                                                                                 \
      simdgroup_matrix<T, Columns, Rows>& matrix, const SPACE T* source, ulong stride = Columns,       \
      ulong2 origin = 0, bool transpose = false);                                                      \
  template <typename T, int Columns, int Rows>                                                         \
  void simdgroup_store(                                                                                \
      simdgroup_matrix<T, Columns, Rows> matrix, SPACE T* target, ulong stride = Columns,              \
      ulong2 origin = 0, bool transpose = false);
LOAD_AND_STORE(IN_DEVICE)
LOAD_AND_STORE(IN_THREADGROUP)

template <typename D, typename A, typename B, typename C, int Columns, int Rows, int Inner>
void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, Columns, Rows>& d, simdgroup_matrix<A, Inner, Rows> a, simdgroup_matrix<B, Columns, Inner> b,
    simdgroup_matrix<C, Columns, Rows> c);

}  // namespace metal

#include "metal_names.h"
