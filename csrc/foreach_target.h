// Compiles FASTICL_THIS_FILE once for each instruction set, each time in a namespace of its own:
//     fasticl::scalar   what every compiler of C++17 can make
//     fasticl::avx2     x86-64 with AVX2, FMA, F16C, BMI          (Haswell, Zen and later)
//     fasticl::avx512   AVX-512 F/BW/DQ/VL/VBMI2/VNNI, POPCNT     (Ice Lake, Zen 4 and later)
// A kernel file defines FASTICL_THIS_FILE, includes this header, and guards its kernels by
// `#ifdef FASTICL_TARGET`; outside of the guard it dispatches through FASTICL_DISPATCH (cpu.h).
//
// The sets are function attributes, never compiler flags, so that no inline function of the standard library
// is compiled for a machine that may not be there. Kernels therefore sit in anonymous namespaces and use no
// templates of the standard library: all of its headers are included before the first target is opened.

#include "cpu.h"

#define FASTICL_TARGET scalar
#define FASTICL_TARGET_SCALAR
namespace fasticl {
namespace scalar {
#include "simd.h"
#include FASTICL_THIS_FILE
}  // namespace scalar
}  // namespace fasticl
#undef FASTICL_TARGET_SCALAR
#undef FASTICL_TARGET

#ifdef FASTICL_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define FASTICL_TARGET avx2
#define FASTICL_TARGET_AVX2
namespace fasticl {
namespace avx2 {
#include "simd.h"
#include FASTICL_THIS_FILE
}  // namespace avx2
}  // namespace fasticl
#undef FASTICL_TARGET_AVX2
#undef FASTICL_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define FASTICL_TARGET avx512
#define FASTICL_TARGET_AVX512
namespace fasticl {
namespace avx512 {
#include "simd.h"
#include FASTICL_THIS_FILE
}  // namespace avx512
}  // namespace fasticl
#undef FASTICL_TARGET_AVX512
#undef FASTICL_TARGET
#pragma GCC pop_options

#endif  // FASTICL_X86
