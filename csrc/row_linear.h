// y = act(x W^T + b) for a weight stored by rows (linear.h), in two loops:
//   few tokens   a row's stored values are expanded to columns in registers, each vector used for up to kMaxTokens
//                tokens; x stays in L1 unless it is long. Bound by memory at one token.
//   many tokens  tokens lie in lanes: per stored value one broadcast and V multiply-adds whose operand is a row of
//                x^T in L1; zeros cost nothing but the decoding of their bits, done once for all tokens. Of a dense
//                weight several rows share that operand.
// Included inside a target's namespace after simd.h and activation.h; no include guard.

namespace {

#if defined(FASTICL_TARGET_AVX512)
constexpr int kMaxTokens = 8;  // accumulators of the first loop: 2 * tokens of 32 registers
constexpr int kChains = 8;     // accumulators of the second loop: hide the latency of two multiply-adds a cycle
constexpr int kProducts = 16;  // accumulators of a dense weight in the second loop, which share loads of x^T
constexpr int64_t kMaxDenseTokens = 16;  // of a dense weight, or in pairs, in the first loop
#else
constexpr int kMaxTokens = 4;
constexpr int kChains = 4;  // of two registers each
constexpr int kProducts = 4;
constexpr int64_t kMaxDenseTokens = 8;
#endif
constexpr int64_t kWord = 64;          // columns in one step of the first loop
constexpr int64_t kRowBlock = 256;     // rows that share a tile of x^T while it is in L1
constexpr int64_t kRowsAhead = 8;      // rows that are decoded, and their values fetched, ahead
constexpr int64_t kTokenBlock = 512;   // tokens whose x^T is packed together
constexpr int64_t kTileBytes = 32768;  // of x^T: leaves a third of a 48 KiB L1 to values, lists and sums

constexpr int64_t kPrefetchBytes = 4096;  // ahead of the value stream

// Fetches `lines` cache lines from `bytes` behind p on. Any address may be prefetched.
FASTICL_INLINE void prefetch(const void* p, int64_t bytes, int64_t lines) {
  const char* from = static_cast<const char*>(p) + bytes;
  for (int64_t i = 0; i < lines; i++) __builtin_prefetch(from + 64 * i, 0, 2);
}

// Vector loads run past the end of a row, and behind the last rows of a weight there may be no memory: those rows are
// copied, with what is read behind them, to a spare place.
template <class T>
constexpr int64_t spare_value_bytes(int64_t K) {
  return round_up((K + kWord) * static_cast<int64_t>(sizeof(T)), 64);
}
template <class T>
constexpr int64_t spare_row_bytes(int64_t K) {
  return spare_value_bytes<T>(K) + round_up(K / 8 + 8, 64);
}

// The values of row n, with 64 elements behind them that may be read.
template <class T>
FASTICL_INLINE const T* row_values(const RowWeight& w, int64_t n, T* spare) {
  const int64_t begin = w.row_start(n), end = w.row_start(n + 1);
  const T* values = static_cast<const T*>(w.values) + begin;
  if (end + kWord <= w.row_start(w.N)) return values;
  if (end > begin) __builtin_memcpy(spare, values, static_cast<size_t>(end - begin) * sizeof(T));
  return spare;
}

// The mask of row n, with 7 bytes behind it that may be read.
FASTICL_INLINE const uint8_t* row_mask(const RowWeight& w, int64_t n, uint8_t* spare) {
  const int64_t bytes = w.mask_stride();
  const uint8_t* mask = w.bitmask + n * bytes;
  if ((w.N - 1 - n) * bytes >= 7) return mask;
  __builtin_memcpy(spare, mask, static_cast<size_t>(bytes));
  return spare;
}

// Bits of the columns [64 i, 64 i + 64) of a mask, of which the first `left` columns exist.
FASTICL_INLINE uint64_t mask_word(const uint8_t* mask, int64_t i, int64_t left) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask + 8 * i, 8);
  return left >= kWord * (i + 1) ? bits : bits & ((uint64_t{1} << (left - kWord * i)) - 1);
}

