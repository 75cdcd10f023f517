// RoPE, the write to the cache, and attention over it; the inner loop is attend.inl.
#include <algorithm>
#include <cmath>

#include "attention.h"

namespace bitdraft {
namespace {

enum Slot { kQueries = 0, kScores = 1, kRow = 2 };

// cos and sin of recent positions: every layer of a model asks for the same few. A thread's own.
class RopeTable {
 public:
  // d/2 cosines, then d/2 sines.
  const float* at(int position, const float* frequency, int half) {
    if (static_cast<int>(frequency_.size()) != half ||
        std::memcmp(frequency_.data(), frequency, static_cast<size_t>(half) * sizeof(float)) != 0) {
      frequency_.assign(frequency, frequency + half);
      positions_.assign(kSlots, -1);
      table_.resize(static_cast<size_t>(kSlots) * 2 * static_cast<size_t>(half));
    }
    const int slot = position % kSlots;
    float* entry = table_.data() + static_cast<size_t>(slot) * 2 * static_cast<size_t>(half);
    if (positions_[static_cast<size_t>(slot)] != position) {
      positions_[static_cast<size_t>(slot)] = position;
      for (int i = 0; i < half; i++) {
        const float angle = static_cast<float>(position) * frequency[i];
        entry[i] = std::cos(angle);
        entry[half + i] = std::sin(angle);
      }
    }
    return entry;
  }

 private:
  static constexpr int kSlots = 256;
  std::vector<float> frequency_;
  std::vector<int> positions_;
  std::vector<float> table_;
};

thread_local RopeTable rope_table;

// Rotate-half RoPE of one head, times `scale`.
void rotate(const float* x, const float* table, int d, float scale, float* out) {
  const int half = d / 2;
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i], cos = table[i], sin = table[half + i];
    out[i] = (a * cos - b * sin) * scale;
    out[half + i] = (b * cos + a * sin) * scale;
  }
}

// Rotates a row's queries into `queries` [kv_heads][count][padded] as number `index` of each kv head's
// rows, and writes its key and value at `position` of a cache [kv_heads][capacity][d].
void place_row(const Heads& h, const float* row, int position, const float* frequency, float* queries,
               int64_t queries_per_kv, int64_t index, float* keys, float* values, int64_t capacity) {
  const float* table = rope_table.at(position, frequency, h.d / 2);
  const int group = h.group(), padded = h.padded();
  for (int head = 0; head < h.heads; head++) {
    float* q = queries + (head / group * queries_per_kv + index * group + head % group) * padded;
    rotate(row + head * h.d, table, h.d, h.scale, q);
    std::fill(q + h.d, q + padded, 0.0f);
  }
  const float* k = row + h.heads * h.d;
  const float* v = k + h.kv_heads * h.d;
  for (int head = 0; head < h.kv_heads; head++) {
    const int64_t at = (head * capacity + position) * h.d;
    rotate(k + head * h.d, table, h.d, 1.0f, keys + at);
    std::memcpy(values + at, v + head * h.d, static_cast<size_t>(h.d) * sizeof(float));
  }
}

// Queries first..last-1 of a kv head; length(i) and out(i) tell each one's keys and place.
template <class Length, class Out>
void attend_range(const Kernels& set, const Heads& h, const float* queries, const float* keys,
                  const float* values, int first, int last, Length&& length, Out&& out) {
  int lengths[kMaxQueries];
  float* places[kMaxQueries];
  for (int start = first; start < last; start += kMaxQueries) {
    Attend a{};
    a.count = std::min(kMaxQueries, last - start);
    int longest = 0;
    for (int i = 0; i < a.count; i++) {
      lengths[i] = length(start + i);
      places[i] = out(start + i);
      longest = std::max(longest, lengths[i]);
    }
    a.queries = queries + static_cast<int64_t>(start) * h.padded();
    a.lengths = lengths;
    a.out = places;
    a.keys = keys;
    a.values = values;
    a.d = h.d;
    a.padded = h.padded();
    a.score_stride = round_up(longest, 16);
    a.scores = scratch_floats(kScores, a.count * a.score_stride);
    set.attend(a);
  }
}

class Attention : public CpuPrimitive {
 public:
  Attention(mx::Stream stream, Heads heads, int offset)
      : CpuPrimitive(stream), heads_(heads), offset_(offset) {}
  DEFINE_NAME(BitdraftAttention)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    drop_spare_inputs(inputs, outputs);
    const bool copy_k = share_cache(inputs[1], outputs[1]), copy_v = share_cache(inputs[2], outputs[2]);
    dispatch(inputs, outputs,
             [h = heads_, offset = offset_, copy_k, copy_v](std::vector<mx::array>& in,
                                                            std::vector<mx::array>& out) {
               if (copy_k) copy_cache(in[1], out[1]);
               if (copy_v) copy_cache(in[2], out[2]);
               std::vector<float> space;
               attend_rows(h, offset, Matrix<float>(in[0]), vector_data(in[3], space), out[1].data<float>(),
                           out[2].data<float>(), out[1].shape(1), out[0].data<float>());
             });
  }

 private:
  Heads heads_;
  int offset_;
};

