// How the blocks of one launch hand each other what they have computed, without a barrier.
//
// Everything goes in packets through L2: three words and the number of the exchange, written and read as one. So data
// and the news that they are there take one way through L2, where a barrier takes three (data, fence, counter), and
// who waits, waits for what it needs only. Numbers never come back, so packets are never cleared.
//
// Where rows are WHOLE, few and narrow, a tile's values go with their statistics in one exchange; else the statistics go
// first and then int8, a quarter of the bytes. The bits of what is received are the same.
//
// A packet is written again once in every layer. By then all have read it: whoever writes it has since received what
// its readers made of it, for no row can be rounded before all of it is there.
#pragma once

#include "rows.cuh"

namespace bitdraft {

constexpr int kThreads = 512;  // of a block
constexpr int kGroupTiles = 256;  // rows of more tiles than this are summed up in pairs of tiles

// Packets that a thread waits for at a time, where it gets about as many for M rows.
constexpr int depth_of(int m) { return m == 1 ? 1 : m <= 4 ? 2 : 4; }

constexpr int packets_of(int words) { return (words + 2) / 3; }

// Of a tile of a whole row: sixteen values, their sum of squares, and the largest magnitude.
constexpr int kWholePackets = packets_of(16 + 2);

// Tiles of sixteen values that share a packet of statistics; one, where rows are whole.
constexpr int tiles_of_group(int k) { return k / 16 > kGroupTiles && k % 32 == 0 ? 2 : 1; }

// Of `total` things, those of this block.
struct Share {
  int first, count;
  __device__ explicit Share(int total)
      : first(static_cast<int64_t>(total) * blockIdx.x / gridDim.x),
        count(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x - first) {}
};

// Sends `units` units of WORDS words each; word(unit, i) is one of them. By the whole block: a lane makes a word, and
// ten lanes of a warp send what thirty have made.
template <int WORDS, class Word>
__device__ void send(Packet* to, int units, unsigned number, Word word) {
  constexpr int room = 3 * packets_of(WORDS);
  const int lane = threadIdx.x % 32, total = units * room;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * 30; first < total; first += kThreads / 32 * 30) {
    const int unit = (first + lane) / room, i = (first + lane) % room;
    const unsigned made = lane < 30 && first + lane < total && i < WORDS ? word(unit, i) : 0;
    Packet p;
    p.x = __shfl_sync(kAllLanes, made, 3 * lane % 32);
    p.y = __shfl_sync(kAllLanes, made, (3 * lane + 1) % 32);
    p.z = __shfl_sync(kAllLanes, made, (3 * lane + 2) % 32);
    p.w = number;
    if (lane < 10 && first + 3 * lane < total) {
      post(to + first / 3 + lane, p);
    }
  }
}

// The first `count` of DEPTH packets, from where(u) on, with this number: looks at all that are missing at once.
template <int DEPTH, class Where>
__device__ inline void await_packets(Packet (&packets)[DEPTH], int count, unsigned number, Where where) {
#pragma unroll
  for (int u = 0; u < DEPTH; u++) {
    packets[u].w = ~number;
  }
#pragma unroll 1
  for (unsigned looks = 0;; looks++) {
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
      if (u < count && packets[u].w != number) {
        packets[u] = peek(where(u));
      }
    }
    const Packet* missing = nullptr;
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
      if (u < count && packets[u].w != number) {
        missing = where(u);
      }
    }
    if (!missing) {
      return;
    }
    look_again(missing, number, looks);
  }
}

// Receives `units` units, each from the packets that from(unit) points to; take(unit, i, word) gets every word.
// By the whole block; threads go on when they have taken theirs.
// DEPTH: packets that a thread waits for at a time.
template <int WORDS, int DEPTH, class From, class Take>
__device__ void receive(int units, unsigned number, From from, Take take) {
  constexpr int packets = packets_of(WORDS);
  const int total = units * packets;
#pragma unroll 1
  for (int first = threadIdx.x; first < total; first += DEPTH * kThreads) {
    Packet got[DEPTH];
    await_packets(got, (total - first + kThreads - 1) / kThreads, number, [&](int u) {
      const int i = first + u * kThreads;
      return from(i / packets) + i % packets;
    });
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
      const int i = first + u * kThreads;
      if (i < total) {
        const int unit = i / packets, at = i % packets * 3;
        take(unit, at, got[u].x);
        if (at + 1 < WORDS) {
          take(unit, at + 1, got[u].y);
        }
        if (at + 2 < WORDS) {
          take(unit, at + 2, got[u].z);
        }
      }
    }
  }
}

