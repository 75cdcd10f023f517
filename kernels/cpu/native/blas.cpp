// MLX's Linux wheels call a reference BLAS, a hundred times slower than OpenBLAS. The calls go through
// three slots of libmlx's global offset table; this file points them at another library's functions.
// Both sides take 32-bit integers (LP64).
//
// OpenBLAS gets one thread, and large products are cut into tiles for our own. Its own threads wait for one another
// several times in a product, and spin and yield as they wait: beside other programs each wait then lasts as long as
// those let a thread stand, and is paid for out of the share of the cores that the waiting thread has.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <limits>
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

// c = alpha op(a) op(b) + beta c, rows contiguous; op(a) is m x k, op(b) k x n. An operand's step is the distance
// between its rows as it lies in memory.
struct FloatProduct {
  int m, n, k;
  float alpha, beta;
  bool plain_a, plain_b;  // not transposed
  const float *a, *b;
  int step_a, step_b;
  float* c;
  int step_c;

  // Rows [row, row + rows) and columns [column, column + columns) of c.
  FloatProduct part(int row, int rows, int column, int columns) const {
    FloatProduct p = *this;
    p.m = rows;
    p.n = columns;
    p.a += plain_a ? int64_t{row} * step_a : row;
    p.b += plain_b ? column : int64_t{column} * step_b;
    p.c += int64_t{row} * step_c + column;
    return p;
  }
};

// One row or one column is a matrix-vector product, which OpenBLAS reads the matrix once for.
void multiply_whole(const FloatProduct& p) {
  if (p.k > 0 && p.m == 1 && p.n > 1) {
    // c = op(b)^T a, c contiguous.
    openblas_sgemv(kRowMajor, p.plain_b ? kTrans : kNoTrans, p.plain_b ? p.k : p.n, p.plain_b ? p.n : p.k, p.alpha,
                   p.b, p.step_b, p.a, p.plain_a ? 1 : p.step_a, p.beta, p.c, 1);
  } else if (p.k > 0 && p.n == 1 && p.m > 1) {
    // c = op(a) b, c a column.
    openblas_sgemv(kRowMajor, p.plain_a ? kNoTrans : kTrans, p.plain_a ? p.m : p.k, p.plain_a ? p.k : p.m, p.alpha,
                   p.a, p.step_a, p.b, p.plain_b ? p.step_b : 1, p.beta, p.c, p.step_c);
  } else {
    openblas_sgemm(kRowMajor, p.plain_a ? kNoTrans : kTrans, p.plain_b ? kNoTrans : kTrans, p.m, p.n, p.k, p.alpha,
                   p.a, p.step_a, p.b, p.step_b, p.beta, p.c, p.step_c);
  }
}

// An axis cut into even pieces; all but the last are whole blocks, as OpenBLAS's kernels like them.
struct Cut {
  static constexpr int kBlock = 32;
  int size, pieces;

  int begin(int piece) const {
    const int blocks = (size + kBlock - 1) / kBlock;
    return std::min(size, static_cast<int>(int64_t{piece} * blocks / pieces) * kBlock);
  }
};

// Each tile reads its rows of a and columns of b from memory and packs them, so tiles are few and nearly square.
constexpr int64_t kTileOutputs = 512 * 1024;
constexpr int64_t kTileWork = 1024 * 1024;  // multiplications, about 15 us

void multiply_float(const FloatProduct& p) {
  const int64_t work = int64_t{p.m} * p.n * p.k, outputs = int64_t{p.m} * p.n;
  const int most_m = (p.m + Cut::kBlock - 1) / Cut::kBlock, most_n = (p.n + Cut::kBlock - 1) / Cut::kBlock;
  int64_t tiles = threads() * std::clamp<int64_t>(outputs / (threads() * kTileOutputs), 1, 4);
  tiles = std::min({tiles, work / kTileWork, int64_t{most_m} * most_n});
  if (tiles < 2 || threads() == 1) {
    return multiply_whole(p);
  }
  // The grid of at least so many tiles that copies least.
  Cut rows{p.m, 1}, columns{p.n, most_n};
  double least = std::numeric_limits<double>::infinity();
  for (int i = 1; i <= std::min<int64_t>(most_m, tiles); i++) {
    const int64_t j = (tiles + i - 1) / i;
    const double copied = double(p.m) * j + double(p.n) * i;
    if (j <= most_n && copied < least) {
      least = copied;
      rows.pieces = i;
      columns.pieces = static_cast<int>(j);
    }
  }
  parallel_for(rows.pieces * columns.pieces, [&](int tile) {
    const int i = tile / columns.pieces, j = tile % columns.pieces;
    const int row = rows.begin(i), column = columns.begin(j);
    multiply_whole(p.part(row, rows.begin(i + 1) - row, column, columns.begin(j + 1) - column));
  });
}

// What MLX calls; it has rows contiguous always.
void sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
           const float* b, int ldb, float beta, float* c, int ldc) {
  if (order != kRowMajor) {
    return openblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
  multiply_float({m, n, k, alpha, beta, trans_a == kNoTrans, trans_b == kNoTrans, a, b, lda, ldb, c, ldc});
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
  reinterpret_cast<void (*)(int)>(find(library, "scipy_openblas_set_num_threads"))(1);
  Patch patch;
  patch.replacements = {{"cblas_sgemm", reinterpret_cast<void*>(&sgemm)},
                        {"cblas_dgemm", find(library, "scipy_cblas_dgemm")},
                        {"cblas_cgemm", find(library, "scipy_cblas_cgemm")}};
  dl_iterate_phdr(visit_library, &patch);
  installed.store(patch.written > 0);
  return patch.written;
}

bool blas_installed() { return installed.load(); }

void matmul(const Matrix<float>& a, const Matrix<float>& b, float* out, int64_t out_stride) {
  require(blas_installed(), "no BLAS was installed");
  // A matrix as BLAS takes it: rows or columns contiguous.
  struct Operand {
    bool plain;
    int step;

    explicit Operand(const Matrix<float>& x)
        : plain(x.col_stride == 1 || x.cols == 1),
          step(static_cast<int>((plain ? x.rows : x.cols) > 1 ? (plain ? x.row_stride : x.col_stride) : least(x))) {
      require((plain || x.row_stride == 1 || x.rows == 1) && step >= least(x),
              "a matrix must have its rows or its columns contiguous");
    }
    int64_t least(const Matrix<float>& x) const { return std::max<int64_t>(1, plain ? x.cols : x.rows); }
  };
  const Operand left(a), right(b);
  multiply_float({static_cast<int>(a.rows), static_cast<int>(b.cols), static_cast<int>(a.cols), 1.0f, 0.0f,
                  left.plain, right.plain, a.data, b.data, left.step, right.step, out, static_cast<int>(out_stride)});
}

}  // namespace bitdraft
