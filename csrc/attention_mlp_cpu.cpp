// attention_mlp on the CPU: F = a^T ReLU(W c), c = sum_i p_i softmax_i(p_i^T A q), for Q queries of each of B prompts.
//
// Three phases with a barrier between them, each cut into equal pieces over the threads:
//   keys       A q for all queries: a product in panels of up to 64 queries, queries in lanes
//   attention  online softmax over chunks of prompts, for a panel of a prompt's queries at once: a chunk is read from
//              memory once. A long prompt is several chunks, merged in order afterwards
//   neurons    ReLU(W c) in the same panels, summed with a at once: hidden activations never leave L1
// Where pieces are cut depends on sizes and lengths alone, so results do not depend on the number of threads.
// Torch's matrix products are not called for many queries: with AVX-512 these are as fast at d = 64 in float32, faster
// in bfloat16 and slower at d = 1024 in float32; they leave out what lies behind a length.
#ifdef FASTICL_TARGET

#include "activation.h"
#include "rows.h"
#include "panel_product.h"

namespace {

// ---- the phases --------------------------------------------------------------------------------------------

struct Work {
  float* keys;            // [N, padded], N = B Q
  float* states;          // of each query its prompt's chunks, [chunks, state]: acc, total, max
  float* outputs;         // [neuron units, N]: what each unit's neurons add to F
  const int64_t* chunks;  // [B + 1]: the first chunk of each prompt
  int64_t N;
  int64_t chunk_rows;
  int64_t scores;  // of all queries together
  int64_t padded;  // d, rounded up to whole vectors
  int64_t state;   // floats: padded, and two vectors more
};

// A q in the units [begin, end): 32 rows of A for one panel, panels in the outer order.
template <class T>
void make_keys(const AttentionParams& p, const Work& w, PanelScratch& scratch, int64_t begin, int64_t end) {
  const int64_t units = ceil_div(p.d, kUnit);
  Panel panel{};
  for (int64_t u = begin; u < end; u++) {
    if (u == begin || u % units == 0) {
      const int64_t first = u / units * kPanel;
      panel = make_panel(static_cast<const T*>(p.query) + first * p.query_stride, p.query_stride, first,
                         least(kPanel, w.N - first), p.d, scratch);
    }
    const int64_t row = u % units * kUnit, n = least(kUnit, p.d - row), L = panel.V * kLanes;
    const float* sums = multiply(static_cast<const T*>(p.A) + row * p.A_stride, p.A_stride, n, p.d, panel, scratch);
    for (int64_t i = 0; i < n; i += kLanes)
      for (int64_t v = 0; v < panel.V; v++) {
        Vec r[kLanes];
        for (int64_t j = 0; j < kLanes; j++) r[j] = i + j < n ? load(sums + (i + j) * L + v * kLanes) : zero();
        transpose16(r);
        for (int64_t j = 0; j < kLanes && v * kLanes + j < panel.count; j++)
          store(w.keys + (panel.first + v * kLanes + j) * w.padded + row + i, r[j]);
      }
  }
}

// The chunks, each with a panel of queries, whose middle score falls into share t of T_.
template <class T>
void attend_share(const AttentionParams& p, const Work& w, PanelScratch& panel_scratch, int64_t t, int64_t T_) {
  static thread_local Scratch scratch;
  float* x = scratch.get<float>(static_cast<size_t>(w.padded + wide_floats(w.padded)));
  int64_t before = 0;
  for (int64_t b = 0; b < p.B; b++) {
    const int64_t length = p.lengths ? p.lengths[b] : p.L, stride_states = (w.chunks[b + 1] - w.chunks[b]) * w.state;
    float* states = w.states + w.chunks[b] * p.Q * w.state;
    for (int64_t i = 0; i < length; i += w.chunk_rows, states += w.state) {
      const int64_t n = least(w.chunk_rows, length - i);
      const T* rows = static_cast<const T*>(p.context) + b * p.prompt_stride + i * p.row_stride;
      for (int64_t first = 0; first < p.Q; first += kPanel) {
        const int64_t count = least(kPanel, p.Q - first), middle = before + n * first + n * count / 2;
        if (middle * T_ < w.scores * t || middle * T_ >= w.scores * (t + 1)) continue;
        const float* keys = w.keys + (b * p.Q + first) * w.padded;
        float* out = states + first * stride_states;
        if (count > kFew) {
          const Panel queries = make_panel(keys, w.padded, first, count, p.d, panel_scratch);
          attend_panel(rows, p.row_stride, n, p.d, queries, out, stride_states, panel_scratch);
          continue;
        }
        for (int64_t j = 0; j < count; j++)
          attend(rows, rows, p.row_stride, n, p.d, keys + j * w.padded, out + j * stride_states, x, x + w.padded);
      }
      before += n * p.Q;
    }
  }
}

// c of a query, counted over all prompts, from the states of its chunks.
inline void merge_chunks(const AttentionParams& p, const Work& w, int64_t query, float* out) {
  const int64_t b = query / p.Q, chunks = w.chunks[b + 1] - w.chunks[b], max_at = w.padded + kLanes;
  const float* states = w.states + (w.chunks[b] * p.Q + query % p.Q * chunks) * w.state;
  float highest = states[max_at];
  for (int64_t c = 1; c < chunks; c++)
    if (states[c * w.state + max_at] > highest) highest = states[c * w.state + max_at];
  Vec total = zero();
  for (int64_t c = 0; c < chunks; c++) {
    const float* s = states + c * w.state;
    const Vec scale = chunks > 1 ? decay(set1(s[max_at] - highest)) : set1(1.0f);
    total = fma(load(s + w.padded), scale, total);
    for (int64_t k = 0; k < w.padded; k += kLanes) store(out + k, fma(load(s + k), scale, c ? load(out + k) : zero()));
  }
  const Vec all = set1(sum(total));
  for (int64_t k = 0; k < w.padded; k += kLanes) store(out + k, load(out + k) / all);
}

// What the neurons of the units [begin, end), 32 rows of W for one panel, add to F.
template <class T>
void sum_neurons(const AttentionParams& p, const Work& w, PanelScratch& scratch, int64_t begin, int64_t end) {
  static thread_local Scratch contexts_scratch;
  float* contexts = contexts_scratch.get<float>(static_cast<size_t>(kPanel * w.padded));
  const int64_t units = ceil_div(p.m, kUnit);
  Panel panel{};
  for (int64_t u = begin; u < end; u++) {
    if (u == begin || u % units == 0) {
      const int64_t first = u / units * kPanel, count = least(kPanel, w.N - first);
      for (int64_t j = 0; j < count; j++) merge_chunks(p, w, first + j, contexts + j * w.padded);
      panel = make_panel(contexts, w.padded, first, count, p.d, scratch);
    }
    const int64_t row = u % units * kUnit, n = least(kUnit, p.m - row);
    const float* sums = multiply(static_cast<const T*>(p.W) + row * p.W_stride, p.W_stride, n, p.d, panel, scratch);
    float a[kUnit];
    for (int64_t i = 0; i < n; i += kLanes) store(a + i, load_n(static_cast<const T*>(p.a) + row + i, n - i));
    float* out = w.outputs + u % units * w.N + panel.first;
    for (int64_t v = 0; v < panel.V; v++) {
      Vec total = zero();
      for (int64_t i = 0; i < n; i++) total = fma(set1(a[i]), relu(load(sums + (i * panel.V + v) * kLanes)), total);
      store_n(out + v * kLanes, total, panel.count - v * kLanes);
    }
  }
}

template <class T>
void run_attention_mlp(const AttentionParams& p) {
  static thread_local Scratch chunks_scratch, floats_scratch;
  Work w{};
  w.padded = round_up(p.d, kLanes);
  w.state = w.padded + 2 * kLanes;
  w.N = p.B * p.Q;
  int64_t rows = 0;
  for (int64_t b = 0; b < p.B; b++) rows += p.lengths ? p.lengths[b] : p.L;
  w.scores = rows * p.Q;
  const int64_t smallest = ceil_div(kChunkBytes, p.d * static_cast<int64_t>(sizeof(T)));
  const int64_t wanted = ceil_div(rows * ceil_div(p.Q, kPanel), kChunks);
  w.chunk_rows = wanted > smallest ? wanted : smallest;
  int64_t* chunks = chunks_scratch.get<int64_t>(static_cast<size_t>(p.B + 1));
  chunks[0] = 0;
  for (int64_t b = 0; b < p.B; b++) chunks[b + 1] = chunks[b] + ceil_div(p.lengths ? p.lengths[b] : p.L, w.chunk_rows);
  w.chunks = chunks;
  const int64_t panels = ceil_div(w.N, kPanel), key_units = ceil_div(p.d, kUnit), neuron_units = ceil_div(p.m, kUnit);
  const int64_t keys = w.N * w.padded, states = chunks[p.B] * p.Q * w.state;
  w.keys = floats_scratch.get<float>(static_cast<size_t>(keys + states + neuron_units * w.N));
  w.states = w.keys + keys;
  w.outputs = w.states + states;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    static thread_local PanelScratch scratch;
    const int64_t t = thread_index(), T_ = thread_count();
    make_keys<T>(p, w, scratch, panels * key_units * t / T_, panels * key_units * (t + 1) / T_);
#pragma omp barrier
    attend_share<T>(p, w, scratch, t, T_);
#pragma omp barrier
    sum_neurons<T>(p, w, scratch, panels * neuron_units * t / T_, panels * neuron_units * (t + 1) / T_);
  }
  for (int64_t i = 0; i < w.N; i += kLanes) {
    const int64_t n = least(kLanes, w.N - i);
    Vec total = zero();
    for (int64_t u = 0; u < neuron_units; u++) total = total + load_n(w.outputs + u * w.N + i, n);
    store_n(static_cast<T*>(p.out) + i, total, n);
  }
}

}  // namespace

