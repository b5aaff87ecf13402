// Rows of any width d, 16 columns a vector: products with a vector and weighted sums, and attention, made of both.
// Included inside a target's namespace after simd.h; no include guard.

namespace {

#if defined(FASTICL_TARGET_AVX512)
constexpr int kDotRows = 8;     // rows multiplied at a time: accumulators
constexpr int kAddColumns = 8;  // vectors of columns summed at a time: accumulators
#elif defined(FASTICL_TARGET_AVX2)
constexpr int kDotRows = 4;
constexpr int kAddColumns = 4;
#else
constexpr int kDotRows = 2;
constexpr int kAddColumns = 2;
#endif

// Rows of d float32 values in vectors: all but the last start at multiples of 16 columns, the last at column `last`,
// where it overlaps its neighbour if 16 does not divide d. A vector to be multiplied with such rows is "spread": 16
// floats for each of their vectors, the overlap zero.
struct Rows {
  const float* data;
  int64_t stride, vectors, last;
};

FASTICL_INLINE Vec lanes() {
  alignas(64) static const float kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kIndex);
}

// x has d values and zeros up to a multiple of 16.
inline void spread(const Rows& r, const float* x, float* out) {
  const int64_t end = (r.vectors - 1) * kLanes;
  for (int64_t k = 0; k < end; k += kLanes) store(out + k, load(x + k));
  store(out + end, where_less(lanes(), set1(static_cast<float>(end - r.last)), zero(), load(x + r.last)));
}

// The inverse, in place, for a sum of such rows; reads 16 floats further.
inline void gather(const Rows& r, float* x) {
  const int64_t end = (r.vectors - 1) * kLanes;
  if (r.last != end) store(x + end, load(x + 2 * end - r.last));
}

// The first n elements at p and zeros behind them, as load_n, which is slow below 16; up to `readable` may be read.
template <class T>
FASTICL_INLINE Vec load_row(const T* p, int64_t n, int64_t readable) {
  if (n >= kLanes) return load(p);
  if (readable < kLanes) return load_n(p, n);
  return where_less(lanes(), set1(static_cast<float>(n)), load(p), zero());
}

// n rows as float32: in place, or converted and padded to whole vectors.
template <class T>
FASTICL_INLINE Rows widen(const T* p, int64_t stride, int64_t n, int64_t d, float* wide) {
  const int64_t vectors = ceil_div(d, kLanes);
  for (int64_t i = 0; i < n; i++) {
    const T* row = p + i * stride;
    float* out = wide + i * vectors * kLanes;
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) store(out + k, load(row + k));
    if (k < d) store(out + k, load_row(row + k, d - k, (n - 1 - i) * stride + d - k));
  }
  return {wide, vectors * kLanes, vectors, (vectors - 1) * kLanes};
}
template <class T>
FASTICL_INLINE Rows rows_of(const T* p, int64_t stride, int64_t n, int64_t d, float* wide) {
  return widen(p, stride, n, d, wide);
}
FASTICL_INLINE Rows rows_of(const float* p, int64_t stride, int64_t n, int64_t d, float* wide) {
  if (d < kLanes) return widen(p, stride, n, d, wide);
  return {p, stride, ceil_div(d, kLanes), d - kLanes};
}

// Lane j is sum_k r[i + j, k] x[k] where i + j < n; x spread.
FASTICL_INLINE Vec dot_rows(const Rows& r, int64_t i, int64_t n, const float* x) {
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int first = 0; first < kLanes; first += kDotRows) {
    const int64_t left = n - i - first;
    const float* row[kDotRows];
    for (int j = 0; j < kDotRows; j++) {
      row[j] = r.data + (i + first) * r.stride + (j < left ? j : left - 1) * r.stride;
      acc[first + j] = zero();
    }
    if (left <= 0) continue;
    for (int64_t k = 0; k < (r.vectors - 1) * kLanes; k += kLanes) {
      const Vec xk = load(x + k);
      for (int j = 0; j < kDotRows; j++) acc[first + j] = fma(load(row[j] + k), xk, acc[first + j]);
    }
    const Vec xk = load(x + (r.vectors - 1) * kLanes);
    for (int j = 0; j < kDotRows; j++) acc[first + j] = fma(load(row[j] + r.last), xk, acc[first + j]);
  }
  return sums(acc);
}

