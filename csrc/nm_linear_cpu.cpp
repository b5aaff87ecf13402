// nm_linear on the CPU: the row kernels of bitmap_linear with as many values in every row, hence without offsets; with
// all of them, also without a bitmask.
#include "linear.h"
#include "python.h"

namespace fasticl {

void bind_nm_linear(py::module_& m) {
  m.def(
      "nm_linear",
      [](Address x, int64_t M, int64_t x_stride, Address values, int value_dtype, Address scales, Address bitmask,
         int64_t N, int64_t K, int64_t row_values, Address bias, int activation, Address y, int64_t y_stride, int dtype,
         int threads) {
        py::gil_scoped_release release;
        const RowWeight w{pointer<const void>(values),
                          static_cast<DType>(value_dtype),
                          pointer<const void>(scales),
                          pointer<const uint8_t>(bitmask),
                          nullptr,
                          N,
                          K,
                          row_values};
        row_linear({pointer<const void>(x), M, x_stride, w, pointer<const void>(bias),
                    static_cast<Activation>(activation), pointer<void>(y), y_stride, static_cast<DType>(dtype),
                    threads});
      },
      "x"_a, "M"_a, "x_stride"_a, "values"_a, "value_dtype"_a, "scales"_a, "bitmask"_a, "N"_a, "K"_a, "row_values"_a,
      "bias"_a, "activation"_a, "y"_a, "y_stride"_a, "dtype"_a, "threads"_a,
      "y = act(x W^T + b), W with row_values = K n / m values in every row, or K and no bitmask. Nothing is checked "
      "here.");
}

}  // namespace fasticl
