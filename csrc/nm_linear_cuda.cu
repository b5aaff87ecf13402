// nm_linear on CUDA, sm_80 and newer, for 2:4 weights of 16 bits and up to 64 tokens: the weight is operand A of
// mma.sp::ordered_metadata.m16n8k32, and lies in memory in the order of its fragments (fasticl/sparse_fragments.py), so
// that nothing is decoded; the tokens are operand B.
//
// A block computes kStrips strips of 16 outputs for all tokens. Each of its warps takes a share of K, runs on its own
// through a ring of kStages chunks in shared memory, weight and tokens, and meets the others only at the end, where
// their sums are added in a fixed order: split-K without a second kernel, without memory besides y, and with the same
// result every time.
//
// Budget. A chunk's record is 1152 bytes for 16 x 64 positions: 1.125 bytes a position, and each is read once. While a
// warp multiplies a chunk it has three more under way, 3456 kStrips bytes of weight: 12 warps of one strip, 8 of two or
// 4 of four have 41, 55 or 55 KB a multiprocessor. Its ring takes 4608 kStrips + 576 tokens bytes: with 64 tokens 46 KB
// for two strips. x is read once by each block, from L2: tokens / (9 kStrips) bytes for each byte of weight, 0.4 with 8
// tokens and two strips, but 3.6 with 64, where L2 may be the limit. N decides on kStrips: there must be a block for
// nearly every multiprocessor, because blocks do not share K.
#include "device.h"
#include "nm_linear_cuda.h"

namespace fasticl {
namespace {

using namespace sparse_fragments;

constexpr int kStages = 4;               // chunks
constexpr int kPitch = 2 * kChunk + 16;  // bytes of a token's row of a chunk: eight rows begin in different banks
constexpr int kWantedWarps = 12;         // a multiprocessor: how finely K is split
constexpr int kMinShare = 4;             // chunks: shorter shares would end before the ring is full

// What a warp has under way: a chunk of its strips' weight and of all tokens, one group of copies for a chunk.
template <class T, int kTiles, int kStrips>
class Ring {
 public:
  FASTICL_DEVICE Ring(const NmLinearCuda& p, unsigned char* memory, int64_t strip, int first, int last)
      : p_(p), memory_(memory), next_(first), last_(last) {
    const int lane = threadIdx.x % 32;
    lane_bytes_ = lane * 16;
    // Of a strip past the last one, that one: no sum is kept.
#pragma unroll
    for (int s = 0; s < kStrips; ++s) values_[s] = record(strip + s) + lane_bytes_;
    metadata_ = record(strip + lane / 8 % kStrips) + kMetadata + lane % 8 * 16;
    x_ = static_cast<const T*>(p.x) + static_cast<int64_t>(lane / 8) * p.x_stride + first * kChunk + lane % 8 * 8;
  }

  // Starts the copies of the next chunk; past the last one the group is empty.
  FASTICL_DEVICE void fetch() {
    if (next_ < last_) {
      unsigned char* const slot = memory_ + slot_ * p_.stage_bytes;
      slot_ = slot_ + 1 < kStages ? slot_ + 1 : 0;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        copy_async_16(slot + s * kRecord + lane_bytes_, values_[s]);
        copy_async_16(slot + s * kRecord + kValues + lane_bytes_, values_[s] + kValues);
        values_[s] += kRecord;
      }
      const int eighth = lane_bytes_ / 128;  // of the lane: eight lanes copy the metadata of a strip
      if (eighth < kStrips) copy_async_16(slot + eighth * kRecord + kMetadata + lane_bytes_ % 128, metadata_);
      metadata_ += kRecord;
      fetch_tokens(slot + kStrips * kRecord);
      x_ += kChunk;
      ++next_;
    }
    copy_async_commit();
  }

 private:
  FASTICL_DEVICE const unsigned char* record(int64_t strip) const {
    return p_.fragments + ((strip < p_.strips ? strip : p_.strips - 1) * p_.chunks + next_) * kRecord;
  }

