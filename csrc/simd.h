// Sixteen float32 lanes on every instruction set: the vocabulary in which the CPU kernels are written once.
// Included by foreach_target.h inside the namespace of each target: no include guard, no standard header here.

namespace {

constexpr int kLanes = 16;

FASTICL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- the register: arithmetic, load and store of float32 --------------------------------------------------

#if defined(FASTICL_TARGET_AVX512)

struct Vec {
  __m512 v;
};
FASTICL_INLINE Vec set1(float a) { return {_mm512_set1_ps(a)}; }
FASTICL_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTICL_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FASTICL_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTICL_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTICL_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTICL_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTICL_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a*b + c
FASTICL_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }                // b where either is NaN
FASTICL_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }                // b where either is NaN
FASTICL_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTICL_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
FASTICL_INLINE Vec copysign(Vec a, Vec sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
FASTICL_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {  // a < b ? yes : no
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
FASTICL_INLINE Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n integral
FASTICL_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FASTICL_INLINE float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }

FASTICL_INLINE Vec load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FASTICL_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FASTICL_INLINE Vec widen_i8(__m128i b) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))}; }
FASTICL_INLINE Vec load(const int8_t* p) { return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FASTICL_INLINE void store(bf16* p, Vec a) {  // to nearest even; NaN stays NaN
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
FASTICL_INLINE void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// ---- the sparse primitives ---------------------------------------------------------------------------------

// VPEXPAND and VPCOMPRESS with zeroing, from a register into itself. Of the intrinsics the compiler chooses another
// register to write, and Zen 5 waits for what was in that one, though nothing of it is kept.
#define FASTICL_IN_PLACE(instruction, Register, Mask)                                 \
  FASTICL_INLINE Register instruction(Register v, Mask mask) {                        \
    asm(#instruction " %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(static_cast<Mask>(mask))); \
    return v;                                                                         \
  }
FASTICL_IN_PLACE(vexpandps, __m512, __mmask16)
FASTICL_IN_PLACE(vpexpandw, __m256i, __mmask16)
FASTICL_IN_PLACE(vpexpandw, __m512i, __mmask32)
FASTICL_IN_PLACE(vpexpandb, __m128i, __mmask16)
FASTICL_IN_PLACE(vpexpandb, __m512i, __mmask64)
FASTICL_IN_PLACE(vpcompressb, __m512i, __mmask64)
#undef FASTICL_IN_PLACE

// Lane i gets the next stored value where bit i of mask is set, else 0. May read 16 values from p on.
FASTICL_INLINE Vec expand(const float* p, uint32_t mask) {
  return {vexpandps(_mm512_loadu_ps(p), static_cast<__mmask16>(mask))};
}
FASTICL_INLINE __m256i expand16(const void* p, uint32_t mask) {
  return vpexpandw(_mm256_loadu_si256(static_cast<const __m256i*>(p)), static_cast<__mmask16>(mask));
}
FASTICL_INLINE Vec expand(const bf16* p, uint32_t mask) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(expand16(p, mask)), 16))};
}
FASTICL_INLINE Vec expand(const f16* p, uint32_t mask) { return {_mm512_cvtph_ps(expand16(p, mask))}; }
FASTICL_INLINE Vec expand(const int8_t* p, uint32_t mask) {
  return widen_i8(vpexpandb(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), static_cast<__mmask16>(mask)));
}

