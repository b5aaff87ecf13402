// sliced_linear on the CPU, one to a few tokens: y = act(x W^T + b) for a weight of which few values are left.
//
// Rows are sorted by length and cut into slices of 16, one row a lane. A step takes at most one stored value of each
// row, all from one window of 32 columns: the x of a window is gathered in registers by a permutation, which is an
// order of magnitude faster than a gather from memory. A step is 20 bytes:
//     uint16 lane mask | uint16 first column of the window | uint8 column within the window, one a lane
// and its values lie, one a set bit of the mask, in the value stream. A slice's steps are a multiple of kUnroll.
#ifdef FASTICL_TARGET

#include "activation.h"

namespace {

#if defined(FASTICL_TARGET_AVX512)
constexpr int kMaxSlicedTokens = 8;
#else
constexpr int kMaxSlicedTokens = 4;
#endif

// Tokens [0, B) of one slice: out[b * 16 + lane]. Summed by blocks of steps, for the accuracy of long rows.
template <class TV, int B>
void slice_tokens(const uint8_t* step, int64_t steps, const TV* p, const float* x, int64_t x_stride, float* out) {
  constexpr int U = B <= 2 ? kUnroll : B <= 4 ? 2 : 1;
  Vec total[B];
  for (int b = 0; b < B; b++) total[b] = zero();
  for (int64_t first = 0; first < steps; first += kBlockSteps) {
    Vec acc[U][B];
    for (int u = 0; u < U; u++)
      for (int b = 0; b < B; b++) acc[u][b] = zero();
    const int64_t last = steps < first + kBlockSteps ? steps : first + kBlockSteps;
    for (int64_t i = first; i < last; i += kUnroll)
      for (int j = 0; j < kUnroll; j++, step += kStepBytes) {
        uint16_t mask, window;
        __builtin_memcpy(&mask, step, 2);
        __builtin_memcpy(&window, step + 2, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);  // a step has at most a line of float32
        if (j % 2 == 0) __builtin_prefetch(step + kPrefetchBytes / 2);          // three steps have about one
        const Vec v = expand(p, mask);
        p += __builtin_popcount(mask);
        for (int b = 0; b < B; b++)
          acc[j % U][b] = fma(v, permute32(x + b * x_stride + window, step + 4), acc[j % U][b]);
      }
    for (int u = 0; u < U; u++)
      for (int b = 0; b < B; b++) total[b] = total[b] + acc[u][b];
  }
  for (int b = 0; b < B; b++) store(out + b * kLanes, total[b]);
}

// The values of a slice, with 32 elements behind them that may be read.
template <class TV>
const TV* slice_values(const SlicedParams& p, int64_t slice, TV* spare) {
  const int64_t first = p.slice_offsets[2 * slice + 1], end = p.slice_offsets[2 * slice + 3];
  const TV* values = static_cast<const TV*>(p.values) + first;
  if (end + 2 * kLanes <= p.slice_offsets[2 * p.slices + 1]) return values;
  if (end > first) __builtin_memcpy(spare, values, static_cast<size_t>(end - first) * sizeof(TV));
  return spare;
}

// y[m, n] = act(scales[n] * sums[lane] + bias[n]) for the rows n of a slice.
template <class T>
void finish_slice(const SlicedParams& p, const float* sums, const int32_t* rows, int64_t m) {
  const T* bias = static_cast<const T*>(p.bias);
  const T* scales = static_cast<const T*>(p.scales);
  const auto of_rows = [&](const T* from) {
    T lanes[kLanes] = {};
    for (int i = 0; i < kLanes; i++)
      if (rows[i] >= 0) lanes[i] = from[rows[i]];
    return load(lanes);
  };
  Vec v = load(sums);
  if (scales) v = v * of_rows(scales);
  if (bias) v = v + of_rows(bias);
  T result[kLanes];
  store(result, activate(p.activation, v));
  T* y = static_cast<T*>(p.y) + m * p.y_stride;
  for (int i = 0; i < kLanes; i++)
    if (rows[i] >= 0) y[rows[i]] = result[i];
}

// x as float32 [M, padded], zeros behind its columns.
template <class T>
void widen_tokens(const SlicedParams& p, int64_t padded, float* x) {
  for (int64_t m = 0; m < p.M; m++) {
    for (int64_t k = 0; k < p.K; k += kLanes)
      store(x + m * padded + k, load_n(static_cast<const T*>(p.x) + m * p.x_stride + k, p.K - k));
    for (int64_t k = round_up(p.K, kLanes); k < padded; k += kLanes) store(x + m * padded + k, zero());
  }
}

template <class TV>
void run_sliced(const SlicedParams& p) {
  static thread_local Scratch x_scratch;
  const int64_t padded = round_up(p.K, kLanes) + kWindow;
  float* x = x_scratch.get<float>(static_cast<size_t>(p.M * padded));
  with_float(p.dtype, [&](auto like) { widen_tokens<decltype(like)>(p, padded, x); });
  const int64_t total = p.slice_offsets[2 * p.slices] + p.slices;  // a slice costs a step more than it has
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    static thread_local Scratch spare_scratch;
    const int64_t t = thread_index(), T_ = thread_count();
    for (int64_t s = 0; s < p.slices; s++) {
      const int64_t middle = p.slice_offsets[2 * s] + s;  // contiguous slices of about equal steps a thread
      if (middle * T_ < total * t || middle * T_ >= total * (t + 1)) continue;
      const int64_t step = p.slice_offsets[2 * s], steps = p.slice_offsets[2 * s + 2] - step;
      const int64_t count = p.slice_offsets[2 * s + 3] - p.slice_offsets[2 * s + 1];
      TV* spare = spare_scratch.get<TV>(static_cast<size_t>(count + 2 * kLanes));
      const TV* values = slice_values(p, s, spare);
      const uint8_t* first_step = p.steps + step * kStepBytes;
      const int32_t* rows = p.row_order + s * kLanes;
      for (int64_t m = 0; m < p.M;) {
        float sums[kMaxSlicedTokens * kLanes];
        const float* xm = x + m * padded;
        const int64_t left = p.M - m;
        int64_t B = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (B > kMaxSlicedTokens) B = kMaxSlicedTokens;
        if (B == 8) slice_tokens<TV, kMaxSlicedTokens>(first_step, steps, values, xm, padded, sums);
        if (B == 4) slice_tokens<TV, 4>(first_step, steps, values, xm, padded, sums);
        if (B == 2) slice_tokens<TV, 2>(first_step, steps, values, xm, padded, sums);
        if (B == 1) slice_tokens<TV, 1>(first_step, steps, values, xm, padded, sums);
        with_float(p.dtype, [&](auto like) {
          for (int64_t b = 0; b < B; b++) finish_slice<decltype(like)>(p, sums + b * kLanes, rows, m + b);
        });
        m += B;
      }
    }
  }
}

}  // namespace

