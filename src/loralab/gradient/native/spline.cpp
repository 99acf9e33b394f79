// The learned function of LS-LoRA, forward and backward, over plain arrays.
//
//     out = (1 - g) z + g o phi(u),   u = i z,   phi piecewise linear
//
// phi's pieces are told apart by thresholds in u: one comparison each gives a mask that both picks
// the piece's line and sums over it. Backward needs sum gy and sum gy z over every piece and
// nothing else: the gradients of the values and scales follow from those in closed form.
//
// Sums are fp32 in lanes over blocks of BLOCK elements and double over blocks, in one order: the
// result does not depend on how many threads share the blocks.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;

constexpr int MOST = 64;  // pieces
constexpr int64_t BLOCK = 16384;

// As wide as the processor's own: GCC runs a comparison of wider vectors lane by lane.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4)));
typedef bf16 half_any __attribute__((vector_size(2 * LANES), aligned(2)));

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) { return *(const vf_any*)p; }
inline void store(float* p, vf v) { *(vf_any*)p = v; }

inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(*(const half_any*)p, vu) << 16);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  *(half_any*)p = __builtin_convertvector(v == v ? rounded : quiet, half_any);
#endif
}

#if defined(__AVX512F__)
typedef __mmask16 mask;
inline mask everywhere() { return 0xffff; }
inline mask greater(vf a, vf b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}
inline vf choose(mask m, vf a, vf b) {
  return (vf)_mm512_mask_mov_ps((__m512)b, m, (__m512)a);
}
inline vf add_where(mask m, vf to, vf v) {
  return (vf)_mm512_mask_add_ps((__m512)to, m, (__m512)to, (__m512)v);
}
#else
typedef vi mask;
inline mask everywhere() { return vi{} - 1; }
inline mask greater(vf a, vf b) { return a > b; }
inline vf choose(mask m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
inline vf add_where(mask m, vf to, vf v) { return to + (vf)(m & (vi)v); }
#endif

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// What Python passes: the spline's parameters.
struct Spline {
  const float* deviation;  // (knots,) of the values from the identity
  const float *input_scale, *output_scale, *gate;  // gate may be null
  float k_min, k_max;
  int knots, clamp;
};

// The same as lines in z, one for each piece; piece p lies above threshold p - 1.
struct Lines {
  int pieces;
  float scale;
  float threshold[MOST], slope[MOST], offset[MOST];
};

double knot(const Spline& s, int j) {
  return s.k_min + j * (((double)s.k_max - s.k_min) / (s.knots - 1));
}

// phi(u) = level + (1 + lean) u on a piece; a clamped end is level.
void piece(const Spline& s, int p, double& level, double& slope) {
  const int segment = p - (s.clamp ? 1 : 0), last = s.knots - 1;
  if (segment < 0 || segment == last) {
    const int j = segment < 0 ? 0 : last;
    level = knot(s, j) + s.deviation[j], slope = 0;
    return;
  }
  const double width = knot(s, segment + 1) - knot(s, segment);
  const double lean = ((double)s.deviation[segment + 1] - s.deviation[segment]) / width;
  level = s.deviation[segment] - lean * knot(s, segment), slope = 1 + lean;
}

Lines lines(const Spline& s) {
  Lines l;
  l.pieces = s.knots - 1 + (s.clamp ? 2 : 0);
  l.scale = *s.input_scale;
  const double share = s.gate ? *s.gate : 1.0, o = *s.output_scale;
  for (int p = 0; p < l.pieces; p++) {
    double level, slope;
    piece(s, p, level, slope);
    l.offset[p] = (float)(share * o * level);
    l.slope[p] = (float)(1 - share + share * o * slope * *s.input_scale);
    if (p) l.threshold[p - 1] = (float)knot(s, p - (s.clamp ? 1 : 0));
  }
  return l;
}

// step(z, gy) on every whole vector of n elements; the last ones go through padded copies.
template <class T, class F>
inline void over(T* z, const T* gy, int64_t n, F step) {
  T rest[LANES] = {}, rest_gy[LANES] = {};
  const int64_t whole = n / LANES * LANES;
  std::memcpy(rest, z + whole, (n - whole) * sizeof(T));
  std::memcpy(rest_gy, gy + whole, (n - whole) * sizeof(T));
  for (int64_t at = 0; at < n; at += LANES) {
    const bool inside = at < whole;
    step(inside ? z + at : rest, inside ? gy + at : rest_gy);
  }
  std::memcpy(z + whole, rest, (n - whole) * sizeof(T));
}

template <int P, class T>
void forward(const Lines& l, T* z, int64_t n) {
  const int pieces = P ? P : l.pieces;
  over(z, z, n, [&](T* at, const T*) {
    const vf x = load(at), u = x * l.scale;
    vf slope = splat(l.slope[0]), offset = splat(l.offset[0]);
    for (int p = 1; p < pieces; p++) {
      const mask above = greater(u, splat(l.threshold[p - 1]));
      slope = choose(above, splat(l.slope[p]), slope);
      offset = choose(above, splat(l.offset[p]), offset);
    }
    store(at, slope * x + offset);
  });
}

// z becomes gz; sums[p] and sums[pieces + p]: of gy and gy z over piece p. Not over all above a
// threshold: differences of those would cancel.
template <int P, class T>
void backward(const Lines& l, T* z, const T* gy, int64_t n, double* sums) {
  const int pieces = P ? P : l.pieces;
  vf of_g[P ? P : MOST], of_gz[P ? P : MOST];
  for (int p = 0; p < pieces; p++) of_g[p] = of_gz[p] = vf{};
  over(z, gy, n, [&](T* at, const T* gy_at) {
    const vf x = load(at), g = load(gy_at), u = x * l.scale, product = g * x;
    vf slope = splat(l.slope[0]);
    mask above = everywhere();
    for (int p = 0; p < pieces - 1; p++) {
      const mask next = greater(u, splat(l.threshold[p]));
      const mask inside = above & ~next;
      of_g[p] = add_where(inside, of_g[p], g);
      of_gz[p] = add_where(inside, of_gz[p], product);
      slope = choose(next, splat(l.slope[p + 1]), slope);
      above = next;
    }
    of_g[pieces - 1] = add_where(above, of_g[pieces - 1], g);
    of_gz[pieces - 1] = add_where(above, of_gz[pieces - 1], product);
    store(at, slope * g);
  });
  for (int p = 0; p < pieces; p++) sums[p] = sum(of_g[p]), sums[pieces + p] = sum(of_gz[p]);
}

template <class F>
void unrolled(int pieces, F run) {
  switch (pieces) {
    case 4: return run(std::integral_constant<int, 4>{});
    case 6: return run(std::integral_constant<int, 6>{});
    case 8: return run(std::integral_constant<int, 8>{});
    default: return run(std::integral_constant<int, 0>{});
  }
}

template <class T>
void backward_blocks(const Lines& l, T* z, const T* gy, int64_t n, double* sums) {
  unrolled(l.pieces, [&](auto p) {
    for (int64_t at = 0; at < n; at += BLOCK, sums += 2 * l.pieces)
      backward<p>(l, z + at, gy + at, std::min(BLOCK, n - at), sums);
  });
}

}  // namespace