// 64 columns at once into four registers. Lane j of register i holds column 16 i + j, but of bf16 column
// 32 (i / 2) + 2 j + i % 2 and of int8 column 4 j + i: taking the halves or bytes of 32-bit lanes apart is cheaper than
// conversions that cross lanes. order64 brings 64 columns of x into the order of T.
template <class T>
constexpr bool kInOrder = true;
template <>
constexpr bool kInOrder<bf16> = false;
template <>
constexpr bool kInOrder<int8_t> = false;
FASTICL_INLINE void split_pairs(__m512i h, Vec& even, Vec& odd) {
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(h, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(h, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}
// Bytes as float32, exactly: a byte with its sign flipped, u = 128 + value, put into the mantissa of 2^23 gives 2^23 +
// u and eight bits higher, in that of 2^15, 2^15 + u.
FASTICL_INLINE void split_bytes(__m512i b, Vec (&v)[4]) {
  const auto put = [](__m512i from, int byte, int bits) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(from, _mm512_set1_epi32(byte), _mm512_set1_epi32(bits), 0x6a));  // (a & b) ^ c
  };
  const __m512 low = _mm512_set1_ps(8388608.0f + 128.0f), high = _mm512_set1_ps(32768.0f + 128.0f);
  const __m512i upper = _mm512_srli_epi32(b, 16);
  v[0] = {_mm512_sub_ps(put(b, 0xff, 0x4b000080), low)};
  v[1] = {_mm512_sub_ps(put(b, 0xff00, 0x47008000), high)};
  v[2] = {_mm512_sub_ps(put(upper, 0xff, 0x4b000080), low)};
  v[3] = {_mm512_sub_ps(put(upper, 0xff00, 0x47008000), high)};
}
FASTICL_INLINE void load32(const bf16* p, Vec& even, Vec& odd) { split_pairs(_mm512_loadu_si512(p), even, odd); }
FASTICL_INLINE void load64(const int8_t* p, Vec (&v)[4]) { split_bytes(_mm512_loadu_si512(p), v); }

// The stored values of 32 or 64 columns in the same order. May read as many values from p on.
FASTICL_INLINE void expand32(const float* p, uint32_t mask, Vec& a, Vec& b) {
  a = expand(p, mask & 0xffff);
  b = expand(p + _mm_popcnt_u32(mask & 0xffff), mask >> 16);
}
FASTICL_INLINE void expand32(const bf16* p, uint32_t mask, Vec& even, Vec& odd) {
  split_pairs(vpexpandw(_mm512_loadu_si512(p), mask), even, odd);
}
FASTICL_INLINE void expand32(const f16* p, uint32_t mask, Vec& a, Vec& b) {
  const __m512i h = vpexpandw(_mm512_loadu_si512(p), mask);
  a = {_mm512_cvtph_ps(_mm512_castsi512_si256(h))};
  b = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1))};
}
FASTICL_INLINE int expand64(const int8_t* p, uint64_t mask, Vec (&v)[4]) {
  split_bytes(vpexpandb(_mm512_loadu_si512(p), mask), v);
  return static_cast<int>(_mm_popcnt_u64(mask));
}

FASTICL_INLINE void split_lanes(Vec& a, Vec& b) {  // into those of even and of odd index
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 odd = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b.v);
  a = {_mm512_permutex2var_ps(a.v, even, b.v)};
  b = {odd};
}
template <class T>
FASTICL_INLINE void order64(Vec (&v)[4]) {
  if (kInOrder<T>) return;
  split_lanes(v[0], v[1]);
  split_lanes(v[2], v[3]);
  if (sizeof(T) == 1) {
    split_lanes(v[0], v[2]);
    split_lanes(v[1], v[3]);
  }
}

// Products of pairs of bfloat16, for the target avx512_bf16: 32 columns a register. Below 2^-126 numbers count as zero.
template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;
FASTICL_INLINE __m512i load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
FASTICL_INLINE __m512i expand_pairs(const bf16* p, uint32_t mask) { return vpexpandw(load_pairs(p), mask); }
FASTICL_INLINE void expand64(const bf16* p, uint64_t mask, bf16* out) {
  const bf16* second = p + _mm_popcnt_u32(static_cast<uint32_t>(mask));
  _mm512_storeu_si512(out, expand_pairs(p, static_cast<uint32_t>(mask)));
  _mm512_storeu_si512(out + 32, expand_pairs(second, static_cast<uint32_t>(mask >> 32)));
}
FASTICL_INLINE void expand64(const int8_t* p, uint64_t mask, bf16* out) {  // the upper halves of float32, exact
  alignas(64) static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper), bytes = vpexpandb(_mm512_loadu_si512(p), mask);
  const __m128i quarters[4] = {_mm512_castsi512_si128(bytes), _mm512_extracti32x4_epi32(bytes, 1),
                               _mm512_extracti32x4_epi32(bytes, 2), _mm512_extracti32x4_epi32(bytes, 3)};
  for (int i = 0; i < 4; i += 2) {
    const __m512i a = _mm512_castps_si512(widen_i8(quarters[i]).v),
                  b = _mm512_castps_si512(widen_i8(quarters[i + 1]).v);
    _mm512_storeu_si512(out + 16 * i, _mm512_permutex2var_epi16(a, upper, b));
  }
}
FASTICL_INLINE Vec dot_pairs(__m512i a, __m512i b, Vec acc) {  // its own attribute would keep it out of lambdas
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a), "v"(b));
  return acc;
}

