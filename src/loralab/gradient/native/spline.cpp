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
  const float *values, *grid;  // (knots,); grid: the values of the identity
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

double deviation(const Spline& s, int j) { return (double)s.values[j] - s.grid[j]; }

double knot(const Spline& s, int j) {
  return s.k_min + j * (((double)s.k_max - s.k_min) / (s.knots - 1));
}

// phi(u) = level + (1 + lean) u on a piece; a clamped end is level.
void piece(const Spline& s, int p, double& level, double& slope) {
  const int segment = p - (s.clamp ? 1 : 0), last = s.knots - 1;
  if (segment < 0 || segment == last) {
    const int j = segment < 0 ? 0 : last;
    level = knot(s, j) + deviation(s, j), slope = 0;
    return;
  }
  const double width = knot(s, segment + 1) - knot(s, segment);
  const double lean = (deviation(s, segment + 1) - deviation(s, segment)) / width;
  level = deviation(s, segment) - lean * knot(s, segment), slope = 1 + lean;
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

template <int P>
struct Bend {
  const Lines& l;

  vf operator()(vf x) const {
    const int pieces = P ? P : l.pieces;
    const vf u = x * l.scale;
    vf slope = splat(l.slope[0]), offset = splat(l.offset[0]);
    for (int p = 1; p < pieces; p++) {
      const mask above = greater(u, splat(l.threshold[p - 1]));
      slope = choose(above, splat(l.slope[p]), slope);
      offset = choose(above, splat(l.offset[p]), offset);
    }
    return slope * x + offset;
  }
};

// Returns gz, and sums gy and gy z over each piece: not over all above a threshold, differences of
// those would cancel.
template <int P>
struct Unbend {
  const Lines& l;
  vf of_g[P ? P : MOST] = {}, of_gz[P ? P : MOST] = {};

  vf operator()(vf x, vf g) {
    const int pieces = P ? P : l.pieces;
    const vf u = x * l.scale, product = g * x;
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
    return slope * g;
  }

  void write(double* sums) const {
    for (int p = 0; p < l.pieces; p++)
      sums[p] = sum(of_g[p]), sums[l.pieces + p] = sum(of_gz[p]);
  }
};

#if defined(__AVX512BF16__)
// z = h B^T by tiles of VECS vectors of outputs, whose rows of B, PAIRS pairs each, stay in
// registers, and HEIGHT rows of h: z is never in memory. All bf16: h (rows, r), B (out, r), and y,
// gy, gz (rows, out).
constexpr int64_t ROWS = 128;
constexpr int HEIGHT = 4;

template <int PAIRS, int VECS>
struct Tile {
  __m512bh b[VECS][PAIRS];

  explicit Tile(const bf16* from) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i row = _mm512_mullo_epi32(lane, _mm512_set1_epi32(PAIRS));
    for (int v = 0; v < VECS; v++)
      for (int k = 0; k < PAIRS; k++) {
        const auto* pairs = (const int32_t*)from + v * LANES * PAIRS + k;
        b[v][k] = (__m512bh)_mm512_i32gather_epi32(row, pairs, 4);
      }
  }

  template <int N>
  void product(const bf16* h, vf (&z)[N][VECS]) const {
    __m512 total[N][VECS];
    for (int i = 0; i < N; i++)
      for (int v = 0; v < VECS; v++) total[i][v] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int k = 0; k < PAIRS; k++)
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        int32_t pair;
        std::memcpy(&pair, h + (i * PAIRS + k) * 2, 4);
        const auto wide = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < VECS; v++) total[i][v] = _mm512_dpbf16_ps(total[i][v], b[v][k], wide);
      }
    for (int i = 0; i < N; i++)
      for (int v = 0; v < VECS; v++) z[i][v] = (vf)total[i][v];
  }
};

// each(z, its place in y) for N rows from `row` on.
template <int N, int PAIRS, int VECS, class F>
inline void over_rows(const Tile<PAIRS, VECS>& tile, const bf16* h, int64_t row, int64_t out,
                      int64_t n, F& each) {
  vf z[N][VECS];
  tile.product(h + row * 2 * PAIRS, z);
#pragma GCC unroll 4
  for (int i = 0; i < N; i++)
    for (int v = 0; v < VECS; v++) each(z[i][v], (row + i) * out + n + v * LANES);
}

template <int PAIRS, int VECS, class F>
void over_tiles(const bf16* h, const bf16* b, int64_t from, int64_t to, int64_t out, F each) {
  for (int64_t n = 0; n < out; n += VECS * LANES) {
    const Tile<PAIRS, VECS> tile(b + n * 2 * PAIRS);
    int64_t row = from;
    for (; row + HEIGHT <= to; row += HEIGHT) over_rows<HEIGHT>(tile, h, row, out, n, each);
    for (; row < to; row++) over_rows<1>(tile, h, row, out, n, each);
  }
}

template <class F>
void by_rank(int r, F run) {
  using std::integral_constant;
  if (r == 8) return run(integral_constant<int, 4>{}, integral_constant<int, 2>{});
  if (r == 16) return run(integral_constant<int, 8>{}, integral_constant<int, 2>{});
  run(integral_constant<int, 16>{}, integral_constant<int, 1>{});
}
#endif

template <int P, class T>
void forward(const Lines& l, T* z, int64_t n) {
  const Bend<P> bend{l};
  over(z, z, n, [&](T* at, const T*) { store(at, bend(load(at))); });
}

// z becomes gz; sums: (2, pieces), of gy and gy z.
template <int P, class T>
void backward(const Lines& l, T* z, const T* gy, int64_t n, double* sums) {
  Unbend<P> unbend{l};
  over(z, gy, n, [&](T* at, const T* gy_at) { store(at, unbend(load(at), load(gy_at))); });
  unbend.write(sums);
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

// Rows whose sums go together in the two functions below; 0: this processor has not got them.
int64_t ll_spline_rows() {
#if defined(__AVX512BF16__)
  return ROWS;
#else
  return 0;
#endif
}

#if defined(__AVX512BF16__)
// y = f(h B^T). r: 8, 16 or 32; out: a multiple of 32.
void ll_spline_product_forward(const Spline* s, const bf16* h, const bf16* b, bf16* y, int64_t rows,
                               int64_t out, int r) {
  const Lines l = lines(*s);
  unrolled(l.pieces, [&](auto p) {
    by_rank(r, [&](auto pairs, auto vecs) {
      const Bend<p> bend{l};
      for (int64_t from = 0; from < rows; from += ROWS)
        over_tiles<pairs, vecs>(h, b, from, std::min(rows, from + ROWS), out,
                                [&](vf z, int64_t at) { store(y + at, bend(z)); });
    });
  });
}

// gz from h, B and gy. sums: (ceil(rows / ROWS), 2, pieces).
void ll_spline_product_backward(const Spline* s, const bf16* h, const bf16* b, const bf16* gy,
                                bf16* gz, int64_t rows, int64_t out, int r, double* sums) {
  const Lines l = lines(*s);
  unrolled(l.pieces, [&](auto p) {
    by_rank(r, [&](auto pairs, auto vecs) {
      for (int64_t from = 0; from < rows; from += ROWS, sums += 2 * l.pieces) {
        Unbend<p> unbend{l};
        over_tiles<pairs, vecs>(
            h, b, from, std::min(rows, from + ROWS), out,
            [&](vf z, int64_t at) { store(gz + at, unbend(z, load(gy + at))); });
        unbend.write(sums);
      }
    });
  });
}
#endif

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
