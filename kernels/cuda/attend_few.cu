// Attention of a few rows of a sequence: a warp, which is a block, has them, a key/value head, and with FOLD all chunks of
// keys, of one row; else one chunk, for `combine`. The next keys come while values are multiplied, and the other way round.
// queries [..][HEADS * DIM]; keys and values: as rope.cu has them; groups: the sequence, the first row, how many, and its
// position, of each; sizes: rows in all, and the strides of a key, a head and a sequence, in DIM values.
// out: with FOLD [rows][HEADS * DIM], else [chunks][rows * HEADS][DIM + 2]. Constants: HEADS, KV_HEADS, DIM, FOLD.
constexpr int GROUP = HEADS / KV_HEADS, each = DIM / 32, width = DIM + 2;
extern __shared__ __align__(128) uint8_t work[];
bfloat16* chunk_keys = reinterpret_cast<bfloat16*>(work);
bfloat16* chunk_values = chunk_keys + kChunk * padded_dim(DIM);
float* mine = reinterpret_cast<float*>(work + chunk_bytes(DIM));  // queries of a row, [GROUP][DIM]
float* weights = mine + GROUP * DIM;                              // [GROUP][kChunk]
const int lane = threadIdx.x, head = blockIdx.y;
const int sequence = groups[4 * blockIdx.x], first_row = groups[4 * blockIdx.x + 1], here = groups[4 * blockIdx.x + 2],
          position = groups[4 * blockIdx.x + 3], total = position + here;
const int64_t stride = static_cast<int64_t>(sizes[1]) * DIM;
const int64_t base = (static_cast<int64_t>(sequence) * sizes[3] + static_cast<int64_t>(head) * sizes[2]) * DIM;
const int first = FOLD ? 0 : blockIdx.z, end = FOLD ? (total + kChunk - 1) / kChunk : first + 1;

// Starts to copy a chunk's keys or values, if there is such a chunk.
const auto fetch = [&](const bfloat16* from, bfloat16* to, int line, int chunk) {
  if (chunk < end) {
    const int start = chunk * kChunk, count = total - start < kChunk ? total - start : kChunk;
#pragma unroll 4
    for (int i = lane; i < count * (DIM / 8); i += 32) {
      const int key = i / (DIM / 8), d = i % (DIM / 8) * 8;
      copy_ahead(to + key * line + d, from + base + (start + key) * stride + d);
    }
  }
  close_copies();
};

if (first * kChunk < total) {
  fetch(keys, chunk_keys, padded_dim(DIM), first);
  fetch(values, chunk_values, DIM, first);
  Fold folds[GROUP];
  float sums[GROUP][each] = {};
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    folds[g] = Fold::none();
  }
#pragma unroll 1
  for (int chunk = first; chunk < end; chunk++) {
    const int start = chunk * kChunk, count = total - start < kChunk ? total - start : kChunk;
#pragma unroll 1
    for (int r = 0; r < here; r++) {
      const int last = position + r - start;  // the highest key of the chunk that the row sees
      if (last < 0) {
        continue;
      }
      const int64_t row = first_row + r;
      if (!FOLD || chunk == first) {
        __syncwarp();
        for (int i = lane; i < GROUP * DIM; i += 32) {
          mine[i] = queries[(row * HEADS + head * GROUP) * DIM + i];
        }
      }
      await_copies<1>();
      __syncwarp();
      float score[GROUP] = {};
#pragma unroll 2
      for (int d = 0; d < DIM; d += 8) {
        float k[8];
        load_widened(chunk_keys + lane * padded_dim(DIM) + d, k);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
#pragma unroll
          for (int i = 0; i < 8; i += 4) {
            const float4 q = *reinterpret_cast<const float4*>(mine + g * DIM + d + i);
            score[g] = __fmaf_rn(q.x, k[i], score[g]);
            score[g] = __fmaf_rn(q.y, k[i + 1], score[g]);
            score[g] = __fmaf_rn(q.z, k[i + 2], score[g]);
            score[g] = __fmaf_rn(q.w, k[i + 3], score[g]);
          }
        }
      }
      float top[GROUP], sum[GROUP];
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        top[g] = max_lanes(lane <= last ? score[g] : minus_infinity());
        const float weight = lane <= last ? expf(__fsub_rn(score[g], top[g])) : 0.0f;
        sum[g] = sum_lanes(weight);
        weights[g * kChunk + lane] = weight;
      }
      __syncwarp();  // the weights are here, and the keys have been read
      if constexpr (FOLD) {
        fetch(keys, chunk_keys, padded_dim(DIM), chunk + 1);
      } else {
        close_copies();
      }
      await_copies<1>();
      __syncwarp();
      float part[GROUP][each] = {};
#pragma unroll 4
      for (int key = 0; key < count; key++) {
        float v[each];
        load_widened(chunk_values + key * DIM + lane * each, v);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {  // a key that the row does not see weighs zero
          const float weight = weights[g * kChunk + key];
#pragma unroll
          for (int i = 0; i < each; i++) {
            part[g][i] = __fmaf_rn(weight, v[i], part[g][i]);
          }
        }
      }
      if constexpr (FOLD) {
        __syncwarp();
        fetch(values, chunk_values, DIM, chunk + 1);
      }
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        if constexpr (FOLD) {
          const float2 factors = folds[g].take(top[g], sum[g]);
#pragma unroll
          for (int i = 0; i < each; i++) {
            sums[g][i] = folded(sums[g][i], part[g][i], factors);
          }
        } else {
          float* to = out + ((static_cast<int64_t>(chunk) * sizes[0] + row) * HEADS + head * GROUP + g) * width;
#pragma unroll
          for (int i = 0; i < each; i++) {
            to[lane * each + i] = part[g][i];
          }
          if (lane == 0) {
            to[DIM] = top[g];
            to[DIM + 1] = sum[g];
          }
        }
      }
    }
  }
  if constexpr (FOLD) {
    float* to = out + (static_cast<int64_t>(first_row) * HEADS + head * GROUP) * DIM;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
#pragma unroll
      for (int i = 0; i < each; i++) {
        to[g * DIM + lane * each + i] = __fdiv_rn(sums[g][i], folds[g].sum);
      }
    }
  }
}
