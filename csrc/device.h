// What CUDA kernels are written in: PTX instructions that C++ has no name for, conversions, activations, launching.
// Compiled by nvcc, or, with the twins in testing/cuda_on_cpu.h, by a C++ compiler for tests without a GPU.
#pragma once
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "types.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "testing/cuda_on_cpu.h"
#endif

namespace fasticl {

#ifdef __CUDACC__

#define FASTICL_DEVICE __device__ __forceinline__
#define FASTICL_CONSTEXPR __host__ __device__ constexpr

// `name` is the block's dynamic shared memory; more than 48 KiB is asked for by launch().
#define FASTICL_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// ---- bits ---------------------------------------------------------------------------------------------------

// Byte i of the result is byte (selector >> 4i) & 7 of {b, a}; the selector's upper half is ignored.
FASTICL_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// The low word of {high, low} >> shift % 32.
FASTICL_DEVICE uint32_t shift_right_wrap(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

// The low word of {high, low} >> min(shift, 32).
FASTICL_DEVICE uint32_t shift_right_clamp(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_rc(low, high, shift);
}

// ---- lanes ------------------------------------------------------------------------------------------------------

// What the lane whose index differs by these bits gives; all lanes of the warp take part.
FASTICL_DEVICE float shuffle_xor(float v, int bits) { return __shfl_xor_sync(0xffffffffu, v, bits); }

// ---- copies from global to shared memory that pass by the registers -----------------------------------------

// Each is complete for the thread that issued it once it has waited; for the other threads after a barrier as well.
FASTICL_DEVICE void copy_async_4(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}

FASTICL_DEVICE void copy_async_16(void* shared, const void* global) {  // addresses aligned to 16 bytes
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

FASTICL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
FASTICL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores -------------------------------------------------------------------------------------------

// d += A B, A [16, 16] by rows, B [16, 8] by columns, d [16, 8] in float32. Lane l = 4g + t holds
//   a[0] A[g, 2t..], a[1] A[g+8, 2t..], a[2] A[g, 2t+8..], a[3] A[g+8, 2t+8..]   two neighbours in k, the lower first
//   b0 B[2t.., g], b1 B[2t+8.., g]
//   d[0] (g, 2t), d[1] (g, 2t+1), d[2] (g+8, 2t), d[3] (g+8, 2t+1)
FASTICL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FASTICL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices [8, 8] of 16-bit elements from shared memory: lane 8 i + j gives the address of row j of matrix i, 16
// bytes aligned to 16, and lane 4 g + t gets of each its row g, columns 2t and 2t+1. Of x [tokens, columns] these are
// operands B, which are held by columns.
FASTICL_DEVICE void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(from)
               : "memory");
}

// d += A B, A [16, 32] of which two are stored in every four columns, B [32, 8], d as mma's. Lane l = 4g + t holds
//   a[0] the two of A[g, 4t..4t+3], a[1] of A[g+8, 4t..], a[2] of A[g, 4t+16..], a[3] of A[g+8, 4t+16..]
//   b[i] B[2t + 8i.., g]
//   metadata, if t / 2 is the selector: of the four groups of columns 16 (t % 2).., lower first, four bits each, the
//     places 0 to 3 of the lower and the upper value, the lower first; of row g below, of row g + 8 in bits 16 to 31
// PTX ISA 9.7.14.6 (mma.sp, sparse m16n8k32 with .f16 and .bf16, figures of the fragments and of the metadata). Ordered
// metadata (PTX 8.5) is that whose places ascend; on some targets plain mma.sp is much slower, says the PTX ISA.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define FASTICL_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col."
#else
#define FASTICL_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col."
#endif
#define FASTICL_MMA_SP_OPERANDS " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"

template <int kSelector>
FASTICL_DEVICE void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata, bf16) {
  asm(FASTICL_MMA_SP "f32.bf16.bf16.f32" FASTICL_MMA_SP_OPERANDS
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
}

template <int kSelector>
FASTICL_DEVICE void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata, f16) {
  asm(FASTICL_MMA_SP "f32.f16.f16.f32" FASTICL_MMA_SP_OPERANDS
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
}

// ---- Hopper: what only sm_90a has -------------------------------------------------------------------------------

// Kernels of these instructions have an empty body elsewhere; has_hopper_code() tells the host.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTICL_HOPPER 1
#endif

// A word in shared memory that counts threads and bytes. A phase is over when `threads` have come and all bytes that
// they announced have landed; phases have the parities 0, 1, 0, ... PTX ISA, mbarrier.
using Barrier = uint64_t;

FASTICL_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

FASTICL_DEVICE void barrier_init(Barrier* barrier, int threads) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(threads) : "memory");
}

// Announces bytes, and comes.
FASTICL_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of that parity, which is the current one or the one before, is over.
FASTICL_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}

// For data that are read once: L2 lets go of them first.
FASTICL_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies bytes, addresses and their number multiples of 16, from global to shared memory; they count at the barrier.
FASTICL_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Orders what this thread wrote to and read from shared memory before what bulk copies and wgmma do there later on.
FASTICL_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FASTICL_DEVICE void store_shared(void* shared, uint4 words) { *static_cast<uint4*>(shared) = words; }

// A matrix [n, k] of 16-bit elements in shared memory as wgmma finds it, by columns of 8 elements: the 16 bytes of (n,
// 8 c..) lie at `matrix` + n / 8 * `n_stride` + c * `k_stride` + n % 8 * 16. Addresses and strides are multiples of 16
// below 2^18. PTX ISA, matrix descriptor of wgmma: K-major without swizzle, whose leading dimension is k.
FASTICL_DEVICE uint64_t descriptor(uint32_t matrix, uint32_t n_stride, uint32_t k_stride) {
  return static_cast<uint64_t>(n_stride >> 4) << 32 | (k_stride >> 4) << 16 | matrix >> 4;
}

