// CUDA kernels on the CPU: the twins of device.h's instructions, and blocks whose threads are fibers. For tests of what
// a kernel computes and where it reads and writes; not of speed, and not of the memory model beyond what is said here.
//
// Blocks begin in an order drawn from the seed, and up to kResident of them run in turns. A fiber runs until it waits
// at a barrier or a warp's instruction, or comes to an atomic one; which one runs next is drawn too, so that a missing
// barrier shows in some order. What one thread has written the others see at once: a missing __threadfence shows in no
// order. Asynchronous copies land as early or as late as they may, drawn too: late ones miss if nobody waits for them,
// early ones overwrite what is still being read. Shared memory has the launch's size exactly, for AddressSanitizer, and
// holds NaN when a block begins.
//
// Of sm_90a: bulk copies land when they are issued, or when somebody waits for their barrier. Products of wgmma read
// their operands and add when they are issued, or when their warp waits for them; each warp's part on its own, so that
// what another warp of the warpgroup writes without a barrier may come too late. What is stored to shared memory for
// wgmma without the fence that shows it to the asynchronous proxy is an error, and so is a product without its fence.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../types.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define FASTICL_HOPPER 1
#define FASTICL_DEVICE inline
#define FASTICL_CONSTEXPR constexpr
#define FASTICL_SHARED(name) unsigned char* const name = ::fasticl::cuda_on_cpu::block->shared.get()
#define __global__
#define __launch_bounds__(...)

namespace fasticl {

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;

struct Barrier {             // mbarrier
  int16_t threads, missing;  // that come in a phase, that have yet to come
  int32_t bytes : 31;        // announced and not landed
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == 8, "as in shared memory of a GPU");

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kResident = 3;       // blocks
constexpr int kSharedLimit = 232448;  // bytes that a block of sm_90 may ask for
enum class Copies { late, early, drawn };
enum class State { ready, waiting, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct BulkCopy {
  Copy copy;
  Barrier* barrier;
};

// A warp's products of one wgmma: of each lane the sums and operand A, and the descriptor of operand B.
struct Products {
  std::vector<float*> d;
  std::vector<const uint32_t*> a;
  uint64_t b;
  void (*run)(const Products&);
};

struct Wgmma {
  bool fenced = false;
  size_t committed = 0;
  std::vector<Products> under_way;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  bool late;                 // goes on after a pause, when no thread of its block that is not late can
  std::vector<Copy> copies;  // that have not landed
  int group;                 // of copies that is being filled
  Barrier* waits_for;
  std::vector<size_t> unfenced;  // units of 16 bytes of shared memory
  void* sanitizer;               // AddressSanitizer's fake stack
};

// Where threads meet: who has come, with what.
struct Meeting {
  const char* what = nullptr;
  std::vector<void*> arguments;
  int arrived = 0;
};

struct Block {
  Index index;
  ucontext_t scheduler;
  void* sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<Wgmma> products;        // by warp
  std::vector<BulkCopy> bulk_copies;  // that have not landed
  std::vector<bool> unfenced;         // units of 16 bytes of shared memory that the asynchronous proxy may not see
  int shared_bytes = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  std::function<void()> kernel;
  std::string error;
  unsigned current = 0;
  std::mt19937 draw;
  Copies copies = Copies::drawn;
  int pause = 0;  // turns until late threads go on
};

inline Block* block = nullptr;
inline unsigned seed = 0;

inline Fiber& self() { return block->fibers[block->current]; }

// Leaves the fiber for the scheduler.
inline void yield(bool last = false) {
  Fiber& fiber = self();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.sanitizer, block->scheduler_stack, block->scheduler_bytes);
#endif
  (void)last;
  swapcontext(&fiber.context, &block->scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.sanitizer, nullptr, nullptr);
#endif
}

inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_bytes);
#endif
  block->kernel();
  self().state = State::done;
  yield(true);
}

inline void resume(unsigned i) {
  Fiber& fiber = block->fibers[i];
  block->current = i;
  threadIdx.x = i;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block->sanitizer, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block->sanitizer, nullptr, nullptr);
#endif
}

