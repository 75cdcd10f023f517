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

// A model. All arrays are evaluated and contiguous, float32 where they are not weights.
struct FusedModel {
  Heads heads;
  mx::array inverse_frequency;
  mx::array embedding;  // bfloat16 or float32 [vocab, width]
  Epilogue epilogue;
  float eps;
  // Of a draft that reads its teacher's states: the product that makes one state of those of all taps, side by side, and
  // the one over the embedding and this state. Each part is normed by itself, with its share of the norm's weight.
  std::vector<Linear> before;
  std::vector<Linear> layers;  // qkv, o, gate and up, and down of every layer
  std::vector<Linear> after;   // the head, perhaps behind another product

  int hidden() const { return layers[0].k; }
  int width() const { return embedding.shape(1); }
  int head_size() const { return after.back().n; }
  int taps() const { return before.empty() ? 0 : before[0].k / width(); }
};

Linear make_linear(const mx::array& data, const MaybeArray& scale, int n, int k, const MaybeArray& norm);
std::shared_ptr<FusedModel> fused_model(const mx::array& embedding, const mx::array& inverse_frequency, int heads,
                                        int kv_heads, float scale, int epilogue, float eps,
                                        const std::vector<Linear>& before, const std::vector<Linear>& layers,
                                        const std::vector<Linear>& after);

// tokens: int32 [m], m <= 8; caches: bfloat16 [1, kv_heads, capacity, d], the keys of each layer, then the values of
// each; taps: layers, ascending. Returns the logits, float32 [m, vocab], the caches, and what leaves each of the taps,
// float32 [m, hidden].
std::vector<mx::array> fused_step(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                  const std::vector<mx::array>& caches, int offset, const std::vector<int>& taps);
// Steps that choose the highest logit's token, each over the token before: `count` tokens, uint32, and the caches.
// d2t: uint32, evaluated, the ids that a trimmed head's rows stand for. states: of a draft that reads its teacher's, those
// behind which the tokens stand, float32 [m, width] a tap; behind a choice stands its own last state.
std::vector<mx::array> greedy_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& states, const std::vector<mx::array>& caches,
                                     int offset, int count, const MaybeArray& d2t);
// A step of several sequences, one token each, and the choice behind each: tokens, uint32 [m], and the caches, float32
// [sequences, kv_heads, capacity, d].
std::vector<mx::array> choose_tokens(const std::shared_ptr<FusedModel>& model, const mx::array& tokens,
                                     const std::vector<mx::array>& caches, const std::vector<int>& sequences,
                                     const std::vector<int>& offsets, const std::vector<float>& temperature,
                                     const std::vector<float>& uniform);

}  // namespace bitdraft
