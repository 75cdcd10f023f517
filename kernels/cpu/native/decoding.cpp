// What decoding asks for beside a step's logits: the choice of tokens, and when it was made.
#include <algorithm>
#include <chrono>
#include <limits>

#include "ops.h"

namespace bitdraft {

uint32_t best_index(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;  // maxima side by side, so that the compiler can use vectors
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane++) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }
  float highest = *std::max_element(lanes, lanes + kLanes);
  for (int64_t i = whole; i < n; i++) {
    highest = x[i] > highest ? x[i] : highest;
  }
  const float* found = std::find(x, x + n, highest);
  return found == x + n ? 0 : static_cast<uint32_t>(found - x);
}

namespace {

// MLX's own argmax takes longer on a CPU than many of our products.
class ArgMax : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  DEFINE_NAME(BitdraftArgMax)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    dispatch(inputs, outputs, [](std::vector<mx::array>& in, std::vector<mx::array>& out) {
      const Matrix<float> x(in[0]);
      std::vector<float> space(static_cast<size_t>(x.cols));
      for (int64_t r = 0; r < x.rows; r++) {
        out[0].data<uint32_t>()[r] = best_index(x.row(r, space.data()), x.cols);
      }
    });
  }
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

mx::array clock(const mx::array& x) {
  return mx::array(mx::Shape{}, mx::int64, std::make_shared<Clock>(cpu_stream()), {x});
}

}  // namespace bitdraft
