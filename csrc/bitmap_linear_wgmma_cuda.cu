// bitmap_linear on Hopper (sm_90a) for more tokens than a strip of 16 outputs serves well: the lane streams of
// bitmap_linear_cuda.cu, decoded into registers as operand A of wgmma; the tokens are operand B, in shared memory.
//
// A warp decodes a strip as before, but all warps of a block stand at the same chunk of K and share its tokens: x comes
// once for 192 or 128 outputs, not for 16. Each warp has a ring of its own, which bulk copies of one lane fill as far
// ahead as it has room. While the tensor cores multiply a chunk the warps decode the next one into other registers and
// load its tokens, which are permuted to operand B's order on their way through registers. Several blocks share K where
// there are too few for the GPU, each some of the shares in which the streams were cut; finish() adds their sums.
//
// Budget, computed and not measured: clocks of an H200's multiprocessor (at 1.98 GHz 16.5 bytes of HBM, 21 of L2 and
// 128 of shared memory, four instructions, 2048 products) for a chunk of R outputs and M tokens, density 1/2, 5 %
// padding:
//                                            M 32, R 192   64, 192   128, 192   256, 128
//   L2: (75 R + 128 M) / 21                          883      1078       1468       2019
//   shared memory: 40 reads a warp, values, x, B     804       836       1092       1155
//   issue: 260 to 350 instructions a warp            780       780        870        700
//   tensor cores, of 64 tokens at least              384       384        768       1024
//   positions a clock, by the longest line          13.9      11.4        8.4        4.1
//   part of HBM's 14.6                              95 %      78 %       57 %       28 %
//   mma.sync, R 16, if no L1 cache helps             4.0       2.3        2.3    2.3 / 4
//   a perfect dense kernel: HBM, or 2048 / M         8.3       8.3        8.3        8.0
// So x's way through L2 bounds it. It wins over mma.sync from 16 tokens on even if L1 saves that one two thirds of x,
// and over a dense kernel up to about 128; beyond, what is left is the memory that is saved. Of the instructions 4.75 a
// position decode. A block fills a multiprocessor: 12 warps (8 for 256 tokens), 168 registers a thread (254), 225 KiB;
// at density 1/2 a warp has 8 KiB under way, a multiprocessor 100. Clusters that share x by multicast would halve its
// bytes; they are not used.
#include "lane_stream.h"

namespace fasticl {
namespace {

using namespace lane_stream;

constexpr int kSlots = 8;                        // pairs of chunks under way of a warp, at most
constexpr int kMemory = (kRing + kTail) * kRow;  // bytes of a warp's ring
static_assert(kLag + 4 * kChunkRows <= kRing, "the ring must hold the pair that is decoded and the next one");
// Two rows more are read and not taken: of the next warp's ring, or of the tokens.
static_assert(kTail >= kChunkRows, "what a chunk takes from past the ring");
static_assert(kMemory >= 4 * 32 * 32 * 4, "in the end the ring holds the sums of 256 tokens");

FASTICL_CONSTEXPR int tokens_of(int tiles) { return tiles * 64; }
FASTICL_CONSTEXPR int warps_of(int tiles) { return tiles == 4 ? 8 : 12; }
FASTICL_CONSTEXPR int shared_bytes_of(int tiles) {  // the table, barriers, rings, two stages of tokens
  return kTableBytes + warps_of(tiles) * (kSlots * 8 + kMemory) + 2 * tokens_of(tiles) * kRow;
}
static_assert(shared_bytes_of(2) <= 232448 && shared_bytes_of(4) <= 232448, "a block of sm_90 has no more");

// The rows of values that a warp has under way, as its first lane sees it: those of one pair of chunks after the other,
// with a barrier each.
class BulkStream {
 public:
  FASTICL_DEVICE BulkStream(const BitmapLinearCuda& p, unsigned char* ring, Barrier* barriers, const int32_t* starts,
                            int chunks)
      : ring_(ring), barriers_(barriers), starts_(starts), left_(chunks), first_row_(*starts) {
    value_ = reinterpret_cast<const unsigned char*>(p.values) + static_cast<int64_t>(first_row_) * kRow;
    policy_ = evict_first();
    find_end();
  }