// acc[c] = acc[c] * scale + sum_i weight[i] r[i, c] for C vectors of columns from `first` on. The n rows behind these
// are prefetched meanwhile: the arithmetic between two blocks would leave the memory idle.
template <int C>
FASTICL_INLINE void add_columns(const Rows& r, int64_t n, const float* weight, Vec scale, int64_t first, float* acc) {
  constexpr int U = kAddColumns / C;  // chains, to hide the latency of the multiply-add
  Vec sums[U][C];
  for (int u = 0; u < U; u++)
    for (int c = 0; c < C; c++) sums[u][c] = u ? zero() : load(acc + (first + c) * kLanes) * scale;
  const int64_t end = first + C == r.vectors ? r.last : (first + C - 1) * kLanes;
  int64_t i = 0;
  for (; i + U <= n; i += U)
    for (int u = 0; u < U; u++) {
      const float* row = r.data + (i + u) * r.stride;
      const Vec w = set1(weight[i + u]);
      for (int c = 0; c < C; c++) __builtin_prefetch(row + n * r.stride + (first + c) * kLanes);
      for (int c = 0; c < C - 1; c++) sums[u][c] = fma(w, load(row + (first + c) * kLanes), sums[u][c]);
      sums[u][C - 1] = fma(w, load(row + end), sums[u][C - 1]);
    }
  for (; i < n; i++) {
    const float* row = r.data + i * r.stride;
    const Vec w = set1(weight[i]);
    for (int c = 0; c < C - 1; c++) sums[0][c] = fma(w, load(row + (first + c) * kLanes), sums[0][c]);
    sums[0][C - 1] = fma(w, load(row + end), sums[0][C - 1]);
  }
  for (int c = 0; c < C; c++) {
    for (int u = 1; u < U; u++) sums[0][c] = sums[0][c] + sums[u][c];
    store(acc + (first + c) * kLanes, sums[0][c]);
  }
}

inline void add_rows(const Rows& r, int64_t n, const float* weight, Vec scale, float* acc) {
  int64_t c = 0;
  for (; c + kAddColumns <= r.vectors; c += kAddColumns) add_columns<kAddColumns>(r, n, weight, scale, c, acc);
  for (; kAddColumns > 4 && c + 4 <= r.vectors; c += 4)
    add_columns<kAddColumns >= 4 ? 4 : 1>(r, n, weight, scale, c, acc);
  for (; kAddColumns > 2 && c + 2 <= r.vectors; c += 2) add_columns<2>(r, n, weight, scale, c, acc);
  for (; c < r.vectors; c++) add_columns<1>(r, n, weight, scale, c, acc);
}

// ---- attention of one query --------------------------------------------------------------------------------

constexpr int64_t kBlockFloats = 4096;  // of prompt rows in one step of the softmax: 16 KB, a third of L1
constexpr int64_t kMaxBlock = 128;      // rows in such a step

// e^a for a <= 0, and 0 below -87. Without the bound exp meets denormals on its way to 0, 150 cycles each.
FASTICL_INLINE Vec decay(Vec a) {
  const Vec lowest = set1(-87.0f);
  return where_less(a, lowest, zero(), exp(max(lowest, a)));
}

// Floats that attend wants for `wide`, d rounded up to whole vectors.
inline int64_t wide_floats(int64_t padded) { return padded * kDotRows + kBlockFloats; }

// What an online softmax has seen so far: the largest score, and sum_i e^(s_i - highest) in 16 parts.
struct Softmax {
  float highest;
  Vec total;
};
FASTICL_INLINE Softmax nothing_seen() { return {-3.4028235e38f, zero()}; }  // finite: e^(-inf - highest) is 0, not NaN

// Adds the scores s_i = r_i . x of `count` rows; weight[i] = e^(s_i - highest). Returns what earlier weights shrink by.
inline Vec add_scores(const Rows& r, int64_t count, const float* x, float* weight, Softmax& s) {
  Vec top = set1(s.highest);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec score =
        where_less(lanes(), set1(static_cast<float>(count - j)), dot_rows(r, j, count, x), set1(-__builtin_inff()));
    store(weight + j, score);
    top = max(score, top);  // passes over NaN, which reaches the sums through exp
  }
  const float before = s.highest;
  s.highest = max_lane(top);
  const Vec scale = decay(set1(before - s.highest));
  s.total = s.total * scale;
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec e = decay(load(weight + j) - set1(s.highest));
    store(weight + j, e);
    s.total = s.total + e;
  }
  return scale;
}

// Rows of d, rounded up to whole vectors, in one step of the softmax.
inline int64_t block_rows(int64_t padded) {
  const int64_t fit = least(kBlockFloats / padded, kMaxBlock);
  return fit < kDotRows ? kDotRows : fit / kDotRows * kDotRows;
}

// Online softmax over n rows of keys and of values, which may be the same: acc = sum_i v_i e^(s_i - max),
// s_i = k_i . query; behind acc's d values, rounded up to vectors, come total = sum_i e^(s_i - max), in 16 parts, and
// max. x holds the query, spread; wide a block of rows, then one of values.
template <class T>
void attend(const T* keys, const T* values, int64_t stride, int64_t n, int64_t d, const float* query, float* acc,
            float* x, float* wide) {
  const int64_t padded = round_up(d, kLanes), block = block_rows(padded);
  Softmax softmax = nothing_seen();
  float weight[kMaxBlock];
  for (int64_t k = 0; k < padded; k += kLanes) store(acc + k, zero());
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = least(block, n - i);
    const Rows r = rows_of(keys + i * stride, stride, count, d, wide);
    if (i == 0) spread(r, query, x);
    const Vec scale = add_scores(r, count, x, weight, softmax);
    const Rows v = values == keys ? r : rows_of(values + i * stride, stride, count, d, wide + wide_floats(padded));
    add_rows(v, count, weight, scale, acc);
    if (i + block >= n) gather(v, acc);
  }
  store(acc + padded, softmax.total);
  acc[padded + kLanes] = softmax.highest;
}

}  // namespace