// Waits until all threads of `meeting`, which are those from `first` on, have come to the same place; the last one to
// come does what is done there with everybody's arguments.
template <class Action>
void meet(Meeting& meeting, unsigned first, const char* what, void* argument, const Action& action) {
  if (meeting.arrived == 0) meeting.what = what;
  if (meeting.what != what) {
    block->error = std::string("threads of a warp or block meet at ") + meeting.what + " and " + what;
  }
  meeting.arguments[block->current - first] = argument;
  if (++meeting.arrived < static_cast<int>(meeting.arguments.size())) {
    self().state = State::waiting;
    return yield();
  }
  action(meeting.arguments);
  meeting.arrived = 0;
  for (size_t i = 0; i < meeting.arguments.size(); ++i) block->fibers[first + i].state = State::ready;
}

template <class Action>
void meet_warp(const char* what, void* argument, const Action& action) {
  const unsigned warp = block->current / kWarp;
  meet(block->warps[warp], warp * kWarp, what, argument, action);
}

inline void land(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

inline bool is_early() {
  return block->copies == Copies::early || (block->copies == Copies::drawn && block->draw() % 2);
}

inline void copy_async(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    block->error = "cp.async of " + std::to_string(bytes) + " bytes: a misaligned address";
    return;
  }
  const Copy copy{to, from, bytes, self().group};
  if (is_early()) {
    land(copy);
  } else {
    self().copies.push_back(copy);
  }
}

inline void begin(Block& b, unsigned index, int threads, int shared_bytes, const std::function<void()>& kernel) {
  b.index.x = index;
  if (static_cast<int>(b.fibers.size()) < threads) b.fibers.resize(threads);
  b.warps.resize(threads / kWarp);
  for (Meeting& warp : b.warps) warp.arguments.resize(kWarp);
  b.all.arguments.resize(threads);
  b.products.assign(threads / kWarp, {});
  b.unfenced.assign(shared_bytes / 16 + 1, false);
  b.shared_bytes = shared_bytes;
  b.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128)));
  std::memset(b.shared.get(), 0xff, shared_bytes);
  b.kernel = kernel;
  b.draw.seed(seed * 7919 + index);
  b.copies = static_cast<Copies>(seed % 3);
  const unsigned late = b.draw() % 3;  // none, some threads, some warps
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.state = State::ready;
    fiber.late = late == 2 && i % kWarp ? b.fibers[i - 1].late : late && b.draw() % 2;
    fiber.copies.clear();
    fiber.group = 0;
    fiber.waits_for = nullptr;
    fiber.unfenced.clear();
    fiber.sanitizer = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

[[noreturn]] inline void fail(const std::string& error) { throw std::runtime_error("CUDA on the CPU: " + error); }

// Lets the threads of a block that can go on do so, late ones after the others. Returns whether all are done; throws
// where they wait for others that never come.
inline bool advance(Block& b, int threads) {
  std::vector<unsigned> ready;
  int done = 0;
  for (int i = 0; i < threads; ++i) {
    if (b.fibers[i].state == State::ready) ready.push_back(i);
    done += b.fibers[i].state == State::done;
  }
  if (done == threads) return true;
  if (ready.empty()) fail("threads wait at a barrier that others of their warp or block never reach");
  const auto late = std::partition(ready.begin(), ready.end(), [&](unsigned i) { return !b.fibers[i].late; });
  if (late != ready.begin()) {
    ready.erase(late, ready.end());
  } else if (b.pause == 0) {
    b.pause = static_cast<int>(1 + b.draw() % 8);
    return false;
  } else {
    b.pause = 0;
  }
  std::shuffle(ready.begin(), ready.end(), b.draw);
  block = &b;
  blockIdx = b.index;
  for (const unsigned i : ready) {
    if (b.error.empty()) resume(i);
  }
  block = nullptr;
  if (!b.error.empty()) fail(b.error);
  return false;
}

