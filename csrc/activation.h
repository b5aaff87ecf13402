// Activations on sixteen lanes. Included inside a target's namespace after simd.h; no include guard.

namespace {

// tanh: odd polynomial (Cephes tanhf) up to |a| = 0.625, beyond it 1 - 2 / (e^2|a| + 1) with the sign of a.
FASTICL_INLINE Vec tanh(Vec a) {
  const Vec m = abs(a), s = a * a;
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, s, set1(2.06390887954e-2f));
  p = fma(p, s, set1(-5.37397155531e-2f));
  p = fma(p, s, set1(1.33314422036e-1f));
  p = fma(p, s, set1(-3.33332819422e-1f));
  p = fma(p * s, a, a);
  const Vec large = set1(1.0f) - set1(2.0f) / (exp(m + m) + set1(1.0f));
  return where_less(m, set1(0.625f), p, copysign(large, a));
}

// a * Phi(a), Phi the normal distribution: erf by its odd polynomial (Cephes erff) up to |a / sqrt 2| = 1; in the tails
// erfc(z) = e^(-z^2) q(1 / (1 + z/2)), q of degree 7 fitted on z in [1, 10] to 6e-8, so that the negative tail
// keeps its relative precision.
FASTICL_INLINE Vec gelu(Vec a) {
  const Vec z = a * set1(0.70710678118654752f), m = abs(z), s = z * z;
  Vec p = set1(7.853861353153693e-5f);
  p = fma(p, s, set1(-8.010193625184903e-4f));
  p = fma(p, s, set1(5.188327685732524e-3f));
  p = fma(p, s, set1(-2.685381193529856e-2f));
  p = fma(p, s, set1(1.128358514861418e-1f));
  p = fma(p, s, set1(-3.761262582423300e-1f));
  p = fma(p, s, set1(1.128379165726710f));
  const Vec center = fma(p * z, set1(0.5f), set1(0.5f));
  const Vec t = set1(1.0f) / fma(m, set1(0.5f), set1(1.0f));
  Vec q = set1(0.07359270751476288f);
  q = fma(q, t, set1(-0.32659056782722473f));
  q = fma(q, t, set1(0.3704013526439667f));
  q = fma(q, t, set1(0.03711077198386192f));
  q = fma(q, t, set1(0.2871151268482208f));
  q = fma(q, t, set1(0.27516868710517883f));
  q = fma(q, t, set1(0.28274714946746826f));
  q = fma(q, t, set1(-2.5876952349790372e-05f));
  const Vec upper = set1(0.5f) * q * exp(zero() - s);  // Phi(-|a|)
  const Vec tail = where_less(z, zero(), upper, set1(1.0f) - upper);
  const Vec phi = where_less(m, set1(1.0f), center, tail);
  return where_less(a, set1(-14.0f), zero() * a, a * phi);  // the product underflows there; keeps -inf from inf * 0
}

FASTICL_INLINE Vec gelu_tanh(Vec a) {
  const Vec inner = set1(0.79788456080286536f) * fma(set1(0.044715f) * a * a, a, a);  // sqrt(2 / pi)
  return set1(0.5f) * a * (set1(1.0f) + tanh(inner));
}

FASTICL_INLINE Vec silu(Vec a) { return a / (set1(1.0f) + exp(zero() - a)); }

FASTICL_INLINE Vec relu(Vec a) { return max(zero(), a); }  // this operand order keeps NaN

// Out of line: it is called from many kernels, and next to the product it follows the call is cheap.
__attribute__((noinline)) Vec nonlinear(Activation kind, Vec a) {
  switch (kind) {
    case Activation::none:
      return a;
    case Activation::relu:
      return relu(a);
    case Activation::gelu:
      return gelu(a);
    case Activation::gelu_tanh:
      return gelu_tanh(a);
    case Activation::silu:
      return silu(a);
  }
  return a;
}

FASTICL_INLINE Vec activate(Activation kind, Vec a) { return kind == Activation::none ? a : nonlinear(kind, a); }

}  // namespace
