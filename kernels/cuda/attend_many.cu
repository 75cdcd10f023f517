// Attention of many rows of a sequence: a block of four warps has a group of rows, as many as its lines have room for, and
// a key/value head, and goes through their keys in chunks. A warp has whole lines (queries); of each, a lane has four keys
// of the chunk, and an eighth of the dimensions. Parameters are those of attend_few.cu.
// Constants: HEADS, KV_HEADS, DIM, THREADS (128).
constexpr int GROUP = HEADS / KV_HEADS, each = DIM > 128 ? 2 : 4;  // lines a thread
constexpr int lines = 16 * each, query = DIM + 4, held = kChunk + 4, wide = DIM / 32;
extern __shared__ __align__(128) uint8_t work[];
bfloat16* chunk_keys = reinterpret_cast<bfloat16*>(work);
bfloat16* chunk_values = chunk_keys + kChunk * padded_dim(DIM);
float* mine = reinterpret_cast<float*>(work + chunk_bytes(DIM));  // queries, [lines][query]
float* weights = mine + lines * query;                            // [lines][held]
// The last groups of a long sequence have most keys: they come first.
const int* group = groups + 4 * (gridDim.x - 1 - blockIdx.x);
const int sequence = group[0], row = group[1], here = group[2], position = group[3], total = position + here;
const int head = blockIdx.y, existing = here * GROUP;
const int column = threadIdx.x % 8, line = threadIdx.x / 8 * each, first_of_warp = threadIdx.x / 32 * 4 * each;
const int64_t stride = static_cast<int64_t>(sizes[1]) * DIM;
const int64_t base = (static_cast<int64_t>(sequence) * sizes[3] + static_cast<int64_t>(head) * sizes[2]) * DIM;
const bool working = first_of_warp < existing;

const auto fetch = [&](const bfloat16* from, bfloat16* to, int to_line, int start) {
  const int count = total - start < kChunk ? total - start : kChunk;
#pragma unroll 4
  for (int i = threadIdx.x; i < count * (DIM / 8); i += THREADS) {
    const int key = i / (DIM / 8), d = i % (DIM / 8) * 8;
    copy_ahead(to + key * to_line + d, from + base + (start + key) * stride + d);
  }
  close_copies();
};

fetch(keys, chunk_keys, padded_dim(DIM), 0);
for (int i = threadIdx.x; i < lines * (DIM / 4); i += THREADS) {
  const int at = i / (DIM / 4), d = i % (DIM / 4) * 4;
  const int64_t which = static_cast<int64_t>(row + at / GROUP) * HEADS + head * GROUP + at % GROUP;
  *reinterpret_cast<float4*>(mine + at * query + d) =
      at < existing ? *reinterpret_cast<const float4*>(queries + which * DIM + d) : make_float4(0, 0, 0, 0);
}
Fold folds[each];
float sums[each][wide][4] = {};
#pragma unroll
for (int j = 0; j < each; j++) {
  folds[j] = Fold::none();
}
#pragma unroll 1
for (int start = 0; start < total; start += kChunk) {
  const int count = total - start < kChunk ? total - start : kChunk;
  await_copies<0>();
  __syncthreads();  // the keys are here, and the values before them have been read
  fetch(values, chunk_values, DIM, start);
  float top[each], sum[each];
  if (working) {
    float score[each][4] = {};
#pragma unroll 1
    for (int d = 0; d < DIM; d += 8) {
      float k[4][8];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        load_widened(chunk_keys + (column + 8 * i) * padded_dim(DIM) + d, k[i]);
      }
#pragma unroll
      for (int j = 0; j < each; j++) {
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
          const float4 q = *reinterpret_cast<const float4*>(mine + (line + j) * query + d + half);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            score[j][i] = __fmaf_rn(q.x, k[i][half], score[j][i]);
            score[j][i] = __fmaf_rn(q.y, k[i][half + 1], score[j][i]);
            score[j][i] = __fmaf_rn(q.z, k[i][half + 2], score[j][i]);
            score[j][i] = __fmaf_rn(q.w, k[i][half + 3], score[j][i]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int last = position + (line + j) / GROUP - start;  // the highest key that this line sees
      top[j] = minus_infinity();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        top[j] = fmaxf(top[j], column + 8 * i <= last ? score[j][i] : minus_infinity());
      }
#pragma unroll
      for (int other = 4; other > 0; other /= 2) {
        top[j] = fmaxf(top[j], __shfl_xor_sync(kAllLanes, top[j], other));
      }
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        weight[i] = column + 8 * i <= last ? expf(__fsub_rn(score[j][i], top[j])) : 0.0f;
        weights[(line + j) * held + column + 8 * i] = weight[i];
      }
      sum[j] = __fadd_rn(__fadd_rn(weight[0], weight[2]), __fadd_rn(weight[1], weight[3]));  // as `sum_lanes` would
#pragma unroll
      for (int other = 4; other > 0; other /= 2) {
        sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(kAllLanes, sum[j], other));
      }
    }
  }
  await_copies<0>();
  __syncthreads();  // the values and weights are here, and the keys have been read
  if (start + kChunk < total) {
    fetch(keys, chunk_keys, padded_dim(DIM), start + kChunk);
  }
  if (working) {
    float part[each][wide][4] = {};
#pragma unroll 2
    for (int key = 0; key < count; key++) {
      float weight[each];
#pragma unroll
      for (int j = 0; j < each; j++) {
        weight[j] = weights[(line + j) * held + key];
      }
#pragma unroll
      for (int w = 0; w < wide; w++) {
        float v[4];
        load_widened(chunk_values + key * DIM + 4 * column + 32 * w, v);
#pragma unroll
        for (int j = 0; j < each; j++) {  // a key that the line does not see weighs zero
#pragma unroll
          for (int i = 0; i < 4; i++) {
            part[j][w][i] = __fmaf_rn(weight[j], v[i], part[j][w][i]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < each; j++) {
      if (start <= position + (line + j) / GROUP) {
        const float2 factors = folds[j].take(top[j], sum[j]);
#pragma unroll
        for (int w = 0; w < wide; w++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            sums[j][w][i] = folded(sums[j][w][i], part[j][w][i], factors);
          }
        }
      }
    }
  }
}
#pragma unroll
for (int j = 0; j < each; j++) {
  const int at = line + j;
  if (at < existing) {
    float* to = out + (static_cast<int64_t>(row + at / GROUP) * HEADS + head * GROUP + at % GROUP) * DIM;
#pragma unroll
    for (int w = 0; w < wide; w++) {
      const float* v = sums[j][w];
      *reinterpret_cast<float4*>(to + 4 * column + 32 * w) =
          make_float4(__fdiv_rn(v[0], folds[j].sum), __fdiv_rn(v[1], folds[j].sum), __fdiv_rn(v[2], folds[j].sum),
                      __fdiv_rn(v[3], folds[j].sum));
    }
  }
}
