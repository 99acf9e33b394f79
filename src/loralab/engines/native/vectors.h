// Sixteen-lane vectors in bf16 pairs and fp32, with and without AVX512-BF16.
//
// GCC's and Clang's vector extensions carry everything but the bf16 dot product and the rounding,
// so the same kernels compile for any processor; only `dot` and `round_pair` know the hardware.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ll {

constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64), aligned(64)));
typedef int32_t vi __attribute__((vector_size(64), aligned(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi_any __attribute__((vector_size(64), aligned(2)));
using bf16 = uint16_t;

static inline vi load_i(const void* p) { return *(const vi_any*)p; }
static inline vf load_f(const float* p) { return *(const vf_any*)p; }
static inline void store_f(float* p, vf v) { *(vf_any*)p = v; }
static inline vf splat(float x) { return vf{} + x; }
static inline vi splat_i(int32_t x) { return vi{} + x; }
static inline vi splat_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return splat_i(pair);
}

// acc[lane] += a.lo * b.lo + a.hi * b.hi
static inline vf dot(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const vi high = splat_i((int32_t)0xffff0000);
  acc += (vf)(a << 16) * (vf)(b << 16);
  acc += (vf)(a & high) * (vf)(b & high);
  return acc;
#endif
}

static inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
static inline bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return (bf16)((u >> 16) | 0x40);
  return (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline void store_bf16(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < LANES; i++) p[i] = to_bf16(v[i]);
#endif
}

// Halves are added to halves: one order, on every processor.
static inline float sum(vf v) {
  float a[LANES];
  std::memcpy(a, &v, sizeof a);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] += a[i + n];
  return a[0];
}

static inline vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vf larger(vf a, vf b) { return select(a > b, a, b); }

static inline float largest(vf v) {
  float a[LANES];
  std::memcpy(a, &v, sizeof a);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
  return a[0];
}

// exp(x), relative error under 2e-7 on [-87, 88]; clamped outside. Cephes' split of ln 2 and a
// degree-5 polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
static inline vf exponential(vf x) {
  const vf low = splat(-87.0f), high = splat(88.0f);
  vf y = select(x < low, low, select(x > high, high, x));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n = (y * 1.44269504f + magic) - magic;
  vf f = y - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)e;
}

}  // namespace ll
