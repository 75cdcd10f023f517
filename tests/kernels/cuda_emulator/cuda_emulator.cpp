// Runs a kernel behind cuda_emulator.h: some blocks at a time, each a thread of the operating system (which gives
// it its own shared memory), their threads as fibers. One fiber of all runs at any time, so runs can be repeated.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <link.h>
#include <memory>
#include <pthread.h>
#include <random>
#include <semaphore.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

#include "cuda_emulator.h"  // last: it defines what the others must not see

namespace emulator {

Thread* running;
uint3 block_size, grid_size;

namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kStack = (64 << 10) + 17 * 64;  // at powers of two, all stacks would share a few cache lines
constexpr size_t kSignalStack = 64 << 10;
// Of an H100: what a block may have of shared memory if asked for, and otherwise. MLX asks above 48,000 bytes of
// the dynamic part, whatever the static part takes.
constexpr size_t kMaxShared = 227 << 10, kDefaultShared = 48 << 10, kAskedFrom = 48000;

enum class State { ready, at_operation, at_barrier, watching, done };

struct Fiber : Thread {
  jmp_buf where;
  State state;
  bool started;
  Operation operation;
  const char* file;  // of the call that it waits in
  int line;
  const unsigned* watched;  // the word that it looked at last, with nothing done since
  unsigned value;
};

struct Warp {
  Brought brought[2];  // two, because a lane may be at the next operation before all have read this one
  int parity[kLanes];
  int priority;
};

// A multiprocessor: it runs a block after another.
struct Slot {
  pthread_t thread;
  sem_t turn;
  bool over;  // no block is left for it
  bool idle;  // between two blocks
  int priority;
  uint3 block;
  std::unique_ptr<Fiber[]> fibers;
  std::unique_ptr<Warp[]> warps;
  char* stacks;
  std::unique_ptr<char[]> signal_stack;
  sigjmp_buf failure;
  jmp_buf scheduler;
  ucontext_t entry;
};

// A buffer between memory that is not accessible; up to 15 bytes behind its end and the page before its start are
// checked for writes.
struct Guarded {
  char* pages;
  size_t length, bytes;
  char* start;
  bool written;  // by intention: an output, or an input that changes in place
  char poison;

  Guarded(size_t bytes, bool written, char poison) : bytes(bytes), written(written), poison(poison) {
    const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + 15) / 16 * 16;
    length = (room + page - 1) / page * page + 2 * page;
    pages = static_cast<char*>(mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages, page, PROT_NONE);
    mprotect(pages + length - page, page, PROT_NONE);
    start = pages + length - page - room;
    std::memset(pages + page, poison, length - 2 * page);
  }
  bool intact() const {
    const size_t page = sysconf(_SC_PAGESIZE);
    return std::all_of(pages + page, start, [&](char c) { return c == poison; }) &&
           std::all_of(start + bytes, pages + length - page, [&](char c) { return c == poison; });
  }
};

std::vector<Slot> slots;
Slot* current;
std::vector<Guarded> buffers;
std::vector<void*> arguments;
std::vector<unsigned> order;  // in which blocks start
size_t next_block;
unsigned threads, resident;
size_t dynamic_shared;
bool random_order;
std::mt19937 dice;
bool failed;
char fault[1000];
sem_t finished;

unsigned warps() { return threads / kLanes; }

bool chance(unsigned one_in) { return random_order && dice() % one_in == 0; }

[[noreturn]] void give_up() { siglongjmp(current->failure, 1); }

std::string place(const char* file, int line) { return std::string(file ? file : "?") + ":" + std::to_string(line); }

std::string name_of(const Thread& thread) {
  char text[100];
  std::snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", thread.thread.x, thread.block.x, thread.block.y,
                thread.block.z);
  return text;
}

[[noreturn]] void fail_with(const std::string& why) {
  failed = true;
  std::snprintf(fault, sizeof fault, "%s", why.c_str());
  give_up();
}

Fiber& self() { return *static_cast<Fiber*>(running); }