class AttentionBatch : public CpuPrimitive {
 public:
  AttentionBatch(mx::Stream stream, Heads heads) : CpuPrimitive(stream), heads_(heads) {}
  DEFINE_NAME(BitdraftAttentionBatch)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    drop_spare_inputs(inputs, outputs);
    const bool copy_k = share_cache(inputs[1], outputs[1]), copy_v = share_cache(inputs[2], outputs[2]);
    dispatch(inputs, outputs,
             [h = heads_, copy_k, copy_v](std::vector<mx::array>& in, std::vector<mx::array>& out) {
               if (copy_k) copy_cache(in[1], out[1]);
               if (copy_v) copy_cache(in[2], out[2]);
               run(h, in, out);
             });
  }

 private:
  static void run(const Heads& h, std::vector<mx::array>& in, std::vector<mx::array>& out) {
    const Kernels& set = kernels();
    const Matrix<float> qkv(in[0]);
    std::vector<float> space;
    const float* frequency = vector_data(in[3], space);
    float *result = out[0].data<float>(), *keys = out[1].data<float>(), *values = out[2].data<float>();
    const int64_t capacity = out[1].shape(2);
    const int group = h.group(), sequences = static_cast<int>(qkv.rows);
    const int64_t sequence_queries = int64_t{h.heads} * h.padded();
    float* queries = scratch_floats(kQueries, sequences * sequence_queries);
    float* row_space = scratch_floats(kRow, qkv.cols);
    std::vector<int> positions(static_cast<size_t>(sequences));
    int64_t work = 0;
    for (int i = 0; i < sequences; i++) {
      // Positions are data, known only now; one outside the cache must not write outside it.
      const int wanted = in[4].data<int32_t>()[i * in[4].strides(0)];
      const int position = positions[static_cast<size_t>(i)] =
          std::clamp(wanted, 0, static_cast<int>(capacity) - 1);
      const int64_t cache = int64_t{i} * h.kv_heads * capacity * h.d;
      place_row(h, qkv.row(i, row_space), position, frequency, queries + i * sequence_queries, group, 0,
                keys + cache, values + cache, capacity);
      work += 2 * int64_t{h.heads} * (position + 1) * h.d;
    }
    const auto one = [&](int task) {
      const int i = task / h.kv_heads, kv = task % h.kv_heads;
      const int64_t cache = int64_t{task} * capacity * h.d;
      attend_range(
          set, h, queries + i * sequence_queries + int64_t{kv} * group * h.padded(), keys + cache,
          values + cache, 0, group, [&](int) { return positions[static_cast<size_t>(i)] + 1; },
          [&](int q) { return result + (int64_t{i} * h.heads + kv * group + q) * h.d; });
    };
    const int tasks = sequences * h.kv_heads;
    const int chunks = work >= kParallelFlops ? std::min(tasks, 8 * threads()) : 1;
    parallel_for(chunks, [&](int chunk) {
      for (int64_t task = int64_t{chunk} * tasks / chunks; task < int64_t{chunk + 1} * tasks / chunks;
           task++) {
        one(static_cast<int>(task));
      }
    });
  }

  Heads heads_;
};

Heads check(const mx::array& qkv, const mx::array& k_cache, const mx::array& v_cache, size_t cache_axes,
            int heads, int kv_heads, const mx::array& frequency, float scale) {
  require(k_cache.ndim() == cache_axes && k_cache.shape() == v_cache.shape() &&
              k_cache.dtype() == mx::float32 && v_cache.dtype() == mx::float32,
          "both caches must be float32 of one shape, [kv_heads, capacity, d] a sequence");
  const int d = k_cache.shape(-1);
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  require(d % 2 == 0 && d > 0 && d <= kMaxHeadDim, "the head dimension must be even and at most 512");
  require(k_cache.shape(-3) == kv_heads, "the caches must have kv_heads heads");
  require(qkv.ndim() == 2 && qkv.shape(1) == (heads + 2 * kv_heads) * d,
          "qkv must be [m, (heads + 2 kv_heads) * d]");
  require(frequency.ndim() == 1 && frequency.shape(0) == d / 2, "inverse_frequency must have d / 2 values");
  return Heads{heads, kv_heads, d, scale};
}

void copy_strided(const mx::array& from, size_t axis, const float* source, float*& to) {
  if (axis == from.ndim()) {
    *to++ = *source;
    return;
  }
  const int64_t stride = from.strides()[axis];
  const int size = from.shape()[axis];
  if (axis + 1 == from.ndim() && stride == 1) {
    std::memcpy(to, source, static_cast<size_t>(size) * sizeof(float));
    to += size;
    return;
  }
  for (int i = 0; i < size; i++) {
    copy_strided(from, axis + 1, source + i * stride, to);
  }
}

}  // namespace

