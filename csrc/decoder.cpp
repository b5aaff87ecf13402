// One token of each of M sequences through all blocks of a decoder-only language model, in one parallel region: at few
// tokens a model is a stream of weights, and what lies between two of them (norms, rotary positions, attention over the
// cache) is done where its input still is in L1. Activations stay float32 from the embedding to the logits.
//
// A phase cuts the rows of its weights into a share a thread; a barrier parts it from the next, which reads all of
// them. Norms are computed by every thread for itself, which spares a barrier.
#ifdef FASTICL_TARGET

#include "activation.h"
#include "rows.h"
#include "row_linear.h"

namespace {

constexpr int64_t kGroupHeads = 8;  // that share the reading of a group's keys and values

// What one thread holds while tokens pass. All float32.
struct Worker {
  int64_t t, threads;
  float* normed;    // [M, stride]
  float* arranged;  // [M, stride], the input of a linear in the order of its values
  // Of attention: [kGroupHeads, padded] each, sums with a vector more; and a block of keys or values.
  float *queries, *spreads, *sums, *wide;
  uint8_t* spare;
};

// Buffers that all threads share, each [M, stride] float32; a stride is `widest` in whole words.
struct Shared {
  float *outputs, *contexts, *hidden, *sums;
  int64_t stride;
};

struct Share {
  int64_t begin, end;
};

FASTICL_INLINE Share share_of(const DecoderLinear& l, const Worker& me) {
  return {first_row(l.weight, me.t, me.threads), first_row(l.weight, me.t + 1, me.threads)};
}

template <class T>
void multiply_rows(const RowWeight& w, Share rows, const float* x, const Worker& me, const Shared& s, int64_t M,
                   float* out, int64_t out_stride) {
  int64_t x_stride = s.stride;
  if (!kInOrder<T> || w.K % kWord) {
    widen_rows<T>(x, M, w.K, x_stride, me.arranged);
    x = me.arranged;
    x_stride = round_up(w.K, kWord);
  }
  if (w.bitmask) {
    few_tokens_any<T, false>(M, w, rows.begin, rows.end, x, x_stride, out, out_stride, me.spare);
  } else {
    few_tokens_any<T, true>(M, w, rows.begin, rows.end, x, x_stride, out, out_stride, me.spare);
  }
}

// out[m, n] = scales[n] (W x[m])[n] + bias[n] for some rows n of W.
inline void multiply(const DecoderLinear& l, Share rows, const float* x, const Worker& me, const Shared& s, int64_t M,
                     float* out, int64_t out_stride) {
  if (rows.begin == rows.end) return;
  with_value(l.weight.dtype,
             [&](auto like) { multiply_rows<decltype(like)>(l.weight, rows, x, me, s, M, out, out_stride); });
  if (!l.scales && !l.bias) return;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = rows.begin; n < rows.end; n += kLanes) {
      const int64_t left = rows.end - n;
      float* at = out + m * out_stride + n;
      Vec y = load_n(at, left);
      if (l.scales) y = y * load_n(l.scales + n, left);
      if (l.bias) y = y + load_n(l.bias + n, left);
      store_n(at, y, left);
    }
}

// out may be x.
inline void normalize(const DecoderNorm& norm, const float* x, int64_t n, float* out) {
  const float count = static_cast<float>(n);
  float mean = 0.0f;
  if (norm.centred) {
    Vec total = zero();
    for (int64_t k = 0; k < n; k += kLanes) total = total + load_n(x + k, n - k);
    mean = sum(total) / count;
  }
  Vec squares = zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec c = load_n(x + k, n - k) - set1(mean);
    squares = where_less(lanes(), set1(static_cast<float>(n - k)), fma(c, c, squares), squares);
  }
  const Vec scale = set1(1.0f / __builtin_sqrtf(sum(squares) / count + norm.eps));
  for (int64_t k = 0; k < n; k += kLanes) {
    Vec y = (load_n(x + k, n - k) - set1(mean)) * scale * load_n(norm.weight + k, n - k);
    if (norm.bias) y = y + load_n(norm.bias + k, n - k);
    store_n(out + k, y, n - k);
  }
}

