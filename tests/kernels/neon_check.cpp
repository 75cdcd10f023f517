// The NEON kernels against the portable ones by bits, and both against plain loops: exact where the definition is,
// near where it is floats. Buffers end where a page does, with none behind it. See test_cpu_neon.py.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include "kernels.h"

using namespace bitdraft;

namespace {

std::mt19937 rng(1);
long comparisons = 0;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
float normal() { return std::normal_distribution<float>()(rng); }

// `count` values, with memory that must not be touched right behind them.
template <class T>
struct Guarded {
  T* data;
  size_t count, bytes;

  explicit Guarded(size_t count) : count(count), bytes((count * sizeof(T) + 4095) / 4096 * 4096 + 4096) {
    auto* start = static_cast<char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(start + bytes - 4096, 4096, PROT_NONE);
    data = reinterpret_cast<T*>(start + bytes - 4096 - count * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(reinterpret_cast<char*>(data) + count * sizeof(T) + 4096 - bytes, bytes); }
  T& operator[](size_t i) { return data[i]; }

  template <class Make>
  void fill(Make make) {
    for (size_t i = 0; i < count; i++) {
      data[i] = static_cast<T>(make(i));
    }
  }
};

void fail(const char* what, size_t at, double a, double b) {
  std::printf("%s: value %zu is %.9g, not %.9g\n", what, at, a, b);
  std::exit(1);
}

template <class T>
void same(const char* what, const T* a, const T* b, size_t count) {
  for (size_t i = 0; i < count; i++, comparisons++) {
    if (std::memcmp(a + i, b + i, sizeof(T)) != 0) {
      fail(what, i, static_cast<double>(a[i]), static_cast<double>(b[i]));
    }
  }
}

void near(const char* what, const float* a, const double* b, size_t count, double tolerance) {
  double top = 1e-30;
  for (size_t i = 0; i < count; i++) {
    top = std::max(top, std::abs(b[i]));
  }
  for (size_t i = 0; i < count; i++, comparisons++) {
    if (!(std::abs(a[i] - b[i]) <= tolerance * top)) {
      fail(what, i, a[i], b[i]);
    }
  }
}

// Products of a pair of tiles, packed as kernels.h says.
void check_dots(bool ternary, int rows, int blocks, int mode) {
  const int k = 16 * blocks, bias = ternary ? 1 : 128, most = ternary ? 1 : 127;
  const size_t block_bytes = ternary ? kBlockBytes : kInt8BlockBytes, tile_bytes = blocks * block_bytes;
  std::vector<int> w(size_t{32} * k);
  for (int& value : w) {
    value = mode == 0 ? uniform(-most, most) : mode == 1 ? most : mode == 2 ? -most : uniform(0, 1) ? most : -most;
  }
  Guarded<int8_t> x(static_cast<size_t>(rows) * k);
  x.fill([&](size_t) { return mode == 0 ? uniform(-128, 127) : mode == 3 ? (uniform(0, 1) ? 127 : -128) : 127; });
  if (mode == 2) {
    x.fill([](size_t) { return -128; });
  }
  Guarded<uint8_t> tiles(2 * tile_bytes);
  tiles.fill([](size_t) { return 0; });
  for (int j = 0; j < 32; j++) {
    for (int c = 0; c < k; c++) {
      uint8_t* block = tiles.data + j / 16 * tile_bytes + c / 16 * block_bytes;
      const int i = c % 16 / 4, b = c % 4, code = w[static_cast<size_t>(j) * k + c] + bias;
      if (ternary) {
        block[4 * (j % 16) + b] |= static_cast<uint8_t>(code << (2 * i));
      } else {
        block[64 * i + 4 * (j % 16) + b] = static_cast<uint8_t>(code);
      }
    }
  }
  Guarded<int32_t> sums(rows), neon(static_cast<size_t>(rows) * 32), portable(static_cast<size_t>(rows) * 32),
      expected(static_cast<size_t>(rows) * 32);
  for (int r = 0; r < rows; r++) {
    int64_t sum = 0;
    for (int c = 0; c < k; c++) {
      sum += x[4 * (static_cast<size_t>(c / 4) * rows + r) + c % 4];
    }
    sums[r] = static_cast<int32_t>(bias * sum);
    for (int j = 0; j < 32; j++) {
      int64_t dot = bias * sum;
      for (int c = 0; c < k; c++) {
        dot += w[static_cast<size_t>(j) * k + c] * x[4 * (static_cast<size_t>(c / 4) * rows + r) + c % 4];
      }
      expected[static_cast<size_t>(r) * 32 + j] = static_cast<int32_t>(dot);
    }
  }
  const auto run = [&](const Kernels& set, int32_t* raw) {
    const Dot d{tiles.data, tiles.data + tile_bytes, blocks, static_cast<int64_t>(2 * tile_bytes), x.data, sums.data,
                raw};
    (ternary ? set.dot_ternary : set.dot_int8)(rows, d);
  };
  run(kNeonDot, neon.data);
  run(kPortable, portable.data);
  const char* what = ternary ? "dot_ternary" : "dot_int8";
  same(what, neon.data, expected.data, expected.count);
  same(what, portable.data, expected.data, expected.count);
}

double activated(Epilogue epilogue, double gate) {
  return epilogue == Epilogue::relu2_mul ? std::pow(std::max(gate, 0.0), 2) : gate / (1 + std::exp(-gate));
}

void check_finish(int rows, int valid0, int valid1, Epilogue epilogue, bool with_residual) {
  const bool gated = epilogue != Epilogue::none;
  const size_t width = gated ? valid0 : valid0 + valid1;
  Guarded<int32_t> raw(static_cast<size_t>(rows) * 32), sums(rows);
  raw.fill([](size_t) { return uniform(-(1 << 30), 1 << 30) >> uniform(0, 25); });
  sums.fill([](size_t) { return uniform(-(1 << 20), 1 << 20); });
  Guarded<float> s(rows), scale0(valid0), scale1(valid1), residual(rows * width), neon(rows * width),
      portable(rows * width);
  s.fill([](size_t) { return std::exp(4 * normal()); });
  scale0.fill([](size_t) { return std::exp(normal()) * 1e-6f; });
  scale1.fill([](size_t) { return std::exp(normal()) * 1e-6f; });
  residual.fill([](size_t) { return normal(); });
  const auto run = [&](const Kernels& set, Guarded<float>& out) {
    Finish f{};
    f.raw = raw.data, f.sums = sums.data, f.s = s.data;
    f.scale0 = scale0.data, f.scale1 = scale1.data;
    f.valid0 = valid0, f.valid1 = valid1;
    f.epilogue = epilogue;
    f.out0 = out.data, f.out1 = out.data + 16;
    f.out_stride = f.residual_stride = static_cast<int64_t>(width);
    f.residual0 = with_residual ? residual.data : nullptr;
    f.residual1 = with_residual ? residual.data + 16 : nullptr;
    set.finish(rows, f);
  };
  run(kNeonDot, neon);
  run(kPortable, portable);
  same("finish", neon.data, portable.data, neon.count);
  for (int r = 0; r < rows; r++) {
    const auto product = [&](int j) {
      const float scale = j < 16 ? scale0[j] : scale1[j - 16];
      return static_cast<float>(raw[r * 32 + j] - sums[r]) * (scale / s[r]);
    };
    for (size_t j = 0; j < width; j++) {
      float y = product(static_cast<int>(j));
      if (epilogue == Epilogue::silu_mul) {  // exp is our own: near
        const double expected = activated(epilogue, y) * product(static_cast<int>(j) + 16) +
                                (with_residual ? residual[r * width + j] : 0.0f);
        const double size = std::abs(activated(epilogue, y) * product(static_cast<int>(j) + 16)) + 1;
        if (!(std::abs(neon[r * width + j] - expected) <= 1e-6 * size)) {
          fail("finish, silu", j, neon[r * width + j], expected);
        }
        continue;
      }
      if (gated) {
        y = std::max(y, 0.0f) * std::max(y, 0.0f) * product(static_cast<int>(j) + 16);
      }
      y = with_residual ? y + residual[r * width + j] : y;
      same("finish, exactly", &neon[r * width + j], &y, 1);
    }
  }
}

void check_rows(size_t k, float size) {
  Guarded<float> x(k), weight(k), neon(k), portable(k);
  x.fill([&](size_t) { return normal() * size; });
  weight.fill([](size_t) { return normal(); });
  kNeonDot.normalise(x.data, weight.data, 1e-5f, k, neon.data);
  kPortable.normalise(x.data, weight.data, 1e-5f, k, portable.data);
  same("normalise", neon.data, portable.data, k);
  double squares = 0;
  for (size_t i = 0; i < k; i++) {
    squares += static_cast<double>(x[i]) * x[i];
  }
  std::vector<double> expected(k);
  for (size_t i = 0; i < k; i++) {
    expected[i] = x[i] / std::sqrt(squares / static_cast<double>(k) + 1e-5) * weight[i];
  }
  if (size < 1e15f) {  // squares beyond are infinite in float32
    near("normalise", neon.data, expected.data(), k, 2e-6);
  }

  Guarded<int8_t> q(k), p(k);
  for (int extreme = 0; extreme < 4; extreme++) {
    if (extreme == 1) {  // halves: the factor is one
      x.fill([](size_t i) { return static_cast<float>(i % 254) - 126.5f; });
      x[0] = 127;
    } else if (extreme == 2) {
      x.fill([](size_t i) { return i % 2 ? 127.0f : -127.0f; });
    } else if (extreme == 3) {
      x.fill([](size_t) { return 0.0f; });
      x[k / 2] = -3e38f;
    }
    const float s = kNeonDot.quantise(x.data, k, q.data), t = kPortable.quantise(x.data, k, p.data);
    float top = 1e-5f;
    for (size_t i = 0; i < k; i++) {
      top = std::max(top, std::abs(x[i]));
    }
    const float factor = 127.0f / top;
    same("quantise, factor", &s, &factor, 1);
    same("quantise, factor", &t, &factor, 1);
    same("quantise", q.data, p.data, k);
    for (size_t i = 0; i < k; i++) {
      const auto rounded = static_cast<int8_t>(std::clamp(std::nearbyint(x[i] * factor), -128.0f, 127.0f));
      same("quantise, exactly", &q[i], &rounded, 1);
    }
  }

  Guarded<float> gate(k), up(k);
  gate.fill([&](size_t i) { return i % 7 == 0 ? normal() * 200 : normal() * 3; });
  up.fill([](size_t) { return normal(); });
  for (const Epilogue epilogue : {Epilogue::relu2_mul, Epilogue::silu_mul}) {
    kNeonDot.gate(epilogue, gate.data, up.data, k, neon.data);
    kPortable.gate(epilogue, gate.data, up.data, k, portable.data);
    same("gate", neon.data, portable.data, k);
    for (size_t i = 0; i < k; i++) {
      expected[i] = activated(epilogue, gate[i]) * up[i];
    }
    near("gate", neon.data, expected.data(), k, 1e-6);
  }
}

void check_dense(int n, int k, bool bfloat16) {
  const size_t padded = round_up(k, 16);
  Guarded<uint16_t> half(static_cast<size_t>(n) * k);
  Guarded<float> whole(static_cast<size_t>(n) * k), x(8 * padded);
  half.fill([](size_t) { return std::bit_cast<uint32_t>(normal()) >> 16; });
  whole.fill([&](size_t i) {
    return bfloat16 ? std::bit_cast<float>(static_cast<uint32_t>(half[i]) << 16) : normal();
  });
  x.fill([&](size_t i) { return i % padded < static_cast<size_t>(k) ? normal() : 0.0f; });
  const auto run = [&](const Kernels& set, int first_row, int rows, int first, int last, float* out) {
    Dense d{};
    d.x = x.data + first_row * padded, d.k_padded = static_cast<int64_t>(padded);
    d.rows = rows;
    d.weights = bfloat16 ? static_cast<const void*>(half.data) : whole.data;
    d.bfloat16 = bfloat16;
    d.n = n, d.k = k;
    d.out = out, d.out_stride = n;
    set.dense(d, first, last);
  };
  Guarded<float> alone(static_cast<size_t>(8) * n);
  std::vector<double> expected(static_cast<size_t>(8) * n);
  for (int r = 0; r < 8; r++) {
    run(kNeonDot, r, 1, 0, n, alone.data + static_cast<size_t>(r) * n);
    for (int j = 0; j < n; j++) {
      for (int c = 0; c < k; c++) {
        expected[static_cast<size_t>(r) * n + j] +=
            static_cast<double>(x[r * padded + c]) * whole[static_cast<size_t>(j) * k + c];
      }
    }
  }
  near("dense", alone.data, expected.data(), alone.count, 1e-6 * std::sqrt(k));
  for (int rows = 1; rows <= 8; rows++) {
    for (const int middle : {n, n / 2}) {  // in one range of outputs, and in two
      Guarded<float> neon(static_cast<size_t>(rows) * n), portable(static_cast<size_t>(rows) * n);
      for (const auto& [set, out] : {std::pair(&kNeonDot, neon.data), std::pair(&kPortable, portable.data)}) {
        run(*set, 0, rows, 0, middle, out);
        run(*set, 0, rows, middle, n, out);
      }
      same("dense", neon.data, portable.data, neon.count);
      same("dense, rows together", neon.data, alone.data, neon.count);
    }
  }
}

void check_attend(int d, int count, int longest, float size) {
  const size_t padded = round_up(d, 16), stride = round_up(longest, 16);
  Guarded<float> queries(count * padded), keys(static_cast<size_t>(longest) * d), values(static_cast<size_t>(longest) * d);
  queries.fill([&](size_t i) { return i % padded < static_cast<size_t>(d) ? normal() * size : 0.0f; });
  keys.fill([](size_t) { return normal(); });
  values.fill([](size_t) { return normal(); });
  std::vector<int> lengths(count);
  for (int i = 0; i < count; i++) {
    lengths[i] = i == count - 1 ? longest : std::max(1, longest - count + 1 + i);
  }
  const auto run = [&](const Kernels& set, int first, int number, Guarded<float>& out) {
    Guarded<float> scores(number * stride);
    std::vector<float*> places(number);
    for (int i = 0; i < number; i++) {
      places[i] = out.data + static_cast<size_t>(first + i) * d;
    }
    set.attend(Attend{queries.data + first * padded, lengths.data() + first, places.data(), keys.data, values.data,
                      number, d, static_cast<int>(padded), scores.data, static_cast<int64_t>(stride)});
  };
  Guarded<float> neon(static_cast<size_t>(count) * d), portable(static_cast<size_t>(count) * d),
      alone(static_cast<size_t>(count) * d);
  run(kNeonDot, 0, count, neon);
  run(kPortable, 0, count, portable);
  std::vector<double> expected(static_cast<size_t>(count) * d);
  for (int i = 0; i < count; i++) {
    run(kNeonDot, i, 1, alone);
    std::vector<double> weights(lengths[i]);
    double top = -1e300, total = 0;
    for (int j = 0; j < lengths[i]; j++) {
      for (int c = 0; c < d; c++) {
        weights[j] += static_cast<double>(queries[i * padded + c]) * keys[static_cast<size_t>(j) * d + c];
      }
      top = std::max(top, weights[j]);
    }
    for (double& weight : weights) {
      total += weight = std::exp(weight - top);
    }
    for (int j = 0; j < lengths[i]; j++) {
      for (int c = 0; c < d; c++) {
        expected[static_cast<size_t>(i) * d + c] += weights[j] / total * values[static_cast<size_t>(j) * d + c];
      }
    }
  }
  same("attend", neon.data, portable.data, neon.count);
  same("attend, queries together", neon.data, alone.data, neon.count);
  near("attend", neon.data, expected.data(), neon.count, 1e-5 * std::max(1.0f, size));
}

}  // namespace

int main(int arguments, char**) {
  if (arguments > 1) {  // which there are, best first
    for (const std::string& name : available_isas()) {
      std::printf("%s\n", name.c_str());
    }
    return 0;
  }
  for (int mode = 0; mode < 4; mode++) {
    for (int rows = 1; rows <= kNeonDot.row_block; rows++) {
      for (const int blocks : {1, 2, 3, 36}) {
        check_dots(true, rows, blocks, mode);
        check_dots(false, rows, blocks, mode);
      }
    }
    check_dots(true, 1, 8256, mode);  // the longest that the definitions allow
    check_dots(false, 8, 4096, mode);
  }
  for (const int rows : {1, 5, 8}) {
    for (const bool residual : {false, true}) {
      for (const auto& [valid0, valid1] : {std::pair(16, 16), std::pair(16, 3), std::pair(7, 0)}) {
        check_finish(rows, valid0, valid1, Epilogue::none, residual);
      }
      for (const Epilogue epilogue : {Epilogue::relu2_mul, Epilogue::silu_mul}) {
        check_finish(rows, 16, 16, epilogue, residual);
      }
    }
  }
  for (const size_t k : {1, 15, 16, 17, 63, 64, 65, 576, 2560, 6912}) {
    for (const float size : {1.0f, 1e-20f, 1e10f, 1e30f}) {
      check_rows(k, size);
    }
  }
  for (const int n : {1, 2, 7, 33}) {
    for (const int k : {1, 15, 16, 33, 576}) {
      check_dense(n, k, false);
      check_dense(n, k, true);
    }
  }
  for (const int d : {2, 20, 32, 64, 128}) {
    for (const int count : {1, 3, 4, 5, 16}) {
      for (const int longest : {1, 2, 15, 16, 17, 31, 32, 33, 65, 300}) {
        check_attend(d, count, longest, 0.5f);
      }
    }
  }
  check_attend(64, 9, 2050, 0.3f);
  check_attend(128, 8, 2050, 30.0f);
  std::printf("%ld values compared\n", comparisons);
}
