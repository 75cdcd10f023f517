// Row operations in float: norm, rounding to int8, activations, finishing products of int8 rows.

inline float sum_lanes(F x) {
  const F zero = set1(0.0f);
  float out[16];
  store(out, reduce_groups(reduce4(x, zero, zero, zero), zero, zero, zero));
  return out[0];
}
inline float max_lanes(F x) {
  float lanes[16];
  store(lanes, x);
  float best = lanes[0];
  for (int i = 1; i < 16; i++) {
    best = lanes[i] > best ? lanes[i] : best;
  }
  return best;
}

// exp in float32 to about 1 ulp: 2^n e^r with |r| <= ln(2)/2 and a polynomial of degree 6 for e^r.
// Below -87 the result stays at e^-87, above 88 at e^88.
inline F exp_lanes(F x) {
  x = max(set1(-87.0f), min(x, set1(88.0f)));
  const F n = round_even(x * set1(1.44269504088896341f));
  F r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts, the first with few bits: n * it is exact
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return p * pow2(n);
}

inline F gate_lanes(Epilogue epilogue, F gate, F up) {
  if (epilogue == Epilogue::relu2_mul) {
    const F g = max(gate, set1(0.0f));
    return g * g * up;
  }
  return gate * (set1(1.0f) / (set1(1.0f) + exp_lanes(set1(0.0f) - gate))) * up;
}

void gate(Epilogue epilogue, const float* g, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    store(out + i, gate_lanes(epilogue, load(g + i), load(up + i)));
  }
  if (const int rest = static_cast<int>(count - i); rest > 0) {
    store_part(out + i, gate_lanes(epilogue, load_part(g + i, rest), load_part(up + i, rest)), rest);
  }
}

void normalise(const float* x, const float* weight, float eps, int64_t k, float* out) {
  F sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    for (int j = 0; j < 4; j++) {
      const F v = load(x + i + 16 * j);
      sums[j] = fma(v, v, sums[j]);
    }
  }
  for (; i < k; i += 16) {
    const F v = i + 16 <= k ? load(x + i) : load_part(x + i, static_cast<int>(k - i));
    sums[0] = fma(v, v, sums[0]);
  }
  const float total = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const F factor = set1(1.0f / std::sqrt(total / static_cast<float>(k) + eps));
  for (i = 0; i + 16 <= k; i += 16) {
    store(out + i, load(x + i) * factor * load(weight + i));
  }
  if (const int rest = static_cast<int>(k - i); rest > 0) {
    store_part(out + i, load_part(x + i, rest) * factor * load_part(weight + i, rest), rest);
  }
}

float quantise(const float* x, int64_t k, int8_t* q) {
  F largest[2] = {set1(0.0f), set1(0.0f)};
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    largest[0] = max(largest[0], abs(load(x + i)));
    largest[1] = max(largest[1], abs(load(x + i + 16)));
  }
  for (; i < k; i += 16) {
    const F v = i + 16 <= k ? load(x + i) : load_part(x + i, static_cast<int>(k - i));
    largest[0] = max(largest[0], abs(v));
  }
  const float top = max_lanes(max(largest[0], largest[1]));
  const float s = 127.0f / (top > 1e-5f ? top : 1e-5f);
  const F factor = set1(s), low = set1(-128.0f), high = set1(127.0f);
  for (i = 0; i + 16 <= k; i += 16) {
    store_i8(q + i, min(max(round_even(load(x + i) * factor), low), high));
  }
  if (const int rest = static_cast<int>(k - i); rest > 0) {
    int8_t lanes[16];
    store_i8(lanes, min(max(round_even(load_part(x + i, rest) * factor), low), high));
    std::memcpy(q + i, lanes, static_cast<size_t>(rest));
  }
  return s;
}

inline F load_valid(const float* p, int valid) { return valid == 16 ? load(p) : load_part(p, valid); }
inline void store_valid(float* p, F x, int valid) { valid == 16 ? store(p, x) : store_part(p, x, valid); }

// y = float(sum) * (scale / s): the division first and no fused rounding, as the reference has it.
void finish(int rows, const Finish& f) {
  const F scale0 = load_valid(f.scale0, f.valid0);
  const F scale1 = load_valid(f.scale1, f.valid1);
  for (int r = 0; r < rows; r++) {
    const int32_t* raw = f.raw + r * kPairOutputs;
    const F s = set1(f.s[r]);
    F y0 = from_int(raw, f.sums[r]) * (scale0 / s);
    F y1 = from_int(raw + 16, f.sums[r]) * (scale1 / s);
    if (f.epilogue != Epilogue::none) {
      y0 = gate_lanes(f.epilogue, y0, y1);
    }
    if (f.residual0 != nullptr) {
      y0 = y0 + load_valid(f.residual0 + r * f.residual_stride, f.valid0);
    }
    store_valid(f.out0 + r * f.out_stride, y0, f.valid0);
    if (f.epilogue == Epilogue::none && f.valid1 > 0) {
      if (f.residual1 != nullptr) {
        y1 = y1 + load_valid(f.residual1 + r * f.residual_stride, f.valid1);
      }
      store_valid(f.out1 + r * f.out_stride, y1, f.valid1);
    }
  }
}