void copy_cache(const mx::array& from, mx::array& to) {
  float* out = to.data<float>();
  if (from.flags().row_contiguous) {
    std::memcpy(out, from.data<float>(), from.nbytes());
  } else {
    copy_strided(from, 0, from.data<float>(), out);
  }
}

void drop_spare_inputs(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& out : outputs) {
    if (&out.inputs() != &inputs && !out.is_tracer()) {
      out.inputs().clear();
    }
  }
}

bool share_cache(const mx::array& in, mx::array& out) {
  if (in.is_donatable() && in.flags().row_contiguous) {
    out.copy_shared_buffer(in);
    return false;
  }
  allocate(out);
  return true;
}

void attend_rows(const Heads& h, int offset, const Matrix<float>& qkv, const float* frequency, float* keys,
                 float* values, int64_t capacity, float* result) {
  const Kernels& set = kernels();
  const int group = h.group(), m = static_cast<int>(qkv.rows), queries_per_kv = m * group;
  float* queries = scratch_floats(kQueries, int64_t{h.heads} * m * h.padded());
  float* row_space = scratch_floats(kRow, qkv.cols);
  for (int i = 0; i < m; i++) {
    place_row(h, qkv.row(i, row_space), offset + i, frequency, queries, queries_per_kv, i, keys, values,
              capacity);
  }
  // A few queries a chunk share its keys; a query is never split, so its bits stay its own.
  const int64_t work = 2 * int64_t{h.heads} * m * (offset + m) * h.d;
  int splits = 1;
  if (work >= kParallelFlops && threads() > 1) {
    splits = std::clamp((6 * threads() + h.kv_heads - 1) / h.kv_heads, 1, std::max(1, queries_per_kv / 4));
    splits = std::max(splits, queries_per_kv / 32);
  }
  const int chunks = work >= kParallelFlops ? h.kv_heads * splits : 1;
  parallel_for(chunks, [&](int chunk) {
    const int first_kv = chunks == 1 ? 0 : chunk / splits,
              last_kv = chunks == 1 ? h.kv_heads : first_kv + 1;
    const int split = chunks == 1 ? 0 : chunk % splits, pieces = chunks == 1 ? 1 : splits;
    for (int kv = first_kv; kv < last_kv; kv++) {
      attend_range(
          set, h, queries + int64_t{kv} * queries_per_kv * h.padded(), keys + kv * capacity * h.d,
          values + kv * capacity * h.d, split * queries_per_kv / pieces,
          (split + 1) * queries_per_kv / pieces, [&](int i) { return offset + i / group + 1; },
          [&](int i) { return result + (int64_t{i} / group * h.heads + kv * group + i % group) * h.d; });
    }
  });
}

std::vector<mx::array> attention(const mx::array& qkv, const mx::array& k_cache, const mx::array& v_cache,
                                 int offset, int heads, int kv_heads, const mx::array& inverse_frequency,
                                 float scale) {
  const Heads h = check(qkv, k_cache, v_cache, 3, heads, kv_heads, inverse_frequency, scale);
  require(offset >= 0 && offset + qkv.shape(0) <= k_cache.shape(1), "the new rows do not fit the cache");
  return mx::array::make_arrays({{qkv.shape(0), heads * h.d}, k_cache.shape(), v_cache.shape()},
                                {mx::float32, mx::float32, mx::float32},
                                std::make_shared<Attention>(cpu_stream(), h, offset),
                                {as_float(qkv), k_cache, v_cache, as_float(inverse_frequency)});
}

std::vector<mx::array> attention_batch(const mx::array& qkv, const mx::array& k_cache,
                                       const mx::array& v_cache, const mx::array& positions, int heads,
                                       int kv_heads, const mx::array& inverse_frequency, float scale) {
  const Heads h = check(qkv, k_cache, v_cache, 4, heads, kv_heads, inverse_frequency, scale);
  require(k_cache.shape(0) == qkv.shape(0), "the caches must have one sequence a row");
  require(positions.ndim() == 1 && positions.shape(0) == qkv.shape(0), "positions must be int32 [s]");
  const mx::array at = positions.dtype() == mx::int32 ? positions : mx::astype(positions, mx::int32);
  return mx::array::make_arrays({{qkv.shape(0), heads * h.d}, k_cache.shape(), v_cache.shape()},
                                {mx::float32, mx::float32, mx::float32},
                                std::make_shared<AttentionBatch>(cpu_stream(), h),
                                {as_float(qkv), k_cache, v_cache, as_float(inverse_frequency), at});
}

}  // namespace bitdraft
