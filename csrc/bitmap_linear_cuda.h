// What bitmap_linear's binding hands to its CUDA kernel. The weight is in the lane-stream layout:
// fasticl/lane_stream.py says what each tensor holds.
#pragma once
#include "types.h"

namespace fasticl {

// The numbers of the layout and of a warp's shared memory; those of fasticl/lane_stream.py are the same.
namespace lane_stream {
constexpr int kStrip = 16;  // outputs
constexpr int kChunk = 64;  // columns; a lane has 16 of them in each of two outputs: 32 positions, a mask word
constexpr int kRow = 128;   // bytes: a word of two values for each lane
constexpr int kLag = 28;    // rows: no lane's stream lags further behind the leading one
constexpr int kQuad = 4;    // rows are copied by four, 16 bytes a lane
constexpr int kRing = 112;  // rows
constexpr int kTail = 16;   // rows: the ring's first ones again behind its last, so that a chunk is read without a wrap
constexpr int kMasks = 16;  // mask words a lane, of chunks that are under way
constexpr int kWarpBytes = (kRing + kTail + kMasks) * kRow;
constexpr int kTableBytes = 16 * 8;
constexpr int kMinDepth = 4, kMaxDepth = 8;  // chunks
constexpr int kMaxWarps = 8;                 // a block
constexpr int kMaxBlocks = 8;                // that share a strip
}  // namespace lane_stream

// y[m, n] = act(sum_k x[m, k] W[n, k] + bias[n]); x, bias, y and the weight of one type, row strides in elements.
struct BitmapLinearCuda {
  const void* x;  // [M, K]
  int64_t M, x_stride;
  const uint32_t* values;    // [rows, 32]
  const uint32_t* masks;     // [strips, chunks, 32]
  const int32_t* starts;     // [strips * chunks + 1]
  const int32_t* row_order;  // [strips * 16]
  int64_t strips;
  int K, chunks;     // chunks = ceil(K / 64)
  int splits;        // shares of K in which the streams were cut
  int depth;         // chunks that are fetched ahead of the one that is decoded
  const void* bias;  // [N] or null
  Activation activation;
  void* y;  // [M, N]
  int64_t y_stride;
  int blocks;       // that share a strip's K
  void* workspace;  // bitmap_linear_workspace() bytes aligned to 8, whatever they hold
  unsigned long long counts;
  bool x_vectors;  // rows of x begin at multiples of 16 bytes
  int token_tiles;
};

// What blocks that share a strip need to meet, in bytes: none where there is one a strip.
int64_t bitmap_linear_workspace(int64_t M, int64_t strips, int blocks);

// Runs it with `warps` a block, each on its share of K. Throws std::runtime_error where CUDA refuses.
void bitmap_linear_cuda(BitmapLinearCuda p, int warps, DType dtype, int device, uintptr_t stream);

// The same by wgmma, which chooses p.blocks itself, and has a workspace of its own; and whether `device` has that: a
// Hopper GPU, and machine code for sm_90a in this build.
void bitmap_linear_wgmma(BitmapLinearCuda p, DType dtype, int device, uintptr_t stream);
int64_t bitmap_linear_wgmma_workspace(int64_t M, int64_t strips, int K, int splits, int device);
bool has_bitmap_linear_wgmma(int device);

}  // namespace fasticl