void on_signal(int number, siginfo_t* info, void*) {
  // The last call is all that is known of where a plain access stands.
  failed = true;
  std::snprintf(fault, sizeof fault, "%s at %p, %s, behind %s:%d",
                number == SIGSEGV || number == SIGBUS ? "access outside of a buffer" : "index, alignment or overflow trap",
                info->si_addr, name_of(self()).c_str(), self().file ? self().file : "the start", self().line);
  give_up();
}

void suspend(State state, const char* file, int line) {
  Fiber& fiber = self();
  fiber.state = state;
  fiber.file = file;
  fiber.line = line;
  if (_setjmp(fiber.where) == 0) _longjmp(current->scheduler, 1);
}

void enter() {
  emulated_kernel(arguments.data());
  self().state = State::done;
  _longjmp(current->scheduler, 1);
}

// setjmp and longjmp switch fibers in nanoseconds; a context is needed only to enter a new stack.
void resume(Slot& slot, unsigned index) {
  Fiber& fiber = slot.fibers[index];
  running = &fiber;
  if (_setjmp(slot.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  getcontext(&slot.entry);
  slot.entry.uc_stack.ss_sp = slot.stacks + index * kStack;
  slot.entry.uc_stack.ss_size = kStack;
  slot.entry.uc_link = nullptr;
  makecontext(&slot.entry, enter, 0);
  setcontext(&slot.entry);
}

bool runnable(const Fiber& fiber) {
  return fiber.state == State::ready || (fiber.state == State::watching && *fiber.watched != fiber.value);
}

bool runnable(const Slot& slot, unsigned warp) {
  for (unsigned i = 0; i < kLanes; ++i) {
    if (runnable(slot.fibers[warp * kLanes + i])) return true;
  }
  return false;
}

bool runnable(const Slot& slot) {
  if (slot.over) return false;
  if (slot.idle) return true;
  for (unsigned w = 0; w < warps(); ++w) {
    if (runnable(slot, w)) return true;
  }
  return false;
}

// Lets the lanes of a warp run to where each waits, and together past an operation that all wait at.
void run_lanes(Slot& slot, unsigned warp) {
  Fiber* fibers = &slot.fibers[warp * kLanes];
  const unsigned turned = random_order ? dice() % kLanes : 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (runnable(fibers[i ^ turned])) resume(slot, warp * kLanes + (i ^ turned));
  }
  const Fiber* at_operation = nullptr;
  const Fiber* other = nullptr;
  for (unsigned i = 0; i < kLanes; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::ready || fiber.state == State::watching) return;
    if (fiber.state != State::at_operation) {
      other = &fiber;
    } else if (!at_operation) {
      at_operation = &fiber;
    } else if (fiber.operation != at_operation->operation || fiber.file != at_operation->file ||
               fiber.line != at_operation->line) {
      other = &fiber;
    }
  }
  if (!at_operation) return;
  if (other) {
    fail_with("lanes of a warp at different operations: " + name_of(*at_operation) + " at " +
              place(at_operation->file, at_operation->line) + ", " + name_of(*other) +
              (other->state == State::done ? " has ended" : " at " + place(other->file, other->line)));
  }
  for (unsigned i = 0; i < kLanes; ++i) fibers[i].state = State::ready;
}

// Lets all threads of a block past the barrier that they have reached. Returns false if all have ended.
bool settle(Slot& slot) {
  const Fiber* waiting = nullptr;
  const Fiber* other = nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = slot.fibers[i];
    if (fiber.state != State::at_barrier && fiber.state != State::done) return true;
    if (fiber.state == State::done) {
      other = &fiber;
    } else if (!waiting) {
      waiting = &fiber;
    } else if (fiber.file != waiting->file || fiber.line != waiting->line) {
      other = &fiber;
    }
  }
  if (!waiting) return false;
  if (other) {
    fail_with("a barrier that some threads miss: " + name_of(*waiting) + " at " + place(waiting->file, waiting->line) +
              ", " + name_of(*other) +
              (other->state == State::done ? " has ended" : " at " + place(other->file, other->line)));
  }
  for (unsigned i = 0; i < threads; ++i) slot.fibers[i].state = State::ready;
  return true;
}