// First row of thread t of T, so that the threads store about equally many values (an empty row counts a little).
inline int64_t first_row(const RowWeight& w, int64_t t, int64_t T) {
  if (!w.row_offsets) return w.N * t / T;
  const int64_t row_cost = w.K / 32 + 1;
  const int64_t total = w.row_offsets[w.N] + row_cost * w.N;
  int64_t lo = 0, hi = w.N;  // smallest n with cost(n) >= total * t / T
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if ((w.row_offsets[mid] + row_cost * mid) * T < total * t) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

// Whether values and x of bfloat16 are multiplied as they are.
FASTICL_INLINE bool in_pairs(const LinearParams& p) {
  return target() == Target::avx512_bf16 && p.dtype == DType::bf16 && p.weight.dtype == DType::bf16;
}

// ---- few tokens --------------------------------------------------------------------------------------------

#if defined(FASTICL_TARGET_AVX512)
constexpr float kFixedMost = 8388604.0f;  // of |q| - 2^23; rounding may add 1 to it, but not reach 2^23

// x [M, K] in fixed point (simd.h), each token in `padded` floats of memory: three planes of `padded` bytes, and the
// step. Where x is smaller than 2^-106 throughout it counts as zero; a token with an infinite or NaN x has a NaN step.
template <class T>
void fix_rows(const T* x, int64_t M, int64_t K, int64_t stride, int64_t padded, float* out) {
  for (int64_t m = 0; m < M; m++) {
    const T* p = x + m * stride;
    uint8_t* planes = reinterpret_cast<uint8_t*>(out + m * padded);
    Vec largest = zero(), invalid = zero();
    for (int64_t k = 0; k < K; k += kLanes) {
      const Vec v = load_n(p + k, K - k);
      largest = max(abs(v), largest);
      invalid = invalid + (v - v);
    }
    const float most = max_lane(largest);
    const Vec inverse = set1(most > 1e-32f ? kFixedMost / most : 0.0f);
    for (int64_t k = 0; k < padded; k += kLanes)
      store_fixed(k < K ? load_n(p + k, K - k) : zero(), inverse, planes + k, padded);
    const float step = most * (1.0f / kFixedMost) + sum(invalid);
    __builtin_memcpy(planes + 3 * padded, &step, sizeof step);
  }
}
#endif

// x as few_tokens reads it: float32 [M, round_up(K, 64)], padded with zeros, its columns in the order in which values
// of type TV are loaded (order64); or, of as many bytes, in fixed point. Float32 x of whole words is so already where
// kInOrder<TV>.
template <class TV, class T>
void widen_rows(const T* x, int64_t M, int64_t K, int64_t stride, float* out) {
  const int64_t padded = round_up(K, kWord);
#if defined(FASTICL_TARGET_AVX512)
  if constexpr (sizeof(TV) == 1) return fix_rows(x, M, K, stride, padded, out);
#endif
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < padded; k += kWord) {
      const T* p = x + m * stride + k;
      Vec v[4];
      for (int i = 0; i < 4; i++) {
        const int64_t left = K - k - i * kLanes;
        v[i] = left > 0 ? load_n(p + i * kLanes, left) : zero();
      }
      order64<TV>(v);
      for (int i = 0; i < 4; i++) store(out + m * padded + k + i * kLanes, v[i]);
    }
}

// Sums the vectors of rows [first, end), which come one by one, sixteen at a time: four shuffles a row become two.
struct RowSums {
  Vec pending[kLanes];
  int64_t first, end;

  FASTICL_INLINE void put(int64_t n, Vec row, float* out) {
    pending[n - first] = row;
    if (n - first < kLanes - 1 && n < end - 1) return;
    for (int64_t i = n + 1 - first; i < kLanes; i++) pending[i] = zero();
    store_n(out + first, sums(pending), n + 1 - first);
    first = n + 1;
  }
};

#if defined(FASTICL_TARGET_AVX512)
// few_tokens for int8 values and x in fixed point. Of 64 columns and a token three products of bytes, and one for all
// tokens, where converted values take four multiply-adds a token after nine instructions of conversion.
template <bool kDense, int B>
void few_tokens_fixed(const RowWeight& w, int64_t n0, int64_t n1, const float* x, int64_t x_stride, float* out,
                      int64_t out_stride, uint8_t* spare) {
  constexpr int U = B <= 2 ? 2 : 1;  // chains, to hide the latency of a product
  const int64_t whole = w.K / kWord, left = w.K % kWord, padded = round_up(w.K, kWord);
  const uint8_t* planes = reinterpret_cast<const uint8_t*>(x);
  const int64_t stride = x_stride * static_cast<int64_t>(sizeof(float));
  float steps[B];
  for (int b = 0; b < B; b++) __builtin_memcpy(&steps[b], planes + b * stride + 3 * padded, sizeof(float));
  RowSums rows;
  rows.first = n0, rows.end = n1;
  for (int64_t n = n0; n < n1; n++) {
    const int8_t* p = row_values(w, n, reinterpret_cast<int8_t*>(spare));
    const uint8_t* mask = kDense ? nullptr : row_mask(w, n, spare + spare_value_bytes<int8_t>(w.K));
    Ints acc[U][B][3], ones[U];
    for (int u = 0; u < U; u++) {
      ones[u] = no_ints();
      for (int b = 0; b < B; b++)
        for (int i = 0; i < 3; i++) acc[u][b][i] = no_ints();
    }
    const auto multiply = [&](Ints v, int64_t k, int u) __attribute__((always_inline)) {
      for (int b = 0; b < B; b++)
        for (int i = 0; i < 3; i++)
          acc[u][b][i] = dot_bytes(acc[u][b][i], load_bytes(planes + b * stride + i * padded + k), v);
      ones[u] = add_bytes(ones[u], v);
    };
    const auto next = [&](int64_t i) __attribute__((always_inline)) {
      if (kDense) {
        p += kWord;
        return load_bytes(p - kWord);
      }
      prefetch(p, kPrefetchBytes, 1);
      const uint64_t bits = mask_word(mask, i, kWord * (i + 1));
      const Ints v = expand_bytes(p, bits);
      p += __builtin_popcountll(bits);
      return v;
    };
    int64_t i = 0;
    for (; i + U <= whole; i += U)
      for (int u = 0; u < U; u++) multiply(next(i + u), (i + u) * kWord, u);
    for (; i < whole; i++) multiply(next(i), i * kWord, 0);
    if (left) {
      int8_t buffer[kWord] = {};
      if (kDense) __builtin_memcpy(buffer, p, static_cast<size_t>(left));
      multiply(kDense ? load_bytes(buffer) : expand_bytes(p, mask_word(mask, whole, w.K)), whole * kWord, U - 1);
    }
    for (int u = 1; u < U; u++) {
      ones[0] = add_ints(ones[0], ones[u]);
      for (int b = 0; b < B; b++)
        for (int k = 0; k < 3; k++) acc[0][b][k] = add_ints(acc[0][b][k], acc[u][b][k]);
    }
    for (int b = 0; b < B; b++) {
      const Vec row = join_fixed(acc[0][b][0], acc[0][b][1], acc[0][b][2], ones[0]) * set1(steps[b]);
      if (B == 1) {
        rows.put(n, row, out);
      } else {
        out[b * out_stride + n] = sum(row);
      }
    }
  }
}
#endif

