// What the linear ops (bitmap_linear, nm_linear, fused_mlp, the large batches of sliced_linear) hand to the kernels
// in row_linear.h. Target-free.
#pragma once
#include "cpu.h"

namespace fasticl {

// A weight [N, K] by rows: `values` of the stored elements, row-major, and which columns they belong to; where there
// are scales, row n is scales[n] times its values.
//   bitmap  row_offsets [N+1] says where a row's values begin; bit k%8 of bitmask[n][k/8] whether column k is stored
//   N:M     row_offsets is null: every row stores row_values = K * n / m
//   dense   bitmask is null too: row_values = K
struct RowWeight {
  const void* values;
  DType dtype;         // of values
  const void* scales;  // [N] of the type of x, or null
  const uint8_t* bitmask;
  const int64_t* row_offsets;
  int64_t N, K;
  int64_t row_values;

  int64_t row_start(int64_t n) const { return row_offsets ? row_offsets[n] : n * row_values; }
  int64_t mask_stride() const { return ceil_div(K, 8); }  // bytes
};

// y[m, n] = act(sum_k x[m, k] * dense(weight)[n, k] + bias[n]); row strides in elements. `dtype` is the type of x, the
// weight's scales, bias and y; the weight's values may have any other.
struct LinearParams {
  const void* x;
  int64_t M, x_stride;
  RowWeight weight;
  const void* bias;  // [N] or null
  Activation activation;
  void* y;
  int64_t y_stride;
  DType dtype;
  int threads;
};

// y = act(x W^T + b) on the CPU, by the target in force (bitmap_linear_cpu.cpp).
void row_linear(LinearParams p);

// Rows [n0, n1) of dense(weight) without its scales as bf16 [n1 - n0, K], of a weight with a bitmask: values are bf16,
// or int8, exact in it.
void unpack_rows(const RowWeight& w, int64_t n0, int64_t n1, bf16* out, int threads);

}  // namespace fasticl
