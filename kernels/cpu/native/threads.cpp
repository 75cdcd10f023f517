#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
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

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr auto kSpin = microseconds(50);        // longer than the gap between a layer's operations
constexpr auto kLongSpin = milliseconds(2);     // for a helper's last chunk, where the cores are ours: waking up is slow
constexpr auto kAwake = microseconds(500);      // how long a helper stays awake beside other programs
constexpr auto kLost = microseconds(800);       // by that it knows them: they take turns of a millisecond or more
constexpr auto kContended = milliseconds(100);  // how long it is believed that they are there
constexpr auto kCrowded = milliseconds(1);      // how long no helper is woken after one came up on the caller's core
constexpr uint64_t kSlice = 100'000;            // nanoseconds, the least that Linux takes

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `done` came true in time. The clock is left alone until a few microseconds have passed.
template <class Done>
bool spin_until(Done&& done, Clock::duration time = kSpin) {
  Clock::time_point until{};
  for (int spins = 1; !done(); spins++) {
    relax();
    if (spins % 64 == 0) {
      const auto now = Clock::now();
      if (until == Clock::time_point{}) {
        until = now + time;
      } else if (now > until) {
        return false;
      }
    }
  }
  return true;
}

void wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }

// Something that holds for a while; any thread may ask.
class ForNow {
 public:
  void set(Clock::duration time) { until_.store((Clock::now() + time).time_since_epoch().count(), kRelaxed); }
  bool holds() const { return Clock::now().time_since_epoch().count() < until_.load(kRelaxed); }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  std::atomic<Clock::rep> until_{0};
};

// The time since a helper last slept. A thread that is put aside while it holds a chunk keeps the others waiting for
// milliseconds, and one that has just slept is put aside last: so beside other programs it is awake for kAwake at a time.
class TimeAwake {
 public:
  explicit TimeAwake(ForNow& contended) : contended_(contended) { begin(); }

  void begin() {
    began_ = Clock::now();
    used_ = cpu_time();
  }

  bool long_enough() {
    const auto time = Clock::now() - began_;
    if (time < kAwake) {
      return false;
    }
    const auto lost = time - (cpu_time() - used_);
    if (lost > kLost && lost * 4 > time) {
      contended_.set(kContended);
    }
    if (contended_.holds()) {
      return true;
    }
    begin();
    return false;
  }

 private:
  static Clock::duration cpu_time() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
  }

  ForNow& contended_;
  Clock::time_point began_;
  Clock::duration used_;
};

// One job at a time. `ticket` holds the job's number (high half) and its unclaimed chunks (low half),
// so that a helper waking late can only ever claim a chunk of the job that is being run; after a
// claim the other fields stay as they are until that chunk is counted as finished. Every helper is
// told of a job by a word of its own: those that a job does not want sleep on.
//
// Beside other programs nobody spins for longer than kSpin, or yields: that is paid for out of the thread's own share of
// the cores.
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
    thread_local const bool prompt = (take_short_slices(), true);
    static_cast<void>(prompt);
    fn_ = fn;
    context_ = context;
    chunks_ = chunks;
    unfinished_.store(static_cast<uint32_t>(chunks), std::memory_order_relaxed);
    if (const int core = sched_getcpu(); core != caller_core_.load(std::memory_order_relaxed)) {
      caller_core_.store(core, std::memory_order_relaxed);  // rarely: helpers look at it all the time
    }
    const uint32_t job = ++job_;
    ticket_.store(uint64_t{job} << 32 | static_cast<uint32_t>(chunks), std::memory_order_release);
    for (int i = 0; i < helpers; i++) {
      helpers_[i].job.store(job, std::memory_order_release);
    }
    // Either this sees a helper asleep, or that helper sees the job before it sleeps.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (int i = 0; i < helpers; i++) {
      if (helpers_[i].asleep.load(std::memory_order_relaxed) && !crowded_.holds() &&
          helpers_[i].asleep.exchange(false, std::memory_order_relaxed)) {
        wake(helpers_[i].job);
      }
    }
    uint32_t mine = 0;
    while (claim_and_run(job)) {
      mine++;
    }
    // What is left was claimed by helpers.
    if (unfinished_.fetch_sub(mine, std::memory_order_acq_rel) != mine) {
      wait_for_helpers();
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
    fn_(context_, chunks_ - static_cast<int>(static_cast<uint32_t>(seen)));
    return true;
  }

  void wait_for_helpers() {
    const auto done = [&] { return unfinished_.load(std::memory_order_acquire) == 0; };
    if (spin_until(done, contended_.holds() ? kSpin : Clock::duration(kLongSpin))) {
      return;
    }
    uint32_t seen = unfinished_.fetch_or(kAsleep, std::memory_order_acq_rel) | kAsleep;
    while (seen != kAsleep) {
      wait(unfinished_, seen);
      seen = unfinished_.load(std::memory_order_acquire);
    }
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
    take_short_slices();
    uint32_t job = 0;
    TimeAwake awake(contended_);
    for (;;) {
      job = wait_for_job(self, job, awake);
      while (!on_callers_core() && claim_and_run(job)) {
        if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == (kAsleep | 1)) {
          wake(unfinished_);
        }
      }
    }
  }

  uint32_t wait_for_job(Helper& self, uint32_t last, TimeAwake& awake) {
    uint32_t job = last;
    const auto told = [&] { return (job = self.job.load(std::memory_order_acquire)) != last; };
    if (told()) {
      return job;
    }
    if (on_callers_core()) {
      crowded_.set(contended_.holds() ? kCrowded : kCrowded / 5);
    } else if (!awake.long_enough() && spin_until(told)) {
      return job;
    }
    do {
      self.asleep.store(true, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      wait(self.job, last);
    } while (!told());
    self.asleep.store(false, std::memory_order_relaxed);
    awake.begin();
    return job;
  }

  // There it would only keep the caller from its own chunks.
  bool on_callers_core() const { return sched_getcpu() == caller_core_.load(std::memory_order_relaxed); }

  static constexpr uint32_t kAsleep = 1u << 31;

  std::mutex busy_;
  int started_ = 0;
  int most_ = kMaxThreads - 1;
  uint32_t job_ = 0;
  detail::ChunkFn fn_ = nullptr;
  void* context_ = nullptr;
  int chunks_ = 0;
  Helper helpers_[kMaxThreads - 1];
  alignas(64) std::atomic<int> caller_core_{-1};
  ForNow contended_, crowded_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};  // chunks of the job, and kAsleep while the caller sleeps
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

void take_short_slices() {
  constexpr uint64_t kResetOnFork = 1;  // SCHED_FLAG_RESET_ON_FORK
  // sched_attr of sched_setattr(2)
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) == 0 && attributes.policy == SCHED_OTHER) {
    attributes.flags |= kResetOnFork;
    attributes.runtime = kSlice;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
  }
}

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
  thread_local Slot slots[kScratchSlots];
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