#if defined(FASTICL_TARGET_AVX512)
// few_tokens for x of bfloat16, [B, round_up(K, 64)] padded with zeros, and values of it: a register holds 32 columns,
// and nothing is converted.
template <class TV, bool kDense, int B>
void few_tokens(const RowWeight& w, int64_t n0, int64_t n1, const bf16* x, int64_t x_stride, float* out,
                int64_t out_stride, uint8_t* spare) {
  constexpr int U = B <= 2 ? 2 : 1;  // words in turn, to hide the latency of a product; then the tokens do
  const int64_t whole = w.K / kWord, left = w.K % kWord;
  RowSums rows;
  rows.first = n0, rows.end = n1;
  for (int64_t n = n0; n < n1; n++) {
    const bf16* p = row_values(w, n, reinterpret_cast<bf16*>(spare));
    const uint8_t* mask = kDense ? nullptr : row_mask(w, n, spare + spare_value_bytes<bf16>(w.K));
    Vec acc[U][B][2];
    for (int u = 0; u < U; u++)
      for (int b = 0; b < B; b++) acc[u][b][0] = acc[u][b][1] = zero();
    const auto word = [&](int64_t i, uint64_t bits, int u) __attribute__((always_inline)) {
      const bf16* second = kDense ? p + 32 : p + __builtin_popcount(static_cast<uint32_t>(bits));
      const Ints low = kDense ? load_pairs(p) : expand_pairs(p, static_cast<uint32_t>(bits));
      const Ints high = kDense ? load_pairs(second) : expand_pairs(second, static_cast<uint32_t>(bits >> 32));
      for (int b = 0; b < B; b++) {
        const bf16* xb = x + b * x_stride + i * kWord;
        acc[u][b][0] = dot_pairs(low, load_pairs(xb), acc[u][b][0]);
        acc[u][b][1] = dot_pairs(high, load_pairs(xb + 32), acc[u][b][1]);
      }
    };
    const auto next = [&](int64_t i, int u) __attribute__((always_inline)) {
      const uint64_t bits = kDense ? 0 : mask_word(mask, i, kWord * (i + 1));
      if (!kDense) prefetch(p, kPrefetchBytes, 2);
      word(i, bits, u);
      p += kDense ? kWord : __builtin_popcountll(bits);
    };
    int64_t i = 0;
    for (; i + U <= whole; i += U)
      for (int u = 0; u < U; u++) next(i + u, u);
    for (; i < whole; i++) next(i, 0);
    if (left) {
      bf16 buffer[kWord] = {};
      if (kDense) {
        __builtin_memcpy(buffer, p, static_cast<size_t>(left) * sizeof(bf16));
        p = buffer;
      }
      word(whole, kDense ? 0 : mask_word(mask, whole, w.K), U - 1);
    }
    for (int b = 0; b < B; b++) {
      Vec s = acc[0][b][0] + acc[0][b][1];
      for (int u = 1; u < U; u++) s = s + (acc[u][b][0] + acc[u][b][1]);
      if (B == 1) {
        rows.put(n, s, out);
      } else {
        out[b * out_stride + n] = sum(s);
      }
    }
  }
}
#endif