[[noreturn]] void report_deadlock() {
  std::string why = "all wait for each other:";
  for (const Slot& slot : slots) {
    if (slot.over) continue;
    const Fiber* shown = nullptr;
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber& fiber = slot.fibers[i];
      if (fiber.state == State::done) continue;
      if (!shown || fiber.state == State::watching) shown = &fiber;
      if (shown->state == State::watching) break;
    }
    if (!shown) continue;
    why += " " + name_of(*shown) + " at " + place(shown->file, shown->line);
    if (shown->state == State::watching) why += " for a word that stays " + std::to_string(shown->value);
    why += ";";
  }
  if (next_block < order.size()) {
    why += " " + std::to_string(order.size() - next_block) + " blocks are not resident";
  }
  fail_with(why);
}

// Hands over to a multiprocessor that can go on, which may be the same one.
void hand_over(Slot& slot) {
  Slot* next = nullptr;
  if (random_order) {
    for (Slot& other : slots) {
      if (runnable(other) && (!next || other.priority > next->priority)) next = &other;
    }
  } else {
    const size_t mine = &slot - slots.data();
    for (size_t i = 1; i <= slots.size() && !next; ++i) {
      Slot& other = slots[(mine + i) % slots.size()];
      if (runnable(other)) next = &other;
    }
  }
  if (!next) {
    if (std::all_of(slots.begin(), slots.end(), [](const Slot& other) { return other.over; })) {
      sem_post(&finished);
      return;
    }
    report_deadlock();
  }
  if (next == &slot) return;
  sem_post(&next->turn);
  if (slot.over) return;
  sem_wait(&slot.turn);
  current = &slot;
  if (failed) give_up();
}

// This thread's copy of the kernel's shared variables.
struct Shared {
  char* start = nullptr;
  size_t bytes = 0;
};

Shared shared_variables() {
  emulated_shared_memory();  // makes the copy
  Shared found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        const char* mine = reinterpret_cast<const char*>(emulated_shared_memory());
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const size_t bytes = info->dlpi_phdr[i].p_memsz;
          char* start = static_cast<char*>(info->dlpi_tls_data);
          if (info->dlpi_phdr[i].p_type == PT_TLS && start && mine >= start && mine < start + bytes) {
            *static_cast<Shared*>(to) = {start, bytes};
          }
        }
        return 0;
      },
      &found);
  return found;
}

// Returns whether any could run.
bool run_warps(Slot& slot) {
  if (!random_order) {
    bool ran = false;
    for (unsigned w = 0; w < warps(); ++w) {
      for (; runnable(slot, w); ran = true) run_lanes(slot, w);
    }
    return ran || (settle(slot) && runnable(slot));
  }
  // The warp of the highest priority, which changes now and then: some stay far behind the others.
  int chosen = -1;
  for (unsigned w = 0; w < warps(); ++w) {
    if (runnable(slot, w) && (chosen < 0 || slot.warps[w].priority > slot.warps[chosen].priority)) chosen = w;
  }
  if (chosen < 0) return settle(slot) && runnable(slot);
  run_lanes(slot, chosen);
  if (chance(8)) slot.warps[chosen].priority = dice() >> 1;
  return true;
}

constexpr size_t kGuard = 1024;  // behind the dynamic part, as the generated file has it

