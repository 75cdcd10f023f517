// What is done with a row of logits: the choice of a token, and its top for scoring; and when something was computed.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "ops.h"

namespace bitdraft {
namespace {

enum Slot { kSums = 6, kCandidates = 7 };

// Calls body(row, values, count) for each row of a float matrix, on all threads when there is enough to do.
template <class Body>
void over_rows(const Matrix<float>& x, Body&& body) {
  const int64_t chunks = x.rows * x.cols < kParallelFlops ? 1 : std::min<int64_t>(x.rows, 4 * threads());
  parallel_for(static_cast<int>(chunks), [&](int c) {
    std::vector<float> space(x.col_stride == 1 ? 0 : static_cast<size_t>(x.cols));
    for (int64_t r = c * x.rows / chunks; r < (c + 1) * x.rows / chunks; r++) {
      body(r, x.row(r, space.data()), x.cols);
    }
  });
}

constexpr int64_t kSumBlock = 256;  // values whose float sum is added to a double
constexpr double kNothing = 1e-35;  // what a block of values without probability sums up to: exp stops at e^-87

// softmax(x / temperature) inverted at a uniform number in [0, 1); the best index at temperature 0.
uint32_t choose_index(const float* x, int64_t n, float temperature, float uniform) {
  if (temperature == 0.0f) {
    return best_index(x, n);
  }
  const Kernels& set = kernels();
  const float top = set.largest(x, n), factor = 1.0f / std::max(temperature, 1e-3f);
  // Sums of blocks, then of sixteenths of the block that holds the place, then of each value there.
  const int64_t blocks = (n + kSumBlock - 1) / kSumBlock;
  float* sums = scratch_floats(kSums, blocks);
  double total = 0.0;
  for (int64_t b = 0; b < blocks; b++) {
    sums[b] = set.exp_sum(x + b * kSumBlock, std::min(kSumBlock, n - b * kSumBlock), top, factor);
    total += sums[b];
  }
  const double place = uniform * total;
  double below = 0.0;
  int64_t first = 0, last = n;
  for (int64_t size = kSumBlock; size > 0; size /= 16) {
    // The piece that holds the place; where rounding leaves none, the last that counts.
    int64_t found = first;
    double before = below;
    for (int64_t at = first; at < last; at += size) {
      const double sum = size == kSumBlock ? sums[at / kSumBlock] : set.exp_sum(x + at, std::min(size, last - at), top, factor);
      if (sum > kNothing && below + sum > below) {
        found = at;
        before = below;
        below += sum;
        if (below > place) {
          break;
        }
      }
    }
    first = found;
    last = std::min(last, found + size);
    below = before;
  }
  return static_cast<uint32_t>(first);
}

}  // namespace

void choose_rows(const Matrix<float>& logits, const float* temperature, const float* uniform, uint32_t* chosen) {
  over_rows(logits, [&](int64_t r, const float* x, int64_t n) {
    chosen[r] = choose_index(x, n, temperature[r], uniform[r]);
  });
}

uint32_t best_index(const float* x, int64_t n) {
  const float* found = std::find(x, x + n, kernels().largest(x, n));
  return found == x + n ? 0 : static_cast<uint32_t>(found - x);
}

namespace {

// The k highest of n values by falling value and then by index. Candidates are collected, and thinned out to the k
// best when they are too many: what comes later must be above the least of these.
void top_of(const float* x, int64_t n, int64_t k, uint32_t* ids, float* values) {
  const Kernels& set = kernels();
  const int64_t room = 2 * k + 64;
  auto* found = reinterpret_cast<uint32_t*>(scratch_bytes(kCandidates, 4 * room));
  const auto higher = [x](uint32_t a, uint32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  float threshold = -INFINITY;
  int64_t count = 0;
  for (int64_t i = 0; (i = set.next_above(x, i, n, threshold)) < n; i++) {
    found[count++] = static_cast<uint32_t>(i);
    if (count == room) {
      std::nth_element(found, found + k - 1, found + count, higher);
      threshold = x[found[k - 1]];
      count = k;
    }
  }
  // Of NaNs and -inf nothing is above the threshold: they fill what is left, in order.
  for (int64_t i = 0; count < k; i++) {
    if (!(x[i] > -INFINITY)) {
      found[count++] = static_cast<uint32_t>(i);
    }
  }
  std::partial_sort(found, found + k, found + count, higher);
  for (int64_t j = 0; j < k; j++) {
    ids[j] = found[j];
    values[j] = x[found[j]];
  }
}

// MLX's own argmax takes longer on a CPU than many of our products.
class ArgMax : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  DEFINE_NAME(BitdraftArgMax)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs, [](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      over_rows(Matrix<float>(in[0]), [&](int64_t r, const float* x, int64_t n) { out[0].data<uint32_t>()[r] = best_index(x, n); });
    });
  }
};

