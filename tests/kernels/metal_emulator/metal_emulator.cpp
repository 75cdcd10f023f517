// Runs a kernel behind metal_emulator.h: threadgroup after threadgroup, its threads as fibers.
#include "metal_emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

// The linker's names for the section of the kernel's threadgroup memory; absent where it has none.
extern "C" char __start_threadgroup_memory[] __attribute__((weak));
extern "C" char __stop_threadgroup_memory[] __attribute__((weak));

namespace emulator {

int running;

namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kThreadgroupBytes = 32768;  // of an Apple GPU
constexpr size_t kStack = (64 << 10) + 17 * 64;  // at powers of two, all stacks would share a few cache lines
constexpr unsigned char kPoison = 0xff;  // NaN in every float format

struct Fiber {
  jmp_buf state;
  Attributes at;
  Operation waiting;
  bool started;
  bool done;
};

struct Simdgroup {
  uint64_t brought[2][kLanes];  // two, because a lane may be at the next operation before all have read this one
  int parity[kLanes];
};

Fiber fibers[kMaxThreads];
Simdgroup simdgroups[kMaxThreads / kLanes];
jmp_buf scheduler;
sigjmp_buf failure;
char fault[200];
ucontext_t entry_context;
char* stacks;
void* const* arguments;

[[noreturn]] void fail(const char* why) {
  std::snprintf(fault, sizeof fault, "%s", why);
  siglongjmp(failure, 1);
}

void on_signal(int number, siginfo_t* info, void*) {
  const uint3 group = fibers[running].at.threadgroup_position_in_grid;
  std::snprintf(
      fault, sizeof fault, "%s at %p in thread %d of threadgroup (%u, %u, %u)",
      number == SIGSEGV || number == SIGBUS ? "access outside of a buffer" : "index or overflow trap", info->si_addr,
      running, group.x, group.y, group.z);
  siglongjmp(failure, 1);
}

void suspend() {
  if (_setjmp(fibers[running].state) == 0) _longjmp(scheduler, 1);
}

void enter() {
  emulated_kernel(arguments, fibers[running].at);
  fibers[running].done = true;
  _longjmp(scheduler, 1);
}

// setjmp and longjmp switch fibers in nanoseconds; a context is needed only to enter a new stack.
void resume(int index) {
  running = index;
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[running];
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&entry_context);
  entry_context.uc_stack.ss_sp = stacks + running * kStack;
  entry_context.uc_stack.ss_size = kStack;
  entry_context.uc_link = nullptr;
  makecontext(&entry_context, enter, 0);
  setcontext(&entry_context);
}

// Runs a simdgroup until all its lanes have ended (true) or wait at a barrier (false).
bool run_simdgroup(int first) {
  for (;;) {
    for (int i = 0; i < kLanes; ++i) {
      if (!fibers[first + i].done) resume(first + i);
    }
    const Fiber& leader = fibers[first];
    for (int i = 1; i < kLanes; ++i) {
      const Fiber& other = fibers[first + i];
      if (other.done != leader.done || (!leader.done && other.waiting != leader.waiting)) {
        fail("lanes of a simdgroup are at different operations");
      }
    }
    if (leader.done) return true;
    if (leader.waiting == Operation::barrier) return false;
  }
}

void run_threadgroup(int threads, bool backwards) {
  std::memset(__start_threadgroup_memory, kPoison, __stop_threadgroup_memory - __start_threadgroup_memory);
  const int count = threads / kLanes;
  bool ended = false;
  while (!ended) {
    int finished = 0;
    for (int i = 0; i < count; ++i) {
      // Either order is possible on a GPU: results that depend on it lack a barrier.
      finished += run_simdgroup((backwards ? count - 1 - i : i) * kLanes);
    }
    if (finished != 0 && finished != count) fail("a barrier that some threads miss");
    ended = finished == count;
  }
}

// A buffer whose end is the end of accessible memory; what lies before its start is checked for writes.
struct Guarded {
  char* pages;
  size_t length;
  char* start;

