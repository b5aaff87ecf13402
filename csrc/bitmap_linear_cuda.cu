// bitmap_linear on CUDA, sm_80 and newer: the weight is decoded from its lane streams (fasticl/lane_stream.py) straight
// into the registers of operand A of mma.m16n8k16, the tokens are operand B. For more than 16 tokens Hopper has
// bitmap_linear_wgmma_cuda.cu.
//
// A block computes a strip of 16 outputs for up to 64 tokens. Each of its warps takes a share of K, runs on its own
// through a ring in shared memory, and meets the others only at the end, where their sums are added in a fixed order:
// split-K without a second kernel, and with the same result every time. Where strips are too few for the GPU, several
// blocks share one: each leaves its sums in a workspace, and the last to come adds all of them, in their order and not
// in that of coming (comes_last of device.h). Thread block clusters would save the trips to L2 (about 0.4 us of 0.7,
// computed); sm_80 has none, and would need what is here besides.
//
// The workspace is allocated for each call, so that calls on several streams share nothing, and a CUDA graph keeps that
// of each call that it captured. What it holds does not matter: arrive() tells this launch's counts from whatever else
// is there. Counters set to zero in advance would be wanted by two streams at once, or be one more kernel to launch.
//
// Budget. A warp's shared memory is kWarpBytes = 18 KiB: three blocks of four warps fill an sm_90 multiprocessor
// (227 KiB), two fill one of sm_80 (163 KiB). At density d a warp has `depth` chunks of about 2048 d + 128 bytes under
// way: with depth 4, d = 1/2 and 12 warps, 54 KiB a multiprocessor.
#include "bitmap_linear_cuda.h"
#include "lane_stream.h"

namespace fasticl {
namespace {

using namespace lane_stream;

// Rows of the ring in use while chunk c is decoded and chunk c + depth arrives: the lag, what depth + 1 chunks add, and
// the rest of a last quad. Greater depths are for weights whose chunks add less; fasticl/lane_stream.py sees to it.
static_assert(kLag + (kMinDepth + 1) * kChunkRows + kQuad - 1 <= kRing, "the ring must hold the densest weight");
static_assert(kTail >= kChunkRows && kRing % kQuad == 0 && kTail % kQuad == 0, "what a chunk takes from past the ring");
static_assert(kMasks > kMaxDepth && (kMasks & (kMasks - 1)) == 0, "slots of masks");

// What a warp has under way: rows of values to its ring and mask words beside them, one group of copies for a chunk.
class Stream {
 public:
  FASTICL_DEVICE Stream(const BitmapLinearCuda& p, unsigned char* memory, int64_t strip, int first, int last)
      : ring_(memory), next_(first), last_(last) {
    const int lane = threadIdx.x % 32;
    const int64_t chunk = strip * p.chunks + first;
    masks_ = memory + (kRing + kTail) * kRow + lane * 4;
    mask_ = p.masks + chunk * 32 + lane;
    starts_ = p.starts + chunk;
    row_ = *starts_;
    end_ = first < last ? *++starts_ : row_;
    lane_bytes_ = lane * 16;  // of a quad
    value_ = reinterpret_cast<const unsigned char*>(p.values) + static_cast<int64_t>(row_) * kRow + lane_bytes_;
  }

  // Starts the copies of the next chunk; past the last one the group is empty.
  FASTICL_DEVICE void fetch() {
    if (next_ < last_) {
      copy_async_4(masks_ + next_ % kMasks * kRow, mask_);
      mask_ += 32;
#pragma unroll 1
      for (; row_ < end_; row_ += kQuad) {
        copy_async_16(ring_ + slot_ * kRow + lane_bytes_, value_);
        if (slot_ < kTail) copy_async_16(ring_ + (slot_ + kRing) * kRow + lane_bytes_, value_);
        value_ += kQuad * kRow;
        slot_ += kQuad;
        if (slot_ == kRing) slot_ = 0;
      }
      if (++next_ < last_) end_ = *++starts_;  // needed at the next call: its latency is hidden
    }
    copy_async_commit();
  }

  FASTICL_DEVICE uint32_t mask(unsigned chunk) const {
    return *reinterpret_cast<const uint32_t*>(masks_ + chunk % kMasks * kRow);
  }

