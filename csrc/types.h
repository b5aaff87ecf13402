// Element types and activations, with the numbers that Python knows them by (fasticl/ops/_registry.py).
#pragma once
#include <cstdint>

namespace fasticl {

// Storage types; arithmetic is float32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2, "element types must have their storage size");

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };  // i8: values of a weight only
enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

}  // namespace fasticl
