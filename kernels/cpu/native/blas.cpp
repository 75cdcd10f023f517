// MLX's Linux wheels call a reference BLAS, a hundred times slower than OpenBLAS. The calls go through
// three slots of libmlx's global offset table; this file points them at another library's functions.
// Both sides take 32-bit integers (LP64).
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

#include "ops.h"

namespace bitdraft {
namespace {

enum Order { kRowMajor = 101, kColMajor = 102 };
enum Transpose { kNoTrans = 111, kTrans = 112, kConjTrans = 113 };

using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float,
                       float*, int);
using Sgemv = void (*)(int, int, int, int, float, const float*, int, const float*, int, float, float*, int);

Sgemm openblas_sgemm = nullptr;
Sgemv openblas_sgemv = nullptr;

// One row or one column is a matrix-vector product, which OpenBLAS reads the matrix once for.
void sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
           const float* b, int ldb, float beta, float* c, int ldc) {
  const bool plain_a = trans_a == kNoTrans, plain_b = trans_b == kNoTrans;
  if (order == kRowMajor && k > 0 && m == 1 && n > 1) {
    // c = op(b)^T a, c contiguous.
    openblas_sgemv(kRowMajor, plain_b ? kTrans : kNoTrans, plain_b ? k : n, plain_b ? n : k, alpha, b, ldb, a,
                   plain_a ? 1 : lda, beta, c, 1);
  } else if (order == kRowMajor && k > 0 && n == 1 && m > 1) {
    // c = op(a) b, c a column.
    openblas_sgemv(kRowMajor, plain_a ? kNoTrans : kTrans, plain_a ? m : k, plain_a ? k : m, alpha, a, lda, b,
                   plain_b ? ldb : 1, beta, c, ldc);
  } else {
    openblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}

struct Replacement {
  const char* symbol;
  void* function;
};

struct Patch {
  std::vector<Replacement> replacements;
  int written = 0;
};

bool is_libmlx(const char* path) {
  const char* file = path == nullptr ? nullptr : std::strrchr(path, '/');
  return file != nullptr && std::strcmp(file, "/libmlx.so") == 0;
}

void write_slot(const dl_phdr_info& info, uintptr_t slot, void* function) {
  // Slots that the loader made read-only after relocation (RELRO) become read-only again.
  bool read_only = false;
  for (int i = 0; i < info.dlpi_phnum; i++) {
    const auto& segment = info.dlpi_phdr[i];
    const uintptr_t start = info.dlpi_addr + segment.p_vaddr;
    read_only |= segment.p_type == PT_GNU_RELRO && slot >= start && slot < start + segment.p_memsz;
  }
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto* start = reinterpret_cast<void*>(slot / page * page);
  if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0) {
    throw std::runtime_error("the page that holds libmlx's BLAS calls cannot be made writable");
  }
  // Other threads may be calling: the slot is one aligned pointer.
  reinterpret_cast<std::atomic<void*>*>(slot)->store(function, std::memory_order_release);
  if (read_only) {
    mprotect(start, page, PROT_READ);
  }
}

void patch_relocations(const dl_phdr_info& info, const ElfW(Rela) * table, size_t bytes,
                       const ElfW(Sym) * symbols, const char* names, Patch& patch) {
  for (size_t i = 0; i < bytes / sizeof(ElfW(Rela)); i++) {
    const auto symbol = ELF64_R_SYM(table[i].r_info);
    if (symbol == 0) {
      continue;
    }
    for (const auto& r : patch.replacements) {
      if (std::strcmp(names + symbols[symbol].st_name, r.symbol) == 0) {
        write_slot(info, info.dlpi_addr + table[i].r_offset, r.function);
        patch.written++;
      }
    }
  }
}

int visit_library(dl_phdr_info* info, size_t, void* context) {
  if (!is_libmlx(info->dlpi_name)) {
    return 0;
  }
  const ElfW(Dyn)* dynamic = nullptr;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    if (info->dlpi_phdr[i].p_type == PT_DYNAMIC) {
      dynamic = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    }
  }
  const ElfW(Rela)* plt = nullptr, *rela = nullptr;
  const ElfW(Sym)* symbols = nullptr;
  const char* names = nullptr;
  size_t plt_bytes = 0, rela_bytes = 0;
  for (; dynamic != nullptr && dynamic->d_tag != DT_NULL; dynamic++) {
    switch (dynamic->d_tag) {
      case DT_JMPREL:
        plt = reinterpret_cast<const ElfW(Rela)*>(dynamic->d_un.d_ptr);
        break;
      case DT_PLTRELSZ:
        plt_bytes = dynamic->d_un.d_val;
        break;
      case DT_RELA:
        rela = reinterpret_cast<const ElfW(Rela)*>(dynamic->d_un.d_ptr);
        break;
      case DT_RELASZ:
        rela_bytes = dynamic->d_un.d_val;
        break;
      case DT_SYMTAB:
        symbols = reinterpret_cast<const ElfW(Sym)*>(dynamic->d_un.d_ptr);
        break;
      case DT_STRTAB:
        names = reinterpret_cast<const char*>(dynamic->d_un.d_ptr);
        break;
      default:
        break;
    }
  }
  if (symbols != nullptr && names != nullptr) {
    auto& patch = *static_cast<Patch*>(context);
    patch_relocations(*info, plt, plt == nullptr ? 0 : plt_bytes, symbols, names, patch);
    patch_relocations(*info, rela, rela == nullptr ? 0 : rela_bytes, symbols, names, patch);
  }
  return 1;
}

void* find(void* library, const char* symbol) {
  void* function = dlsym(library, symbol);
  if (function == nullptr) {
    throw std::runtime_error(std::string("the BLAS library lacks ") + symbol);
  }
  return function;
}

std::mutex install_mutex;
std::atomic<bool> installed{false};

}  // namespace

int install_blas(const std::string& path) {
  std::lock_guard lock(install_mutex);
  // Never closed: its functions stay in use until the process ends.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error(std::string("cannot load the BLAS library: ") + dlerror());
  }
  openblas_sgemm = reinterpret_cast<Sgemm>(find(library, "scipy_cblas_sgemm"));
  openblas_sgemv = reinterpret_cast<Sgemv>(find(library, "scipy_cblas_sgemv"));
  Patch patch;
  patch.replacements = {{"cblas_sgemm", reinterpret_cast<void*>(&sgemm)},
                        {"cblas_dgemm", find(library, "scipy_cblas_dgemm")},
                        {"cblas_cgemm", find(library, "scipy_cblas_cgemm")}};
  dl_iterate_phdr(visit_library, &patch);
  installed.store(patch.written > 0);
  return patch.written;
}

bool blas_installed() { return installed.load(); }

}  // namespace bitdraft