// out[b * out_stride + n] = sum_k x[b * x_stride + k] * values[n, k] for rows [n0, n1) and B tokens; x as
// widen_rows<TV> leaves it, spare of spare_row_bytes<TV>(K). Scales are finish_rows' to apply.
template <class TV, bool kDense, int B>
void few_tokens(const RowWeight& w, int64_t n0, int64_t n1, const float* x, int64_t x_stride, float* out,
                int64_t out_stride, uint8_t* spare) {
#if defined(FASTICL_TARGET_AVX512)
  if constexpr (sizeof(TV) == 1) return few_tokens_fixed<kDense, B>(w, n0, n1, x, x_stride, out, out_stride, spare);
#endif
  // At one and two tokens four sums a token hide the latency of the multiply-add; then the tokens themselves do.
  constexpr int U = B <= 2 && kMaxTokens > 4 ? 4 : B <= 4 ? 2 : 1;
  const int64_t whole = w.K / kWord, left = w.K % kWord;
  RowSums rows;
  rows.first = n0, rows.end = n1;
  for (int64_t n = n0; n < n1; n++) {
    const TV* p = row_values(w, n, reinterpret_cast<TV*>(spare));
    const uint8_t* mask = kDense ? nullptr : row_mask(w, n, spare + spare_value_bytes<TV>(w.K));
    Vec acc[U][B];
    for (int u = 0; u < U; u++)
      for (int b = 0; b < B; b++) acc[u][b] = zero();
    const auto multiply = [&](const Vec(&v)[4], const float* xi) __attribute__((always_inline)) {
      for (int j = 0; j < 4; j++)
        for (int b = 0; b < B; b++) acc[j % U][b] = fma(v[j], load(xi + b * x_stride + j * kLanes), acc[j % U][b]);
    };
    Vec v[4];
    for (int64_t i = 0; i < whole; i++) {
      if (kDense) {
        load64(p, v);
        p += kWord;
      } else {
        prefetch(p, kPrefetchBytes, sizeof(TV) > 1 ? 2 : 1);
        p += expand64(p, mask_word(mask, i, kWord * (i + 1)), v);
      }
      multiply(v, x + i * kWord);
    }
    if (left) {
      if (kDense) {
        TV buffer[kWord] = {};
        __builtin_memcpy(buffer, p, static_cast<size_t>(left) * sizeof(TV));
        load64(buffer, v);
      } else {
        expand64(p, mask_word(mask, whole, w.K), v);
      }
      multiply(v, x + whole * kWord);
    }
    for (int b = 0; b < B; b++) {
      Vec s = acc[0][b];
      for (int u = 1; u < U; u++) s = s + acc[u][b];
      if (B == 1) {
        rows.put(n, s, out);
      } else {
        out[b * out_stride + n] = sum(s);
      }
    }
  }
}

template <class TV, bool kDense, class X>
void few_tokens_any(int64_t M, const RowWeight& w, int64_t n0, int64_t n1, const X* x, int64_t x_stride, float* out,
                    int64_t out_stride, uint8_t* spare) {
  while (M > 0) {
    int done;
    if (M >= 8 && kMaxTokens >= 8) {
      few_tokens<TV, kDense, kMaxTokens >= 8 ? 8 : 1>(w, n0, n1, x, x_stride, out, out_stride, spare);
      done = 8;
    } else if (M >= 4) {
      few_tokens<TV, kDense, 4>(w, n0, n1, x, x_stride, out, out_stride, spare);
      done = 4;
    } else if (M >= 2) {
      few_tokens<TV, kDense, 2>(w, n0, n1, x, x_stride, out, out_stride, spare);
      done = 2;
    } else {
      few_tokens<TV, kDense, 1>(w, n0, n1, x, x_stride, out, out_stride, spare);
      done = 1;
    }
    M -= done;
    x += done * x_stride;
    out += done * out_stride;
  }
}

// y[m, n] = act(scales[n] * sums[m, n] + bias[n]) for columns [n0, n1); sums may be y itself where y is float32.
template <class T>
void finish_rows(const LinearParams& p, const float* sums, int64_t sums_stride, int64_t n0, int64_t n1) {
  const T* scales = static_cast<const T*>(p.weight.scales);
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t m = 0; m < p.M; m++)
    for (int64_t n = n0; n < n1; n += kLanes) {
      Vec v = load_n(sums + m * sums_stride + n, n1 - n);
      if (scales) v = v * load_n(scales + n, n1 - n);
      if (bias) v = v + load_n(bias + n, n1 - n);
      store_n(static_cast<T*>(p.y) + m * p.y_stride + n, activate(p.activation, v), n1 - n);
    }
}

template <class TV, class X>
void run_few(const LinearParams& p, const X* x, int64_t x_stride) {
  static thread_local Scratch sums_scratch;
  const RowWeight& w = p.weight;
  const bool is_float = p.dtype == DType::f32;
  float* sums = static_cast<float*>(p.y);
  int64_t sums_stride = p.y_stride;
  if (!is_float) {
    sums = sums_scratch.get<float>(static_cast<size_t>(p.M * w.N));
    sums_stride = w.N;
  }
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    static thread_local Scratch spare_scratch;
    uint8_t* spare = spare_scratch.get<uint8_t>(static_cast<size_t>(spare_row_bytes<TV>(w.K)));
    const int64_t t = thread_index(), T_ = thread_count();
    const int64_t n0 = first_row(w, t, T_), n1 = first_row(w, t + 1, T_);
    if (w.bitmask) {
      few_tokens_any<TV, false>(p.M, w, n0, n1, x, x_stride, sums, sums_stride, spare);
    } else {
      few_tokens_any<TV, true>(p.M, w, n0, n1, x, x_stride, sums, sums_stride, spare);
    }
    if (!is_float || w.scales || p.bias || p.activation != Activation::none)
      with_float(p.dtype, [&](auto like) { finish_rows<decltype(like)>(p, sums, sums_stride, n0, n1); });
  }
}

