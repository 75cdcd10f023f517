// The part of CUDA C++ that kernels/cuda uses, as C++ for g++: the kernels' own text is compiled behind this
// header and executed (cuda_emulator.cpp) to test what it computes.
//
// A thread is a fiber that hands over at each warp operation, barrier and wait for a packet; blocks that are
// resident together live at once. What CUDA leaves undefined, or a GPU would wait for in vain, is an error here: lanes
// of a warp at different operations, a barrier that some threads miss, reads and writes outside of buffers and
// arrays, addresses that are not aligned, loads past the coherent caches of what the kernel may write, overflow
// of signed integers, packets that nobody will send. Memory that nothing was written to holds random bytes.
// Not shown: the order in which a GPU's threads see each other's writes. Here they see them at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <math.h>
#include <unordered_map>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A block's threads are fibers of one thread of the operating system, so its shared memory is that thread's own.
#define __shared__ thread_local
#define threadIdx (::emulator::running->thread)
#define blockIdx (::emulator::running->block)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

// Where the kernel's text calls something; as default arguments these name the caller.
#define EMULATED_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATED_CALL file, line

struct Thread {
  uint3 thread, block;
};
extern Thread* running;
extern uint3 block_size, grid_size;
inline int lane() { return running->thread.x % 32; }

constexpr int kWords = 6;  // that a lane can bring to an operation
using Brought = uint32_t[32][kWords];

enum class Operation : int { none, shuffle, multiply, wait };

// Waits until all lanes of the warp are at this operation; returns what each of them brought.
const Brought& exchange(Operation operation, unsigned lanes, const void* brought, size_t bytes, EMULATED_CALLER);
void wait_for_block(EMULATED_CALLER);
// Where others may run, if the order is a random one.
void may_pause(EMULATED_CALLER);
// A word's value; who looks at the same value again is only resumed once it has changed.
unsigned watch(const unsigned* word, EMULATED_CALLER);

enum class Access { coherent, read_only, ahead };
// Fails if an address is not aligned to its size, not of a buffer, or of one that the kernel may write to.
void check(const void* address, size_t bytes, Access access, EMULATED_CALLER);
[[noreturn]] void fail(const char* why, EMULATED_CALLER);

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulator

inline void __syncthreads(EMULATED_CALLER) { emulator::wait_for_block(EMULATED_CALL); }
inline void __syncwarp(EMULATED_CALLER) {
  const uint32_t nothing = 0;
  emulator::exchange(emulator::Operation::wait, ~0u, &nothing, sizeof nothing, EMULATED_CALL);
}
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, EMULATED_CALLER) {
  const auto& brought = emulator::exchange(emulator::Operation::shuffle, lanes, &value, sizeof value, EMULATED_CALL);
  std::memcpy(&value, brought[emulator::lane() ^ mask], sizeof value);
  return value;
}

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from, EMULATED_CALLER) {
  const auto& brought = emulator::exchange(emulator::Operation::shuffle, lanes, &value, sizeof value, EMULATED_CALL);
  std::memcpy(&value, brought[from], sizeof value);
  return value;
}

template <typename T>
T atomicAdd(T* address, T value, EMULATED_CALLER) {
  emulator::may_pause(EMULATED_CALL);
  const T before = *address;
  *address = before + value;
  return before;
}

// Through a cache that never learns of writes.
template <typename T>
T __ldg(const T* address, EMULATED_CALLER) {
  emulator::check(address, sizeof(T), emulator::Access::read_only, EMULATED_CALL);
  return *address;
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
  return c;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __frsqrt_rn(float x) { return float(1.0 / __builtin_sqrt(double(x))); }
inline float __int2float_rn(int x) { return float(x); }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : int(__builtin_rintf(x));
}
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
namespace emulator {

// What a test's generated file defines: the kernel of one thread, and the start of its dynamic shared memory.
extern "C" void emulated_kernel(void* const* buffers);
extern "C" unsigned char* emulated_shared_memory();

}  // namespace emulator