inline void run_grid(unsigned blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  static std::vector<std::vector<Fiber>> spare;  // stacks are kept from block to block
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937 draw(seed);
  std::shuffle(order.begin(), order.end(), draw);
  std::vector<std::unique_ptr<Block>> resident;
  for (size_t next = 0; next < blocks || !resident.empty();) {
    while (next < blocks && resident.size() < kResident) {
      resident.push_back(std::make_unique<Block>());
      if (!spare.empty()) {
        resident.back()->fibers.swap(spare.back());
        spare.pop_back();
      }
      begin(*resident.back(), order[next++], threads, shared_bytes, kernel);
    }
    const auto some = resident.begin() + draw() % resident.size();
    Block& b = **some;
    if (resident.size() == 1) b.pause = std::min(b.pause, 1);
    if (b.pause > 1) {
      --b.pause;
      continue;
    }
    bool done = false;
    for (int rounds = 1 << draw() % 6; !done && rounds && b.pause <= 1; --rounds) {
      done = advance(b, threads);
    }
    if (!done) continue;
    spare.emplace_back().swap((*some)->fibers);
    resident.erase(some);
  }
}

inline float value(uint32_t word, int high, bf16) {
  const uint32_t bits = high ? word & 0xffff0000u : word << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float value(uint32_t word, int high, f16) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * high);
  _Float16 result;
  std::memcpy(&result, &bits, 2);
  return result;
}

struct Operands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Sums in the order of k, each rounded to float32; tensor cores have an order and a rounding of their own.
template <class T>
void multiply(const std::vector<void*>& lanes, T type) {
  const auto of = [&](int lane) -> const Operands& { return *static_cast<const Operands*>(lanes[lane]); };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = of(lane).d[i];
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
        const uint32_t b = of(column * 4 + k % 8 / 2).b[k / 8];
        sum += value(a, k % 2, type) * value(b, k % 2, type);
      }
      of(lane).d[i] = sum;
    }
  }
}

struct SparseOperands {
  float* d;
  const uint32_t *a, *b;
  uint32_t metadata;
};

// mma.sp::ordered_metadata.m16n8k32 by the PTX ISA's section "Matrix Fragments for sparse mma.m16n8k32 with .f16 and
// .bf16 types": element a_i of a lane, i from 0 to 7, is of row laneid / 4, but 8 more for i = 2, 3, 6 and 7, and of
// the four columns that begin at laneid % 4 * 4, but 16 more from i = 4 on; which of the four, the metadata say. Those
// of columns 0 to 15 are in the first, of 16 to 31 in the second lane of the pair that the selector chooses among four:
// of the lane's row in bits 0 to 15, of the row 8 below it in bits 16 to 31, two bits a value from the lowest column
// on. b_i is of row laneid % 4 * 2 + i % 2 + i / 2 * 8, column laneid / 4. What is not stored is not multiplied.
template <class T>
void multiply_sparse(const std::vector<void*>& lanes, int selector, T type) {
  const auto of = [&](int lane) -> const SparseOperands& { return *static_cast<const SparseOperands*>(lanes[lane]); };
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& d = of(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
      for (int chunk = 0; chunk < 8; ++chunk) {  // four columns of A
        const uint32_t metadata = of(row % 8 * 4 + selector * 2 + chunk / 4).metadata >> row / 8 * 16;
        const int low = metadata >> chunk % 4 * 4 & 3, high = metadata >> chunk % 4 * 4 >> 2 & 3;
        if (low >= high) block->error = "mma.sp::ordered_metadata: metadata that do not ascend";
        const uint32_t a = of(row % 8 * 4 + chunk % 4).a[chunk / 4 * 2 + row / 8];
        for (const int i : {0, 1}) {
          const int k = chunk * 4 + (i ? high : low);
          d += value(a, i, type) * value(of(column * 4 + k % 8 / 2).b[k / 8], k % 2, type);
        }
      }
    }
  }
}

// ---- sm_90a

inline size_t unit_of(const void* shared) {
  return static_cast<size_t>(static_cast<const unsigned char*>(shared) - block->shared.get()) / 16;
}

inline void unfence(const void* shared) {
  self().unfenced.push_back(unit_of(shared));
  block->unfenced[unit_of(shared)] = true;
}

// A phase whose threads have come and whose bytes have landed is over: those that wait go on.
inline void settle_phase(Barrier* barrier) {
  if (barrier->missing || barrier->bytes) return;
  barrier->phase ^= 1;
  barrier->missing = barrier->threads;
}

inline void wake(const Barrier* barrier) {
  for (Fiber& fiber : block->fibers) {
    if (fiber.waits_for == barrier) fiber.waits_for = nullptr, fiber.state = State::ready;
  }
}

