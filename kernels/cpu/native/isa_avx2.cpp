// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace bitdraft {
namespace {

constexpr int kDenseAccumulators = 6;  // of 8 pairs of registers
constexpr int kScoreQueries = 1;
constexpr int kValueStrip = 1;

#include "simd_avx2.inl"
#include "rows.inl"
#include "choice.inl"
#include "dense.inl"
#include "attend.inl"
#include "dot_avx2.inl"
#include "int8_avx2.inl"

}  // namespace

const Kernels kAvx2 = {"avx2",    8,        dot_ternary, dot_int8, finish,
                       normalise, quantise, gate,        dense, rotate, narrow, attend, largest, exp_sum, next_above};

}  // namespace bitdraft

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