// Products of bytes: int8 values are multiplied without conversion to float32. For them x is in fixed point: 24 bits q
// = round(x / step) + 2^23, step = max |x| / (2^23 - 4), in three planes of bytes.
using Ints = __m512i;
FASTICL_INLINE Ints no_ints() { return _mm512_setzero_si512(); }
FASTICL_INLINE Ints load_bytes(const void* p) { return _mm512_loadu_si512(p); }
FASTICL_INLINE Ints expand_bytes(const int8_t* p, uint64_t mask) { return vpexpandb(_mm512_loadu_si512(p), mask); }
FASTICL_INLINE Ints dot_bytes(Ints acc, Ints x, Ints values) { return _mm512_dpbusd_epi32(acc, x, values); }  // x >= 0
FASTICL_INLINE Ints add_bytes(Ints acc, Ints values) { return dot_bytes(acc, _mm512_set1_epi8(1), values); }
// Sixteen q of x * inverse, a byte of each to p, p + stride and p + 2 stride, the highest first.
FASTICL_INLINE void store_fixed(Vec x, Vec inverse, uint8_t* p, int64_t stride) {
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32((x * inverse).v), _mm512_set1_epi32(1 << 23));
  for (int i = 0; i < 3; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * stride),
                     _mm512_cvtepi32_epi8(_mm512_srlv_epi32(q, _mm512_set1_epi32(16 - 8 * i))));
}
// 2^16 high + 2^8 mid + low - 2^23 ones: what products with the planes come to, and those with 1. The high plane is
// made signed while it still is exact.
FASTICL_INLINE Vec join_fixed(Ints high, Ints mid, Ints low, Ints ones) {
  const Vec signed_high = {_mm512_cvtepi32_ps(_mm512_sub_epi32(high, _mm512_slli_epi32(ones, 7)))};
  const Vec rest = fma({_mm512_cvtepi32_ps(mid)}, set1(256.0f), {_mm512_cvtepi32_ps(low)});
  return fma(signed_high, set1(65536.0f), rest);
}
FASTICL_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

// Lane i gets window[index[i]], index[i] < 32.
FASTICL_INLINE Vec permute32(const float* window, const uint8_t* index) {
  const __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(window), i, _mm512_loadu_ps(window + 16))};
}

// Appends base + i to out for each set bit i of mask; returns their number. May write 64 entries.
FASTICL_INLINE int append_set_bits(uint64_t mask, uint8_t base, uint8_t* out) {
  const __m512i iota = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928, 0x2726252423222120,
                                        0x1f1e1d1c1b1a1918, 0x1716151413121110, 0x0f0e0d0c0b0a0908, 0x0706050403020100);
  const __m512i all = _mm512_add_epi8(iota, _mm512_set1_epi8(static_cast<char>(base)));
  _mm512_storeu_si512(out, vpcompressb(all, mask));
  return static_cast<int>(_mm_popcnt_u64(mask));
}