// Before the first product, and when registers of later products have been written.
FASTICL_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FASTICL_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups of products of this warp: their operands may be overwritten.
FASTICL_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Before a fence or after the wait: keeps the compiler from moving what is done with d or A to the other side.
FASTICL_DEVICE void settle(float (&d)[8][4]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

FASTICL_DEVICE void settle(uint32_t (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// d += A B, asynchronously, by the four warps of a warpgroup: warp w has the rows 16 w.. of A [64, 16] and d [64, 64],
// eight tiles of eight columns, in lanes as mma has them; B [16, 64] is the matrix of the descriptor, n its column. All
// four warps give the same one. PTX ISA, wgmma.mma_async, register fragments of m64nNk16.
#define FASTICL_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTICL_WGMMA(type)                                                                                            \
  asm volatile(                                                                                                        \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                      \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"               \
      "%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, adds, 1, 1, 0;\n}"                                            \
      : FASTICL_D(0), FASTICL_D(1), FASTICL_D(2), FASTICL_D(3), FASTICL_D(4), FASTICL_D(5), FASTICL_D(6), FASTICL_D(7) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                             \
      : "memory")

FASTICL_DEVICE void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bf16) { FASTICL_WGMMA("bf16"); }
FASTICL_DEVICE void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, f16) { FASTICL_WGMMA("f16"); }

// ---- conversions --------------------------------------------------------------------------------------------

FASTICL_DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }

FASTICL_DEVICE float to_float(f16 v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}

FASTICL_DEVICE void from_float(float v, bf16& result) {  // to nearest, ties to even
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
}

FASTICL_DEVICE void from_float(float v, f16& result) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v)); }

// ---- launching ----------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that is not sticky is this call's alone
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    message += "; it needs an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
               std::to_string(CUDART_VERSION % 1000 / 10) + " or newer";
  }
  throw std::runtime_error(message);
}

// Makes a device current while it lives. This library has a CUDA runtime of its own, whose choice may not be torch's.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&before_), what);
    if (device == before_) before_ = -1;
    if (before_ >= 0) check(cudaSetDevice(device), what);
  }
  ~DeviceGuard() {
    if (before_ >= 0) (void)cudaSetDevice(before_);
  }

 private:
  int before_;
};

struct DeviceLimits {
  int multiprocessors, shared_bytes;  // shared_bytes: the most that a block may ask for
};

inline DeviceLimits limits(int device, const char* what) {
  DeviceLimits found;
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device), what);
  check(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  return found;
}

// Whether `device` runs machine code of the kernel that was compiled for sm_90a, not sm_80's nor PTX's.
template <class... Parameters>
bool has_hopper_code(const char* what, void (*kernel)(Parameters...), int device) {
  const DeviceGuard guard(device, what);
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel), what);
  return found.binaryVersion == 90 && found.ptxVersion == 90;
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...) on `device`. Allocates nothing and waits for
// nothing, so that a CUDA graph can capture it.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int device,
            uintptr_t stream, const Arguments&... arguments) {
  const DeviceGuard guard(device, what);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
      arguments...);
  check(cudaGetLastError(), what);
}

#endif

// ---- blocks that meet ---------------------------------------------------------------------------------------

// Bits 8 to 63 of a launch's words that count; bits 0 to 7 are the count. Another for each launch, so that neither what
// a launch that was broken off has left nor other data (but once in 2^56) are taken for them.
inline unsigned long long counts_of_a_launch() {
  static std::atomic<unsigned long long> launches{0};
  return ++launches * 0x9e37'79b9'7f4a'7c15 << 8;
}

// How many threads have come to the word, this one included. It counts from 0 whatever it held, as long as that was no
// count of this launch: the last to come leaves 0.
FASTICL_DEVICE int arrive(unsigned long long* word, unsigned long long zero) {
  unsigned long long seen = zero;
  for (;;) {
    const unsigned long long before = (seen & ~0xffull) == zero ? seen : zero;
    const unsigned long long found = atomicCAS(word, seen, before + 1);
    if (found == seen) return static_cast<int>(before & 0xff) + 1;
    seen = found;
  }
}

// Whether this block is the last of `blocks` to come to the word, whatever it held before, once in a launch, whose
// counts_of_a_launch() is `zero`: it reads what the others wrote before they came. Called by all threads.
FASTICL_DEVICE bool comes_last(unsigned long long* word, int blocks, unsigned long long zero) {
  // Writes of all threads, barrier, fence, count; count, fence, barrier, reads of all threads.
  __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = arrive(word, zero) == blocks;
    __threadfence();
    if (is_last) *word = zero;  // for the next replay of a CUDA graph, which has the launch's parameters
  }
  return __syncthreads_or(is_last);
}

// ---- activations --------------------------------------------------------------------------------------------

FASTICL_DEVICE float activate(Activation kind, float a) {
  switch (kind) {
    case Activation::none:
      return a;
    case Activation::relu:
      return a < 0.0f ? 0.0f : a;  // keeps NaN
    case Activation::gelu:         // by erfc, because 1 + erf cancels for negative a
      return 0.5f * a * erfcf(a * -0.70710678118654752f);
    case Activation::gelu_tanh:
      return 0.5f * a * (1.0f + tanhf(0.79788456080286536f * fmaf(0.044715f * a * a, a, a)));
    case Activation::silu:
      return a / (1.0f + expf(-a));
  }
  return a;
}

}  // namespace fasticl
