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

// Rotates a row's queries into `queries` [kv_heads][count][padded] as number `index` of each kv head's
// rows, and writes its key and value at `position` of a cache [kv_heads][capacity][d].
void place_row(const Kernels& set, const Heads& h, const float* row, int position, const float* frequency,
               float* queries, int64_t queries_per_kv, int64_t index, uint16_t* keys, uint16_t* values,
               int64_t capacity) {
  const float* table = rope_table.at(position, frequency, h.d / 2);
  const int group = h.group(), padded = h.padded();
  for (int head = 0; head < h.heads; head++) {
    float* q = queries + (head / group * queries_per_kv + index * group + head % group) * padded;
    set.rotate(row + head * h.d, table, h.d, h.scale, q);
    std::fill(q + h.d, q + padded, 0.0f);
  }
  const float* k = row + h.heads * h.d;
  const float* v = k + h.kv_heads * h.d;
  float rotated[kMaxHeadDim];
  for (int head = 0; head < h.kv_heads; head++) {
    const int64_t at = (head * capacity + position) * h.d;
    set.rotate(k + head * h.d, table, h.d, 1.0f, rotated);
    set.narrow(rotated, h.d, keys + at);
    set.narrow(v + head * h.d, h.d, values + at);
  }
}

// Queries first..last-1 of a kv head; length(i) and out(i) tell each one's keys and place.
template <class Length, class Out>
void attend_range(const Kernels& set, const Heads& h, const float* queries, const uint16_t* keys,
                  const uint16_t* values, int first, int last, Length&& length, Out&& out) {
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

// What a thread takes at once: queries first..last-1 of a key/value head of a span.
struct Task {
  int span, kv, first, last;
};

class Attention : public CpuPrimitive {
 public:
  Attention(mx::Stream stream, Heads heads, std::vector<Span> spans)
      : CpuPrimitive(stream), heads_(heads), spans_(std::move(spans)) {}
  DEFINE_NAME(BitdraftAttention)

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    drop_spare_inputs(inputs, outputs);
    const bool copy_k = share_cache(inputs[1], outputs[1]), copy_v = share_cache(inputs[2], outputs[2]);
    dispatch(inputs, outputs,
             [h = heads_, spans = spans_, copy_k, copy_v](std::vector<mx::array>& in,
                                                          std::vector<mx::array>& out) {
               if (copy_k) copy_cache(in[1], out[1]);
               if (copy_v) copy_cache(in[2], out[2]);
               std::vector<float> space;
               attend_spans(h, spans, Matrix<float>(in[0]), vector_data(in[3], space), out[1].data<mx::bfloat16_t>(),
                            out[2].data<mx::bfloat16_t>(), out[1].shape(2), out[0].data<float>());
             });
  }

 private:
  Heads heads_;
  std::vector<Span> spans_;
};

Heads check(const mx::array& qkv, const mx::array& k_cache, const mx::array& v_cache,
            int heads, int kv_heads, const mx::array& frequency, float scale) {
  require(k_cache.ndim() == 4 && k_cache.shape() == v_cache.shape() && k_cache.dtype() == mx::bfloat16 &&
              v_cache.dtype() == mx::bfloat16,
          "both caches must be bfloat16 of one shape, [sequences, kv_heads, capacity, d]");
  const int d = k_cache.shape(-1);
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  require(d % 2 == 0 && d > 0 && d <= kMaxHeadDim, "the head dimension must be even and at most 512");
  require(k_cache.shape(-3) == kv_heads, "the caches must have kv_heads heads");
  require(qkv.ndim() == 2 && qkv.shape(1) == (heads + 2 * kv_heads) * d,
          "qkv must be [m, (heads + 2 kv_heads) * d]");
  require(frequency.ndim() == 1 && frequency.shape(0) == d / 2, "inverse_frequency must have d / 2 values");
  return Heads{heads, kv_heads, d, scale};
}

void copy_strided(const mx::array& from, size_t axis, const mx::bfloat16_t* source, mx::bfloat16_t*& to) {
  if (axis == from.ndim()) {
    *to++ = *source;
    return;
  }
  const int64_t stride = from.strides()[axis];
  const int size = from.shape()[axis];
  if (axis + 1 == from.ndim() && stride == 1) {
    std::copy_n(source, size, to);
    to += size;
    return;
  }
  for (int i = 0; i < size; i++) {
    copy_strided(from, axis + 1, source + i * stride, to);
  }
}

}  // namespace

