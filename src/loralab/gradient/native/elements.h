// Sixteen elements of bf16 or fp32 memory as fp32, and back, rounded once.
#pragma once
#include "../../engines/native/vectors.h"

namespace ll {

static inline vf load(const float* p) { return load_f(p); }
static inline void store(float* p, vf v) { store_f(p, v); }

static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  typedef uint16_t half __attribute__((vector_size(32), aligned(2)));
  typedef uint32_t wide __attribute__((vector_size(64)));
  return (vf)(__builtin_convertvector(*(const half*)p, wide) << 16);
#endif
}
static inline void store(bf16* p, vf v) { store_bf16(p, v); }

}  // namespace ll
