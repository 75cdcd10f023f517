// What CUDA C++ has no words for. The tests replace this file by plain C++ and run the others on a CPU.
#pragma once

// No header comes from elsewhere: a kernel compiles in a fraction of the time that the usual ones take.
using int8_t = signed char;
using uint8_t = unsigned char;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;

namespace bitdraft {

struct bfloat16 {
  unsigned short bits;
  __device__ operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

// Sixteen bytes of weights, which the first cache need not keep. Volatile: the load starts where it is written.
__device__ inline uint4 stream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

// m16n8k32: c += a b for sixteen outputs and eight rows of int8; the operands as the PTX manual names them.
__device__ inline void multiply(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with unsigned bytes on the left.
__device__ inline void multiply_codes(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// m16n8k16: c += a b for sixteen outputs and eight rows of bfloat16, two in a word; the operands as the PTX manual names
// them. On GPUs that have no such product, before compute capability 8.0, nothing that uses it is run.
__device__ inline void multiply_bfloat16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Three words and a number; what waiting for one in vain ends with is an error, not a GPU that hangs.
using Packet = uint4;
constexpr unsigned kPatience = 1u << 24;  // looks, which takes seconds

// Writes a packet as one, for all blocks to see.
__device__ inline void post(Packet* to, Packet p) {
  asm volatile(
      "{\n .reg .b64 low, high;\n .reg .b128 all;\n mov.b64 low, {%1, %2};\n mov.b64 high, {%3, %4};\n"
      " mov.b128 all, {low, high};\n st.relaxed.gpu.global.b128 [%0], all;\n}" ::"l"(to),
      "r"(p.x), "r"(p.y), "r"(p.z), "r"(p.w)
      : "memory");
}

// Reads a packet as one, as it is now.
__device__ inline Packet peek(const Packet* from) {
  Packet p;
  asm volatile(
      "{\n .reg .b64 low, high;\n .reg .b128 all;\n ld.relaxed.gpu.global.b128 all, [%4];\n mov.b128 {low, high}, all;\n"
      " mov.b64 {%0, %1}, low;\n mov.b64 {%2, %3}, high;\n}"
      : "=r"(p.x), "=r"(p.y), "=r"(p.z), "=r"(p.w)
      : "l"(from)
      : "memory");
  return p;
}

// Between two looks at packets of which this one has not had its number.
__device__ inline void look_again(const Packet*, unsigned, unsigned looks) {
  if (looks > kPatience) {
    asm volatile("trap;");
  }
}

// Starts to copy sixteen bytes to shared memory. A thread's copies since its last `close_copies` are a group.
__device__ inline void copy_ahead(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

__device__ inline void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies but those of its last `groups` groups.
template <int groups>
__device__ inline void await_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// Calls memory into L2; address and bytes are multiples of 16.
__device__ inline void prefetch(const uint8_t* from, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

}  // namespace bitdraft