// normed[m] = norm(x[m]) of all tokens: every thread for itself, which spares a barrier.
inline void normalize_all(const DecoderParams& p, const DecoderNorm& norm, const float* x, int64_t stride,
                          const Worker& me, const Shared& s) {
  for (int64_t m = 0; m < p.M; m++) normalize(norm, x + m * stride, p.D, me.normed + m * s.stride);
}

// Turns the first `rotary` dimensions of a head: (a, b) = (x[i], x[i + rotary / 2]) becomes (a c - b s, b c + a s).
inline void rotate(const DecoderBlock& b, int64_t position, float* x) {
  const int64_t half = b.rotary / 2;
  const float *cos = b.cos + position * half, *sin = b.sin + position * half;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Vec c = load_n(cos + i, half - i), s = load_n(sin + i, half - i);
    const Vec low = load_n(x + i, half - i), high = load_n(x + half + i, half - i);
    store_n(x + i, low * c - high * s, half - i);
    store_n(x + half + i, high * c + low * s, half - i);
  }
}

template <class T>
void cache(const float* x, int64_t d, T* out) {
  for (int64_t k = 0; k < d; k += kLanes) store_n(out + k, load_n(x + k, d - k), d - k);
}

// Norms and turns this thread's share of the heads of queries and keys; keys and values go to the cache.
template <class T>
void place_heads(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  const int64_t heads = b.q.count + b.k.count, total = p.M * heads;
  for (int64_t i = total * me.t / me.threads; i < total * (me.t + 1) / me.threads; i++) {
    const int64_t m = i / heads, nth = i % heads;
    const bool is_query = nth < b.q.count;
    const int64_t h = is_query ? nth : nth - b.q.count;
    float* outputs = s.outputs + m * s.stride;
    float* x = outputs + (is_query ? b.q.first + h * b.q.step : b.k.first + h * b.k.step);
    const DecoderNorm& norm = is_query ? b.q_norm : b.k_norm;
    if (norm.weight) normalize(norm, x, p.d, x);
    if (b.rotary) rotate(b, p.angles[m], x);
    if (is_query) continue;
    cache(x, p.d, static_cast<T*>(b.keys.data) + b.keys.at(m, h) + p.slots[m] * p.d);
    cache(outputs + b.v.first + h * b.v.step, p.d,
          static_cast<T*>(b.values.data) + b.values.at(m, h) + p.slots[m] * p.d);
  }
}

// contexts[h] = sum_i softmax_i(q_h . k_i) v_i for `heads` of one group, whose keys and values are read, and converted,
// once for all; queries [heads, padded] are scaled, contexts [heads, d].
template <class T>
void attend_group(const T* keys, const T* values, int64_t n, int64_t d, int64_t heads, const Worker& me,
                  float* contexts) {
  const int64_t padded = round_up(d, kLanes), block = block_rows(padded);
  Softmax softmax[kGroupHeads];
  Vec scale[kGroupHeads];
  float weight[kGroupHeads][kMaxBlock];
  for (int64_t h = 0; h < heads; h++) softmax[h] = nothing_seen();
  for (int64_t k = 0; k < heads * padded; k += kLanes) store(me.sums + k, zero());
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = least(block, n - i);
    const Rows r = rows_of(keys + i * d, d, count, d, me.wide);
    for (int64_t h = 0; h < heads; h++) {
      if (i == 0) spread(r, me.queries + h * padded, me.spreads + h * padded);
      scale[h] = add_scores(r, count, me.spreads + h * padded, weight[h], softmax[h]);
    }
    const Rows v = rows_of(values + i * d, d, count, d, me.wide);
    for (int64_t h = 0; h < heads; h++) add_rows(v, count, weight[h], scale[h], me.sums + h * padded);
    if (i + block < n) continue;
    for (int64_t h = 0; h < heads; h++) gather(v, me.sums + h * padded);
  }
  for (int64_t h = 0; h < heads; h++) {
    const Vec total = set1(sum(softmax[h].total));
    for (int64_t k = 0; k < d; k += kLanes)
      store_n(contexts + h * d + k, load(me.sums + h * padded + k) / total, d - k);
  }
}