  FASTICL_DEVICE void fetch_tokens(unsigned char* to) const {
    if (p_.x_alignment == 16 && (next_ + 1) * kChunk <= p_.K) {
      const int token = lane_bytes_ / 128;
      const T* from = x_;
      to += token * kPitch + lane_bytes_ % 128;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if (token + 4 * i < p_.M) copy_async_16(to + 4 * i * kPitch, from);
        from += 4 * p_.x_stride;
      }
    } else {
      fetch_ragged(to);
    }
  }

  // Of any alignment, and zeros from column K on. A lane has two columns of each token; K is even.
  FASTICL_DEVICE void fetch_ragged(unsigned char* to) const {
    const int lane = lane_bytes_ / 16, column = next_ * kChunk + 2 * lane;
    const T* from = static_cast<const T*>(p_.x) + column;
    to += 4 * lane;
#pragma unroll 1
    for (int token = 0; token < p_.M; ++token) {
      if (column < p_.K && p_.x_alignment >= 4) {
        copy_async_4(to, from);
      } else {
        *reinterpret_cast<uint32_t*>(to) = column < p_.K ? from[0].bits | static_cast<uint32_t>(from[1].bits) << 16 : 0;
      }
      from += p_.x_stride;
      to += kPitch;
    }
  }

  const NmLinearCuda& p_;
  unsigned char* memory_;
  const unsigned char *values_[kStrips], *metadata_;
  const T* x_;
  int next_, last_;  // chunks
  int slot_ = 0, lane_bytes_;
};

template <class T, int kTiles, int kStrips>
__global__ void __launch_bounds__(kMaxWarps * 32) nm_linear_kernel(const NmLinearCuda p) {
  static_assert(kStages * kRecord >= kTiles * 4 * 32 * 4, "a warp's sums take the place of its ring");
  static_assert(kStrips <= 4, "a lane copies metadata of one strip");
  FASTICL_SHARED(shared);  // a ring for each warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, splits = blockDim.x / 32;
  const int ring_bytes = kStages * p.stage_bytes;
  const int64_t strip0 = static_cast<int64_t>(blockIdx.x) * kStrips;
  const int first = p.chunks * warp / splits, last = p.chunks * (warp + 1) / splits;
  unsigned char* const memory = shared + warp * ring_bytes;
  Ring<T, kTiles, kStrips> ring(p, memory, strip0, first, last);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) ring.fetch();

  // Where the lane's rows of operand B begin in a slot, by tile of 8 tokens; of a token past the last one, that one's:
  // no sum is kept.
  int rows[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = tile * 8 + lane % 8;
    rows[tile] = kStrips * kRecord + (token < p.M ? token : p.M - 1) * kPitch + lane / 8 * 16;
  }

  float sums[kStrips][kTiles][4] = {};
  int at = 0;  // slot
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    copy_async_wait<kStages - 2>();
    __syncwarp();  // every lane's copies have arrived, and the slot before this one has been read
    ring.fetch();
    const unsigned char* const slot = memory + at * p.stage_bytes;
    at = at + 1 < kStages ? at + 1 : 0;
    uint32_t metadata[kStrips];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      metadata[s] = *reinterpret_cast<const uint32_t*>(slot + s * kRecord + kMetadata + lane * 4);
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const uint4 v = *reinterpret_cast<const uint4*>(slot + s * kRecord + step * kValues + lane * 16);
        a[s][0] = v.x, a[s][1] = v.y, a[s][2] = v.z, a[s][3] = v.w;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t b[4];
        load_matrices(b, slot + rows[tile] + step * 64);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          if (step == 0) {
            mma_sp<0>(sums[s][tile], a[s], b, metadata[s], T{});
          } else {
            mma_sp<1>(sums[s][tile], a[s], b, metadata[s], T{});
          }
        }
      }
    }
  }

  __syncwarp();  // all copies have landed, and the last slot has been read
