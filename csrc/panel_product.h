// Products of a matrix [rows, d] with up to kPanel vectors at once, the vectors in lanes: each value of the matrix is
// read once and multiplies all of them. Attention of as many queries to the same rows, made of such products. Included
// inside a target's namespace after rows.h; no include guard.

namespace {

#if defined(FASTICL_TARGET_AVX512)
constexpr int kMaxPanel = 4;        // registers of 16 vectors
constexpr int kPanelProducts = 16;  // accumulators: with V registers of vectors, 16 / V rows of the matrix
#elif defined(FASTICL_TARGET_AVX2)
constexpr int kMaxPanel = 1;
constexpr int kPanelProducts = 4;  // 8 registers of 8 lanes
#else
constexpr int kMaxPanel = 1;
constexpr int kPanelProducts = 2;
#endif
constexpr int64_t kPanel = kMaxPanel * kLanes;
constexpr int64_t kTile = 128;  // columns multiplied at a time: 32 KB of a panel
constexpr int64_t kUnit = 32;   // rows of the matrix in a piece of work
constexpr int64_t kFew = 8;     // up to here lanes hold columns, not vectors
static_assert(kUnit % kLanes == 0 && kUnit % kPanelProducts == 0, "rows of a unit fill registers");

// xt[k * 16V + j] = x[j, k] for k < d; zero where j >= count.
template <class T>
void pack_panel(const T* x, int64_t stride, int64_t count, int64_t d, int64_t V, float* xt) {
  for (int64_t k = 0; k < d; k += kLanes)
    for (int64_t v = 0; v < V; v++) {
      Vec r[kLanes];
      for (int64_t i = 0; i < kLanes; i++) {
        const int64_t j = v * kLanes + i;
        r[i] = j < count ? load_row(x + j * stride + k, d - k, (count - 1 - j) * stride + d - k) : zero();
      }
      transpose16(r);
      for (int64_t i = 0; i < kLanes; i++) store(xt + (k + i) * V * kLanes + v * kLanes, r[i]);
    }
}

// sums[i, j] = sum_k r[i, k] xt[k, j] for n rows and 16V vectors, a tile of columns after the other.
template <int V>
void multiply_panel(const Rows& r, int64_t n, int64_t d, const float* xt, float* sums) {
  constexpr int R = kPanelProducts / V;
  for (int64_t k0 = 0; k0 < d; k0 += kTile) {
    const int64_t k1 = least(k0 + kTile, d);
    for (int64_t i = 0; i < n; i += R) {
      const float* row[R];
      Vec acc[R][V];
      for (int j = 0; j < R; j++) {
        row[j] = r.data + (i + j < n ? i + j : n - 1) * r.stride;
        for (int v = 0; v < V; v++) acc[j][v] = zero();
      }
      for (int64_t k = k0; k < k1; k++) {
        Vec x[V];
        for (int v = 0; v < V; v++) x[v] = load(xt + (k * V + v) * kLanes);
        for (int j = 0; j < R; j++) {
          const Vec w = set1(row[j][k]);
          for (int v = 0; v < V; v++) acc[j][v] = fma(w, x[v], acc[j][v]);
        }
      }
      for (int j = 0; j < R && i + j < n; j++)
        for (int v = 0; v < V; v++) {
          float* s = sums + ((i + j) * V + v) * kLanes;
          store(s, k0 ? load(s) + acc[j][v] : acc[j][v]);
        }
    }
  }
}

// acc[k, j] = acc[k, j] * scale[j] + sum_i weight[i, j] r[i, k] for n rows, d columns and 16V vectors.
template <int V>
void add_panel(const Rows& r, int64_t n, int64_t d, const float* weight, const float* scale, float* acc) {
  constexpr int R = kPanelProducts / V;
  static_assert(R <= kLanes, "rows of fewer columns are padded to a vector");
  for (int64_t k = 0; k < d; k += R) {
    const int64_t first = k + R <= d || d < R ? k : d - R;  // the last columns overlap their neighbours
    Vec sums[R][V];
    for (int j = 0; j < R; j++)
      for (int v = 0; v < V; v++) sums[j][v] = zero();
    for (int64_t i = 0; i < n; i++) {
      const float* row = r.data + i * r.stride + first;
      Vec w[V];
      for (int v = 0; v < V; v++) w[v] = load(weight + (i * V + v) * kLanes);
      for (int j = 0; j < R; j++) {
        const Vec x = set1(row[j]);
        for (int v = 0; v < V; v++) sums[j][v] = fma(x, w[v], sums[j][v]);
      }
    }
    for (int j = 0; j < R; j++)
      for (int v = 0; v < V && first + j >= k && first + j < d; v++) {
        float* a = acc + ((first + j) * V + v) * kLanes;
        store(a, fma(load(a), load(scale + v * kLanes), sums[j][v]));
      }
  }
}

struct PanelScratch {
  Scratch panel, sums, wide, acc;
};

template <int V>
struct Registers {
  static constexpr int count = V;
};

// f(Registers<V>{}), V known to the compiler.
template <class F>
FASTICL_INLINE void with_registers(int64_t V, F f) {
  switch (V) {
    case 1:
      return f(Registers<1>{});
    case 2:
      return f(Registers<kMaxPanel >= 2 ? 2 : 1>{});
    case 3:
      return f(Registers<kMaxPanel >= 3 ? 3 : 1>{});
    default:
      return f(Registers<kMaxPanel>{});
  }
}

// Vectors [first, first + count) ready to be multiplied: as rows where they are few, else transposed.
struct Panel {
  int64_t first, count, V;
  float* x;
};

template <class T>
Panel make_panel(const T* x, int64_t stride, int64_t first, int64_t count, int64_t d, PanelScratch& scratch) {
  const int64_t V = ceil_div(count, kLanes);
  float* out = scratch.panel.get<float>(static_cast<size_t>(round_up(d, kLanes) * V * kLanes));
  if (count > kFew) {
    pack_panel(x, stride, count, d, V, out);
  } else {
    widen(x, stride, count, d, out);
  }
  return {first, count, V, out};
}

// sums[i, j] = sum_k matrix[i, k] x[j, k] for rows [0, n) and the panel's vectors; rows of 16V sums.
template <class T>
const float* multiply(const T* matrix, int64_t stride, int64_t n, int64_t d, const Panel& panel,
                      PanelScratch& scratch) {
  const int64_t padded = round_up(d, kLanes);
  float* sums = scratch.sums.get<float>(kUnit * kPanel);
  float* wide = scratch.wide.get<float>(static_cast<size_t>((kUnit + kFew) * padded));
  const Rows r = rows_of(matrix, stride, n, d, wide);
  if (panel.count > kFew) {
    with_registers(panel.V, [&](auto v) { multiply_panel<v.count>(r, n, d, panel.x, sums); });
    return sums;
  }
  float* x = wide + kUnit * padded;
  for (int64_t j = 0; j < panel.count; j++) spread(r, panel.x + j * padded, x + j * padded);
  for (int64_t i = 0; i < n; i += kLanes) {  // 16 rows stay in L1 for all vectors
    Vec dots[kLanes];
    for (int64_t j = 0; j < kLanes; j++) dots[j] = j < panel.count ? dot_rows(r, i, n, x + j * padded) : zero();
    transpose16(dots);
    for (int64_t k = 0; k < kLanes; k++) store(sums + (i + k) * kLanes, dots[k]);
  }
  return sums;
}

// ---- attention of many queries -----------------------------------------------------------------------------

constexpr int64_t kRowBlock = 64;  // rows in one step of the softmax

// As attend, for a panel of more than kFew queries: the state of query j goes to states + j * stride_states. A block of
// rows is multiplied with all queries, then weighted for all, while it stays in L1.
template <class T>
void attend_panel(const T* rows, int64_t stride, int64_t n, int64_t d, const Panel& queries, float* states,
                  int64_t stride_states, PanelScratch& scratch) {
  const int64_t padded = round_up(d, kLanes), V = queries.V, L = V * kLanes;
  float* acc = scratch.acc.get<float>(static_cast<size_t>(padded * L));
  float* weight = scratch.sums.get<float>(kRowBlock * kPanel);
  float* wide = scratch.wide.get<float>(static_cast<size_t>(kRowBlock * padded));
  float highest[kPanel], total[kPanel], scale[kPanel];
  for (int64_t j = 0; j < L; j += kLanes) {
    store(highest + j, set1(-3.4028235e38f));  // finite: e^(-inf - highest) is then 0, not NaN
    store(total + j, zero());
  }
  for (int64_t k = 0; k < padded * L; k += kLanes) store(acc + k, zero());
  for (int64_t first = 0; first < n; first += kRowBlock) {
    const int64_t count = least(kRowBlock, n - first);
    const Rows r = rows_of(rows + first * stride, stride, count, d, wide);
    with_registers(V, [&](auto v) { multiply_panel<v.count>(r, count, d, queries.x, weight); });
    for (int64_t j = 0; j < L; j += kLanes) {
      const Vec before = load(highest + j);
      Vec top = before;
      for (int64_t i = 0; i < count; i++) top = max(load(weight + i * L + j), top);  // passes over NaN
      const Vec fade = decay(before - top);
      Vec all = load(total + j) * fade;
      for (int64_t i = 0; i < count; i++) {
        const Vec e = decay(load(weight + i * L + j) - top);
        store(weight + i * L + j, e);
        all = all + e;
      }
      store(highest + j, top);
      store(scale + j, fade);
      store(total + j, all);
    }
    with_registers(V, [&](auto v) { add_panel<v.count>(r, count, d, weight, scale, acc); });
  }
  for (int64_t k = 0; k < padded; k += kLanes)
    for (int64_t v = 0; v < V; v++) {
      Vec r[kLanes];
      for (int64_t i = 0; i < kLanes; i++) r[i] = load(acc + (k + i) * L + v * kLanes);
      transpose16(r);
      for (int64_t j = 0; j < kLanes && v * kLanes + j < queries.count; j++)
        store(states + (v * kLanes + j) * stride_states + k, r[j]);
    }
  for (int64_t j = 0; j < queries.count; j++) {
    float* state = states + j * stride_states + padded;
    store(state, zero());
    state[0] = total[j];
    state[kLanes] = highest[j];
  }
}

}  // namespace
