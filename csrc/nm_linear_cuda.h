// What nm_linear's binding hands to its CUDA kernel. The weight is in the fragment layout: fasticl/sparse_fragments.py
// says what a record holds.
#pragma once
#include "types.h"

namespace fasticl {

// The numbers of the layout; those of fasticl/sparse_fragments.py are the same.
namespace sparse_fragments {
constexpr int kStrip = 16;              // outputs
constexpr int kChunk = 64;              // columns: two steps of 32
constexpr int kValues = 32 * 16;        // bytes of a step's values: 16 a lane
constexpr int kMetadata = 2 * kValues;  // where the metadata of both steps begin, 4 bytes a lane
constexpr int kRecord = kMetadata + 32 * 4;
constexpr int kMaxTokens = 64;
constexpr int kMaxWarps = 8;  // a block
}  // namespace sparse_fragments

// y[m, n] = act(sum_k x[m, k] W[n, k] + bias[n]); x, bias, y and the weight of one type, row strides in elements.
struct NmLinearCuda {
  const void* x;  // [M, K]
  int M;          // 1 to kMaxTokens
  int64_t x_stride;
  const unsigned char* fragments;  // [strips, chunks, kRecord], aligned to 16
  int64_t N, strips;
  int K, chunks;     // K % 4 == 0, strips = ceil(N / 16), chunks = ceil(K / 64)
  const void* bias;  // [N] or null
  Activation activation;
  void* y;  // [M, N]
  int64_t y_stride;
  int x_alignment;  // bytes that rows of x begin at multiples of: 16, 4 or 2
  int stage_bytes;  // of a warp's ring
};

// How a product is cut: `splits` warps of a block share K, each for the same `strips` strips.
struct NmLinearPlan {
  int strips, splits;
};

// Runs it; of `plan`, what is 0 is chosen for the device: strips 1, 2 or 4, splits 1 to kMaxWarps, fewer where shared
// memory ends. Throws std::invalid_argument for more than kMaxTokens and std::runtime_error where CUDA refuses.
void nm_linear_cuda(NmLinearCuda p, NmLinearPlan plan, DType dtype, int device, uintptr_t stream);

}  // namespace fasticl
