#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace bitdraft {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);  // longer than the gap between a layer's operations
constexpr int kMaxThreads = 256;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `ticket` holds the job's number (high half) and its unclaimed chunks (low half),
// so that a helper waking late can only ever claim a chunk of the job that is being run; after a
// claim the other fields stay as they are until that chunk is counted as finished.
class Pool {
 public:
  // False when the pool is busy with another stream's job.
  bool run(int helpers, int chunks, detail::ChunkFn fn, void* context) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return false;
    }
    start_helpers(helpers);
    fn_ = fn;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    active_.store(helpers, std::memory_order_relaxed);
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    ticket_.store(uint64_t{job} << 32 | static_cast<uint32_t>(chunks), std::memory_order_release);
    job_.store(job, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      syscall(SYS_futex, &job_, FUTEX_WAKE_PRIVATE, helpers, nullptr, nullptr, 0);
    }
    int mine = 0;
    while (claim_and_run(job)) {
      mine++;
    }
    // What is left was claimed by running helpers. Yield at times: one of them may need this core.
    finished_.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 1; finished_.load(std::memory_order_acquire) != chunks; spins++) {
      spins % 1024 == 0 ? void(sched_yield()) : relax();
    }
    return true;
  }

 private:
  bool claim_and_run(uint32_t job) {
    uint64_t seen = ticket_.load(std::memory_order_acquire);
    do {
      if (seen >> 32 != job || static_cast<uint32_t>(seen) == 0) {
        return false;
      }
    } while (!ticket_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel));
    fn_(context_, static_cast<int>(static_cast<uint32_t>(seen)) - 1);
    return true;
  }

  void start_helpers(int wanted) {
    for (; started_ < wanted; started_++) {
      std::thread(&Pool::help, this, started_).detach();
    }
  }

  void help(int index) {
    uint32_t last = 0;
    for (;;) {
      const uint32_t job = wait_for_job(last);
      last = job;
      if (index >= active_.load(std::memory_order_relaxed)) {
        continue;  // fewer threads are wanted now
      }
      while (claim_and_run(job)) {
        finished_.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  }

  uint32_t wait_for_job(uint32_t last) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1;; spins++) {
      if (const uint32_t job = job_.load(std::memory_order_acquire); job != last) {
        return job;
      }
      relax();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
        break;
      }
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    uint32_t job;
    while ((job = job_.load(std::memory_order_seq_cst)) == last) {
      syscall(SYS_futex, &job_, FUTEX_WAIT_PRIVATE, last, nullptr, nullptr, 0);
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return job;
  }

  std::mutex busy_;
  int started_ = 0;
  detail::ChunkFn fn_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> finished_{0};
};

// Never destroyed: helpers may outlive static destructors. A forked child has no helpers and perhaps
// a locked mutex, so it forgets the pool and makes its own.
std::atomic<Pool*> pool{nullptr};
std::mutex* pool_mutex = new std::mutex;

Pool& get_pool() {
  Pool* p = pool.load(std::memory_order_acquire);
  if (p == nullptr) {
    std::lock_guard lock(*pool_mutex);
    if ((p = pool.load(std::memory_order_acquire)) == nullptr) {
      static std::once_flag once;
      std::call_once(once, [] {
        pthread_atfork(nullptr, nullptr, [] {
          pool_mutex = new std::mutex;
          pool.store(nullptr, std::memory_order_release);
        });
      });
      p = new Pool;
      pool.store(p, std::memory_order_release);
    }
  }
  return *p;
}

int default_threads() {
  if (const char* wanted = std::getenv("BITDRAFT_THREADS"); wanted != nullptr && std::atoi(wanted) > 0) {
    return std::min(std::atoi(wanted), kMaxThreads);
  }
  cpu_set_t set;
  const int count = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::clamp(count, 1, kMaxThreads);
}

std::atomic<int> thread_count{0};

}  // namespace

int threads() {
  int count = thread_count.load(std::memory_order_relaxed);
  if (count == 0) {
    thread_count.store(count = default_threads(), std::memory_order_relaxed);
  }
  return count;
}

void set_threads(int count) {
  thread_count.store(count <= 0 ? default_threads() : std::min(count, kMaxThreads),
                     std::memory_order_relaxed);
}

void detail::parallel_chunks(int chunks, ChunkFn fn, void* context) {
  const int helpers = std::min(threads(), chunks) - 1;
  if (helpers > 0 && get_pool().run(helpers, chunks, fn, context)) {
    return;
  }
  for (int chunk = 0; chunk < chunks; chunk++) {
    fn(context, chunk);
  }
}

float* scratch_floats(int slot, int64_t count) {
  struct Slot {
    float* data = nullptr;
    int64_t size = 0;
    ~Slot() { std::free(data); }
  };
  thread_local Slot slots[8];
  Slot& s = slots[slot];
  if (s.size < count) {
    std::free(s.data);
    s.size = (count + 15) / 16 * 16;
    s.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(s.size) * sizeof(float)));
    if (s.data == nullptr) {
      s.size = 0;
      throw std::bad_alloc();
    }
  }
  return s.data;
}

}  // namespace bitdraft