 private:
  unsigned char *ring_, *masks_;
  const unsigned char* value_;
  const uint32_t* mask_;
  const int32_t* starts_;
  unsigned next_, last_;  // chunks
  int row_, end_, slot_ = 0, lane_bytes_;
};

template <class T, int kTiles>
__global__ void __launch_bounds__(kMaxWarps * 32, 2)  // at most 12 warps fit: 128 registers cost nothing
    bitmap_linear_kernel(const BitmapLinearCuda p) {
  FASTICL_SHARED(shared);  // the table of nibbles, then kWarpBytes a warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int g = lane / 4, t = lane % 4;
  const unsigned blocks = p.blocks, block = blockIdx.x % blocks;  // those that share a strip and tile of tokens
  const unsigned shared_by = blockIdx.x / blocks;
  const int64_t strip = shared_by / p.token_tiles;
  const int64_t token0 = shared_by % p.token_tiles * kTiles * 8;
  fill_table(shared);
  __syncthreads();

  const unsigned share = block * warps + warp, shares = blocks * warps, chunks = p.chunks;  // products are below 2^32
  const int first = chunks * share / shares, last = chunks * (share + 1) / shares;
  unsigned char* const memory = shared + kTableBytes + warp * kWarpBytes;
  Stream stream(p, memory, strip, first, last);
  for (int i = 0; i < p.depth; ++i) stream.fetch();

  // The lane's columns of the next chunk, by tile of 8 tokens; of a token past the last one, that one's: no sum is
  // kept.
  const T* x_rows[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t token = token0 + tile * 8 + g;
    x_rows[tile] = static_cast<const T*>(p.x) + (token < p.M ? token : p.M - 1) * p.x_stride + first * kChunk + t * 16;
  }

  float sums[kTiles][4] = {};
  const int32_t* starts = p.starts + strip * p.chunks + first;
  const int first_row = *starts;
  int ahead = 0;  // rows from the first one to the one that no lane has reached
  const uint32_t ring = kTableBytes + warp * kWarpBytes;
  uint32_t position = 0;  // of the lane in its stream, in values since the first chunk
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    const int left = p.K - chunk * kChunk;  // columns
    const bool aligned = p.x_vectors && left >= kChunk;
    const auto load = [&](int tile) {
      const T* const x = x_rows[tile];
      x_rows[tile] += kChunk;
      return load_columns<8>(x, aligned, left - t * 16);
    };
    Columns<8> tokens = load(0);  // arrives while the weight is decoded
    const int next_ahead = *++starts - first_row;
    if (p.depth == kMaxDepth) {
      copy_async_wait<kMaxDepth - 1>();
    } else {
      copy_async_wait<kMinDepth - 1>();
    }
    __syncwarp();  // every lane's copies have arrived, and the last chunk's rows have been read
    stream.fetch();
    const uint32_t mask = stream.mask(chunk);
    if (ahead > kLag && position < 2u * (ahead - kLag)) position = 2u * (ahead - kLag);
    ahead = next_ahead;
    uint32_t a[4][4];
    decode(shared, ring, position, mask, a);
    position += __popc(mask);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Columns<8> now = tokens;
      if (tile + 1 < kTiles) tokens = load(tile + 1);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        mma(sums[tile], a[step], now.words[2 * step], now.words[2 * step + 1], T{});
      }
    }
  }

#pragma unroll  // into the ring: all copies have landed there, and no other lane reads this one's words
  for (int i = 0; i < kTiles * 4; ++i) reinterpret_cast<float*>(memory)[i * 32 + lane] = sums[i / 4][i % 4];
  __syncthreads();
  const auto add_warps = [&](int i) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) {
      sum += reinterpret_cast<const float*>(shared + kTableBytes + w * kWarpBytes)[held(i % kStrip, i / kStrip)];
    }
    return sum;
  };
  finish<T, kStrip, kTiles * 8>(p, shared_by, p.strips * p.token_tiles, strip, token0, add_warps);
}

int tiles_of(int64_t M) { return M <= 8 ? 1 : M <= 16 ? 2 : M <= 32 ? 4 : 8; }  // of 8 tokens, a block

int64_t token_tiles_of(int64_t M) { return (M + tiles_of(M) * 8 - 1) / (tiles_of(M) * 8); }

template <class T, int kTiles>
void run(const BitmapLinearCuda& p, int warps, int device, uintptr_t stream) {
  launch("bitmap_linear", bitmap_linear_kernel<T, kTiles>, p.strips * p.token_tiles * p.blocks, warps * 32,
         kTableBytes + warps * kWarpBytes, device, stream, p);
}

template <class T>
void run(BitmapLinearCuda p, int warps, int device, uintptr_t stream) {
  p.token_tiles = static_cast<int>(token_tiles_of(p.M));
  p.counts = counts_of_a_launch();
  p.x_vectors = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.M == 1 || p.x_stride % 8 == 0);
  switch (tiles_of(p.M)) {
    case 1:
      return run<T, 1>(p, warps, device, stream);
    case 2:
      return run<T, 2>(p, warps, device, stream);
    case 4:
      return run<T, 4>(p, warps, device, stream);
    default:
      return run<T, 8>(p, warps, device, stream);
  }
}

}  // namespace

int64_t bitmap_linear_workspace(int64_t M, int64_t strips, int blocks) {
  return workspace_bytes(strips * token_tiles_of(M), tiles_of(M) * 8 * kStrip, blocks);
}

void bitmap_linear_cuda(BitmapLinearCuda p, int warps, DType dtype, int device, uintptr_t stream) {
  if (p.M == 0 || p.strips == 0) return;
  if (dtype == DType::bf16) return run<bf16>(p, warps, device, stream);
  run<f16>(p, warps, device, stream);
}

}  // namespace fasticl