  // Copies what there is room for: pairs before the one numbered `pairs`, rows before `rows`.
  FASTICL_DEVICE void fetch(unsigned pairs, int rows) {
#pragma unroll 1
    while (left_ > 0 && pair_ < pairs && end_ <= rows) {
      Barrier* const barrier = barriers_ + pair_ % kSlots;
      const int count = end_ - row_;
      // Straight on to the end of the ring and its tail; what lies in the first rows of the ring lies in both.
      const int straight = count < kRing + kTail - slot_ ? count : kRing + kTail - slot_;
      const int from = slot_ + count > kRing ? kRing - slot_ : 0;
      const int again = from ? count - from : slot_ < kTail ? (count < kTail - slot_ ? count : kTail - slot_) : 0;
      barrier_expect(barrier, (straight + again) * kRow);
      if (count) copy_bulk(ring_ + slot_ * kRow, value_, straight * kRow, barrier, policy_);
      if (again) {
        copy_bulk(ring_ + (from ? 0 : slot_ + kRing) * kRow, value_ + from * kRow, again * kRow, barrier, policy_);
      }
      value_ += count * kRow;
      slot_ += count;
      if (slot_ >= kRing) slot_ -= kRing;
      row_ = end_;
      ++pair_;
      starts_ += 2, left_ -= 2;
      find_end();
    }
  }

 private:
  // Of the pair that is next: needed at the next call, which hides its latency.
  FASTICL_DEVICE void find_end() {
    if (left_ > 0) end_ = starts_[left_ > 1 ? 2 : 1] - first_row_;
  }