void sliced_linear(const SlicedParams& p) {
  with_value(p.value_dtype, [&](auto like) { run_sliced<decltype(like)>(p); });
}

#else

#include <vector>

#include "cpu.h"
#include "python.h"

namespace fasticl {

constexpr int kStepBytes = 20;
constexpr int kWindow = 32;  // columns
constexpr int kUnroll = 4;   // steps
constexpr int kBlockSteps = 64;
constexpr int kPrefetchBytes = 4096;
constexpr int kStepWork = 64;  // multiply-adds that take as long as a step for one token
static_assert(kBlockSteps % kUnroll == 0, "a slice has whole groups of steps");
static_assert(kStepBytes == 2 + 2 + 16, "mask, window, an index a lane");

struct SlicedParams {
  const void* x;
  int64_t M, x_stride, K;
  const void* values;
  DType value_dtype;
  const void* scales;  // [N], or null: row n is scales[n] times its values
  const uint8_t* steps;
  const int64_t* slice_offsets;  // [slices + 1][2]: first step, first value
  const int32_t* row_order;      // [slices * 16], -1 for none
  int64_t slices;
  const void* bias;
  Activation activation;
  void* y;
  int64_t y_stride;
  DType dtype;  // of x, scales, bias and y
  int threads;
};

}  // namespace fasticl

#define FASTICL_THIS_FILE "sliced_linear_cpu.cpp"
#include "foreach_target.h"

namespace fasticl {
namespace {

// A row's stored columns in ascending order, and where its next value lies.
class RowCursor {
 public:
  RowCursor(const uint8_t* mask, int64_t bytes, int64_t value) : mask_(mask), bytes_(bytes), value_(value) {
    advance();
  }
  bool done() const { return column_ < 0; }
  int64_t column() const { return column_; }
  int64_t take() {
    advance();
    return value_++;
  }