// Rows that all blocks compute together: a block has some tiles of sixteen values of every row.
struct Rows {
  int k, group;         // values; tiles that share a packet of statistics
  int first, tiles;     // this block's
  float* mine;          // [tiles][M][16], in shared memory
  float* norm;          // that lies behind them, [tiles][16], in shared memory; ones for none
  Packet* statistics;   // [M][k / 16 / group]; of whole rows, [M][k / 16][kWholePackets]
  Packet* packets;      // of the rows' int8, [k / 16][packets_of(4 * M)]
  Packet* values;       // of some of the rows as they are, [k / 16][packets_of(16 * ROWS)]; for two kinds of rows only

  __device__ int groups() const { return k / 16 / group; }

  // Of the statistics of a row's group, number m * groups + group; of a whole row, they are in the last packet.
  template <bool WHOLE>
  __device__ Packet* statistics_of(int group) const {
    return statistics + (WHOLE ? kWholePackets * group + kWholePackets - 1 : group);
  }
};

// What rounding M rows to int8 takes: 1 / rms, the factor of x * norm, and the row's scale.
template <int M>
struct Factors {
  float r[M], factor[M], s[M];
};

__device__ inline float sum_tile(float x) {
  for (int lane = 8; lane > 0; lane /= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, lane));
  }
  return x;
}

__device__ inline float max_tile(float x) {
  for (int lane = 8; lane > 0; lane /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  }
  return x;
}

// Keeps this block's values and sends their statistics: of every group of tiles the sum of squares and the largest
// magnitude behind the norm; with WHOLE the values behind the norm, too. value(tile, m, o) is called once for each of the
// first `live` rows; whatever is in the others is sent on with them, and read by nobody.
template <int M, bool WHOLE, class Value>
__device__ void finish_tiles(const Rows& rows, int live, unsigned number, Value value) {
  const int lane = threadIdx.x % 32, o = lane % 16, items = rows.tiles * live;
#pragma unroll 1
  for (int pair = threadIdx.x / 32 * 2; pair < items; pair += kThreads / 16) {
    const int item = pair + lane / 16, tile = item % rows.tiles, m = item / rows.tiles;
    float y = 0, normed = 0;
    if (item < items) {
      y = value(tile, m, o);
      rows.mine[(tile * M + m) * 16 + o] = y;
      normed = __fmul_rn(y, rows.norm[tile * 16 + o]);
    }
    float squares = sum_tile(__fmul_rn(y, y)), largest = max_tile(fabsf(normed));
    if (rows.group == 2) {  // a warp's two tiles are of one row then
      squares = __fadd_rn(squares, __shfl_xor_sync(kAllLanes, squares, 16));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 16));
    }
    const int group = m * rows.groups() + (rows.first + tile) / rows.group;
    Packet p = make_uint4(0, __float_as_uint(squares), __float_as_uint(largest), number);
    if constexpr (WHOLE) {
      float words[3];
#pragma unroll
      for (int i = 0; i < 3; i++) {
        words[i] = __shfl_sync(kAllLanes, normed, lane / 16 * 16 + (3 * o + i) % 16);
      }
      const bool last = o == kWholePackets - 1;
      p.x = __float_as_uint(words[0]);
      p.y = last ? p.y : __float_as_uint(words[1]);
      p.z = last ? p.z : __float_as_uint(words[2]);
      if (item < items && o < kWholePackets) {
        post(rows.statistics + kWholePackets * group + o, p);
      }
    } else if (item < items && (rows.group == 2 ? lane : o) == 0) {
      post(rows.statistics + group, p);
    }
  }
}

