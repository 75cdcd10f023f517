// The kernels for x86-64 with AVX-512 and VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#endif

namespace bitdraft {
namespace {

constexpr int kDenseAccumulators = 24;  // of 32 registers
constexpr int kScoreQueries = 3;
constexpr int kValueStrip = 4;

#include "simd_avx512.inl"
#include "rows.inl"
#include "choice.inl"
#include "dense.inl"
#include "attend.inl"
#include "dot_vnni.inl"
#include "int8_vnni.inl"

}  // namespace

const Kernels kAvx512Vnni = {"avx512vnni", kMaxRowBlock, dot_ternary, dot_int8, finish,
                             normalise,    quantise,     gate,        dense, rotate, narrow, attend, largest, exp_sum, next_above};

}  // namespace bitdraft

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