void attention_mlp(const AttentionParams& p) {
  with_float(p.dtype, [&](auto like) { run_attention_mlp<decltype(like)>(p); });
}

#else

#include "cpu.h"
#include "python.h"

namespace fasticl {

constexpr int64_t kBatch = 1024;            // queries whose keys and contexts are held at a time
constexpr int64_t kChunks = 64;             // about so many panels of chunks are shared out among the threads
constexpr int64_t kChunkBytes = 32 * 1024;  // at least, of context: below, merging chunks is not worth it

// All strides in elements; the last dimension is contiguous. lengths may be null: every prompt has L columns.
struct AttentionParams {
  const void* context;  // [B, L, d]
  int64_t B, L, d, Q, prompt_stride, row_stride;
  const void* query;  // [B Q, d]
  int64_t query_stride;
  const void* A;  // [d, d]
  int64_t A_stride;
  const void* W;  // [m, d]
  int64_t m, W_stride;
  const void* a;           // [m]
  const int64_t* lengths;  // [B], in [1, L]
  void* out;               // [B Q]
  DType dtype;
  int threads;
};

}  // namespace fasticl

#define FASTICL_THIS_FILE "attention_mlp_cpu.cpp"
#include "foreach_target.h"

namespace fasticl {

void bind_attention_mlp(py::module_& m) {
  m.def(
      "attention_mlp",
      [](Address context, int64_t B, int64_t L, int64_t d, int64_t prompt_stride, int64_t row_stride, Address query,
         int64_t Q, int64_t query_stride, Address A, int64_t A_stride, Address W, int64_t m, int64_t W_stride,
         Address a, Address lengths, Address out, int dtype, int threads) {
        py::gil_scoped_release release;
        const int64_t element = dtype == static_cast<int>(DType::f32) ? 4 : 2;
        const int64_t queries = std::min(kBatch, Q), prompts = kBatch / std::max<int64_t>(queries, 1);
        for (int64_t b = 0; b < B; b += prompts)
          for (int64_t q = 0; q < Q; q += queries) {  // more than once where a prompt alone has more than kBatch
            AttentionParams p{pointer<const char>(context) + b * prompt_stride * element,
                              std::min(prompts, B - b),
                              L,
                              d,
                              std::min(queries, Q - q),
                              prompt_stride,
                              row_stride,
                              pointer<const char>(query) + (b * Q + q) * query_stride * element,
                              query_stride,
                              pointer<const void>(A),
                              A_stride,
                              pointer<const void>(W),
                              m,
                              W_stride,
                              pointer<const void>(a),
                              lengths ? pointer<const int64_t>(lengths) + b : nullptr,
                              pointer<char>(out) + (b * Q + q) * element,
                              static_cast<DType>(dtype),
                              threads};
            const int64_t work = p.B * p.Q * d * (2 * L + d + m);  // multiply-adds
            p.threads = static_cast<int>(std::min<int64_t>(threads, 1 + work / kThreadWork));
            FASTICL_DISPATCH(attention_mlp(p));
          }
      },
      "context"_a, "B"_a, "L"_a, "d"_a, "prompt_stride"_a, "row_stride"_a, "query"_a, "Q"_a, "query_stride"_a, "A"_a,
      "A_stride"_a, "W"_a, "m"_a, "W_stride"_a, "a"_a, "lengths"_a, "out"_a, "dtype"_a, "threads"_a,
      "F = a^T ReLU(W c) of Q queries for each prompt. Addresses and strides (elements); nothing is checked here.");
}

}  // namespace fasticl

#endif