void copy_cache(const mx::array& from, mx::array& to) {
  auto* out = to.data<mx::bfloat16_t>();
  if (from.flags().row_contiguous) {
    std::memcpy(out, from.data<mx::bfloat16_t>(), from.nbytes());
  } else {
    copy_strided(from, 0, from.data<mx::bfloat16_t>(), out);
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

void attend_spans(const Heads& h, const std::vector<Span>& spans, const Matrix<float>& qkv,
                  const float* frequency, mx::bfloat16_t* key_cache, mx::bfloat16_t* value_cache, int64_t capacity,
                  float* result) {
  const Kernels& set = kernels();
  const int group = h.group();
  const int64_t row_queries = int64_t{h.heads} * h.padded(), cache = int64_t{h.kv_heads} * capacity * h.d;
  auto *keys = reinterpret_cast<uint16_t*>(key_cache), *values = reinterpret_cast<uint16_t*>(value_cache);
  const auto place = [&](const Span& span, float* queries) {
    float* row_space = scratch_floats(kRow, qkv.cols);
    for (int i = 0; i < span.count; i++) {
      place_row(set, h, qkv.row(span.row + i, row_space), span.offset + i, frequency, queries,
                int64_t{span.count} * group, i, keys + span.sequence * cache, values + span.sequence * cache, capacity);
    }
  };
  // Queries first..last-1 of a key/value head; a query is never split, so its bits stay its own.
  const auto attend = [&](const Span& span, const float* queries, int kv, int first, int last) {
    const int64_t head = (int64_t{span.sequence} * h.kv_heads + kv) * capacity * h.d;
    attend_range(
        set, h, queries + int64_t{kv} * span.count * group * h.padded(), keys + head, values + head, first, last,
        [&](int i) { return span.offset + i / group + 1; },
        [&](int i) { return result + ((span.row + i / group) * h.heads + kv * group + i % group) * h.d; });
  };
  int64_t work = 0;
  int busy = 0;  // spans with rows
  for (const Span& span : spans) {
    work += 2 * int64_t{h.heads} * span.count * (span.offset + span.count) * h.d;
    busy += span.count > 0;
  }
  const bool shared = work >= kParallelFlops && threads() > 1;
  if (!shared || busy >= 4 * threads()) {  // a span as a whole: what it is about to read was just written
    const auto count = static_cast<int64_t>(spans.size());
    const int64_t chunks = shared ? std::min<int64_t>(count, 8 * threads()) : 1;
    parallel_for(static_cast<int>(chunks), [&](int chunk) {
      for (int64_t s = chunk * count / chunks; s < (chunk + 1) * count / chunks; s++) {
        const Span& span = spans[static_cast<size_t>(s)];
        float* queries = scratch_floats(kQueries, span.count * row_queries);
        place(span, queries);
        for (int kv = 0; span.count > 0 && kv < h.kv_heads; kv++) {
          attend(span, queries, kv, 0, span.count * group);
        }
      }
    });
    return;
  }
  float* queries = scratch_floats(kQueries, qkv.rows * row_queries);
  thread_local std::vector<Task> tasks;  // a few queries each, which share their keys
  tasks.clear();
  for (int s = 0; s < static_cast<int>(spans.size()); s++) {
    const Span& span = spans[static_cast<size_t>(s)];
    place(span, queries + span.row * row_queries);
    const int head_queries = span.count * group;
    const int wanted = (6 * threads() + h.kv_heads * busy - 1) / (h.kv_heads * busy);
    const int pieces = std::max(std::clamp(wanted, 1, std::max(1, head_queries / 4)), head_queries / 32);
    for (int kv = 0; head_queries > 0 && kv < h.kv_heads; kv++) {
      for (int piece = 0; piece < pieces; piece++) {
        tasks.push_back({s, kv, piece * head_queries / pieces, (piece + 1) * head_queries / pieces});
      }
    }
  }
  const Task* all = tasks.data();  // not another thread's own
  parallel_for(static_cast<int>(tasks.size()), [&](int i) {
    const Span& span = spans[static_cast<size_t>(all[i].span)];
    attend(span, queries + span.row * row_queries, all[i].kv, all[i].first, all[i].last);
  });
}

std::vector<mx::array> attention(const mx::array& qkv, const mx::array& k_cache, const mx::array& v_cache,
                                 const std::vector<int>& offsets, const std::vector<int>& counts, int heads,
                                 int kv_heads, const mx::array& inverse_frequency, float scale) {
  const Heads h = check(qkv, k_cache, v_cache, heads, kv_heads, inverse_frequency, scale);
  const auto sequences = static_cast<size_t>(k_cache.shape(0));
  require(offsets.size() == sequences && counts.size() == sequences, "every sequence of the caches has a span");
  std::vector<Span> spans;
  int64_t rows = 0;
  for (size_t i = 0; i < sequences; i++) {
    require(offsets[i] >= 0 && counts[i] >= 0 && (counts[i] == 0 || offsets[i] <= k_cache.shape(2) - counts[i]),
            "the new rows do not fit the cache");
    spans.push_back({static_cast<int>(i), rows, offsets[i], counts[i]});
    rows += counts[i];
  }
  require(rows == qkv.shape(0), "the spans must have as many rows as qkv");
  return mx::array::make_arrays({{qkv.shape(0), heads * h.d}, k_cache.shape(), v_cache.shape()},
                                {mx::float32, mx::bfloat16, mx::bfloat16},
                                std::make_shared<Attention>(cpu_stream(), h, std::move(spans)),
                                {as_float(qkv), k_cache, v_cache, as_float(inverse_frequency)});
}

}  // namespace bitdraft