class Choose : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  DEFINE_NAME(BitdraftChoose)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs, [](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      std::vector<float> temperature_space, uniform_space;
      const float* temperature = vector_data(in[1], temperature_space);
      const float* uniform = vector_data(in[2], uniform_space);
      choose_rows(Matrix<float>(in[0]), temperature, uniform, out[0].data<uint32_t>());
    });
  }
};

class TopK : public CpuPrimitive {
 public:
  TopK(mx::Stream stream, int k, std::vector<float> temperatures)
      : CpuPrimitive(stream), k_(k), temperatures_(std::move(temperatures)) {}
  DEFINE_NAME(BitdraftTopK)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& out : outputs) {
      allocate(out);
    }
    dispatch(inputs, outputs, [k = k_, temperatures = temperatures_](std::vector<mx::array>& in,
                                                                     std::vector<mx::array>& out) {
      const Kernels& set = kernels();
      const auto count = static_cast<int64_t>(temperatures.size());
      over_rows(Matrix<float>(in[0]), [&](int64_t r, const float* x, int64_t n) {
        top_of(x, n, k, out[0].data<uint32_t>() + r * k, out[1].data<float>() + r * k);
        const float top = set.largest(x, n);
        for (int64_t t = 0; t < count; t++) {
          const float factor = 1.0f / temperatures[static_cast<size_t>(t)];
          double sum = 0.0;
          for (int64_t i = 0; i < n; i += kSumBlock) {
            sum += set.exp_sum(x + i, std::min(kSumBlock, n - i), top, factor);
          }
          out[2].data<float>()[r * count + t] = static_cast<float>(double(top) * factor + std::log(sum));
        }
      });
    });
  }

 private:
  int k_;
  std::vector<float> temperatures_;
};

class Clock : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  DEFINE_NAME(BitdraftClock)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs, [](std::vector<mx::array>&, std::vector<mx::array>& out) {
      const auto now = std::chrono::steady_clock::now().time_since_epoch();
      *out[0].data<int64_t>() = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
    });
  }
};

}  // namespace

mx::array argmax(const mx::array& x) {
  require(x.ndim() == 2 && x.dtype() == mx::float32 && x.shape(1) > 0, "x must be float32 [m, n], n > 0");
  return mx::array({x.shape(0)}, mx::uint32, std::make_shared<ArgMax>(cpu_stream()), {x});
}

mx::array choose(const mx::array& logits, const mx::array& temperature, const mx::array& uniform) {
  require(logits.ndim() == 2 && logits.dtype() == mx::float32 && logits.shape(1) > 0,
          "logits must be float32 [m, n], n > 0");
  for (const mx::array* a : {&temperature, &uniform}) {
    require(a->ndim() == 1 && a->dtype() == mx::float32 && a->shape(0) == logits.shape(0),
            "temperature and uniform must be float32 [m]");
  }
  return mx::array({logits.shape(0)}, mx::uint32, std::make_shared<Choose>(cpu_stream()),
                   {logits, temperature, uniform});
}

std::vector<mx::array> top_k(const mx::array& logits, int k, const std::vector<float>& temperatures) {
  require(logits.ndim() == 2 && logits.dtype() == mx::float32, "logits must be float32 [m, n]");
  require(k > 0 && k <= logits.shape(1), "k must be from 1 to the number of logits");
  const int m = logits.shape(0), count = static_cast<int>(temperatures.size());
  return mx::array::make_arrays({{m, k}, {m, k}, {m, count}}, {mx::uint32, mx::float32, mx::float32},
                                std::make_shared<TopK>(cpu_stream(), k, temperatures), {logits});
}

mx::array clock(const mx::array& x) {
  return mx::array(mx::Shape{}, mx::int64, std::make_shared<Clock>(cpu_stream()), {x});
}

}  // namespace bitdraft