  unsigned char* ring_;
  Barrier* barriers_;
  const int32_t* starts_;
  const unsigned char* value_;
  int left_, row_ = 0, end_ = 0, slot_ = 0, first_row_;  // chunks; rows since the first
  unsigned pair_ = 0;
  uint64_t policy_;
};

template <class T, int kTiles>
__global__ void __launch_bounds__(warps_of(kTiles) * 32, 1) bitmap_linear_wgmma_kernel(const BitmapLinearCuda p) {
#if FASTICL_HOPPER
  constexpr int kWarps = warps_of(kTiles), kTokens = tokens_of(kTiles);
  constexpr int kUnit = kTokens * 16;                            // bytes: 8 columns of all tokens
  constexpr int kLoads = (2 * kTokens - 1) / (kWarps * 32) + 1;  // of 32 columns of a token, for each thread
  FASTICL_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* const barriers = reinterpret_cast<Barrier*>(shared + kTableBytes) + warp * kSlots;
  const uint32_t rings = kTableBytes + kWarps * kSlots * 8, ring = rings + warp * kMemory;
  unsigned char* const stages = shared + rings + kWarps * kMemory;

  const unsigned blocks = p.blocks, block = blockIdx.x % blocks, tile = blockIdx.x / blocks;
  const int64_t strip0 = static_cast<int64_t>(tile / p.token_tiles) * kWarps, token0 = tile % p.token_tiles * kTokens;
  // Of a strip past the last one, that one's: no sum is kept.
  const int64_t strip = strip0 + warp < p.strips ? strip0 + warp : p.strips - 1;
  const unsigned splits = p.splits, chunks = p.chunks;  // products are below 2^32
  unsigned share = splits * block / blocks;
  const int first = chunks * share / splits, last = chunks * (splits * (block + 1) / blocks) / splits;

  fill_table(shared);
  if (lane == 0) {
    for (int i = 0; i < kSlots; ++i) barrier_init(barriers + i, 1);
    fence_proxy_async();
  }
  __syncthreads();
  const int32_t* starts = p.starts + strip * p.chunks + first;
  const uint32_t* masks = p.masks + (strip * p.chunks + first) * 32 + lane;
  BulkStream stream(p, shared + ring, barriers, starts, last - first);

  // The thread's part of a chunk of x: of a token the columns 16 t + 8 half to 16 t + 8 half + 7, t = 0 to 3. Four
  // words that lie side by side in operand B, of columns 16 t + 2 i, are one of each t. Of tokens past the last one
  // nothing is stored and no sum is kept.
  Columns<4> x[kLoads][4];
  const T* x_rows[kLoads];
  int x_units[kLoads];  // where they go in a stage, or -1
#pragma unroll
  for (int load = 0; load < kLoads; ++load) {
    const int index = threadIdx.x + load * kWarps * 32, token = index / 16 * 8 + index % 8, half = index / 8 % 2;
    const bool there = index < 2 * kTokens && token0 + token < p.M;
    x_units[load] = there ? half * 4 * kUnit + token * 16 : -1;
    x_rows[load] = static_cast<const T*>(p.x) + (there ? (token0 + token) * p.x_stride + first * kChunk + half * 8 : 0);
  }
  const auto load_x = [&](int chunk) {
    const bool aligned = p.x_vectors && p.K - chunk * kChunk >= kChunk;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (x_units[load] < 0) continue;
      const int left = p.K - chunk * kChunk - (x_units[load] >= 4 * kUnit ? 8 : 0);
#pragma unroll
      for (int t = 0; t < 4; ++t) x[load][t] = load_columns<4>(x_rows[load] + 16 * t, aligned, left - 16 * t);
      x_rows[load] += kChunk;
    }
  };
  const auto store_x = [&](int stage) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if (x_units[load] < 0) continue;
      unsigned char* const to = stages + stage * 8 * kUnit + x_units[load];
      const auto& [x0, x1, x2, x3] = x[load];
#pragma unroll
      for (int i = 0; i < 4; ++i) store_shared(to + i * kUnit, {x0.words[i], x1.words[i], x2.words[i], x3.words[i]});
    }
  };
  if (first < last) {
    load_x(first);
    store_x(0);
  }

  float sums[kTiles][8][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) settle(sums[i]);
  const int first_row = *starts;
  int row = 0;            // that no lane has reached, since the first
  int share_end = first;  // the chunk at which the next share begins
  uint32_t position = 0;  // of the lane in its stream, in values since the first row
  unsigned pair = 0;

  // What is still multiplied of the last chunk keeps the other registers of operand A and the other stage of tokens.
  // The mask of the chunk after next takes this one's place.
  const auto multiply = [&](int chunk, int stage, uint32_t& next_mask, uint32_t (&a)[4][4]) {
    const uint32_t mask = next_mask;
    if (chunk + 2 < last) next_mask = masks[64];
    masks += 32;
    if (chunk + 1 < last) load_x(chunk + 1);
    const int next_row = *++starts - first_row;
    if (stage == 0) barrier_wait(barriers + pair % kSlots, pair / kSlots % 2);
    if (chunk == share_end) {
      position = 2 * row;
      while (share_end == chunk) share_end = chunks * ++share / splits;
    } else if (row > kLag && position < 2u * (row - kLag)) {
      position = 2 * (row - kLag);
    }
    row = next_row;
    decode(shared, ring, position, mask, a);
    position += __popc(mask);
    settle(a);
    // The last chunk's products have read their operands, this one's tokens are where wgmma finds them, and its rows
    // have been read: of all threads.
    wgmma_wait();
    fence_proxy_async();
    __syncthreads();
    wgmma_fence();
    const uint32_t matrix = shared_address(stages + stage * 8 * kUnit);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        wgmma(sums[i], a[step], descriptor(matrix + 2 * step * kUnit + i * 64 * 16, 128, kUnit), T{});
      }
    }
    wgmma_commit();
    if (chunk + 1 < last) store_x(1 - stage);
  };
  uint32_t even[4][4], odd[4][4];
  uint32_t even_mask = first < last ? masks[0] : 0, odd_mask = first + 1 < last ? masks[32] : 0;
#pragma unroll 1
  for (int chunk = first; chunk < last; ++pair) {
    if (lane == 0) stream.fetch(pair + kSlots, row - kLag + kRing);
    multiply(chunk++, 0, even_mask, even);
    if (chunk == last) break;
    multiply(chunk++, 1, odd_mask, odd);
  }
  wgmma_wait();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) settle(sums[i]);