inline void land_bulk(const BulkCopy& bulk) {
  land(bulk.copy);
  bulk.barrier->bytes -= bulk.copy.bytes;
  settle_phase(bulk.barrier);
  wake(bulk.barrier);
}

// The part of wgmma.m64n64k16 that is a warp's, by the PTX ISA's "Matrix Fragments for wgmma.mma_async.m64nNk16": of
// warp w of a warpgroup, element a_i of a lane is of row 16 w + laneid / 4, but 8 more for i = 2, 3, 6 and 7, and
// column laneid % 4 * 2 + i % 2, but 8 more from i = 4 on; d_i is of row 16 w + laneid / 4 + i / 2 % 2 * 8 and column
// i / 4 * 8 + laneid % 4 * 2 + i % 2. B lies as "Matrix Descriptor Format" says: bits 0 to 13 are the start address,
// 16 to 29 the distance of core matrices along K (the leading dimension), 32 to 45 of those along N, all in units of 16
// bytes; 62 and 63 the swizzle, here none; a core matrix is 8 rows of N, 16 bytes each, one after the other.
template <class T>
void multiply_wgmma(const Products& products) {
  const uint64_t b = products.b;
  if (b >> 46) return void(block->error = "wgmma: a descriptor with swizzle, base offset or reserved bits");
  const size_t start = (b & 0x3fff) * 16, k_stride = (b >> 16 & 0x3fff) * 16, n_stride = (b >> 32 & 0x3fff) * 16;
  if (start + 7 * n_stride + k_stride + 128 > static_cast<size_t>(block->shared_bytes)) {
    return void(block->error = "wgmma: operand B beyond shared memory");
  }
  float columns[64][16], rows[16][16];
  for (int n = 0; n < 64; ++n) {
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const eight = block->shared.get() + start + n / 8 * n_stride + half * k_stride + n % 8 * 16;
      if (block->unfenced[unit_of(eight)]) block->error = "wgmma: operand B was written without fence.proxy.async";
      for (int i = 0; i < 4; ++i) {
        uint32_t word;
        std::memcpy(&word, eight + 4 * i, 4);
        for (const int high : {0, 1}) columns[n][8 * half + 2 * i + high] = value(word, high, T{});
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      rows[row][k] = value(products.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2, T{});
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < 64; ++n) {
      float& d = products.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
      for (int k = 0; k < 16; ++k) d += rows[row][k] * columns[n][k];
    }
  }
}

struct WgmmaOperands {
  float* d;
  const uint32_t* a;
  uint64_t b;
};

inline Wgmma& own_products() { return block->products[block->current / kWarp]; }

struct Shuffled {
  float given, got;
  int bits;
};

struct MatrixRow {
  uint32_t* words;
  const void* row;
};

}  // namespace cuda_on_cpu

// ---- the vocabulary of device.h -----------------------------------------------------------------------------

inline void __syncthreads() {
  cuda_on_cpu::meet(cuda_on_cpu::block->all, 0, "__syncthreads", nullptr, [](const auto&) {});
}

inline int __syncthreads_or(int predicate) {
  int any = predicate;
  cuda_on_cpu::meet(cuda_on_cpu::block->all, 0, "__syncthreads_or", &any, [](const auto& threads) {
    int result = 0;
    for (void* thread : threads) result |= *static_cast<int*>(thread) != 0;
    for (void* thread : threads) *static_cast<int*>(thread) = result;
  });
  return any;
}

inline void __syncwarp() {
  cuda_on_cpu::meet_warp("__syncwarp", nullptr, [](const auto&) {});
}

inline void __threadfence() {}

// Returns what *word was; it is `desired` then if that was `expected`. Others may go on before it and after it.
inline unsigned long long atomicCAS(unsigned long long* word, unsigned long long expected, unsigned long long desired) {
  const auto others = [] {
    if (cuda_on_cpu::block->draw() % 2) cuda_on_cpu::yield();
  };
  others();
  const unsigned long long before = *word;
  if (before == expected) *word = desired;
  others();
  return before;
}

inline int __popc(uint32_t v) { return __builtin_popcount(v); }