 private:
  void advance() {
    while (!byte_ && at_ < bytes_) byte_ = mask_[at_++];
    column_ = -1;
    if (!byte_) return;
    column_ = (at_ - 1) * 8 + __builtin_ctz(byte_);
    byte_ &= byte_ - 1;
  }
  const uint8_t* mask_;
  int64_t bytes_, at_ = 0;
  uint32_t byte_ = 0;
  int64_t column_ = -1, value_;
};

// Calls emit(mask, window, index, source positions) for each step of a slice; returns the number of steps.
template <class Emit>
int64_t cut_slice(const uint8_t* bitmask, const int64_t* row_offsets, const int32_t* rows, int64_t K, Emit emit) {
  const int64_t bytes = ceil_div(K, 8);
  std::vector<RowCursor> lanes;
  for (int i = 0; i < 16; i++)
    lanes.emplace_back(rows[i] < 0 ? nullptr : bitmask + rows[i] * bytes, rows[i] < 0 ? 0 : bytes,
                       rows[i] < 0 ? 0 : row_offsets[rows[i]]);
  int64_t steps = 0;
  for (;; steps++) {
    int64_t window = -1;
    for (const RowCursor& lane : lanes)
      if (!lane.done() && (window < 0 || lane.column() < window)) window = lane.column();
    if (window < 0) break;
    uint16_t mask = 0;
    uint8_t index[16] = {};
    int64_t source[16];
    for (int i = 0; i < 16; i++)
      if (!lanes[i].done() && lanes[i].column() < window + kWindow) {
        mask |= static_cast<uint16_t>(1 << i);
        index[i] = static_cast<uint8_t>(lanes[i].column() - window);
        source[i] = lanes[i].take();
      }
    emit(mask, static_cast<uint16_t>(window), index, source);
  }
  for (; steps % kUnroll; steps++) {
    const uint8_t index[16] = {};
    emit(0, 0, index, nullptr);
  }
  return steps;
}

}  // namespace

void bind_sliced_linear(py::module_& m) {
  m.def(
      "count_slices",
      [](Address bitmask, Address row_offsets, Address row_order, int64_t slices, int64_t K, Address slice_offsets) {
        py::gil_scoped_release release;
        int64_t* out = pointer<int64_t>(slice_offsets);
        out[0] = out[1] = 0;
        for (int64_t s = 0; s < slices; s++) {
          int64_t values = 0;
          const int64_t steps = cut_slice(
              pointer<const uint8_t>(bitmask), pointer<const int64_t>(row_offsets),
              pointer<const int32_t>(row_order) + 16 * s, K,
              [&](uint16_t mask, uint16_t, const uint8_t*, const int64_t*) { values += __builtin_popcount(mask); });
          out[2 * s + 2] = out[2 * s] + steps;
          out[2 * s + 3] = out[2 * s + 1] + values;
        }
      },
      "bitmask"_a, "row_offsets"_a, "row_order"_a, "slices"_a, "K"_a, "slice_offsets"_a,
      "First step and first value of each slice, and the totals, into slice_offsets int64 [slices + 1, 2].");
  m.def(
      "fill_slices",
      [](Address bitmask, Address row_offsets, Address row_order, int64_t slices, int64_t K, Address values,
         int64_t value_bytes, Address steps, Address sliced_values) {
        py::gil_scoped_release release;
        uint8_t* step = pointer<uint8_t>(steps);
        uint8_t* out = pointer<uint8_t>(sliced_values);
        const uint8_t* in = pointer<const uint8_t>(values);
        for (int64_t s = 0; s < slices; s++)
          cut_slice(pointer<const uint8_t>(bitmask), pointer<const int64_t>(row_offsets),
                    pointer<const int32_t>(row_order) + 16 * s, K,
                    [&](uint16_t mask, uint16_t window, const uint8_t* index, const int64_t* source) {
                      std::memcpy(step, &mask, 2);
                      std::memcpy(step + 2, &window, 2);
                      std::memcpy(step + 4, index, 16);
                      step += kStepBytes;
                      for (int i = 0; i < 16; i++)
                        if (mask >> i & 1) {
                          std::memcpy(out, in + source[i] * value_bytes, static_cast<size_t>(value_bytes));
                          out += value_bytes;
                        }
                    });
      },
      "bitmask"_a, "row_offsets"_a, "row_order"_a, "slices"_a, "K"_a, "values"_a, "value_bytes"_a, "steps"_a,
      "sliced_values"_a, "Steps and values of all slices, one after the other.");
  m.def(
      "sliced_linear",
      [](Address x, int64_t M, int64_t x_stride, int64_t K, Address values, int value_dtype, Address scales,
         Address steps, Address slice_offsets, Address row_order, int64_t slices, Address bias, int activation,
         Address y, int64_t y_stride, int dtype, int threads) {
        py::gil_scoped_release release;
        SlicedParams p{pointer<const void>(x),
                       M,
                       x_stride,
                       K,
                       pointer<const void>(values),
                       static_cast<DType>(value_dtype),
                       pointer<const void>(scales),
                       pointer<const uint8_t>(steps),
                       pointer<const int64_t>(slice_offsets),
                       pointer<const int32_t>(row_order),
                       slices,
                       pointer<const void>(bias),
                       static_cast<Activation>(activation),
                       pointer<void>(y),
                       y_stride,
                       static_cast<DType>(dtype),
                       threads};
        if (p.slice_offsets[2 * slices] * kStepWork * M < kThreadWork) p.threads = 1;
        FASTICL_DISPATCH(sliced_linear(p));
      },
      "x"_a, "M"_a, "x_stride"_a, "K"_a, "values"_a, "value_dtype"_a, "scales"_a, "steps"_a, "slice_offsets"_a,
      "row_order"_a, "slices"_a, "bias"_a, "activation"_a, "y"_a, "y_stride"_a, "dtype"_a, "threads"_a,
      "y = act(x W^T + b), W as slices. Addresses and strides (elements); nothing is checked here.");
}

}  // namespace fasticl

#endif
