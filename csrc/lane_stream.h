// What the kernels of bitmap_linear share: how a chunk of the lane-stream layout (fasticl/lane_stream.py) becomes
// operand A of a tensor core, how tokens are loaded, and how blocks that share outputs add their sums and write y.
#pragma once
#include "bitmap_linear_cuda.h"
#include "device.h"

namespace fasticl::lane_stream {

constexpr int kChunkRows = kChunk * kStrip / 32 / 2;  // the most rows that a chunk adds

// ---- the weight ---------------------------------------------------------------------------------------------

// How four positions with the bits of a nibble take their values from a stream. Words .x of two positions, .y of the
// next two: in the lower half the selector that permutes the next two values, or zeros, into them; in the upper half of
// .x the bytes by which the stream advances, 64 a value (two lie side by side in a row of 128), of .y the bits by which
// the first two positions shift it.
FASTICL_DEVICE uint2 nibble_entry(uint32_t nibble) {
  const uint64_t selectors = 0x3210'1044'4410'4444;  // none, the first, the second, both; bytes 4 to 7 are zero
  const uint32_t first = nibble & 3, second = nibble >> 2;
  const uint32_t before = (first & 1) + (first >> 1), count = before + (second & 1) + (second >> 1);
  return {static_cast<uint32_t>(selectors >> 16 * first & 0xffff) | count * 64 << 16,
          static_cast<uint32_t>(selectors >> 16 * second & 0xffff) | before * 16 << 16};
}

// The table of nibbles, at the beginning of shared memory; a barrier follows.
FASTICL_DEVICE void fill_table(unsigned char* shared) {
  if (threadIdx.x < 16) reinterpret_cast<uint2*>(shared)[threadIdx.x] = nibble_entry(threadIdx.x);
}

// Operand A of the four steps of a chunk whose mask and place in the stream, in values since the ring's first row, are
// the lane's; the ring lies `ring` bytes, a multiple of 128, from the beginning of shared memory.
FASTICL_DEVICE void decode(const unsigned char* shared, uint32_t ring, uint32_t position, uint32_t mask,
                           uint32_t (&a)[4][4]) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t at = ring + position / 2 % kRing * kRow + position % 2 * (kRow / 2);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // outputs g and g + 8, four columns each
      const uint32_t nibble = mask >> (8 * step + 4 * half) & 15;
      const uint2 entry = reinterpret_cast<const uint2*>(shared)[nibble];
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(shared + ((at & ~127u) | 4u * lane));
      const uint32_t w0 = words[0], w1 = words[32], w2 = words[64];  // of rows not yet there, nothing is taken
      const uint32_t shift = at >> 2;  // 16 for the second value of a word; rows are multiples of 32
      const uint32_t v0 = shift_right_wrap(w0, w1, shift), v1 = shift_right_wrap(w1, w2, shift);
      a[step][half] = permute(v0, 0, entry.x);
      a[step][half + 2] = permute(shift_right_clamp(v0, v1, entry.y >> 16), 0, entry.y);
      at += entry.x >> 16;
    }
  }
}

// ---- the tokens ---------------------------------------------------------------------------------------------

// 2 kWords neighbouring columns of a token.
template <int kWords>
struct Columns {
  uint32_t words[kWords];
};

// Of any alignment and with zeros from the column `left` on, or, if `aligned`, of 16 bytes and all there.
template <int kWords, class T>
FASTICL_DEVICE Columns<kWords> load_columns(const T* x, bool aligned, int left) {
  Columns<kWords> c;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(x)[i];
      c.words[4 * i] = four.x, c.words[4 * i + 1] = four.y, c.words[4 * i + 2] = four.z, c.words[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t even = 2 * i < left ? x[2 * i].bits : 0, odd = 2 * i + 1 < left ? x[2 * i + 1].bits : 0;
      c.words[i] = even | odd << 16;
    }
  }
  return c;
}

// ---- the sums -----------------------------------------------------------------------------------------------

// Where the sum of an output of a strip and a token lies that the lanes of a warp held as accumulators, register after
// register, 32 lanes each.
FASTICL_DEVICE int held(int output, int token) {
  return (token / 8 * 4 + output / 8 * 2 + token % 2) * 32 + output % 8 * 4 + token % 8 / 2;
}

// Writes kOutputs, from `strip` on, of kTokens tokens: sum_of(i) is this block's sum of the output i % kOutputs and the
// token i / kOutputs. Where p.blocks share them, each leaves its sums in the workspace, after the counts of all
// `tiles`, and the last to come adds those of all, in their order. This one is of tile `tile`.
template <class T, int kOutputs, int kTokens, class SumOf>
FASTICL_DEVICE void finish(const BitmapLinearCuda& p, int64_t tile, int64_t tiles, int64_t strip, int64_t token0,
                           const SumOf& sum_of) {
  constexpr int kSums = kOutputs * kTokens;
  const auto write = [&](int i, float sum) {
    const int64_t token = token0 + i / kOutputs, place = strip * kStrip + i % kOutputs;
    if (token >= p.M || place >= p.strips * kStrip) return;
    const int64_t n = p.row_order[place];
    if (n < 0) return;
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
    from_float(activate(p.activation, sum), static_cast<T*>(p.y)[token * p.y_stride + n]);
  };
  if (p.blocks == 1) {
    for (int i = threadIdx.x; i < kSums; i += blockDim.x) write(i, sum_of(i));
    return;
  }
  auto* const counts = static_cast<unsigned long long*>(p.workspace);
  float* const partial = reinterpret_cast<float*>(counts + tiles) + tile * p.blocks * kSums;
  const int block = blockIdx.x % static_cast<unsigned>(p.blocks);
  for (int i = threadIdx.x; i < kSums; i += blockDim.x) partial[block * kSums + i] = sum_of(i);
  if (!comes_last(counts + tile, p.blocks, p.counts)) return;
  for (int i = threadIdx.x; i < kSums; i += blockDim.x) {
    float sum = 0.0f;
    for (int b = 0; b < p.blocks; ++b) sum += partial[b * kSums + i];
    write(i, sum);
  }
}

// Bytes of the workspace of `finish`.
inline int64_t workspace_bytes(int64_t tiles, int sums, int blocks) {
  if (blocks == 1) return 0;
  return tiles * (int64_t{sizeof(unsigned long long)} + int64_t{sums} * blocks * int64_t{sizeof(float)});
}

}  // namespace fasticl::lane_stream