template <class TV>
void run_few(const LinearParams& p) {
  static thread_local Scratch x_scratch;
  const RowWeight& w = p.weight;
  const int64_t padded = round_up(w.K, kWord);
#if defined(FASTICL_TARGET_AVX512)
  if constexpr (kPairs<TV>) {
    if (in_pairs(p)) {
      const bf16* x = static_cast<const bf16*>(p.x);
      if (w.K % kWord == 0) return run_few<TV>(p, x, p.x_stride);
      bf16* wide = x_scratch.get<bf16>(static_cast<size_t>(p.M * padded));
      for (int64_t m = 0; m < p.M; m++) {
        __builtin_memcpy(wide + m * padded, x + m * p.x_stride, static_cast<size_t>(w.K) * sizeof(bf16));
        for (int64_t k = w.K; k < padded; k++) wide[m * padded + k] = bf16{0};
      }
      return run_few<TV>(p, const_cast<const bf16*>(wide), padded);
    }
  }
#endif
  const float* x = static_cast<const float*>(p.x);
  if (p.dtype == DType::f32 && kInOrder<TV> && w.K % kWord == 0) return run_few<TV>(p, x, p.x_stride);
  float* wide = x_scratch.get<float>(static_cast<size_t>(p.M * padded + 1));  // int8's step, where K is 0
  with_float(p.dtype,
             [&](auto like) { widen_rows<TV>(static_cast<const decltype(like)*>(p.x), p.M, w.K, p.x_stride, wide); });
  run_few<TV>(p, static_cast<const float*>(wide), padded);
}

// ---- many tokens -------------------------------------------------------------------------------------------

// x^T of one panel: out[k * 16V + j] = x[first + j, k], zero where first + j >= M. Columns [k0, k1), multiples of 16.
template <int V, class T>
void pack_panel(const LinearParams& p, const T* x, int64_t first, int64_t k0, int64_t k1, float* out) {
  const int64_t K = p.weight.K;
  for (int64_t k = k0; k < k1; k += kLanes)
    for (int v = 0; v < V; v++) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t m = first + v * kLanes + i;
        r[i] = m < p.M ? load_n(x + m * p.x_stride + k, K - k) : zero();
      }
      transpose16(r);
      for (int i = 0; i < kLanes; i++) store(out + (k + i) * V * kLanes + v * kLanes, r[i]);
    }
}

// Stored values as float32: in place for float32, else converted into `wide`.
FASTICL_INLINE const float* widen_values(const float* p, int64_t, float*) { return p; }
template <class T>
FASTICL_INLINE const float* widen_values(const T* p, int64_t count, float* wide) {
  for (int64_t i = 0; i < count; i += kLanes) store(wide + i, load(p + i));
  return wide;
}

// acc[d % D][v] += values[d] * column c_d of x^T for the n columns c_d in the bytes of `columns`, lowest first.
template <int n, int D, int V>
FASTICL_INLINE void add_values(uint64_t columns, const float* values, const float* xt, Vec (&acc)[D][V]) {
  constexpr uint64_t kColumn = V * kLanes * sizeof(float);
#pragma GCC unroll 8
  for (int d = 0; d < n; d++) {
    const uint64_t offset = (columns >> (8 * d) & 0xff) * kColumn;
    const float* column = reinterpret_cast<const float*>(reinterpret_cast<const char*>(xt) + offset);
    const Vec value = set1(values[d]);
    for (int v = 0; v < V; v++) acc[d % D][v] = fma(value, load(column + v * kLanes), acc[d % D][v]);
  }
}

// y[j] = (first ? 0 : y[j]) + sum_i values[i] * xt[16V columns[i] + j] for 16V tokens j. Eight columns are loaded at a
// time, also at the end: loads are what bounds this loop.
template <int V>
FASTICL_INLINE void add_row(const uint8_t* columns, const float* values, int count, const float* xt, float* y,
                            bool first) {
  constexpr int D = kChains / V;
  Vec acc[D][V];
  for (int d = 0; d < D; d++)
    for (int v = 0; v < V; v++) acc[d][v] = zero();
  uint64_t next;
  for (; count >= 8; count -= 8, columns += 8, values += 8) {
    __builtin_memcpy(&next, columns, 8);
    add_values<8>(next, values, xt, acc);
  }
  __builtin_memcpy(&next, columns, 8);
  if (count & 4) {
    add_values<4>(next, values, xt, acc);
    next >>= 32, values += 4;
  }
  if (count & 2) {
    add_values<2>(next, values, xt, acc);
    next >>= 16, values += 2;
  }
  if (count & 1) add_values<1>(next, values, xt, acc);
  for (int v = 0; v < V; v++) {
    Vec s = acc[0][v];
    for (int d = 1; d < D; d++) s = s + acc[d][v];
    store(y + v * kLanes, first ? s : load(y + v * kLanes) + s);
  }
}

