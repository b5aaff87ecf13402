// sliced_linear on CUDA, and bitmap_linear of few non-zeros: sm_80 and newer, up to 8 tokens, bfloat16 and float16.
// Each lane walks its own list of values (fasticl/gather_layout.py), reads of x what each of them multiplies from
// shared memory, and adds up in float32: work goes with the values, not with the positions.
//
// x takes 16 bytes a column in shared memory, whatever the tokens: in float32 four times for 1 token and twice for 2,
// in its own type twice for 4 and once for 8, tokens side by side. Eight columns are 128 bytes, all banks; lane
// l = 8 r + c reads only columns 8 j + c, of the copy r % copies, so that the lanes that are served together (32 of 4
// bytes, 16 of 8, 8 of 16) never share a bank, and a step of j is 128 bytes.
//
// A block keeps its share of x for all its groups. Its warps meet nobody: a group's sums are its warp's own, and are
// added in one order. Where K has several shares, each block leaves its sums in a workspace, and the last one of those
// that have the same groups adds them, in their order and not in that of coming.
//
// Budget, for an H200: 132 multiprocessors, 1.7 GHz, 4.3 TB/s; computed, with instructions counted in the machine code
// (tests/test_cuda_build.py): nothing was timed. "x" is speed against a dense product that runs at the bandwidth.
//   bytes         2.67 an entry; with what fills lists up 3.1 a value at density 0.2 and 3.4 at 0.1 for K = 4096, 2.9
//                 and 3.1 for K = 14336: 3.3x and 5.9x, 3.5x and 6.5x
//   instructions  7.3, 8.3, 14.3 and 23 an entry for 1, 2, 4 and 8 tokens: 0.41, 0.47, 0.80 and 1.3 of its bytes' time
//   shared memory 1, 2, 2 and 4 cycles for 32 entries: 0.22, 0.45, 0.45 and 0.9 of its bytes' time
// Bytes bound it up to 4 tokens, instructions with 5 to 8: 2.5x and 4.6x, 2.7x and 5.0x. Launch, fetching x and the
// last warps' ends come on top; the smaller the weight, the more they count. The lane stream (bitmap_linear_cuda.cu)
// has 2.7x at most whatever the density, and takes over where that is more: from density 0.25 on, with 5 to 8 tokens
// from 0.18 on (fasticl/ops/bitmap_linear.py).
// A warp has up to 8 records of 512 bytes under way, 6 warps of a multiprocessor 24 KiB; with 5 to 8 tokens half.
#include "device.h"
#include "sliced_linear_cuda.h"

namespace fasticl {
namespace {

using namespace gather_layout;

constexpr int kThreads = kMaxWarps * 32;  // of a block, even where fewer warps have groups: all of them fetch x

// Where a lane's first column is in shared memory: `size` bytes, in so many copies.
FASTICL_CONSTEXPR int first_column(int lane, int size, int copies) {
  return lane / kClasses % copies * (kEightBytes / copies) + lane % kClasses * size;
}

// Whether lanes that are served together, as many as read 128 bytes, are in different ones of the 32 banks of 4 bytes,
// whatever j they are at: their first columns tell, because a j is all banks.
constexpr bool use_all_banks(int size, int copies) {
  for (int first = 0; first < 32; first += 128 / size) {
    uint32_t banks = 0;
    for (int lane = first; lane < first + 128 / size; ++lane) {
      for (int word = 0; word < size / 4; ++word) {
        banks |= 1u << (first_column(lane, size, copies) / 4 + word) % 32;
      }
    }
    if (banks != 0xffffffffu) return false;
  }
  return kEightBytes == 128;
}

struct alignas(16) Floats {
  float v[4];
};

// What shared memory holds of a column.
template <class T, int kTokens>
struct Column;

template <class T>
struct Column<T, 1> {
  static constexpr int kCopies = 4;
  float x;

  FASTICL_DEVICE void multiply(float w, float (&sums)[1]) const { sums[0] = fmaf(w, x, sums[0]); }
};

template <class T>
struct alignas(8) Column<T, 2> {
  static constexpr int kCopies = 2;
  float x[2];

