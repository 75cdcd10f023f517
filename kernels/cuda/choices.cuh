// Which logit is higher, and where a sum of probabilities passes a number.
#pragma once

#include "attention.cuh"

namespace bitdraft {

// Takes the higher logit; of equal ones the lower id. NaN is never better.
__device__ inline void better(float& logit, unsigned& id, float other, unsigned other_id) {
  if (other > logit || (other == logit && other_id < id)) {
    logit = other;
    id = other_id;
  }
}

__device__ inline void best_of_lanes(float& logit, unsigned& id) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, logit, lane);
    better(logit, id, other, __shfl_xor_sync(kAllLanes, id, lane));
  }
}

// The sum of the lanes up to this one, in order.
__device__ inline float sum_before_and_with(float mine) {
  float sum = 0;
#pragma unroll
  for (int lane = 0; lane < 32; lane++) {
    const float theirs = __shfl_sync(kAllLanes, mine, lane);
    sum = lane <= static_cast<int>(threadIdx.x % 32) ? __fadd_rn(sum, theirs) : sum;
  }
  return sum;
}

// The first lane whose sum with those before it is above a number, of which it takes off those before; only a lane that
// has something itself; the last such one if rounding lets none be found, and lane 0 if no lane has anything.
__device__ inline int first_above(float mine, float& number) {
  const int lane = threadIdx.x % 32;
  const float with = sum_before_and_with(mine);
  int first = mine > 0 && with > number ? lane : 32, last = mine > 0 ? lane : 0;
  for (int other = 16; other > 0; other /= 2) {
    const int a = __shfl_xor_sync(kAllLanes, first, other), b = __shfl_xor_sync(kAllLanes, last, other);
    first = a < first ? a : first;
    last = b > last ? b : last;
  }
  const int chosen = first < 32 ? first : last;
  const float before = __shfl_sync(kAllLanes, with, chosen > 0 ? chosen - 1 : 0);
  number = chosen > 0 ? __fsub_rn(number, before) : number;
  return chosen;
}

// Of two logits the one that comes first has the higher rank: by falling logit, of equal ones by id; NaN is the last.
// Zero is no logit's rank.
__device__ inline uint64_t rank_of(float logit, unsigned id) {
  const unsigned bits = logit == 0 ? 0 : __float_as_uint(logit);  // minus zero equals zero
  const unsigned ordered = logit != logit ? 1 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~id;
}

__device__ inline unsigned id_of(uint64_t rank) { return ~static_cast<unsigned>(rank); }

__device__ inline float logit_of(uint64_t rank) {
  const unsigned ordered = static_cast<unsigned>(rank >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

}  // namespace bitdraft
