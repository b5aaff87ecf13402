// bitmap_linear on the CPU: dispatch of the row kernels (row_linear.h), which nm_linear and fused_mlp share.
#ifdef FASTICL_TARGET

#include "activation.h"
#include "row_linear.h"

void row_linear(const LinearParams& p) { run_row_linear(p); }
void unpack_rows(const RowWeight& w, int64_t n0, int64_t n1, bf16* out, int threads) {
  run_unpack(w, n0, n1, out, threads);
}

#else

#include "linear.h"
#include "python.h"
#define FASTICL_THIS_FILE "bitmap_linear_cpu.cpp"
#include "foreach_target.h"

namespace fasticl {

void row_linear(LinearParams p) {
  const RowWeight& w = p.weight;  // each position costs the decoding of its bit, each stored value M multiply-adds
  if (2 * w.N * w.K + w.row_start(w.N) * p.M < kThreadWork) p.threads = 1;
  FASTICL_DISPATCH(row_linear(p));
}

void unpack_rows(const RowWeight& w, int64_t n0, int64_t n1, bf16* out, int threads) {
  FASTICL_DISPATCH(unpack_rows(w, n0, n1, out, (n1 - n0) * w.K < kThreadWork ? 1 : threads));
}

void bind_bitmap_linear(py::module_& m) {
  m.def(
      "bitmap_linear",
      [](Address x, int64_t M, int64_t x_stride, Address values, int value_dtype, Address scales, Address bitmask,
         Address row_offsets, int64_t N, int64_t K, Address bias, int activation, Address y, int64_t y_stride,
         int dtype, int threads) {
        py::gil_scoped_release release;
        const RowWeight w{pointer<const void>(values),
                          static_cast<DType>(value_dtype),
                          pointer<const void>(scales),
                          pointer<const uint8_t>(bitmask),
                          pointer<const int64_t>(row_offsets),
                          N,
                          K,
                          0};
        row_linear({pointer<const void>(x), M, x_stride, w, pointer<const void>(bias),
                    static_cast<Activation>(activation), pointer<void>(y), y_stride, static_cast<DType>(dtype),
                    threads});
      },
      "x"_a, "M"_a, "x_stride"_a, "values"_a, "value_dtype"_a, "scales"_a, "bitmask"_a, "row_offsets"_a, "N"_a, "K"_a,
      "bias"_a, "activation"_a, "y"_a, "y_stride"_a, "dtype"_a, "threads"_a,
      "y = act(x W^T + b), W as bitmask and values by rows. Addresses and strides (elements); nothing is checked "
      "here.");
  m.def(
      "unpack_rows",
      [](Address values, int value_dtype, Address bitmask, Address row_offsets, int64_t N, int64_t K,
         int64_t row_values, int64_t first, int64_t end, Address out, int threads) {
        py::gil_scoped_release release;
        const RowWeight w{pointer<const void>(values),
                          static_cast<DType>(value_dtype),
                          nullptr,
                          pointer<const uint8_t>(bitmask),
                          pointer<const int64_t>(row_offsets),
                          N,
                          K,
                          row_values};
        unpack_rows(w, first, end, pointer<bf16>(out), threads);
      },
      "values"_a, "value_dtype"_a, "bitmask"_a, "row_offsets"_a, "N"_a, "K"_a, "row_values"_a, "first"_a, "end"_a,
      "out"_a, "threads"_a,
      "Rows [first, end) of the dense weight as bfloat16, of bfloat16 or int8 values by rows, as bitmap_linear and "
      "nm_linear take them; scales are not applied. Nothing is checked here.");
}

}  // namespace fasticl

#endif