#pragma unroll  // into the ring: all copies have landed there, and all lanes have read them
  for (int i = 0; i < kTiles * 32; ++i) {
    reinterpret_cast<float*>(shared + ring)[i * 32 + lane] = sums[i / 32][i / 4 % 8][i % 4];
  }
  __syncthreads();
  const auto sum_of = [&](int i) {
    const int output = i % (kWarps * kStrip);
    const float* const of_warp = reinterpret_cast<const float*>(shared + rings + output / kStrip * kMemory);
    return of_warp[held(output % kStrip, i / (kWarps * kStrip))];
  };
  const int64_t tiles = (p.strips + kWarps - 1) / kWarps * p.token_tiles;
  finish<T, kWarps * kStrip, kTokens>(p, tile, tiles, strip0, token0, sum_of);
#else
  (void)p;
#endif
}

// How a product is cut: tiles of 64 tokens a block, tiles of outputs and tokens, blocks that share K.
struct Plan {
  int tiles, token_tiles, blocks;
  int64_t blocks_apart;  // of other outputs or tokens
};

// The blocks that take the least time by a model in chunks: rounds of them times the chunks of each, and where they
// meet the way to L2 and the sums of each, which the last one reads. Computed, not measured.
Plan plan_of(int64_t M, int64_t strips, int chunks, int splits, int device) {
  Plan plan{M <= 64 ? 1 : M <= 128 ? 2 : 4, 0, 1, 0};
  plan.token_tiles = static_cast<int>((M + tokens_of(plan.tiles) - 1) / tokens_of(plan.tiles));
  plan.blocks_apart = (strips + warps_of(plan.tiles) - 1) / warps_of(plan.tiles) * plan.token_tiles;
  const int64_t multiprocessors = limits(device, "bitmap_linear").multiprocessors;
  double least = 0.0;
  for (int blocks = 1; blocks <= kMaxBlocks && blocks <= splits; ++blocks) {
    const double rounds = static_cast<double>((plan.blocks_apart * blocks + multiprocessors - 1) / multiprocessors);
    const double time = rounds * chunks / blocks + (blocks > 1 ? 2.0 + blocks : 0.0);
    if (blocks == 1 || time < least) least = time, plan.blocks = blocks;
  }
  return plan;
}

template <class T, int kTiles>
void run(const BitmapLinearCuda& p, int64_t blocks, int device, uintptr_t stream) {
  launch("bitmap_linear", bitmap_linear_wgmma_kernel<T, kTiles>, blocks, warps_of(kTiles) * 32, shared_bytes_of(kTiles),
         device, stream, p);
}

template <class T>
void run(BitmapLinearCuda p, int device, uintptr_t stream) {
  const Plan plan = plan_of(p.M, p.strips, p.chunks, p.splits, device);
  p.token_tiles = plan.token_tiles, p.blocks = plan.blocks;
  p.counts = counts_of_a_launch();
  switch (plan.tiles) {
    case 1:
      return run<T, 1>(p, plan.blocks_apart * plan.blocks, device, stream);
    case 2:
      return run<T, 2>(p, plan.blocks_apart * plan.blocks, device, stream);
    default:
      return run<T, 4>(p, plan.blocks_apart * plan.blocks, device, stream);
  }
}

}  // namespace

bool has_bitmap_linear_wgmma(int device) {
  return has_hopper_code("bitmap_linear", bitmap_linear_wgmma_kernel<bf16, 1>, device);
}

int64_t bitmap_linear_wgmma_workspace(int64_t M, int64_t strips, int K, int splits, int device) {
  if (M == 0 || strips == 0) return 0;
  const Plan plan = plan_of(M, strips, (K + kChunk - 1) / kChunk, splits, device);
  return workspace_bytes(plan.blocks_apart, warps_of(plan.tiles) * kStrip * tokens_of(plan.tiles), plan.blocks);
}

void bitmap_linear_wgmma(BitmapLinearCuda p, DType dtype, int device, uintptr_t stream) {
  if (p.M == 0 || p.strips == 0) return;
  p.x_vectors = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.M == 1 || p.x_stride % 8 == 0);
  if (dtype == DType::bf16) return run<bf16>(p, device, stream);
  run<f16>(p, device, stream);
}

}  // namespace fasticl