#pragma unroll
  for (int i = 0; i < kStrips * kTiles * 4; ++i) {
    reinterpret_cast<float*>(memory)[i * 32 + lane] = sums[i / 4 / kTiles][i / 4 % kTiles][i % 4];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kStrips * kStrip * p.M; i += blockDim.x) {
    const int output = i % (kStrips * kStrip), token = i / (kStrips * kStrip);
    const int64_t n = strip0 * kStrip + output;
    if (n >= p.N) continue;
    const int tile = output / kStrip * kTiles + token / 8;  // of all strips'
    const int held = (tile * 4 + output % kStrip / 8 * 2 + token % 2) * 32 + output % 8 * 4 + token % 8 / 2;
    float sum = 0.0f;
    for (int w = 0; w < splits; ++w) sum += reinterpret_cast<const float*>(shared + w * ring_bytes)[held];
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
    from_float(activate(p.activation, sum), static_cast<T*>(p.y)[token * p.y_stride + n]);
  }
}

template <class T, int kTiles, int kStrips>
void run(NmLinearCuda p, int splits, DeviceLimits limits, int device, uintptr_t stream) {
  const int64_t blocks = (p.strips + kStrips - 1) / kStrips;
  p.stage_bytes = kStrips * kRecord + p.M * kPitch;
  const int ring_bytes = kStages * p.stage_bytes;
  if (splits == 0) {
    const int64_t wanted = (static_cast<int64_t>(kWantedWarps) * limits.multiprocessors + blocks - 1) / blocks;
    splits = static_cast<int>(wanted < p.chunks / kMinShare ? wanted : p.chunks / kMinShare);
  }
  const int fit = limits.shared_bytes / ring_bytes, most = fit < kMaxWarps ? fit : kMaxWarps;
  splits = splits < 1 ? 1 : splits < most ? splits : most;
  launch("nm_linear", nm_linear_kernel<T, kTiles, kStrips>, blocks, splits * 32, splits * ring_bytes, device, stream,
         p);
}

template <class T, int kTiles>
void run(const NmLinearCuda& p, NmLinearPlan plan, DeviceLimits limits, int device, uintptr_t stream) {
  // As many strips as leave a block for nine multiprocessors of ten: the more, the less often x is read.
  const auto fills = [&](int strips) { return 10 * p.strips >= 9ll * strips * limits.multiprocessors; };
  if (plan.strips == 0) plan.strips = fills(4) ? 4 : fills(2) ? 2 : 1;
  if (plan.strips == 4) return run<T, kTiles, 4>(p, plan.splits, limits, device, stream);
  if (plan.strips == 2) return run<T, kTiles, 2>(p, plan.splits, limits, device, stream);
  run<T, kTiles, 1>(p, plan.splits, limits, device, stream);
}

template <class T>
void run(const NmLinearCuda& p, NmLinearPlan plan, int device, uintptr_t stream) {
  const DeviceLimits found = limits(device, "nm_linear");
  if (p.M <= 8) return run<T, 1>(p, plan, found, device, stream);
  if (p.M <= 16) return run<T, 2>(p, plan, found, device, stream);
  if (p.M <= 32) return run<T, 4>(p, plan, found, device, stream);
  run<T, 8>(p, plan, found, device, stream);
}

}  // namespace

void nm_linear_cuda(NmLinearCuda p, NmLinearPlan plan, DType dtype, int device, uintptr_t stream) {
  if (p.M > kMaxTokens) {
    throw std::invalid_argument("nm_linear: expected at most 64 tokens, got " + std::to_string(p.M));
  }
  if (p.M == 0 || p.strips == 0) return;
  const auto both = reinterpret_cast<uintptr_t>(p.x) | (p.M == 1 ? 0 : static_cast<uintptr_t>(p.x_stride) * 2);
  p.x_alignment = both % 16 == 0 ? 16 : both % 4 == 0 ? 4 : 2;
  if (dtype == DType::bf16) return run<bf16>(p, plan, device, stream);
  run<f16>(p, plan, device, stream);
}

}  // namespace fasticl