// Transposes the 16x16 matrix whose row i is r[i].
FASTICL_INLINE void transpose16(Vec* r) {
  __m512 t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 4; i++) {  // four rows: 4x4 blocks transposed within the 128-bit lanes
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; i++) {  // then the 128-bit lanes, two levels
    t[i] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#elif defined(FASTICL_TARGET_AVX2)

struct Vec {
  __m256 lo, hi;
};
FASTICL_INLINE Vec set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FASTICL_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FASTICL_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
FASTICL_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FASTICL_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FASTICL_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FASTICL_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
FASTICL_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FASTICL_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
FASTICL_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
FASTICL_INLINE Vec round(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
FASTICL_INLINE Vec abs(Vec a) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, a.lo), _mm256_andnot_ps(bit, a.hi)};
}
FASTICL_INLINE Vec copysign(Vec a, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, a.lo), _mm256_and_ps(bit, sign.lo)),
          _mm256_or_ps(_mm256_andnot_ps(bit, a.hi), _mm256_and_ps(bit, sign.hi))};
}
FASTICL_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
FASTICL_INLINE __m256 scale2(__m256 a, __m256 n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}
FASTICL_INLINE Vec scale2(Vec a, Vec n) { return {scale2(a.lo, n.lo), scale2(a.hi, n.hi)}; }  // -127 < n < 128
FASTICL_INLINE float sum(Vec a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
FASTICL_INLINE float max_lane(Vec a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

FASTICL_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
FASTICL_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FASTICL_INLINE Vec load(const bf16* p) { return {widen_bf16(load128(p)), widen_bf16(load128(p + 8))}; }
FASTICL_INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
FASTICL_INLINE __m256 widen_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTICL_INLINE Vec load(const int8_t* p) { return {widen_i8(p), widen_i8(p + 8)}; }
FASTICL_INLINE __m128i narrow_bf16(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTICL_INLINE void store(bf16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow_bf16(a.hi));
}
FASTICL_INLINE void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

// Byte table for 8-bit masks: entry m holds, lane by lane, which stored value goes there; bit 7 marks "none".
// Its counterpart holds the positions of the set bits, low to high.
struct ByteMasks {
  alignas(64) uint8_t source[256][8];
  alignas(64) uint8_t position[256][8];
  ByteMasks() {
    for (int m = 0; m < 256; m++) {
      int n = 0;
      for (int i = 0; i < 8; i++) position[m][i] = 0;
      for (int i = 0; i < 8; i++) {
        source[m][i] = (m >> i & 1) ? static_cast<uint8_t>(n) : 0x80;
        if (m >> i & 1) position[m][n++] = static_cast<uint8_t>(i);
      }
    }
  }
};
const ByteMasks kByteMasks;

FASTICL_INLINE __m256i source_lanes(uint32_t mask8) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteMasks.source[mask8])));
}
FASTICL_INLINE __m256 expand8(__m256 packed, uint32_t mask8) {
  const __m256i from = source_lanes(mask8);  // negative where the lane is empty
  const __m256 all = _mm256_permutevar8x32_ps(packed, from);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(from, 31)), all);
}
FASTICL_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
FASTICL_INLINE __m256 load8(const bf16* p) { return widen_bf16(load128(p)); }
FASTICL_INLINE __m256 load8(const f16* p) { return _mm256_cvtph_ps(load128(p)); }
FASTICL_INLINE __m256 load8(const int8_t* p) { return widen_i8(p); }
template <class T>
FASTICL_INLINE Vec expand(const T* p, uint32_t mask) {
  const uint32_t m = mask & 0xff;
  return {expand8(load8(p), m), expand8(load8(p + _mm_popcnt_u32(m)), mask >> 8 & 0xff)};
}

FASTICL_INLINE __m256 permute32(const float* window, __m256i i) {  // four 8-lane permutes, chosen by bits 3 and 4
  const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window), i);
  const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 8), i);
  const __m256 c = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 16), i);
  const __m256 d = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 24), i);
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)),
               bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 27));
  return _mm256_blendv_ps(_mm256_blendv_ps(a, b, bit3), _mm256_blendv_ps(c, d, bit3), bit4);
}
FASTICL_INLINE Vec permute32(const float* window, const uint8_t* index) {
  const __m128i i = load128(index);
  return {permute32(window, _mm256_cvtepu8_epi32(i)), permute32(window, _mm256_cvtepu8_epi32(_mm_srli_si128(i, 8)))};
}

FASTICL_INLINE int append_set_bits(uint64_t mask, uint8_t base, uint8_t* out) {
  int n = 0;
  for (int b = 0; b < 8; b++) {
    const uint32_t m = mask >> (8 * b) & 0xff;
    const __m128i at = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteMasks.position[m]));
    const __m128i first = _mm_set1_epi8(static_cast<char>(base + 8 * b));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + n), _mm_add_epi8(at, first));
    n += _mm_popcnt_u32(m);
  }
  return n;
}

