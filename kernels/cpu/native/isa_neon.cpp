// The kernels for ARM with the dot-product extension. NEON itself is part of the base, so the float
// operations are the portable ones.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace bitdraft {
namespace {

constexpr int kDenseAccumulators = 6;  // of 8 groups of four registers
constexpr int kScoreQueries = 1;
constexpr int kValueStrip = 1;

#include "simd_generic.inl"
#include "rows.inl"
#include "choice.inl"
#include "dense.inl"
#include "attend.inl"
#include "dot_neon.inl"
#include "int8_neon.inl"

}  // namespace

const Kernels kNeonDot = {"neondot", 8,        dot_ternary, dot_int8, finish,
                          normalise, quantise, gate,        dense, rotate, narrow, attend, largest, exp_sum, next_above};

}  // namespace bitdraft

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
