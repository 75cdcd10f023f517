// A token a row of logits [m][n]: the highest logit at temperature 0, else softmax(logits / temperature) inverted at a
// uniform number: sums of 32 ids each, then sums of consecutive ones of these by a lane each, and then the way back.
// One block a row; a NaN has no probability. sizes: n. Dynamic shared memory: a float for every 32 ids.
// Constants: THREADS.
constexpr int warps = THREADS / 32;
extern __shared__ __align__(128) uint8_t work[];
__shared__ float tops[warps];
__shared__ unsigned ids[warps];
float* sums = reinterpret_cast<float*>(work);
const int n = sizes[0], groups = (n + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
const float* row = logits + static_cast<int64_t>(blockIdx.x) * n;
float top = minus_infinity();
unsigned id = 0xffffffffu;
#pragma unroll 8
for (int i = threadIdx.x; i < n; i += THREADS) {
  const float x = row[i];
  if (x > top) {
    top = x;
    id = i;
  }
}
best_of_lanes(top, id);
if (lane == 0) {
  tops[warp] = top;
  ids[warp] = id;
}
__syncthreads();
for (int w = 0; w < warps; w++) {
  better(top, id, tops[w], ids[w]);
}
const float t = temperature[blockIdx.x];
if (t == 0) {
  if (threadIdx.x == 0) {
    out[blockIdx.x] = id == 0xffffffffu ? 0 : id;  // where nothing is higher than minus infinity
  }
} else {
  const float inverse = __fdiv_rn(1.0f, fmaxf(t, 1e-3f));
  const auto weight = [&](int i) {
    const float x = i < n ? row[i] : minus_infinity();
    return x > minus_infinity() ? expf(__fmul_rn(__fsub_rn(x, top), inverse)) : 0.0f;
  };
#pragma unroll 4
  for (int group = warp; group < groups; group += warps) {
    const float sum = sum_lanes(weight(32 * group + lane));
    if (lane == 0) {
      sums[group] = sum;
    }
  }
  __syncthreads();
  if (warp == 0) {
    const int share = (groups + 31) / 32;
    const int begin = lane * share < groups ? lane * share : groups;
    const int end = begin + share < groups ? begin + share : groups;
    float mine = 0;
    for (int group = begin; group < end; group++) {
      mine = __fadd_rn(mine, sums[group]);
    }
    float rest = uniform[blockIdx.x];
    const float all = __shfl_sync(kAllLanes, sum_before_and_with(mine), 31);
    rest = __fmul_rn(rest, all);
    const int share_of = first_above(mine, rest);  // lowers what is left to what the share has to make up
    const int from = share_of * share, to = from + share < groups ? from + share : groups;
    float sum = 0, before = 0;
    int chosen = from;
    bool found = false;
    for (int group = from; group < to; group++) {
      const float more = sums[group], next = __fadd_rn(sum, more);
      if (more > 0 && !found) {  // the last one with any probability, if rounding lets none be found
        chosen = group;
        before = sum;
        found = next > rest;
      }
      sum = next;
    }
    rest = __fsub_rn(rest, before);
    const int in_group = first_above(weight(32 * chosen + lane), rest);
    if (lane == 0) {
      out[blockIdx.x] = 32 * chosen + in_group;
    }
  }
}