// y[j] = (first ? 0 : y[j]) + sum_i values[i] * xt[16V i + j] for 16V tokens j and each of R rows, of which `rows`
// exist: row r has values[r] and y + 16V r.
template <int V>
FASTICL_INLINE void add_dense_rows(const float* const* values, int64_t rows, int64_t count, const float* xt, float* y,
                                   bool first) {
  constexpr int R = kProducts / V;
  const float* row[R];
  Vec acc[R][V];
  for (int r = 0; r < R; r++) {
    row[r] = values[least(r, rows - 1)];
    for (int v = 0; v < V; v++) acc[r][v] = zero();
  }
  for (int64_t i = 0; i < count; i++, xt += V * kLanes) {
    Vec x[V];
    for (int v = 0; v < V; v++) x[v] = load(xt + v * kLanes);
    for (int r = 0; r < R; r++) {
      const Vec value = set1(row[r][i]);
      for (int v = 0; v < V; v++) acc[r][v] = fma(value, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R && r < rows; r++)
    for (int v = 0; v < V; v++, y += kLanes) store(y, first ? acc[r][v] : load(y) + acc[r][v]);
}

// A block of rows against all panels of x^T.
template <class TV, int V>
struct ManyTokens {
  static constexpr int64_t L = V * kLanes;                               // tokens in a panel
  static constexpr int64_t kFit = kTileBytes / (L * 4) / kWord * kWord;  // columns whose x^T stays in L1
  static constexpr int64_t kTile = kFit < 256 ? kFit : 256;              // columns in a tile: a list holds bytes
  static constexpr int64_t kWords = kTile / kWord;
  static constexpr int64_t kRing = (kRowsAhead + 1) * kTile;  // the lists that are in use, and room for the next
  static_assert(kRing + kTile <= kRowBlock * kTile, "the ring lies in the lists of a block");
  static_assert(kTile >= kWord, "a tile holds whole mask words");

  struct Row {  // in one tile
    const uint8_t* list;
    const float* values;
    int32_t count, row;
  };

  uint8_t columns[kRowBlock * kTile + kWord];  // of one tile, row after row in `order`
  float wide[sizeof(TV) == 4 ? 1 : kRowBlock * kTile + 2 * kLanes];
  Row order[kRowBlock];
  uint16_t counts[kRowBlock];
  const uint8_t* masks[kRowBlock];
  const TV* next[kRowBlock];

  // Rows [r0, r1), at most kRowBlock; sums [panels][kRowBlock][L].
  void block(const LinearParams& p, int64_t r0, int64_t r1, const float* xt, int64_t padded, int64_t panels,
             int64_t first_token, float* sums, uint8_t* spare) {
    const RowWeight& w = p.weight;
    const int64_t rows = r1 - r0;
    for (int64_t r = 0; r < rows; r++) {
      uint8_t* own = spare + r * spare_row_bytes<TV>(w.K);
      next[r] = row_values(w, r0 + r, reinterpret_cast<TV*>(own));
      if (w.bitmask) masks[r] = row_mask(w, r0 + r, own + spare_value_bytes<TV>(w.K));
    }
    for (int64_t k0 = 0; k0 < w.K; k0 += kTile) {
      if (!w.bitmask) {
        dense_tile(rows, k0, least(kTile, w.K - k0), xt, padded, panels, sums);
      } else if (k0 + kTile <= w.K) {
        tile<true>(w, rows, k0, xt, padded, panels, sums);
      } else {
        tile<false>(w, rows, k0, xt, padded, panels, sums);
      }
    }
    with_float(p.dtype, [&](auto like) { finish<decltype(like)>(p, r0, r1, panels, first_token, sums); });
  }

  // Adds the product of the columns from k0 on to the sums; kWhole says that all of a tile's columns exist.
  template <bool kWhole>
  void tile(const RowWeight& w, int64_t rows, int64_t k0, const float* xt, int64_t padded, int64_t panels,
            float* sums) {
    sort_by_count<kWhole>(rows, k0, w.K);
    // Rows are decoded kRowsAhead before they are used: by then their list has left the store buffer, which could not
    // forward it in pieces of another size, and their values are in L1.
    uint8_t* list = columns;
    float* widened = wide;
    for (int64_t i = 0; i < rows + kRowsAhead; i++) {
      if (i < rows) {
        Row& row = order[i];
        prefetch(next[row.row], 0, row.count * static_cast<int64_t>(sizeof(TV)) / 64 + 2);
        row.list = list;
        list += decode<kWhole>(masks[row.row] + k0 / 8, w.K - k0, list);
        if (panels == 1 && list > columns + kRing) list = columns;  // used once, a short ring of them stays in L1
      }
      if (i >= kRowsAhead) {
        Row& row = order[i - kRowsAhead];
        row.values = widen_values(next[row.row], row.count, widened);
        next[row.row] += row.count;
        if (panels > 1) widened += sizeof(TV) == 4 ? 0 : row.count;
        add_row<V>(row.list, row.values, row.count, xt + k0 * L, sums + row.row * L, k0 == 0);
      }
    }
    for (int64_t q = 1; q < panels; q++)
      for (int64_t i = 0; i < rows; i++)
        add_row<V>(order[i].list, order[i].values, order[i].count, xt + (q * padded + k0) * L,
                   sums + (q * kRowBlock + order[i].row) * L, k0 == 0);
  }

  // The same for `count` columns of a dense weight.
  void dense_tile(int64_t rows, int64_t k0, int64_t count, const float* xt, int64_t padded, int64_t panels,
                  float* sums) {
    const float* values[kRowBlock];
    for (int64_t r = 0; r < rows; r++) {
      values[r] = widen_values(next[r], count, wide + (sizeof(TV) == 4 ? 0 : r * kTile));
      next[r] += count;
    }
    for (int64_t q = 0; q < panels; q++)
      for (int64_t r = 0; r < rows; r += kProducts / V)
        add_dense_rows<V>(values + r, rows - r, count, xt + (q * padded + k0) * L, sums + (q * kRowBlock + r) * L,
                          k0 == 0);
  }

  // Counts the stored values of each row in the tile from k0 on, and orders the rows by them, so that the loops over a
  // row's values end where the processor predicts it.
  template <bool kWhole>
  FASTICL_INLINE void sort_by_count(int64_t rows, int64_t k0, int64_t K) {
    uint16_t first[kTile + 2] = {};
    for (int64_t r = 0; r < rows; r++) {
      int count = 0;
      for (int64_t i = 0; i < kWords && (kWhole || k0 + i * kWord < K); i++)
        count += __builtin_popcountll(mask_word(masks[r] + k0 / 8, i, kWhole ? kTile : K - k0));
      counts[r] = static_cast<uint16_t>(count);
      first[count + 1]++;
    }
    for (int64_t c = 0; c <= kTile; c++) first[c + 1] = static_cast<uint16_t>(first[c + 1] + first[c]);
    for (int64_t r = 0; r < rows; r++) {
      Row& row = order[first[counts[r]]++];
      row.count = counts[r];
      row.row = static_cast<int32_t>(r);
    }
  }

  // Lists the stored columns of the tile whose mask is given, of which `left` exist; returns their number.
  template <bool kWhole>
  static FASTICL_INLINE int decode(const uint8_t* mask, int64_t left, uint8_t* list) {
    int count = 0;
    for (int64_t i = 0; i < kWords && (kWhole || i * kWord < left); i++)
      count +=
          append_set_bits(mask_word(mask, i, kWhole ? kTile : left), static_cast<uint8_t>(i * kWord), list + count);
    return count;
  }

  template <class T>
  static void finish(const LinearParams& p, int64_t r0, int64_t r1, int64_t panels, int64_t first_token,
                     const float* sums) {
    const T* scales = static_cast<const T*>(p.weight.scales);
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t q = 0; q < panels; q++)
      for (int v = 0; v < V; v++) {
        const int64_t m0 = first_token + q * L + v * kLanes;
        for (int64_t r = r0; r < r1; r += kLanes) {
          const Vec scale = scales ? load_n(scales + r, r1 - r) : set1(1.0f);
          const Vec b = bias ? load_n(bias + r, r1 - r) : zero();
          Vec s[kLanes];
          for (int i = 0; i < kLanes; i++)
            s[i] = load(sums + (q * kRowBlock + least(r + i, r1 - 1) - r0) * L + v * kLanes);
          transpose16(s);
          T* y = static_cast<T*>(p.y) + m0 * p.y_stride + r;
          if (m0 + kLanes <= p.M && r + kLanes <= r1) {
            for (int i = 0; i < kLanes; i++) store(y + i * p.y_stride, activate(p.activation, fma(s[i], scale, b)));
          } else {
            for (int i = 0; i < kLanes && m0 + i < p.M; i++)
              store_n(y + i * p.y_stride, activate(p.activation, fma(s[i], scale, b)), r1 - r);
          }
        }
      }
  }
};

// Tokens [m0, m1).
template <class TV, int V>
void run_many(const LinearParams& p, int64_t m0, int64_t m1) {
  using Kernel = ManyTokens<TV, V>;
  static thread_local Scratch x_scratch;
  const RowWeight& w = p.weight;
  const int64_t padded = round_up(w.K, kLanes);
  for (int64_t first = m0; first < m1; first += kTokenBlock) {
    const int64_t panels = ceil_div(std::min(m1 - first, kTokenBlock), Kernel::L);
    float* xt = x_scratch.get<float>(static_cast<size_t>(panels * padded * Kernel::L));
    LinearParams block = p;
    block.M = m1;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
      static thread_local Scratch kernel_scratch, sums_scratch, spare_scratch;
      Kernel* kernel = kernel_scratch.get<Kernel>(1);
      float* sums = sums_scratch.get<float>(static_cast<size_t>(panels * kRowBlock * Kernel::L));
      const int64_t t = thread_index(), T_ = thread_count();
      const int64_t chunks = padded / kLanes;
      with_float(p.dtype, [&](auto like) {
        for (int64_t q = 0; q < panels; q++)
          pack_panel<V>(block, static_cast<const decltype(like)*>(p.x), first + q * Kernel::L, chunks * t / T_ * kLanes,
                        chunks * (t + 1) / T_ * kLanes, xt + q * padded * Kernel::L);
      });
#pragma omp barrier
      const int64_t n0 = first_row(w, t, T_), n1 = first_row(w, t + 1, T_);
      uint8_t* spare = spare_scratch.get<uint8_t>(static_cast<size_t>(kRowBlock * spare_row_bytes<TV>(w.K)));
      for (int64_t r = n0; r < n1; r += kRowBlock)
        kernel->block(block, r, std::min(r + kRowBlock, n1), xt, padded, panels, first, sums, spare);
    }
  }
}

