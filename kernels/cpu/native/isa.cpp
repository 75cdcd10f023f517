// Which instruction set to use: the best that this processor has, or what BITDRAFT_ISA says.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace bitdraft {
namespace {

std::vector<const Kernels*> candidates() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    if (const Kernels* amx = amx_kernels()) {
      found.push_back(amx);
    }
    found.push_back(&kAvx512Vnni);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kAvx2);
  }
#elif defined(__aarch64__)
  constexpr unsigned long dot_product = 1UL << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & dot_product) {
    found.push_back(&kNeonDot);
  }
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels* named(const std::string& name) {
  std::string known;
  for (const Kernels* k : candidates()) {
    if (name == k->name) {
      return k;
    }
    known += known.empty() ? k->name : std::string(", ") + k->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; there are: " + known);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_acquire);
  if (k == nullptr) {
    const char* wanted = std::getenv("BITDRAFT_ISA");
    k = wanted != nullptr && *wanted != '\0' ? named(wanted) : candidates().front();
    chosen.store(k, std::memory_order_release);
  }
  return *k;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : candidates()) {
    names.emplace_back(k->name);
  }
  return names;
}

void select_isa(const std::string& name) { chosen.store(named(name), std::memory_order_release); }

}  // namespace bitdraft