  FASTICL_DEVICE void multiply(float w, float (&sums)[2]) const {
    sums[0] = fmaf(w, x[0], sums[0]);
    sums[1] = fmaf(w, x[1], sums[1]);
  }
};

template <class T>
FASTICL_DEVICE float low(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}

template <class T>
FASTICL_DEVICE float high(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

template <class T, int kTokens>
struct alignas(2 * kTokens) Column {
  static constexpr int kCopies = 8 / kTokens;
  uint32_t x[kTokens / 2];

  FASTICL_DEVICE void multiply(float w, float (&sums)[kTokens]) const {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      sums[2 * i] = fmaf(w, low<T>(x[i]), sums[2 * i]);
      sums[2 * i + 1] = fmaf(w, high<T>(x[i]), sums[2 * i + 1]);
    }
  }
};

FASTICL_DEVICE uint32_t lows(uint32_t a, uint32_t b) { return permute(a, b, 0x5410); }
FASTICL_DEVICE uint32_t highs(uint32_t a, uint32_t b) { return permute(a, b, 0x7632); }

// Columns 8 first to 8 last - 1 of x to shared memory, at least eight; zeros from the last token and from K on. Stores
// go by turns of copies, or of columns, so that eight threads together write to all banks.
template <class T, int kTokens>
FASTICL_DEVICE void fetch_tokens(const SlicedLinearCuda& p, int first, int last, unsigned char* shared) {
  constexpr int kColumns = kTokens == 1 ? 4 : 2, kTasks = 8 / kColumns;  // of a task; of eight columns
  const auto two = [&](int token, int column) -> uint32_t {
    const T* const x = static_cast<const T*>(p.x) + token * p.x_stride + column;
    if (token >= p.M || column >= p.K) return 0;
    if (p.x_words && column + 1 < p.K) return *reinterpret_cast<const uint32_t*>(x);
    return x[0].bits | (column + 1 < p.K ? static_cast<uint32_t>(x[1].bits) << 16 : 0);
  };
  const int tasks = (last > first ? last - first : 1) * kTasks;
#pragma unroll 2
  for (int i = threadIdx.x; i < tasks; i += kThreads) {
    const int j = i / kTasks, q = i % kTasks, column = (first + j) * 8 + q * kColumns;
    unsigned char* const to = shared + j * kEightBytes + q * (kTokens == 8 ? 32 : 16);
    if constexpr (kTokens == 1) {
      const uint32_t a = two(0, column), b = two(0, column + 2);
      const Floats held{low<T>(a), high<T>(a), low<T>(b), high<T>(b)};
#pragma unroll
      for (int copy = 0; copy < 4; ++copy) *reinterpret_cast<Floats*>(to + (copy + j) % 4 * 32) = held;
    } else if constexpr (kTokens == 2) {
      const uint32_t a = two(0, column), b = two(1, column);
      const Floats held{low<T>(a), low<T>(b), high<T>(a), high<T>(b)};
#pragma unroll
      for (int copy = 0; copy < 2; ++copy) *reinterpret_cast<Floats*>(to + (copy + j) % 2 * 64) = held;
    } else if constexpr (kTokens == 4) {
      const uint32_t a = two(0, column), b = two(1, column), c = two(2, column), d = two(3, column);
      const uint4 held{lows(a, b), lows(c, d), highs(a, b), highs(c, d)};
#pragma unroll
      for (int copy = 0; copy < 2; ++copy) *reinterpret_cast<uint4*>(to + (copy + j) % 2 * 64) = held;
    } else {
      uint32_t words[8];
#pragma unroll
      for (int token = 0; token < 8; ++token) words[token] = two(token, column);
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        const int odd = (turn + j) % 2;
        uint32_t held[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          held[pair] = permute(words[2 * pair], words[2 * pair + 1], odd ? 0x7632 : 0x5410);
        }
        *reinterpret_cast<uint4*>(to + odd * 16) = {held[0], held[1], held[2], held[3]};
      }
    }
  }
}

// Adds up what the eight lanes of a row have of each token. Lane c of them is left with token c / (8 / kTokens), in
// sums[0].
template <int kTokens>
FASTICL_DEVICE void add_lanes(float (&sums)[kTokens], int c) {
  int n = kTokens;
#pragma unroll
  for (int other = 4; other > 0; other /= 2) {
    if (n > 1) {
      n /= 2;
#pragma unroll
      for (int i = 0; i < n; ++i) {  // half of the tokens goes to the other lane
        const float a = sums[i], b = sums[i + n];
        sums[i] = (c & other ? b : a) + shuffle_xor(c & other ? a : b, other);
      }
    } else {
      sums[0] += shuffle_xor(sums[0], other);
    }
  }
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) sliced_linear_kernel(const SlicedLinearCuda p) {
  using X = Column<T, kTokens>;
  static_assert(sizeof(X) * X::kCopies * kClasses == kEightBytes, "eight columns in all their copies");
  constexpr int kAhead = kTokens < 8 ? 8 : 4;  // records
  constexpr int kLanesAToken = 8 / kTokens;
  FASTICL_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / kClasses, c = lane % kClasses;
  const int share = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
  const auto place = [&](int worker) {
    return static_cast<int>(static_cast<int64_t>(p.groups) * worker / (p.blocks * p.warps));
  };
  int group = warp < p.warps ? place(block * p.warps + warp) : 0;
  const int last = warp < p.warps ? place(block * p.warps + warp + 1) : 0;
  const int32_t* const starts = p.starts + static_cast<int64_t>(share) * p.groups;

  // The records of a warp's groups follow each other: `left` are yet to be multiplied, kAhead of them in registers.
  int at = starts[group], left = starts[last] - at;
  const uint4* next = static_cast<const uint4*>(p.records) + static_cast<int64_t>(at) * 32 + lane;
  uint4 records[kAhead] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < left) records[i] = next[i * 32];
  }
  const int64_t eights = (p.K + 7) / 8;
  fetch_tokens<T, kTokens>(p, static_cast<int>(eights * share / p.shares),
                           static_cast<int>(eights * (share + 1) / p.shares), shared);
  __syncthreads();

  const auto write = [&](int n, int token, float sum) {
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
    from_float(activate(p.activation, sum), static_cast<T*>(p.y)[token * p.y_stride + n]);
  };
  auto* const counts = static_cast<unsigned long long*>(p.workspace);
  float* const partial = reinterpret_cast<float*>(counts + p.blocks);  // [shares, groups * 4, kTokens]
  const int64_t group_sums = kGroup * kTokens, share_sums = p.groups * group_sums;

  const unsigned char* const begin = shared + first_column(lane, sizeof(X), X::kCopies);
  const auto end_of = [&](int g) { return starts[g < last ? g + 1 : last]; };
  const auto row_of = [&](int g) { return g < last ? p.row_order[g * static_cast<int64_t>(kGroup) + r] : -1; };
  int end = end_of(group), n = row_of(group);  // and those of the group after it: their latency is hidden
  int next_end = end_of(group + 1), next_n = row_of(group + 1);
  const unsigned char* column = begin;
  int slot = 0;  // of the next record
  float sums[kTokens] = {};
