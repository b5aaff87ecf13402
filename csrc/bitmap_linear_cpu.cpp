// bitmap_linear on the CPU: dispatch of the row kernels (row_linear.h), which nm_linear and fused_mlp share.
#ifdef FASTICL_TARGET

#include "activation.h"
#include "row_linear.h"

void row_linear(const LinearParams& p) { run_row_linear(p); }

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
}

}  // namespace fasticl

#endif
