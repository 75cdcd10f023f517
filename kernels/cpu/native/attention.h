// Attention over plain memory, and caches that are updated where they are.
#pragma once

#include "ops.h"

namespace bitdraft {

struct Heads {
  int heads, kv_heads, d;
  float scale;
  int group() const { return heads / kv_heads; }
  int padded() const { return static_cast<int>(round_up(d, 16)); }
};

// The new rows of a sequence: `count` from row `row` of a call's on, the first at position `offset`.
struct Span {
  int sequence;
  int64_t row;
  int offset, count;
};

// RoPE, the write to the caches [sequences][kv_heads][capacity][d], where keys and values are rounded, and attention
// over them, for the rows of some spans; qkv: [rows][(heads + 2 kv_heads) * d]; out: [rows][heads * d].
void attend_spans(const Heads& h, const std::vector<Span>& spans, const Matrix<float>& qkv,
                  const float* frequency, mx::bfloat16_t* keys, mx::bfloat16_t* values, int64_t capacity, float* out);

// Every output of a primitive holds the inputs; left so, a cache never has one holder only and would
// be copied each time. MLX drops them all right after the evaluation anyway.
void drop_spare_inputs(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

// The cache as an output: the input's own memory when nobody else holds it, else a copy.
// Returns true when the task has to copy.
bool share_cache(const mx::array& in, mx::array& out);
void copy_cache(const mx::array& from, mx::array& to);

}  // namespace bitdraft