// ---- choice ------------------------------------------------------------------------------------------------

// Whether M <= kMaxTokens tokens are faster in the first loop, by its cycles for 64 columns against those of the
// second: lines fitted to one AVX-512 core. The first pays for every token, more if their x is too long for L1; the
// second for every stored value. For products of pairs, up to 16 tokens, the lines are those of Zen 5.
inline bool few_pay(const LinearParams& p, int64_t M) {
  const RowWeight& w = p.weight;
  const double density = static_cast<double>(w.row_start(w.N)) / (static_cast<double>(w.N) * w.K);
  if (in_pairs(p)) return 4 * ceil_div(M, kMaxTokens) + 1.4 * M <= 12 + 75 * density;
  const double few = M * w.K * 4 <= 5 * kTileBytes / 4 ? 9 + 3.5 * M : 4 + 7.5 * M;
  return few <= 16 + 130 * density;
}

template <class TV>
void run_rows(LinearParams p) {
  const RowWeight& w = p.weight;
  if (w.K == 0) return run_few<TV>(p);  // an empty bitmask has no address
  const int64_t most_few = w.bitmask && !in_pairs(p) ? kMaxTokens : kMaxDenseTokens;
  // Whole panels of 64 tokens, and what is left in the smallest panel that holds it or in the first loop.
  int64_t done = 0;
  while (done < p.M) {
    const int64_t left = p.M - done;
    if (left > 32) {
      const int64_t whole = left % 64 > 32 || left % 64 == 0 ? left : left / 64 * 64;
      run_many<TV, 4>(p, done, done + whole);
      done += whole;
    } else if (left > 16) {
      run_many<TV, 2>(p, done, p.M);
      done = p.M;
    } else if (left > most_few || !few_pay(p, left)) {
      run_many<TV, 1>(p, done, p.M);
      done = p.M;
    } else {
      const int64_t size = p.dtype == DType::f32 ? 4 : 2;
      p.x = static_cast<const char*>(p.x) + done * p.x_stride * size;
      p.y = static_cast<char*>(p.y) + done * p.y_stride * size;
      p.M = left;
      return run_few<TV>(p);
    }
  }
}