inline float shuffle_xor(float v, int bits) {
  using cuda_on_cpu::Shuffled;
  Shuffled own{v, v, bits};
  cuda_on_cpu::meet_warp("shfl", &own, [](const auto& lanes) {
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) {
      auto& to = *static_cast<Shuffled*>(lanes[lane]);
      to.got = static_cast<const Shuffled*>(lanes[lane ^ to.bits])->given;
    }
  });
  return own.got;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15;
    const uint32_t byte = static_cast<uint32_t>(both >> (choice & 7) * 8) & 0xff;
    result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;  // bit 3 repeats the sign
  }
  return result;
}

inline uint32_t shift_right_wrap(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift % 32);
}

inline uint32_t shift_right_clamp(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift < 32 ? shift : 32));
}

inline void copy_async_4(void* shared, const void* global) { cuda_on_cpu::copy_async(shared, global, 4); }
inline void copy_async_16(void* shared, const void* global) { cuda_on_cpu::copy_async(shared, global, 16); }
inline void copy_async_commit() { ++cuda_on_cpu::self().group; }

template <int kPending>
void copy_async_wait() {
  auto& fiber = cuda_on_cpu::self();
  auto& copies = fiber.copies;
  const auto pending = [&](const auto& copy) { return copy.group >= fiber.group - kPending; };
  const auto rest = std::stable_partition(copies.begin(), copies.end(), pending);
  std::for_each(rest, copies.end(), cuda_on_cpu::land);
  copies.erase(rest, copies.end());
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  cuda_on_cpu::Operands operands{d, a, {b0, b1}};
  cuda_on_cpu::meet_warp("mma", &operands, [&](const auto& lanes) { cuda_on_cpu::multiply(lanes, type); });
}

template <int kSelector, class T>
void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata, T type) {
  static_assert(kSelector == 0 || kSelector == 1, "a pair of lanes among four");
  cuda_on_cpu::SparseOperands operands{d, a, b, metadata};
  const char* const what = kSelector ? "mma.sp, selector 1" : "mma.sp, selector 0";
  cuda_on_cpu::meet_warp(what, &operands,
                         [&](const auto& lanes) { cuda_on_cpu::multiply_sparse(lanes, kSelector, type); });
}

// ldmatrix.m8n8.x4 by the PTX ISA: lanes 8 i to 8 i + 7 give the rows of matrix i; register i of a lane is of row
// laneid / 4 of matrix i, and of its columns laneid % 4 * 2 and the next.
inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  using cuda_on_cpu::MatrixRow;
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_on_cpu::block->error = "ldmatrix: a misaligned address";
  MatrixRow own{matrices, row};
  cuda_on_cpu::meet_warp("ldmatrix", &own, [](const auto& lanes) {
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto* const from = static_cast<const MatrixRow*>(lanes[8 * i + lane / 4]);
        std::memcpy(static_cast<MatrixRow*>(lanes[lane])->words + i,
                    static_cast<const unsigned char*>(from->row) + lane % 4 * 4, 4);
      }
    }
  });
}

// ---- the vocabulary of sm_90a -------------------------------------------------------------------------------

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - cuda_on_cpu::block->shared.get());
}

inline void barrier_init(Barrier* barrier, int threads) {
  *barrier = {static_cast<int16_t>(threads), static_cast<int16_t>(threads), 0, 0};
  cuda_on_cpu::unfence(barrier);
}

inline void barrier_expect(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  if (--barrier->missing < 0) cuda_on_cpu::block->error = "mbarrier: more threads than it counts";
  cuda_on_cpu::settle_phase(barrier);
  cuda_on_cpu::wake(barrier);
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  using namespace cuda_on_cpu;
  while (barrier->phase == parity) {
    auto& copies = block->bulk_copies;
    const auto found = std::find_if(copies.begin(), copies.end(), [&](const auto& c) { return c.barrier == barrier; });
    if (found != copies.end()) {
      const BulkCopy bulk = *found;
      copies.erase(found);
      land_bulk(bulk);
    } else {
      self().waits_for = barrier;
      self().state = State::waiting;
      cuda_on_cpu::yield();
    }
  }
}

inline uint64_t evict_first() { return 1; }

inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, uint64_t) {
  using namespace cuda_on_cpu;
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) % 16 || bytes <= 0) {
    block->error = "cp.async.bulk: a misaligned address or number of bytes";
    return;
  }
  if (block->unfenced[unit_of(barrier)]) block->error = "cp.async.bulk: a barrier without fence.proxy.async";
  const BulkCopy bulk{{shared, global, bytes, 0}, barrier};
  if (is_early()) {
    land_bulk(bulk);
  } else {
    block->bulk_copies.push_back(bulk);
    wake(barrier);
  }
}