#pragma unroll 1
  while (group < last) {
    const int until = end - at < kAhead - slot ? slot + end - at : kAhead;
    at += until - slot;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < slot || i >= until) continue;
      const uint32_t values[3] = {records[i].x, records[i].y, records[i].z}, steps = records[i].w;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        constexpr int kShift = 7;  // 128 bytes
        const int right = e * kStepBits - kShift;
        column += (right < 0 ? steps << -right : steps >> right) & ((1u << kStepBits) - 1) << kShift;
        const X x = *reinterpret_cast<const X*>(column);
        x.multiply(e % 2 ? high<T>(values[e / 2]) : low<T>(values[e / 2]), sums);
      }
      if (left > kAhead) records[i] = next[(i + kAhead) * 32];
      --left;
    }
    slot = until;
    if (slot == kAhead) slot = 0, next += kAhead * 32;
    if (at < end) continue;
    add_lanes(sums, c);
    const int token = c / kLanesAToken;
    if (c % kLanesAToken == 0) {
      if (p.shares > 1) {
        partial[share * share_sums + group * group_sums + r * kTokens + token] = sums[0];
      } else if (token < p.M && n >= 0) {
        write(n, token, sums[0]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t] = 0.0f;
    column = begin;
    ++group;
    end = next_end, n = next_n;
    next_end = end_of(group + 1), next_n = row_of(group + 1);
  }
  if (p.shares == 1) return;

  if (!comes_last(counts + block, p.shares, p.counts)) return;
  const int64_t sums_end = place((block + 1) * p.warps) * group_sums;
  for (int64_t i = place(block * p.warps) * group_sums + threadIdx.x; i < sums_end; i += kThreads) {
    const int token = static_cast<int>(i % kTokens), row = p.row_order[i / kTokens];
    if (token >= p.M || row < 0) continue;
    float sum = 0.0f;
    for (int s = 0; s < p.shares; ++s) sum += partial[s * share_sums + i];
    write(row, token, sum);
  }
}

int width_of(int M) { return M <= 2 ? M : M <= 4 ? 4 : 8; }  // tokens that a kernel computes

template <class T, int kTokens>
void run(const SlicedLinearCuda& p, int device, uintptr_t stream) {
  using X = Column<T, kTokens>;
  static_assert(use_all_banks(sizeof(X), X::kCopies), "lanes that are served together share no bank");
  const int eights = (p.K + 7) / 8, most = (eights + p.shares - 1) / p.shares;
  launch("sliced_linear", sliced_linear_kernel<T, kTokens>, static_cast<int64_t>(p.shares) * p.blocks, kThreads,
         (most > 0 ? most : 1) * kEightBytes, device, stream, p);
}

template <class T>
void run(SlicedLinearCuda p, int device, uintptr_t stream) {
  const auto both = reinterpret_cast<uintptr_t>(p.x) | (p.M == 1 ? 0 : static_cast<uintptr_t>(p.x_stride) * 2);
  p.x_words = both % 4 == 0;
  p.counts = counts_of_a_launch();
  switch (width_of(p.M)) {
    case 1:
      return run<T, 1>(p, device, stream);
    case 2:
      return run<T, 2>(p, device, stream);
    case 4:
      return run<T, 4>(p, device, stream);
    default:
      return run<T, 8>(p, device, stream);
  }
}

}  // namespace

int64_t sliced_linear_workspace(int M, int groups, int shares, int blocks) {
  if (shares == 1 || M == 0) return 0;
  const int64_t sums = static_cast<int64_t>(shares) * groups * kGroup * width_of(M);
  return blocks * int64_t{sizeof(unsigned long long)} + sums * int64_t{sizeof(float)};
}

void sliced_linear_cuda(SlicedLinearCuda p, DType dtype, int device, uintptr_t stream) {
  if (p.M > kMaxTokens) {
    throw std::invalid_argument("sliced_linear: expected at most 8 tokens, got " + std::to_string(p.M));
  }
  if (p.M == 0 || p.groups == 0) return;
  if (dtype == DType::bf16) return run<bf16>(p, device, stream);
  run<f16>(p, device, stream);
}

}  // namespace fasticl