inline void run_row_linear(const LinearParams& p) {
  if (p.M == 0 || p.weight.N == 0) return;
  with_value(p.weight.dtype, [&](auto like) { run_rows<decltype(like)>(p); });
}

// ---- the dense weight --------------------------------------------------------------------------------------

// 64 columns; reads as many values from p on.
#if defined(FASTICL_TARGET_AVX512)
template <class TV>
FASTICL_INLINE void unpack_word(const TV* p, uint64_t mask, bf16* out) {
  expand64(p, mask, out);
}
#else
template <class TV>
FASTICL_INLINE void unpack_word(const TV* p, uint64_t mask, bf16* out) {
  for (int i = 0; i < 4; i++, mask >>= kLanes) {
    store(out + i * kLanes, expand(p, mask & 0xffff));
    p += __builtin_popcount(mask & 0xffff);
  }
}
#endif

template <class TV>
void unpack(const RowWeight& w, int64_t n0, int64_t n1, bf16* out, int threads) {
  const int64_t whole = w.K / kWord, left = w.K % kWord;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch spare_scratch;
    uint8_t* spare = spare_scratch.get<uint8_t>(static_cast<size_t>(spare_row_bytes<TV>(w.K)));
    const int64_t t = thread_index(), T = thread_count();
    for (int64_t n = n0 + (n1 - n0) * t / T; n < n0 + (n1 - n0) * (t + 1) / T; n++) {
      const TV* p = row_values(w, n, reinterpret_cast<TV*>(spare));
      const uint8_t* mask = row_mask(w, n, spare + spare_value_bytes<TV>(w.K));
      bf16* row = out + (n - n0) * w.K;
      for (int64_t i = 0; i < whole; i++) {
        const uint64_t bits = mask_word(mask, i, kWord * (i + 1));
        unpack_word(p, bits, row + i * kWord);
        p += __builtin_popcountll(bits);
      }
      if (left) {
        bf16 last[kWord];
        unpack_word(p, mask_word(mask, whole, w.K), last);
        __builtin_memcpy(row + whole * kWord, last, static_cast<size_t>(left) * sizeof(bf16));
      }
    }
  }
}

inline void run_unpack(const RowWeight& w, int64_t n0, int64_t n1, bf16* out, int threads) {
  if (w.K == 0) return;  // an empty bitmask has no address
  if (w.dtype == DType::i8) {
    unpack<int8_t>(w, n0, n1, out, threads);
  } else {
    unpack<bf16>(w, n0, n1, out, threads);
  }
}

}  // namespace