// contexts[m, h] = sum_i softmax_i(scale q_h . k_i) v_i for this thread's share of the queries' heads.
template <class T>
void attend_heads(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  const int64_t padded = round_up(p.d, kLanes), all = p.M * b.q.count, shared = b.q.count / b.k.count;
  const int64_t last = all * (me.t + 1) / me.threads;
  for (int64_t i = all * me.t / me.threads, heads; i < last; i += heads) {
    const int64_t m = i / b.q.count, h = i % b.q.count;
    heads = least(least(shared - h % shared, kGroupHeads), last - i);
    for (int64_t j = 0; j < heads; j++) {
      const float* q = s.outputs + m * s.stride + b.q.first + (h + j) * b.q.step;
      float* query = me.queries + j * padded;
      for (int64_t k = 0; k < p.d; k += kLanes) store(query + k, load_n(q + k, p.d - k) * set1(b.scale));
    }
    const int64_t begin = b.window && p.ends[m] - p.begins[m] > b.window ? p.ends[m] - b.window : p.begins[m];
    attend_group(static_cast<const T*>(b.keys.data) + b.keys.at(m, h / shared) + begin * p.d,
                 static_cast<const T*>(b.values.data) + b.values.at(m, h / shared) + begin * p.d, p.ends[m] - begin,
                 p.d, heads, me, s.contexts + m * s.stride + h * p.d);
  }
}

inline void start_mlp(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  normalize_all(p, b.mlp_norm, p.x, p.D, me, s);
  const Share rows = share_of(b.up, me);
  multiply(b.up, rows, me.normed, me, s, p.M, s.hidden, s.stride);
  if (b.gated) multiply(b.gate, rows, me.normed, me, s, p.M, s.sums, s.stride);
  for (int64_t m = 0; m < p.M; m++)
    for (int64_t n = rows.begin; n < rows.end; n += kLanes) {
      const int64_t left = rows.end - n;
      float* hidden = s.hidden + m * s.stride + n;
      const Vec up = load_n(hidden, left);
      const Vec h =
          b.gated ? activate(b.activation, load_n(s.sums + m * s.stride + n, left)) * up : activate(b.activation, up);
      store_n(hidden, h, left);
    }
}

// x += norm(linear(from)): the rows of this thread, which waits for the others only where a norm needs all of them.
inline void add_to_x(const DecoderParams& p, const DecoderLinear& l, const DecoderNorm& norm, const float* from,
                     const Worker& me, const Shared& s) {
  const Share rows = share_of(l, me);
  multiply(l, rows, from, me, s, p.M, s.sums, s.stride);
  const float* sums = s.sums;
  if (norm.weight) {
#pragma omp barrier
    normalize_all(p, norm, s.sums, s.stride, me, s);
    sums = me.normed;
  }
  for (int64_t m = 0; m < p.M; m++)
    for (int64_t n = rows.begin; n < rows.end; n += kLanes) {
      const int64_t left = rows.end - n;
      float* x = p.x + m * p.D + n;
      store_n(x, load_n(x, left) + load_n(sums + m * s.stride + n, left), left);
    }
}

// Queries, keys and values: outputs, and what the cache takes of them.
template <class T>
void start_block(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  normalize_all(p, b.norm, p.x, p.D, me, s);
  float* out = s.outputs;
  for (int i = 0; i < b.qkv_count; i++) {
    multiply(b.qkv[i], share_of(b.qkv[i], me), me.normed, me, s, p.M, out, s.stride);
    out += b.qkv[i].weight.N;
  }
#pragma omp barrier
  place_heads<T>(p, b, me, s);
}

template <class T>
void finish_block(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  attend_heads<T>(p, b, me, s);
  if (b.parallel) start_mlp(p, b, me, s);  // of x, before attention is added to it
#pragma omp barrier
  add_to_x(p, b.out, b.out_norm, s.contexts, me, s);
#pragma omp barrier
  if (!b.parallel) {
    start_mlp(p, b, me, s);
#pragma omp barrier
  }
  add_to_x(p, b.down, b.mlp_out_norm, s.hidden, me, s);
}

// x of a single block, in and out, has the type of its cache.
template <class T>
float* widen_x(const DecoderParams& p) {
  static thread_local Scratch scratch;
  float* x = scratch.get<float>(static_cast<size_t>(p.M * p.D));
  for (int64_t k = 0; k < p.M * p.D; k += kLanes)
    store_n(x + k, load_n(static_cast<const T*>(p.in) + k, p.M * p.D - k), p.M * p.D - k);
  return x;
}

