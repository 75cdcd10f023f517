// Persistent helper threads for loops of independent chunks.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace bitdraft {

constexpr int kMaxThreads = 256;

// Threads a loop may use, the caller among them: one until set_threads says otherwise, as kernels/cpu/__init__.py
// does, and kMaxThreads at most.
int threads();
void set_threads(int count);

// Ask that the calling thread gets the core in short slices: as much of it as before, but sooner after waking up, so that
// threads that wait for one another beside other programs run at the same time. What it starts does not inherit that.
// Linux from 6.12 on; nothing elsewhere.
void take_short_slices();

namespace detail {
using ChunkFn = void (*)(void* context, int chunk);
void parallel_chunks(int chunks, ChunkFn fn, void* context);
}  // namespace detail

// Calls body(chunk) once for every chunk in 0..chunks-1, in any order, on the caller and whatever
// helpers are free. Body must not throw.
template <class Body>
void parallel_for(int chunks, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::parallel_chunks(
      chunks, [](void* context, int chunk) { (*static_cast<Plain*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

constexpr int kScratchSlots = 10;

// A thread's scratch memory, 64-byte aligned, kept between calls. Slots are independent; growing one
// loses its contents.
float* scratch_floats(int slot, int64_t count);
inline int8_t* scratch_bytes(int slot, int64_t count) {
  return reinterpret_cast<int8_t*>(scratch_floats(slot, (count + 3) / 4));
}

}  // namespace bitdraft
