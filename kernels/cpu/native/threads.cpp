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
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

namespace bitdraft {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);  // longer than the gap between a layer's operations

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `ticket` holds the job's number (high half) and its unclaimed chunks (low half),
// so that a helper waking late can only ever claim a chunk of the job that is being run; after a
// claim the other fields stay as they are until that chunk is counted as finished. Every helper is
// told of a job by a word of its own: those that a job does not want sleep on.
class Pool {
 public:
  // False when the pool is busy with another stream's job, or has no helpers.
  bool run(int wanted, int chunks, detail::ChunkFn fn, void* context) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock.owns_lock()) {
      return false;
    }
    const int helpers = start_helpers(wanted);
    if (helpers == 0) {
      return false;
    }
    fn_ = fn;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    const uint32_t job = ++job_;
    ticket_.store(uint64_t{job} << 32 | static_cast<uint32_t>(chunks), std::memory_order_release);
    for (int i = 0; i < helpers; i++) {
      helpers_[i].job.store(job, std::memory_order_release);
    }
    // Either this sees a helper asleep, or that helper sees the job before it sleeps.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (int i = 0; i < helpers; i++) {
      if (helpers_[i].asleep.load(std::memory_order_relaxed)) {
        syscall(SYS_futex, &helpers_[i].job, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
      }
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
  struct alignas(64) Helper {
    std::atomic<uint32_t> job{0};  // the last one that it was told of
    std::atomic<bool> asleep{false};
  };

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

  // How many of the wanted ones there are. A limit on processes that stops one is not run into again.
  int start_helpers(int wanted) {
    wanted = std::min(wanted, most_);
    try {
      for (; started_ < wanted; started_++) {
        std::thread(&Pool::help, this, std::ref(helpers_[started_])).detach();
      }
    } catch (const std::exception&) {
      wanted = most_ = started_;
    }
    return wanted;
  }

  void help(Helper& self) {
    uint32_t job = 0;
    for (;;) {
      job = wait_for_job(self, job);
      while (claim_and_run(job)) {
        finished_.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  }

  static uint32_t wait_for_job(Helper& self, uint32_t last) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1;; spins++) {
      if (const uint32_t job = self.job.load(std::memory_order_acquire); job != last) {
        return job;
      }
      relax();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
        break;
      }
    }
    self.asleep.store(true, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    uint32_t job;
    while ((job = self.job.load(std::memory_order_acquire)) == last) {
      syscall(SYS_futex, &self.job, FUTEX_WAIT_PRIVATE, last, nullptr, nullptr, 0);
    }
    self.asleep.store(false, std::memory_order_relaxed);
    return job;
  }

  std::mutex busy_;
  int started_ = 0;
  int most_ = kMaxThreads - 1;
  uint32_t job_ = 0;
  detail::ChunkFn fn_ = nullptr;
  void* context_ = nullptr;
  Helper helpers_[kMaxThreads - 1];
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

std::atomic<int> thread_count{1};

}  // namespace

int threads() { return thread_count.load(std::memory_order_relaxed); }

void set_threads(int count) {
  thread_count.store(std::clamp(count, 1, kMaxThreads), std::memory_order_relaxed);
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