inline int64_t attention_floats(int64_t d) {
  const int64_t padded = round_up(d, kLanes);
  return 3 * kGroupHeads * padded + kLanes + wide_floats(padded);
}

inline void lay_out_attention(int64_t d, float* floats, Worker& me) {
  const int64_t each = kGroupHeads * round_up(d, kLanes);
  me.queries = floats;
  me.spreads = me.queries + each;
  me.sums = me.spreads + each;
  me.wide = me.sums + each + kLanes;
}

template <class T>
void narrow_x(const DecoderParams& p) {
  for (int64_t k = 0; k < p.M * p.D; k += kLanes)
    store_n(static_cast<T*>(p.out) + k, load_n(p.x + k, p.M * p.D - k), p.M * p.D - k);
}

// Queries [M, heads, d] in place of x, which become contexts: one is read before it is written.
template <class T>
void run_attention(DecoderParams p) {
  p.x = widen_x<T>(p);
  Shared s{};
  s.outputs = s.contexts = p.x;
  s.stride = p.D;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    static thread_local Scratch scratch;
    Worker me{};
    me.t = thread_index();
    me.threads = thread_count();
    lay_out_attention(p.d, scratch.get<float>(static_cast<size_t>(attention_floats(p.d))), me);
    attend_heads<T>(p, p.blocks[0], me, s);
  }
  narrow_x<T>(p);
}

template <class T>
void run_decoder(DecoderParams p) {
  static thread_local Scratch shared_scratch;
  Shared s{};
  s.stride = round_up(p.widest, kWord);
  const int64_t floats = p.M * s.stride;
  s.contexts = shared_scratch.get<float>(static_cast<size_t>(4 * floats));
  s.hidden = s.contexts + floats;
  s.sums = s.hidden + floats;
  s.outputs = p.outputs ? p.outputs : s.sums + floats;
  p.x = p.in ? widen_x<T>(p) : p.x;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    static thread_local Scratch own_scratch, spare_scratch;
    Worker me{};
    me.t = thread_index();
    me.threads = thread_count();
    me.normed = own_scratch.get<float>(static_cast<size_t>(2 * floats + attention_floats(p.d)));
    me.arranged = me.normed + floats;
    lay_out_attention(p.d, me.arranged + floats, me);
    me.spare = spare_scratch.get<uint8_t>(static_cast<size_t>(spare_row_bytes<float>(p.widest)));
    for (int64_t i = 0; i < p.count; i++) {
      if (p.part != Part::finish) start_block<T>(p, p.blocks[i], me, s);
      if (p.part == Part::all) {
#pragma omp barrier
      }
      if (p.part != Part::start) finish_block<T>(p, p.blocks[i], me, s);
      if (p.part == Part::all) {
#pragma omp barrier
      }
    }
    if (p.head.weight.N) {
      normalize_all(p, p.norm, p.x, p.D, me, s);
      multiply(p.head, share_of(p.head, me), me.normed, me, s, p.M, p.logits, p.head.weight.N);
    }
  }
  if (p.out) narrow_x<T>(p);
}

}  // namespace

void decoder(const DecoderParams& p) {
  with_float(p.cache_dtype, [&](auto like) { run_decoder<decltype(like)>(p); });
}

void decode_attention(const DecoderParams& p) {
  with_float(p.cache_dtype, [&](auto like) { run_attention<decltype(like)>(p); });
}

#else

#include "decoder.h"

#include <vector>

#include "python.h"
#define FASTICL_THIS_FILE "decoder.cpp"
#include "foreach_target.h"