  explicit Guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    length = (bytes + page - 1) / page * page + 2 * page;
    pages = static_cast<char*>(mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages, page, PROT_NONE);
    mprotect(pages + length - page, page, PROT_NONE);
    start = pages + length - page - bytes;
    std::memset(pages + page, kPoison, start - pages - page);
  }

  bool intact() const {
    for (const char* p = pages + sysconf(_SC_PAGESIZE); p < start; ++p) {
      if (static_cast<unsigned char>(*p) != kPoison) return false;
    }
    return true;
  }
};

}  // namespace

const uint64_t* exchange(Operation operation, uint64_t brought) {
  Simdgroup& simdgroup = simdgroups[running / kLanes];
  const int parity = simdgroup.parity[lane()] ^= 1;
  simdgroup.brought[parity][lane()] = brought;
  fibers[running].waiting = operation;
  suspend();
  return simdgroup.brought[parity];
}

void wait_for_threadgroup() {
  fibers[running].waiting = Operation::barrier;
  suspend();
}

}  // namespace emulator

// buffers: `inputs` inputs and then outputs of so many bytes each; outputs are written back. grid: threadgroups.
// Returns 0, or 1 with the reason in `why`, 200 characters.
extern "C" __attribute__((visibility("default"))) int run_emulated(
    void** buffers, const size_t* bytes, int inputs, int count, const uint32_t* grid, const uint32_t* size,
    char* why) {
  using namespace emulator;
  const int threads = size[0] * size[1] * size[2];
  stacks = static_cast<char*>(
      mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  std::vector<Guarded> guarded;
  std::vector<void*> starts;
  for (int i = 0; i < count; ++i) {
    guarded.emplace_back(bytes[i]);
    starts.push_back(guarded[i].start);
    if (i < inputs) {
      std::memcpy(starts[i], buffers[i], bytes[i]);
    } else {
      std::memset(starts[i], kPoison, bytes[i]);
    }
  }
  arguments = starts.data();

  static char signal_stack[64 << 10];
  const stack_t alternative{signal_stack, 0, sizeof signal_stack};
  stack_t old_stack;
  sigaltstack(&alternative, &old_stack);
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction old[5];
  for (int i = 0; i < 5; ++i) sigaction(numbers[i], &action, &old[i]);

  volatile int failed = 0;
  if (sigsetjmp(failure, 1) == 0) {
    if (threads > kMaxThreads || threads % kLanes) fail("a threadgroup of no whole simdgroups, or of too many");
    if (__stop_threadgroup_memory - __start_threadgroup_memory > ptrdiff_t(kThreadgroupBytes)) {
      fail("too much threadgroup memory");
    }
    for (uint z = 0; z < grid[2]; ++z) {
      for (uint y = 0; y < grid[1]; ++y) {
        for (uint x = 0; x < grid[0]; ++x) {
          for (uint t = 0; t < uint(threads); ++t) {
            const uint3 local{t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
            fibers[t].at = {
                {x * size[0] + local.x, y * size[1] + local.y, z * size[2] + local.z},
                {x, y, z},
                {grid[0], grid[1], grid[2]},
                {size[0], size[1], size[2]},
                t / kLanes,
                uint(threads) / kLanes,
                t % kLanes,
                t,
            };
            fibers[t].started = fibers[t].done = false;
            simdgroups[t / kLanes].parity[t % kLanes] = 0;
          }
          run_threadgroup(threads, (x + y + z) % 2);
        }
      }
    }
  } else {
    failed = 1;
  }

  for (int i = 0; i < 5; ++i) sigaction(numbers[i], &old[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  for (int i = 0; i < count; ++i) {
    if (!failed && !guarded[i].intact()) {
      failed = 1;
      std::snprintf(fault, sizeof fault, "a write before the start of buffer %d", i);
    }
    if (i >= inputs) std::memcpy(buffers[i], starts[i], bytes[i]);
    munmap(guarded[i].pages, guarded[i].length);
  }
  munmap(stacks, threads * kStack);
  if (failed) std::memcpy(why, fault, sizeof fault);
  return failed;
}