void run_block(Slot& slot, const Shared& shared, unsigned index) {
  slot.block = {index % grid_size.x, index / grid_size.x % grid_size.y, index / grid_size.x / grid_size.y};
  for (size_t i = 0; i < shared.bytes; ++i) shared.start[i] = char(dice());
  unsigned char* behind = emulated_shared_memory() + dynamic_shared;
  std::memset(behind, 0xa5, kGuard);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = slot.fibers[t];
    fiber.thread = {t, 0, 0};
    fiber.block = slot.block;
    fiber.state = State::ready;
    fiber.started = false;
    fiber.watched = nullptr;
    fiber.file = nullptr;
    fiber.line = 0;
    slot.warps[t / kLanes].parity[t % kLanes] = 0;
  }
  slot.idle = false;
  for (;;) {
    for (unsigned turns = random_order ? 1 + dice() % 64 : ~0u; turns && run_warps(slot); --turns) {
    }
    if (!runnable(slot) && !settle(slot)) break;
    if (chance(4)) slot.priority = dice() >> 1;
    hand_over(slot);
  }
  for (size_t i = 0; i < kGuard; ++i) {
    if (behind[i] != 0xa5) fail_with("a write behind the end of shared memory, " + name_of(slot.fibers[0]));
  }
}

void* run_slot(void* argument) {
  Slot& slot = *static_cast<Slot*>(argument);
  const stack_t alternative{slot.signal_stack.get(), 0, kSignalStack};
  sigaltstack(&alternative, nullptr);
  sem_wait(&slot.turn);
  current = &slot;
  if (sigsetjmp(slot.failure, 1) == 0) {
    if (failed) give_up();
    const Shared shared = shared_variables();
    const size_t fixed = shared.bytes - dynamic_shared - kGuard;
    if (!shared.start) fail_with("no shared memory found");
    if (fixed > kDefaultShared || fixed + dynamic_shared > kMaxShared) fail_with("too much shared memory");
    if (dynamic_shared <= kAskedFrom && fixed + dynamic_shared > kDefaultShared) {
      fail_with("more than 48 KB of shared memory, which MLX does not ask for");
    }
    while (next_block < order.size()) {
      run_block(slot, shared, order[next_block++]);
      slot.idle = true;
    }
    slot.over = true;
    hand_over(slot);
  } else {
    sem_post(&finished);
  }
  return nullptr;
}

}  // namespace

const Brought& exchange(Operation operation, unsigned lanes, const void* brought, size_t bytes, const char* file,
                        int line) {
  if (lanes != ~0u) fail("an operation of some lanes", file, line);
  Fiber& fiber = self();
  Warp& warp = current->warps[fiber.thread.x / kLanes];
  const int lane = fiber.thread.x % kLanes, parity = warp.parity[lane] ^= 1;
  std::memcpy(warp.brought[parity][lane], brought, bytes);
  fiber.operation = operation;
  fiber.watched = nullptr;
  suspend(State::at_operation, file, line);
  return warp.brought[parity];
}

void wait_for_block(const char* file, int line) {
  self().watched = nullptr;
  suspend(State::at_barrier, file, line);
}

void may_pause(const char* file, int line) {
  self().watched = nullptr;
  if (chance(4)) suspend(State::ready, file, line);
}

unsigned watch(const unsigned* word, const char* file, int line) {
  check(word, sizeof *word, Access::coherent, file, line);
  Fiber& fiber = self();
  if (fiber.watched == word) suspend(State::watching, file, line);
  fiber.watched = word;
  fiber.value = *word;
  return fiber.value;
}

void check(const void* address, size_t bytes, Access access, const char* file, int line) {
  static const Guarded* last;  // most likely the same one again
  const char* at = static_cast<const char*>(address);
  const auto inside = [&](const Guarded& buffer) {
    return at >= buffer.start && at + bytes <= buffer.start + buffer.bytes;
  };
  if (!last || last < buffers.data() || last >= buffers.data() + buffers.size() || !inside(*last)) {
    const auto found = std::find_if(buffers.begin(), buffers.end(), inside);
    if (found == buffers.end()) fail("a load outside of all buffers", file, line);
    last = &*found;
  }
  const size_t alignment = access == Access::ahead ? 16 : bytes;
  if (reinterpret_cast<uintptr_t>(address) % alignment) fail("an address that is not aligned", file, line);
  if (access == Access::read_only && last->written) {
    fail("a load past the coherent caches from memory that the kernel may write to", file, line);
  }
}

