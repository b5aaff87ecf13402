// What every CPU kernel shares and no instruction set changes: the target in force, scratch memory, threads. Includes
// all standard headers that kernels may use (see foreach_target.h for the reason).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTICL_X86
#include <immintrin.h>
#endif

#include "types.h"

#define FASTICL_INLINE inline __attribute__((always_inline))

namespace fasticl {

enum class Target : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best target of this machine, unless a test has forced another one. Defined in bindings.cpp. avx512_bf16 runs the
// kernels of avx512, which have another loop for it where one pays.
Target target();

// Calls `call` in the namespace of the target in force: FASTICL_DISPATCH(run(params)).
#ifdef FASTICL_X86
#define FASTICL_DISPATCH(call)                                                \
  (::fasticl::target() >= ::fasticl::Target::avx512 ? ::fasticl::avx512::call \
   : ::fasticl::target() == ::fasticl::Target::avx2 ? ::fasticl::avx2::call   \
                                                    : ::fasticl::scalar::call)
#else
#define FASTICL_DISPATCH(call) ::fasticl::scalar::call
#endif

// Memory that a kernel needs while it runs, 64-byte aligned and not initialised. Kept per thread and reused,
// so that a call in a decoding loop does not touch the allocator; grows, never shrinks below the largest call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int thread_count() {  // of the running parallel region
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Below this many multiply-adds a second thread is not woken.
constexpr int64_t kThreadWork = 1 << 17;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fasticl
