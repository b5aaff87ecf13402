// One token through all blocks of a decoder-only language model, in one parallel region: at one token a model is a
// stream of weights, and what lies between two of them (norms, rotary positions, attention over the cache) is done
// where its input still is in L1. Activations stay float32 from the embedding to the logits.
//
// A phase cuts the rows of its weights into a share a thread; a barrier parts it from the next, which reads all of
// them. Norms are computed by every thread for itself, which spares a barrier.
#ifdef FASTICL_TARGET

#include "activation.h"
#include "rows.h"
#include "row_linear.h"

namespace {

// What one thread holds while a token passes. All float32.
struct Worker {
  int64_t t, threads;
  float* normed;    // [D], and zeros up to whole words
  float* arranged;  // the input of a linear in the order of its values
  float* state;     // attention: sums, total, largest score
  float* query;     // attention: spread
  float* wide;
  uint8_t* spare;
};

// Buffers that all threads share, each of `widest` floats.
struct Shared {
  float *outputs, *contexts, *hidden, *sums;
};

struct Share {
  int64_t begin, end;
};

FASTICL_INLINE Share share_of(const DecoderLinear& l, const Worker& me) {
  return {first_row(l.weight, me.t, me.threads), first_row(l.weight, me.t + 1, me.threads)};
}

template <class T>
void multiply_rows(const RowWeight& w, Share rows, const float* x, const Worker& me, float* out) {
  if (!kInOrder<T> || w.K % kWord) {
    widen_rows<T>(x, 1, w.K, w.K, me.arranged);
    x = me.arranged;
  }
  if (w.bitmask) {
    few_tokens<T, false, 1>(w, rows.begin, rows.end, x, 0, out, 0, me.spare);
  } else {
    few_tokens<T, true, 1>(w, rows.begin, rows.end, x, 0, out, 0, me.spare);
  }
}

// out[n] = scales[n] (W x)[n] + bias[n] for some rows n.
inline void multiply(const DecoderLinear& l, Share rows, const float* x, const Worker& me, float* out) {
  if (rows.begin == rows.end) return;
  switch (l.weight.dtype) {
    case DType::f32:
      multiply_rows<float>(l.weight, rows, x, me, out);
      break;
    case DType::bf16:
      multiply_rows<bf16>(l.weight, rows, x, me, out);
      break;
    case DType::f16:
      multiply_rows<f16>(l.weight, rows, x, me, out);
      break;
    case DType::i8:
      multiply_rows<int8_t>(l.weight, rows, x, me, out);
      break;
  }
  if (!l.scales && !l.bias) return;
  for (int64_t n = rows.begin; n < rows.end; n += kLanes) {
    const int64_t left = rows.end - n;
    Vec y = load_n(out + n, left);
    if (l.scales) y = y * load_n(l.scales + n, left);
    if (l.bias) y = y + load_n(l.bias + n, left);
    store_n(out + n, y, left);
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
void place_heads(const DecoderParams& p, const DecoderBlock& b, const Worker& me, float* outputs) {
  const int64_t heads = b.q.count + b.k.count;
  for (int64_t i = heads * me.t / me.threads; i < heads * (me.t + 1) / me.threads; i++) {
    const bool is_query = i < b.q.count;
    const int64_t h = is_query ? i : i - b.q.count;
    float* x = outputs + (is_query ? b.q.first + h * b.q.step : b.k.first + h * b.k.step);
    const DecoderNorm& norm = is_query ? b.q_norm : b.k_norm;
    if (norm.weight) normalize(norm, x, p.d, x);
    if (b.rotary) rotate(b, p.position, x);
    if (is_query) continue;
    const int64_t at = (h * p.capacity + p.position) * p.d;
    cache(x, p.d, static_cast<T*>(b.keys) + at);
    cache(outputs + b.v.first + h * b.v.step, p.d, static_cast<T*>(b.values) + at);
  }
}

// contexts[h] = sum_i softmax_i(scale q_h . k_i) v_i for this thread's share of the queries' heads.
template <class T>
void attend_heads(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  const int64_t padded = round_up(p.d, kLanes);
  const int64_t seen = b.window && p.position + 1 > b.window ? b.window : p.position + 1;
  for (int64_t h = b.q.count * me.t / me.threads; h < b.q.count * (me.t + 1) / me.threads; h++) {
    float* query = me.normed;  // free by now, and as long as a head at least
    const float* q = s.outputs + b.q.first + h * b.q.step;
    for (int64_t k = 0; k < p.d; k += kLanes) store(query + k, load_n(q + k, p.d - k) * set1(b.scale));
    const int64_t at = (h * b.k.count / b.q.count * p.capacity + p.position + 1 - seen) * p.d;
    attend(static_cast<const T*>(b.keys) + at, static_cast<const T*>(b.values) + at, p.d, seen, p.d, query, me.state,
           me.query, me.wide);
    const Vec total = set1(sum(load(me.state + padded)));
    for (int64_t k = 0; k < p.d; k += kLanes) store_n(s.contexts + h * p.d + k, load(me.state + k) / total, p.d - k);
  }
}

inline void start_mlp(const DecoderBlock& b, const Worker& me, const Shared& s) {
  const Share rows = share_of(b.up, me);
  multiply(b.up, rows, me.normed, me, s.hidden);
  if (b.gated) multiply(b.gate, rows, me.normed, me, s.sums);
  for (int64_t n = rows.begin; n < rows.end; n += kLanes) {
    const int64_t left = rows.end - n;
    const Vec up = load_n(s.hidden + n, left);
    const Vec h = b.gated ? activate(b.activation, load_n(s.sums + n, left)) * up : activate(b.activation, up);
    store_n(s.hidden + n, h, left);
  }
}

// x += norm(linear(from)): the rows of this thread, which waits for the others only where a norm needs all of them.
inline void add_to_x(const DecoderParams& p, const DecoderLinear& l, const DecoderNorm& norm, const float* from,
                     const Worker& me, const Shared& s) {
  const Share rows = share_of(l, me);
  multiply(l, rows, from, me, s.sums);
  const float* sums = s.sums;
  if (norm.weight) {
#pragma omp barrier
    normalize(norm, s.sums, p.D, me.normed);
    sums = me.normed;
  }
  for (int64_t n = rows.begin; n < rows.end; n += kLanes) {
    const int64_t left = rows.end - n;
    store_n(p.x + n, load_n(p.x + n, left) + load_n(sums + n, left), left);
  }
}

template <class T>
void run_block(const DecoderParams& p, const DecoderBlock& b, const Worker& me, const Shared& s) {
  if (b.parallel) {
    normalize(b.mlp_norm, p.x, p.D, me.normed);
    start_mlp(b, me, s);
  }
  normalize(b.norm, p.x, p.D, me.normed);
  float* out = s.outputs;
  for (int i = 0; i < b.qkv_count; i++) {
    multiply(b.qkv[i], share_of(b.qkv[i], me), me.normed, me, out);
    out += b.qkv[i].weight.N;
  }
#pragma omp barrier
  place_heads<T>(p, b, me, s.outputs);
#pragma omp barrier
  attend_heads<T>(p, b, me, s);
#pragma omp barrier
  add_to_x(p, b.out, b.out_norm, s.contexts, me, s);
#pragma omp barrier
  if (!b.parallel) {
    normalize(b.mlp_norm, p.x, p.D, me.normed);
    start_mlp(b, me, s);
#pragma omp barrier
  }
  add_to_x(p, b.down, b.mlp_out_norm, s.hidden, me, s);
#pragma omp barrier
}

template <class T>
void run_decoder(const DecoderParams& p) {
  static thread_local Scratch shared_scratch;
  const int64_t widest = round_up(p.widest, kWord);
  Shared s{};
  s.outputs = shared_scratch.get<float>(static_cast<size_t>(4 * widest));
  s.contexts = s.outputs + widest;
  s.hidden = s.contexts + widest;
  s.sums = s.hidden + widest;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    static thread_local Scratch own_scratch, spare_scratch;
    const int64_t padded = round_up(p.d, kLanes);
    Worker me{};
    me.t = thread_index();
    me.threads = thread_count();
    me.normed =
        own_scratch.get<float>(static_cast<size_t>(2 * widest + 2 * padded + 2 * kLanes + 2 * wide_floats(padded)));
    me.arranged = me.normed + widest;
    me.state = me.arranged + widest;
    me.query = me.state + padded + 2 * kLanes;
    me.wide = me.query + padded;
    me.spare = spare_scratch.get<uint8_t>(static_cast<size_t>(spare_row_bytes<float>(p.widest)));
    for (int64_t i = 0; i < p.count; i++) run_block<T>(p, p.blocks[i], me, s);
    if (p.head.weight.N) {
      normalize(p.norm, p.x, p.D, me.normed);
      multiply(p.head, share_of(p.head, me), me.normed, me, p.logits);
    }
  }
}

}  // namespace

void decoder(const DecoderParams& p) {
  switch (p.cache_dtype) {
    case DType::f32:
      return run_decoder<float>(p);
    case DType::bf16:
      return run_decoder<bf16>(p);
    case DType::f16:
      return run_decoder<f16>(p);
    case DType::i8:
      return;  // refused where the caches are made
  }
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

// Holds addresses alone: the tensors live in the Python object that made it.
class Decoder {
 public:
  Decoder(int64_t D, int64_t d, int64_t capacity, int cache_dtype, const py::list& blocks, const py::object& norm,
          const py::object& head) {
    p_.D = p_.widest = D;
    p_.d = d;
    p_.capacity = capacity;
    p_.cache_dtype = static_cast<DType>(cache_dtype);
    for (const auto& item : blocks) add(item.cast<py::dict>());
    p_.norm = norm_of(norm);
    if (!head.is_none()) p_.head = linear_of(head.cast<py::dict>());
    p_.blocks = blocks_.data();
    p_.count = static_cast<int64_t>(blocks_.size());
  }

  void step(Address x, int64_t position, Address logits, int threads) const {
    py::gil_scoped_release release;
    DecoderParams p = p_;
    p.x = pointer<float>(x);
    p.logits = pointer<float>(logits);
    p.position = position;
    p.threads = threads;
    FASTICL_DISPATCH(decoder(p));
  }

 private:
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
    b.keys = pointer<void>(d["keys"].cast<Address>());
    b.values = pointer<void>(d["cached_values"].cast<Address>());
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
  py::class_<Decoder>(m, "Decoder",
                      "The blocks of a language model, by the addresses of their tensors, which must outlive it; "
                      "fasticl.decoder checks what is passed here.")
      .def(py::init<int64_t, int64_t, int64_t, int, const py::list&, const py::object&, const py::object&>(), "D"_a,
           "d"_a, "capacity"_a, "cache_dtype"_a, "blocks"_a, "norm"_a, "head"_a)
      .def(
          "step", &Decoder::step, "x"_a, "position"_a, "logits"_a, "threads"_a,
          "x [D] float32, the token's embedding, becomes what the last block adds up to; logits [vocabulary] float32.");
}

}  // namespace fasticl

#endif
