// What the binding hands to sliced_linear's CUDA kernel. The weight is in the gather layout: fasticl/gather_layout.py
// says what each tensor holds.
#pragma once
#include "types.h"

namespace fasticl {

// The numbers of the layout; those of fasticl/gather_layout.py are the same.
namespace gather_layout {
constexpr int kGroup = 4;         // rows
constexpr int kClasses = 8;       // columns of different remainders, each a lane's
constexpr int kEntries = 6;       // of a record of a lane
constexpr int kStepBits = 5;      // of an entry
constexpr int kEightBytes = 128;  // of shared memory for eight columns of x
constexpr int kMaxWarps = 16;     // a block
constexpr int kMaxTokens = 8;
}  // namespace gather_layout

// y[m, n] = act(sum_k x[m, k] W[n, k] + bias[n]); x, bias, y and the weight of one type, row strides in elements.
struct SlicedLinearCuda {
  const void* x;  // [M, K]
  int M;          // 1 to kMaxTokens
  int64_t x_stride;
  const void* records;       // [records, 32] of 16 bytes, aligned to 16
  const int32_t* starts;     // [shares * groups + 1]
  const int32_t* row_order;  // [groups * 4]
  int groups, K;
  int shares;         // of K
  int blocks, warps;  // that work on a share: blocks, and warps of each
  const void* bias;   // [N] or null
  Activation activation;
  void* y;  // [M, N]
  int64_t y_stride;
  void* workspace;  // sliced_linear_workspace() bytes aligned to 8, whatever they hold
  unsigned long long counts;
  bool x_words;  // two columns of x, the first of even index, are a word
};

// What blocks of several shares need to meet, in bytes: none where there is one share.
int64_t sliced_linear_workspace(int M, int groups, int shares, int blocks);

// Runs it. Throws std::invalid_argument for more than kMaxTokens and std::runtime_error where CUDA refuses.
void sliced_linear_cuda(SlicedLinearCuda p, DType dtype, int device, uintptr_t stream);

}  // namespace fasticl