void fail(const char* why, const char* file, int line) {
  fail_with(std::string(why) + ", " + name_of(self()) + " at " + place(file, line));
}

}  // namespace emulator

// Runs a grid of blocks. pointers: `count` buffers of so many bytes each; first the inputs, of which those marked as
// written and all outputs are written back. seed: 0 for a fixed order, others for random ones.
// Returns 0, or 1 with the reason in `why`, 1,000 characters.
extern "C" __attribute__((visibility("default"))) int run_emulated(void** pointers, const size_t* bytes,
                                                                   const bool* written, int inputs, int count,
                                                                   const uint32_t* grid, uint32_t block_threads,
                                                                   size_t shared_bytes, uint32_t multiprocessors,
                                                                   uint32_t seed, char* why) {
  using namespace emulator;
  threads = block_threads;
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {threads, 1, 1};
  dynamic_shared = shared_bytes;
  random_order = seed != 0;
  dice.seed(seed);
  failed = false;
  std::snprintf(fault, sizeof fault, "?");
  if (threads == 0 || threads > kMaxThreads || threads % kLanes) {
    std::snprintf(why, sizeof fault, "a block of no whole warps, or of too many");
    return 1;
  }

  buffers.clear();
  arguments.clear();
  buffers.reserve(count);
  for (int i = 0; i < count; ++i) {
    buffers.emplace_back(bytes[i], i >= inputs || written[i], char(dice()));
    Guarded& buffer = buffers.back();
    arguments.push_back(buffer.start);
    if (i < inputs) {
      std::memcpy(buffer.start, pointers[i], bytes[i]);
    } else {
      for (size_t b = 0; b < bytes[i]; ++b) buffer.start[b] = char(dice());
    }
  }

  order.resize(size_t(grid[0]) * grid[1] * grid[2]);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (random_order) std::shuffle(order.begin(), order.end(), dice);
  next_block = 0;

  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction old[5];
  for (int i = 0; i < 5; ++i) sigaction(numbers[i], &action, &old[i]);
  sem_init(&finished, 0, 0);
  slots = std::vector<Slot>(std::min<size_t>(multiprocessors, order.size()));
  for (Slot& slot : slots) {
    sem_init(&slot.turn, 0, 0);
    slot.over = false;
    slot.idle = true;
    slot.priority = dice() >> 1;
    slot.fibers.reset(new Fiber[threads]);
    slot.warps.reset(new Warp[warps()]);
    for (unsigned w = 0; w < warps(); ++w) slot.warps[w].priority = dice() >> 1;
    slot.signal_stack.reset(new char[kSignalStack]);
    slot.stacks = static_cast<char*>(mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    pthread_create(&slot.thread, nullptr, run_slot, &slot);
  }
  if (!slots.empty()) {
    sem_post(&slots[0].turn);
    sem_wait(&finished);
  }
  for (Slot& slot : slots) {
    // After a failure the others still wait for their turn, one by one they see it and end.
    if (failed) sem_post(&slot.turn);
    pthread_join(slot.thread, nullptr);
    munmap(slot.stacks, threads * kStack);
    sem_destroy(&slot.turn);
  }
  sem_destroy(&finished);
  slots.clear();
  for (int i = 0; i < 5; ++i) sigaction(numbers[i], &old[i], nullptr);

  for (int i = 0; i < count; ++i) {
    Guarded& buffer = buffers[i];
    if (!failed && !buffer.intact()) {
      failed = true;
      std::snprintf(fault, sizeof fault, "a write next to buffer %d", i);
    }
    if (buffer.written) {
      std::memcpy(pointers[i], buffer.start, bytes[i]);
    } else if (!failed && std::memcmp(pointers[i], buffer.start, bytes[i]) != 0) {
      failed = true;
      std::snprintf(fault, sizeof fault, "a write to buffer %d, an input", i);
    }
    munmap(buffer.pages, buffer.length);
  }
  if (failed) std::memcpy(why, fault, sizeof fault);
  return failed;
}
