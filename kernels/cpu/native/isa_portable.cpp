// The kernels for any processor.
#include <cmath>
#include <cstring>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace bitdraft {
namespace {

constexpr int kDenseAccumulators = 4;
constexpr int kScoreQueries = 1;
constexpr int kValueStrip = 1;

#include "simd_generic.inl"
#include "rows.inl"
#include "choice.inl"
#include "dense.inl"
#include "attend.inl"
#include "dot_generic.inl"
#include "int8_generic.inl"

}  // namespace

const Kernels kPortable = {"portable", 8,        dot_ternary, dot_int8, finish,
                           normalise,  quantise, gate,        dense, rotate, narrow, attend, largest, exp_sum, next_above};

}  // namespace bitdraft