FASTICL_INLINE void transpose8(__m256* r) {
  __m256 t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
FASTICL_INLINE void transpose16(Vec* r) {
  __m256 a[8], b[8], c[8], d[8];  // [a b; c d] becomes [a' c'; b' d']
  for (int i = 0; i < 8; i++) a[i] = r[i].lo, b[i] = r[i].hi, c[i] = r[i + 8].lo, d[i] = r[i + 8].hi;
  transpose8(a);
  transpose8(b);
  transpose8(c);
  transpose8(d);
  for (int i = 0; i < 8; i++) r[i] = {a[i], c[i]}, r[i + 8] = {b[i], d[i]};
}

#else  // scalar

struct Vec {
  float v[kLanes];
};
template <class F>
FASTICL_INLINE Vec each(F f) {
  Vec r;
  for (int i = 0; i < kLanes; i++) r.v[i] = f(i);
  return r;
}
FASTICL_INLINE Vec set1(float a) {
  return each([&](int) { return a; });
}
FASTICL_INLINE Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
FASTICL_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; i++) p[i] = a.v[i];
}
FASTICL_INLINE Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
FASTICL_INLINE Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
FASTICL_INLINE Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
FASTICL_INLINE Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
FASTICL_INLINE Vec fma(Vec a, Vec b, Vec c) {  // rounds twice where the machine has no fused instruction
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
FASTICL_INLINE Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
FASTICL_INLINE Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
FASTICL_INLINE Vec round(Vec a) {
  return each([&](int i) { return __builtin_rintf(a.v[i]); });
}
FASTICL_INLINE Vec abs(Vec a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
FASTICL_INLINE Vec copysign(Vec a, Vec sign) {
  return each([&](int i) { return __builtin_copysignf(a.v[i], sign.v[i]); });
}
FASTICL_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
FASTICL_INLINE Vec scale2(Vec a, Vec n) {
  return each([&](int i) { return n.v[i] != n.v[i] ? n.v[i] : __builtin_ldexpf(a.v[i], static_cast<int>(n.v[i])); });
}
FASTICL_INLINE float sum(Vec a) {
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
  return a.v[0];
}
FASTICL_INLINE float max_lane(Vec a) {
  for (int i = 1; i < kLanes; i++) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
  return a.v[0];
}

FASTICL_INLINE float widen(float a) { return a; }
FASTICL_INLINE float widen(int8_t a) { return a; }
FASTICL_INLINE float widen(bf16 a) {
  const uint32_t u = static_cast<uint32_t>(a.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline float widen(f16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16, e = a.bits >> 10 & 31, m = a.bits & 0x3ff;
  if (e == 0) {  // zero and denormals: m * 2^-24
    const float f = static_cast<float>(m) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  const uint32_t u = sign | (e == 31 ? 255u : e + 112u) << 23 | m << 13;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline void narrow(float a, bf16* p) {
  uint32_t u;
  __builtin_memcpy(&u, &a, 4);
  p->bits = a != a ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float a, f16* p) {  // to nearest even
  uint32_t u;
  __builtin_memcpy(&u, &a, 4);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) {
    p->bits = sign | 0x7e00;
  } else if (u >= 0x477ff000) {  // 65520 and above round to infinity
    p->bits = sign | 0x7c00;
  } else if (u < 0x38800000) {  // below 2^-14: a multiple of 2^-24; adding 0.5 lets the adder round
    float f;
    __builtin_memcpy(&f, &u, 4);
    f += 0.5f;
    __builtin_memcpy(&u, &f, 4);
    p->bits = static_cast<uint16_t>(sign | (u - 0x3f000000));
  } else {
    p->bits = static_cast<uint16_t>(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  }
}
template <class T>
FASTICL_INLINE Vec load(const T* p) {
  return each([&](int i) { return widen(p[i]); });
}
template <class T>
FASTICL_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; i++) narrow(a.v[i], p + i);
}

template <class T>
FASTICL_INLINE Vec expand(const T* p, uint32_t mask) {
  int n = 0;
  return each([&](int i) { return mask >> i & 1 ? widen(p[n++]) : 0.0f; });
}
FASTICL_INLINE Vec permute32(const float* window, const uint8_t* index) {
  return each([&](int i) { return window[index[i]]; });
}
FASTICL_INLINE int append_set_bits(uint64_t mask, uint8_t base, uint8_t* out) {
  int n = 0;
  for (; mask; mask &= mask - 1) out[n++] = static_cast<uint8_t>(base + __builtin_ctzll(mask));
  return n;
}
FASTICL_INLINE void transpose16(Vec* r) {
  for (int i = 0; i < kLanes; i++)
    for (int j = i + 1; j < kLanes; j++) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

#endif

// ---- the same for all targets ------------------------------------------------------------------------------

#ifndef FASTICL_TARGET_AVX512
template <class T>
constexpr bool kInOrder = true;
template <class T>
FASTICL_INLINE void order64(Vec (&)[4]) {}
template <class T>
FASTICL_INLINE void expand32(const T* p, uint32_t mask, Vec& a, Vec& b) {
  a = expand(p, mask & 0xffff);
  b = expand(p + __builtin_popcount(mask & 0xffff), mask >> 16);
}
#endif
template <class T>
FASTICL_INLINE void load32(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + kLanes);
}
template <class T>
FASTICL_INLINE void load64(const T* p, Vec (&v)[4]) {
  load32(p, v[0], v[1]);
  load32(p + 2 * kLanes, v[2], v[3]);
}
// Returns how many values are stored.
template <class T>
FASTICL_INLINE int expand64(const T* p, uint64_t mask, Vec (&v)[4]) {
  const uint32_t low = static_cast<uint32_t>(mask), high = static_cast<uint32_t>(mask >> 32);
  expand32(p, low, v[0], v[1]);
  expand32(p + __builtin_popcount(low), high, v[2], v[3]);
  return __builtin_popcountll(mask);
}

FASTICL_INLINE Vec zero() { return set1(0.0f); }

// The first n (at most 16) elements; the lanes behind them are 0. Reads and writes nothing else.
template <class T>
FASTICL_INLINE Vec load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
FASTICL_INLINE void store_n(T* p, Vec a, int64_t n) {
  if (n >= kLanes) return store(p, a);
  T buffer[kLanes];
  store(buffer, a);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// e^a, relative error below 2 ulp; 0 below -87.3 (no denormals), +inf above 88.7, NaN for NaN.
FASTICL_INLINE Vec exp(Vec a) {
  const Vec c = min(set1(89.0f), max(set1(-88.0f), a));  // this operand order lets NaN through
  const Vec n = round(c * set1(1.44269504089f));         // c = n ln 2 + r, |r| <= ln 2 / 2
  Vec r = fma(n, set1(-0.693145751953125f), c);          // ln 2 in two pieces: the first product is exact
  r = fma(n, set1(-1.42860682030941723212e-6f), r);
  Vec p = set1(1.9875691500e-4f);  // Cephes expf: minimax on [-ln 2 / 2, ln 2 / 2]
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p * r, r, r) + set1(1.0f);
  const Vec half = round(n * set1(0.5f));  // in two steps: neither 2^128 nor 2^-127 is a normal float32
  p = scale2(scale2(p, half), n - half);
  p = where_less(a, set1(-87.336544f), zero(), p);
  return where_less(set1(88.722839f), a, set1(__builtin_inff()), p);
}

// ---- types known at run time -------------------------------------------------------------------------------

// Calls f with a value of the type that x, bias and y have.
template <class F>
FASTICL_INLINE void with_float(DType dtype, F f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  f(f16{});
}
// And of the type of a weight's values.
template <class F>
FASTICL_INLINE void with_value(DType dtype, F f) {
  if (dtype == DType::i8) return f(int8_t{});
  with_float(dtype, f);
}

// Lane i is the sum of r[i].
FASTICL_INLINE Vec sums(const Vec* r) {
#if defined(FASTICL_TARGET_AVX512)
  __m512 a[8], b[4];  // halves the registers four times: 30 shuffles, where sixteen sums of one register take 64
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[i].v, r[i + 8].v), _mm512_unpackhi_ps(r[i].v, r[i + 8].v));
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 4]), _mm512_unpackhi_ps(a[i], a[i + 4]));
  for (int i = 0; i < 2; i++)
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 2], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 2], 0xdd));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15), s)};
#else
  float s[kLanes];
  for (int i = 0; i < kLanes; i++) s[i] = sum(r[i]);
  return load(s);
#endif
}

}  // namespace