inline void fence_proxy_async() {
  auto& fiber = cuda_on_cpu::self();
  for (const size_t unit : fiber.unfenced) cuda_on_cpu::block->unfenced[unit] = false;
  fiber.unfenced.clear();
}

inline void store_shared(void* shared, uint4 words) {
  std::memcpy(shared, &words, sizeof words);
  cuda_on_cpu::unfence(shared);
}

inline uint64_t descriptor(uint32_t matrix, uint32_t n_stride, uint32_t k_stride) {
  if ((matrix | n_stride | k_stride) % 16 || (matrix | n_stride | k_stride) >> 18) {
    cuda_on_cpu::block->error = "wgmma: a descriptor of misaligned or too large numbers";
  }
  return static_cast<uint64_t>(n_stride >> 4) << 32 | (k_stride >> 4) << 16 | matrix >> 4;
}

inline void wgmma_fence() {
  cuda_on_cpu::meet_warp("wgmma.fence", nullptr, [](const auto&) { cuda_on_cpu::own_products().fenced = true; });
}

template <class T>
void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, T) {
  using namespace cuda_on_cpu;
  WgmmaOperands operands{&d[0][0], a, b};
  meet_warp("wgmma", &operands, [](const auto& lanes) {
    Wgmma& own = own_products();
    Products products{{}, {}, static_cast<const WgmmaOperands*>(lanes[0])->b, multiply_wgmma<T>};
    for (void* lane : lanes) {
      const auto& given = *static_cast<const WgmmaOperands*>(lane);
      if (given.b != products.b) block->error = "wgmma: lanes with several descriptors";
      products.d.push_back(given.d);
      products.a.push_back(given.a);
    }
    if (!own.fenced) block->error = "wgmma: registers without wgmma.fence";
    own.under_way.push_back(products);
    if (!is_early()) return;
    // Those before it, whose results it takes, have been computed too.
    for (Products& each : own.under_way) {
      if (each.run) each.run(each);
      each.run = nullptr;
    }
  });
}

inline void wgmma_commit() {
  cuda_on_cpu::meet_warp("wgmma.commit_group", nullptr, [](const auto&) {
    auto& own = cuda_on_cpu::own_products();
    own.committed = own.under_way.size();
    own.fenced = false;  // operand A of the next ones is written to registers
  });
}

inline void wgmma_wait() {
  cuda_on_cpu::meet_warp("wgmma.wait_group", nullptr, [](const auto&) {
    auto& own = cuda_on_cpu::own_products();
    const auto end = own.under_way.begin() + static_cast<std::ptrdiff_t>(own.committed);
    std::for_each(own.under_way.begin(), end, [](const auto& each) {
      if (each.run) each.run(each);
    });
    own.under_way.erase(own.under_way.begin(), end);
    own.committed = 0;
  });
}

template <class Registers>
void settle(Registers&) {}

inline float to_float(bf16 v) { return cuda_on_cpu::value(v.bits, 0, v); }
inline float to_float(f16 v) { return cuda_on_cpu::value(v.bits, 0, v); }

inline void from_float(float v, bf16& result) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  result.bits = static_cast<uint16_t>(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float v, f16& result) {
  const _Float16 rounded = static_cast<_Float16>(v);
  std::memcpy(&result.bits, &rounded, 2);
}

struct DeviceLimits {
  int multiprocessors, shared_bytes;
};

inline DeviceLimits limits(int, const char*) { return {132, cuda_on_cpu::kSharedLimit}; }

template <class... Parameters>
bool has_hopper_code(const char*, void (*)(Parameters...), int) {
  return true;
}

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int,
            uintptr_t, const Arguments&... arguments) {
  if (blocks < 1 || blocks > INT32_MAX || threads % cuda_on_cpu::kWarp || threads > 1024 ||
      shared_bytes > cuda_on_cpu::kSharedLimit) {
    throw std::runtime_error(std::string(what) + ": invalid configuration argument");
  }
  blockDim.x = threads;
  cuda_on_cpu::run_grid(static_cast<unsigned>(blocks), threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace fasticl