extern "C" {

int64_t ll_spline_block() { return BLOCK; }
int ll_spline_most() { return MOST; }

// z (n,) -> out, in place.
void ll_spline_forward(const Spline* s, void* z, int64_t n, int is_bf16) {
  const Lines l = lines(*s);
  unrolled(l.pieces, [&](auto p) {
    is_bf16 ? forward<p>(l, (bf16*)z, n) : forward<p>(l, (float*)z, n);
  });
}

// z (n,) -> gz, in place. sums: (blocks, 2, pieces).
void ll_spline_backward(const Spline* s, void* z, const void* gy, int64_t n, int is_bf16,
                        double* sums) {
  const Lines l = lines(*s);
  if (is_bf16)
    backward_blocks(l, (bf16*)z, (const bf16*)gy, n, sums);
  else
    backward_blocks(l, (float*)z, (const float*)gy, n, sums);
}

// From the sums, out (knots + 3,): gradients of the values, input_scale, output_scale, gate.
void ll_spline_gradients(const Spline* s, const double* sums, int64_t blocks, float* out) {
  const int pieces = s->knots - 1 + (s->clamp ? 2 : 0), last = s->knots - 1;
  double g[MOST] = {}, gz[MOST] = {}, values[MOST + 1] = {};
  for (int64_t b = 0; b < blocks; b++, sums += 2 * pieces)
    for (int p = 0; p < pieces; p++) g[p] += sums[p], gz[p] += sums[pieces + p];
  const double i = *s->input_scale, o = *s->output_scale;
  const double share = s->gate ? *s->gate : 1.0;
  double all = 0, with_phi = 0, with_slope = 0;
  for (int p = 0; p < pieces; p++) {
    double level, slope;
    piece(*s, p, level, slope);
    all += gz[p];
    with_phi += level * g[p] + slope * i * gz[p];
    with_slope += slope * gz[p];
    const int segment = p - (s->clamp ? 1 : 0);
    if (segment < 0 || segment == last) {
      values[segment < 0 ? 0 : last] += g[p];
      continue;
    }
    const double from = knot(*s, segment), width = knot(*s, segment + 1) - from;
    const double right = (i * gz[p] - from * g[p]) / width;
    values[segment] += g[p] - right, values[segment + 1] += right;
  }
  for (int j = 0; j <= last; j++) out[j] = (float)(share * o * values[j]);
  out[last + 1] = (float)(share * o * with_slope);
  out[last + 2] = (float)(share * with_phi);
  out[last + 3] = (float)(o * with_phi - all);
}
}