namespace fasticl {

namespace {

DecoderLinear linear_of(const py::dict& d) {
  DecoderLinear l{};
  l.weight.values = pointer<const void>(d["values"].cast<Address>());
  l.weight.bitmask = pointer<const uint8_t>(d["bitmask"].cast<Address>());
  l.weight.row_offsets = pointer<const int64_t>(d["row_offsets"].cast<Address>());
  l.weight.N = d["N"].cast<int64_t>();
  l.weight.K = d["K"].cast<int64_t>();
  l.weight.row_values = d["row_values"].cast<int64_t>();
  l.weight.dtype = static_cast<DType>(d["dtype"].cast<int>());
  l.scales = pointer<const float>(d["scales"].cast<Address>());
  l.bias = pointer<const float>(d["bias"].cast<Address>());
  return l;
}

DecoderNorm norm_of(const py::object& o) {
  if (o.is_none()) return {};
  const auto d = o.cast<py::dict>();
  return {pointer<const float>(d["weight"].cast<Address>()), pointer<const float>(d["bias"].cast<Address>()),
          d["eps"].cast<float>(), d["centred"].cast<bool>()};
}

Heads heads_of(const py::object& o) {
  const auto [count, first, step] = o.cast<std::tuple<int64_t, int64_t, int64_t> >();
  return {count, first, step};
}

// Keys or values [M, heads, positions, d] whose last two dimensions lie close; strides in elements.
DecoderCache cache_of(const py::tuple& t) {
  return {pointer<void>(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

// Holds addresses alone: the tensors live in the Python object that made it.
class Decoder {
 public:
  Decoder(int64_t D, int64_t d, int dtype, const py::list& blocks, const py::object& norm, const py::object& head) {
    p_.D = p_.widest = D;
    p_.d = d;
    p_.cache_dtype = static_cast<DType>(dtype);
    for (const auto& item : blocks) add(item.cast<py::dict>());
    p_.norm = norm_of(norm);
    if (!head.is_none()) p_.head = linear_of(head.cast<py::dict>());
    p_.blocks = blocks_.data();
    p_.count = static_cast<int64_t>(blocks_.size());
  }

  void step(Address x, int64_t M, Address places, Address logits, int threads) const {
    py::gil_scoped_release release;
    DecoderParams p = p_;
    p.M = M;
    p.x = pointer<float>(x);
    p.angles = pointer<const int64_t>(places);
    p.slots = p.angles + M;
    p.begins = p.slots + M;
    p.ends = p.begins + M;
    p.logits = pointer<float>(logits);
    p.threads = threads;
    FASTICL_DISPATCH(decoder(p));
  }

  int64_t output_floats(int64_t M) const { return M * round_up(p_.widest, 64); }

  void start(Address x, int64_t M, Address cos, Address sin, Address rows, Address outputs, const py::tuple& keys,
             const py::tuple& values, int threads) const {
    DecoderBlock b = blocks_.front();
    b.cos = pointer<const float>(cos);
    b.sin = pointer<const float>(sin);
    b.keys = cache_of(keys);
    b.values = cache_of(values);
    py::gil_scoped_release release;
    DecoderParams p = part(Part::start, b, M, outputs, threads);
    p.angles = pointer<const int64_t>(rows);
    p.slots = p.angles + M;
    p.in = pointer<const void>(x);
    FASTICL_DISPATCH(decoder(p));
  }

  void finish(Address x, int64_t M, Address outputs, const py::tuple& keys, const py::tuple& values, Address seen,
              Address out, int threads) const {
    DecoderBlock b = blocks_.front();
    b.keys = cache_of(keys);
    b.values = cache_of(values);
    py::gil_scoped_release release;
    DecoderParams p = part(Part::finish, b, M, outputs, threads);
    p.begins = pointer<const int64_t>(seen);
    p.ends = p.begins + M;
    p.in = pointer<const void>(x);
    p.out = pointer<void>(out);
    FASTICL_DISPATCH(decoder(p));
  }

 private:
  DecoderParams part(Part which, const DecoderBlock& b, int64_t M, Address outputs, int threads) const {
    DecoderParams p = p_;
    p.part = which;
    p.blocks = &b;
    p.M = M;
    p.outputs = pointer<float>(outputs);
    p.threads = threads;
    return p;
  }

  void add(const py::dict& d) {
    DecoderBlock b{};
    b.norm = norm_of(d["norm"]);
    b.q_norm = norm_of(d["q_norm"]);
    b.k_norm = norm_of(d["k_norm"]);
    b.out_norm = norm_of(d["out_norm"]);
    b.mlp_norm = norm_of(d["mlp_norm"]);
    b.mlp_out_norm = norm_of(d["mlp_out_norm"]);
    int64_t outputs = 0;
    for (const auto& item : d["qkv"].cast<py::list>()) {
      if (b.qkv_count == kMaxLinears) throw py::value_error("qkv: expected at most 3 linears");
      b.qkv[b.qkv_count++] = linear_of(item.cast<py::dict>());
      outputs += b.qkv[b.qkv_count - 1].weight.N;
    }
    b.q = heads_of(d["q"]);
    b.k = heads_of(d["k"]);
    b.v = heads_of(d["v"]);
    b.scale = d["scale"].cast<float>();
    b.window = d["window"].cast<int64_t>();
    b.cos = pointer<const float>(d["cos"].cast<Address>());
    b.sin = pointer<const float>(d["sin"].cast<Address>());
    b.rotary = d["rotary"].cast<int64_t>();
    b.keys = cache_of(d["keys"].cast<py::tuple>());
    b.values = cache_of(d["cached_values"].cast<py::tuple>());
    b.out = linear_of(d["out"].cast<py::dict>());
    b.up = linear_of(d["up"].cast<py::dict>());
    b.down = linear_of(d["down"].cast<py::dict>());
    b.gated = !d["gate"].is_none();
    if (b.gated) b.gate = linear_of(d["gate"].cast<py::dict>());
    b.parallel = d["parallel"].cast<bool>();
    b.activation = static_cast<Activation>(d["activation"].cast<int>());
    for (const int64_t n : {outputs, b.q.count * p_.d, b.up.weight.N}) p_.widest = std::max(p_.widest, n);
    blocks_.push_back(b);
  }

  std::vector<DecoderBlock> blocks_;
  DecoderParams p_{};
};

}  // namespace

void bind_decoder(py::module_& m) {
  m.def(
      "decode_attention",
      [](Address query, int64_t M, int64_t heads, int64_t groups, int64_t d, float scale, const py::tuple& keys,
         const py::tuple& values, Address seen, Address out, int dtype, int threads) {
        DecoderBlock b{};
        b.q = {heads, 0, d};
        b.k.count = groups;
        b.scale = scale;
        b.keys = cache_of(keys);
        b.values = cache_of(values);
        py::gil_scoped_release release;
        DecoderParams p{};
        p.blocks = &b;
        p.D = heads * d;
        p.d = d;
        p.cache_dtype = static_cast<DType>(dtype);
        p.M = M;
        p.begins = pointer<const int64_t>(seen);
        p.ends = p.begins + M;
        p.in = pointer<const void>(query);
        p.out = pointer<void>(out);
        p.threads = threads;
        FASTICL_DISPATCH(decode_attention(p));
      },
      "query"_a, "M"_a, "heads"_a, "groups"_a, "d"_a, "scale"_a, "keys"_a, "values"_a, "seen"_a, "out"_a, "dtype"_a,
      "threads"_a,
      "out[m, h] = softmax(scale query[m, h] . keys) values over positions seen[0, m] to seen[1, m]; query and out "
      "[M, heads, d] of keys' dtype, seen [2, M] int64.");
  py::class_<Decoder>(
      m, "Decoder",
      "Blocks of a language model, by the addresses of their tensors, which must outlive it. Its caller "
      "in Python checks what is passed here. A cache is (address, stride of a sequence, of a head).")
      .def(py::init<int64_t, int64_t, int, const py::list&, const py::object&, const py::object&>(), "D"_a, "d"_a,
           "dtype"_a, "blocks"_a, "norm"_a, "head"_a)
      .def("step", &Decoder::step, "x"_a, "M"_a, "places"_a, "logits"_a, "threads"_a,
           "M tokens, each of another sequence, through all blocks. x [M, D] float32, their embeddings, becomes what "
           "the last block adds up to. places [4, M] int64: a token's row of cos and sin, its position in the caches, "
           "and from where to where it attends there. logits [M, vocabulary] float32.")
      .def("output_floats", &Decoder::output_floats, "M"_a, "Length of what start leaves for finish.")
      .def("start", &Decoder::start, "x"_a, "M"_a, "cos"_a, "sin"_a, "rows"_a, "outputs"_a, "keys"_a, "values"_a,
           "threads"_a,
           "The first block's queries, keys and values of x [M, D] of its dtype. rows [2, M] int64: of cos and sin "
           "[.., rotary / 2] float32, and of the positions of keys and values, which are written.")
      .def("finish", &Decoder::finish, "x"_a, "M"_a, "outputs"_a, "keys"_a, "values"_a, "seen"_a, "out"_a, "threads"_a,
           "The rest of the first block, attending from positions seen[0, m] to seen[1, m] of keys and values; out [M, "
           "D] of "
           "its dtype.");
}

}  // namespace fasticl

#endif
