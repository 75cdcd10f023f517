// A decoding step of a whole model as one operation: what Python and MLX spend on each operation of each layer is spent once.
#pragma once

#include "attention.h"
#include "product.h"

namespace bitdraft {

// A linear layer with what stands around it. A dense weight has no scale.
struct Linear {
  mx::array data;
  MaybeArray scale;
  int n, k;
  MaybeArray norm;
};

// A model: `linears` are qkv, o, gate and up, and down of every layer, then the head. All arrays are evaluated and
// contiguous, float32 where they are not weights.
struct FusedModel {
  Heads heads;
  mx::array inverse_frequency;
  mx::array embedding;  // bfloat16 or float32 [vocab, hidden]
  Epilogue epilogue;
  float eps;
  std::vector<Linear> linears;

  size_t layers() const { return linears.size() / 4; }
  int hidden() const { return embedding.shape(1); }
};

std::shared_ptr<FusedModel> fused_model(const mx::array& embedding, const mx::array& inverse_frequency, int heads,
                                        int kv_heads, float scale, int epilogue, float eps);
void add_linear(FusedModel& model, const mx::array& data, const MaybeArray& scale, int n, int k,
                const MaybeArray& norm);

// tokens: int32 [m], m <= 8; caches: bfloat16 [1, kv_heads, capacity, d], the keys of each layer, then the values of
// each. Returns the logits, float32 [m, vocab], and the caches.
std::vector<mx::array> fused_step(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                  const std::vector<mx::array>& caches, int offset);
// Steps that choose the highest logit's token, each over the token before: `count` tokens, uint32, and the caches.
// d2t: uint32, evaluated, the ids that a trimmed head's rows stand for.
std::vector<mx::array> greedy_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& caches, int offset, int count,
                                     const MaybeArray& d2t);
// A step of several sequences, one token each, and the choice behind each: tokens, uint32 [m], and the caches, float32
// [sequences, kv_heads, capacity, d].
std::vector<mx::array> choose_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& caches, const std::vector<int>& sequences,
                                     const std::vector<int>& offsets, const std::vector<float>& temperature,
                                     const std::vector<float>& uniform);

}  // namespace bitdraft