// Receives the statistics of the first `live` rows and sums them up, in one order on every grid. work: 2 * M * groups
// floats of shared memory, free behind the next barrier. values: of rows that are WHOLE, room for theirs behind the norm,
// [live][k]; or null, where only the statistics are asked for.
template <int M, bool WHOLE>
__device__ void receive_statistics(const Rows& rows, int live, unsigned number, bool normed, float eps,
                                   Factors<M>& factors, float* work, float* values = nullptr) {
  const int groups = rows.groups(), m = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (WHOLE && values) {
    receive<16 + 2, M == 1 ? 2 : depth_of(M)>(
        live * groups, number, [&](int unit) { return rows.statistics + kWholePackets * unit; },
        [&](int unit, int i, unsigned word) {
          *(i < 16 ? values + 16 * unit + i : work + 2 * unit + i - 16) = __uint_as_float(word);
        });
  } else {
    receive<3, depth_of(M)>(
        live * groups, number, [&](int unit) { return rows.statistics_of<WHOLE>(unit); },
        [&](int unit, int i, unsigned word) {
          if (i > 0) {
            work[2 * unit + i - 1] = __uint_as_float(word);
          }
        });
  }
  __syncthreads();
  if (m < live) {
    const float2* row = reinterpret_cast<const float2*>(work) + m * groups;
    float squares = 0, top = 0;
#pragma unroll 1
    for (int group = lane; group < groups; group += 32) {
      squares = __fadd_rn(squares, row[group].x);
      top = fmaxf(top, row[group].y);
    }
    squares = sum_lanes(squares);
    top = max_lanes(top);
    if (lane == 0) {
      const float r = inverse_rms(squares, rows.k, eps, normed);
      const float scale = __fdiv_rn(127.0f, fmaxf(__fmul_rn(top, r), kSmallest));
      factors.r[m] = r;
      factors.s[m] = scale;
      factors.factor[m] = __fmul_rn(r, scale);
    }
  }
}

// Rounds whole rows to int8, `stride` bytes apart. values: as they were received.
template <int M>
__device__ void round_rows(int k, int live, const Factors<M>& factors, const float* values, int8_t* q, int stride) {
#pragma unroll 1
  for (int i = threadIdx.x; i < live * (k / 4); i += kThreads) {
    const int m = i / (k / 4), column = i % (k / 4) * 4;
    const float4 v = *reinterpret_cast<const float4*>(values + m * k + column);
    *reinterpret_cast<unsigned*>(q + m * stride + column) = rounded(v, make_float4(1, 1, 1, 1), factors.factor[m]);
  }
}

// Sends the int8 of this block's values.
template <int M>
__device__ void send_rows(const Rows& rows, const Factors<M>& factors, unsigned number) {
  send<4 * M>(rows.packets + rows.first * packets_of(4 * M), rows.tiles, number, [&](int tile, int i) {
    const int m = i / 4, at = i % 4 * 4;
    const float4 v = *reinterpret_cast<const float4*>(rows.mine + (tile * M + m) * 16 + at);
    const float4 w = *reinterpret_cast<const float4*>(rows.norm + tile * 16 + at);
    return rounded(v, w, factors.factor[m]);
  });
}

// Receives the int8 of M whole rows into q, `stride` bytes apart.
template <int M>
__device__ void receive_rows(const Rows& rows, unsigned number, int8_t* q, int stride) {
  receive<4 * M, depth_of(M)>(
      rows.k / 16, number, [&](int tile) { return rows.packets + tile * packets_of(4 * M); },
      [&](int tile, int i, unsigned word) {
        *reinterpret_cast<unsigned*>(q + i / 4 * stride + tile * 16 + i % 4 * 4) = word;
      });
}

// Sends this block's values of ROWS rows, from `row` on, as they are.
template <int ROWS, int M>
__device__ void send_values(const Rows& rows, int row, unsigned number) {
  send<16 * ROWS>(rows.values + rows.first * packets_of(16 * ROWS), rows.tiles, number, [&](int tile, int i) {
    return __float_as_uint(rows.mine[(tile * M + row) * 16 + i]);
  });
}

// Receives ROWS whole rows as they are: take(m, column, value).
template <int ROWS, class Take>
__device__ void receive_values(const Rows& rows, unsigned number, Take take) {
  receive<16 * ROWS, depth_of(ROWS)>(
      rows.k / 16, number, [&](int tile) { return rows.values + tile * packets_of(16 * ROWS); },
      [&](int tile, int i, unsigned word) { take(i / 16, tile * 16 + i % 16, __uint_as_float(word)); });
}

}  // namespace bitdraft
