// Causal attention of training, forward and backward, of sequences laid end to end, in bf16.
//
//     S = scale Q K^T,  P = softmax(S),  O = P V
//     dV = P^T dO,  dP = dO V^T,  dS = scale P (dP - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q
//
// P is never kept: backward makes it again from the rows' logarithms of sums (Dao et al. 2022,
// arXiv:2205.14135). One sequence and one key head at a time, in blocks of 64 queries by 64 keys
// that stay in the cache; blocks above the diagonal are not computed. Products are `multiply` of
// gemm.h; sums are fp32, and P and dS are rounded to bf16 to be multiplied, as tensor cores do.
//
// q, out (tokens, heads, width), k, v (tokens, groups, width), each dense; width is even.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../../engines/native/gemm.h"
#include "elements.h"

namespace {

using namespace ll;

struct Shape {
  int64_t heads, groups, width;
  float scale;
};

struct Sequence {
  int64_t start, tokens;
};

inline int64_t up_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }

// The bf16 of a vector in the low halves of 32-bit lanes.
inline vi rounded(vf v) {
#if defined(__AVX512BF16__)
  return (vi)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  bf16 half[LANES];
  store_bf16(half, v);
  vi out;
  for (int i = 0; i < LANES; i++) out[i] = half[i];
  return out;
#endif
}

inline void store_pair(bf16* p, vf low, vf high) {
  *(vi_any*)p = rounded(low) | rounded(high) << 16;
}

// Rows as outputs of a product over their width: [tile of 64 rows][width / 2][64][2].
void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t width, bf16* to) {
  std::fill(to, to + tiles(rows) * TILE * width, 0);
  for (int64_t row = 0; row < rows; row++) {
    bf16* at = to + row / TILE * TILE * width + row % TILE * 2;
    for (int64_t d = 0; d < width; d += 2) std::memcpy(at + d * TILE, x + row * stride + d, 4);
  }
}

// Sixteen of one row in the low halves of 32-bit lanes, of another in the high ones.
inline vi interleaved(const bf16* low, const bf16* high) {
  typedef bf16 half __attribute__((vector_size(32), aligned(2)));
  return __builtin_convertvector(*(const half*)low, vi) |
         __builtin_convertvector(*(const half*)high, vi) << 16;
}

// Rows as the sum of a product that gives their width: [tile of 64 of width][rows / 2][64][2].
void pack_columns(const bf16* x, int64_t stride, int64_t rows, int64_t width, bf16* to) {
  const int64_t height = up_to(rows, 2), whole = width / LANES * LANES;
  if (width % TILE) std::fill(to, to + tiles(width) * TILE * height, 0);
  const std::vector<bf16> nothing(width);
  for (int64_t row = 0; row < rows; row += 2) {
    const bf16 *low = x + row * stride, *high = row + 1 < rows ? low + stride : nothing.data();
    auto at = [&](int64_t d) { return to + d / TILE * TILE * height + row * TILE + d % TILE * 2; };
    for (int64_t d = 0; d < whole; d += LANES) *(vi_any*)at(d) = interleaved(low + d, high + d);
    for (int64_t d = whole; d < width; d++) at(d)[0] = low[d], at(d)[1] = high[d];
  }
}

// acc = X^T W of pairs of rows: x [K / 2][TILE][2], of which R columns, and w [K / 2][64][2].
template <int R>
inline void multiply_columns(const bf16* x, int K, const bf16* w, vf (&acc)[R][VECTORS]) {
  for (int i = 0; i < R; i++)
    for (int j = 0; j < VECTORS; j++) acc[i][j] = vf{};
  for (int k = 0; k < K; k += 2) {
    vi wv[VECTORS];
    for (int j = 0; j < VECTORS; j++) wv[j] = load_i(w + k * TILE + 32 * j);
    for (int i = 0; i < R; i++) {
      const vi xv = splat_pair(x + k * TILE + 2 * i);
      for (int j = 0; j < VECTORS; j++) acc[i][j] = dot(acc[i][j], wv[j], xv);
    }
  }
}

// block(size, row) over `count` rows, six at a time, then two and one.
template <class F>
inline void by_rows(int64_t count, F block) {
  int64_t row = 0;
  for (; row + ROWS <= count; row += ROWS) block(std::integral_constant<int, ROWS>{}, row);
  for (; row + 2 <= count; row += 2) block(std::integral_constant<int, 2>{}, row);
  if (row < count) block(std::integral_constant<int, 1>{}, row);
}

// to (count, wide) += X^T W, of one tile of 64 of the width.
void add_product(const bf16* x, int64_t count, int K, const bf16* w, float* to, int64_t wide) {
  by_rows(count, [&](auto size, int64_t row) {
    constexpr int R = decltype(size)::value;
    vf acc[R][VECTORS];
    multiply_columns<R>(x + 2 * row, K, w, acc);
    for (int i = 0; i < R; i++)
      for (int j = 0; j < VECTORS; j++) {
        float* at = to + (row + i) * wide + j * LANES;
        store_f(at, load_f(at) + acc[i][j]);
      }
  });
}

// x W of `count` rows by packed w: emit(first row, how many, their results [rows][VECTORS]).
// What is emitted is a copy (measured: a third of the time). Loops that are not unrolled would take
// the accumulators themselves by address, and these would live in memory while they add up.
template <class F>
inline void product(const bf16* x, int64_t stride, int64_t count, int K, const bf16* w, F emit) {
  by_rows(count, [&](auto size, int64_t row) {
    constexpr int R = decltype(size)::value;
    vf acc[R][VECTORS], results[R][VECTORS];
    multiply<R>(x + row * stride, stride, K, w, Ahead{}, acc);
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) results[i][j] = acc[i][j];
    emit(row, R, results);
  });
}

// Rows of results as pairs of rows, [R / 2][64][2], for a product that sums over them.
inline void store_pairs(bf16* to, int R, const vf (*results)[VECTORS]) {
  for (int i = 0; i < R; i += 2)
    for (int j = 0; j < VECTORS; j++)
      store_pair(to + i * TILE + j * 2 * LANES, results[i][j],
                 i + 1 < R ? results[i + 1][j] : vf{});
}

// `value` in the lanes of keys, counted from `key`, that the query may see, else `hidden`.
inline vf where_seen(int64_t key, int64_t query, vf value, float hidden) {
  if (key + LANES <= query + 1) return value;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane <= splat_i((int32_t)(query - key)), value, splat(hidden));
}

// Writes what a product gives for rows of `width` in tiles of 64.
template <class F>
inline void emit_tile(int64_t tile, int64_t width, int R, F each) {
  for (int i = 0; i < R; i++)
    for (int j = 0; j < VECTORS; j++)
      if (tile * TILE + j * LANES < width) each(i, tile * TILE + j * LANES, j);
}

inline void store_some(bf16* p, vf v, int64_t room) {
  if (room >= LANES) return store(p, v);
  bf16 all[LANES];
  store(all, v);
  std::memcpy(p, all, room * sizeof(bf16));
}

// Memory that a thread keeps from call to call, at the start of a cache line. Plain pointers into
// it go into the loops: reaching a thread's own variable is a call.
template <class T, int Name>
T* scratch(int64_t n) {
  thread_local std::vector<T> kept;
  constexpr int64_t line = 64 / sizeof(T);
  if ((int64_t)kept.size() < n + line) kept.resize(n + line);
  return (T*)(((uintptr_t)kept.data() + 63) / 64 * 64);
}

// One sequence, one group. lse: (tokens, heads), natural logarithms.
void forward(const Shape& s, Sequence at, int64_t group, const bf16* q, const bf16* k,
             const bf16* v, bf16* out, float* lse) {
  const int64_t share = s.heads / s.groups, d = s.width, keys = tiles(at.tokens) * TILE;
  const int64_t row = s.heads * d, key_row = s.groups * d, first = at.start * key_row + group * d;
  const int64_t height = up_to(at.tokens, 2);
  bf16* const packed_k = scratch<bf16, 0>(keys * d);
  bf16* const packed_v = scratch<bf16, 1>(tiles(d) * TILE * height);
  bf16* const weights = scratch<bf16, 2>(ROWS * keys);
  float* const scores = scratch<float, 0>(ROWS * keys);
  pack_rows(k + first, key_row, at.tokens, d, packed_k);
  pack_columns(v + first, key_row, at.tokens, d, packed_v);

  for (int64_t h = group * share; h < (group + 1) * share; h++)
    for (int64_t from = 0; from < at.tokens; from += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, at.tokens - from), seen = from + count;
      const int64_t wide = tiles(seen) * TILE;
      const bf16* queries = q + (at.start + from) * row + h * d;
      for (int64_t tile = 0; tile < tiles(seen); tile++)
        product(queries, row, count, d, packed_k + tile * TILE * d,
                [&](int64_t t, int R, auto& acc) {
                  for (int i = 0; i < R; i++)
                    for (int j = 0; j < VECTORS; j++) {
                      const int64_t key = tile * TILE + j * LANES;
                      store_f(scores + (t + i) * keys + key,
                              where_seen(key, from + t + i, acc[i][j] * s.scale, -INFINITY));
                    }
                });
      float share_of[ROWS];
      for (int64_t i = 0; i < count; i++) {
        const float* score = scores + i * keys;
        vf most = load_f(score), total{};
        for (int64_t key = LANES; key < wide; key += LANES)
          most = larger(load_f(score + key), most);
        const float top = largest(most);
        for (int64_t key = 0; key < wide; key += LANES) {
          const vf p = exponential(load_f(score + key) - top);
          total += p;
          store(weights + i * keys + key, p);
        }
        const float sum_of = sum(total);
        share_of[i] = 1.0f / sum_of;
        lse[(at.start + from + i) * s.heads + h] = top + std::log(sum_of);
      }
      // Weights of keys that are not seen are 1e-38 and less; of pads, 0 times their values.
      for (int64_t tile = 0; tile < tiles(d); tile++)
        product(weights, keys, count, (int)up_to(seen, 2), packed_v + tile * TILE * height,
                [&](int64_t t, int R, auto& acc) {
                  emit_tile(tile, d, R, [&](int i, int64_t column, int j) {
                    bf16* to = out + (at.start + from + t + i) * row + h * d + column;
                    store_some(to, acc[i][j] * share_of[t + i], d - column);
                  });
                });
    }
}

// One sequence, one group; delta: rowsum(dO O), like lse (tokens, heads).
void backward(const Shape& s, Sequence at, int64_t group, const bf16* q, const bf16* k,
              const bf16* v, const bf16* of_out, const float* lse, const float* delta, bf16* of_q,
              bf16* of_k, bf16* of_v) {
  const int64_t share = s.heads / s.groups, d = s.width, keys = tiles(at.tokens) * TILE;
  const int64_t row = s.heads * d, key_row = s.groups * d, first = at.start * key_row + group * d;
  const int64_t height = up_to(at.tokens, 2);
  const int64_t wide = tiles(d) * TILE;
  bf16* const packed_k = scratch<bf16, 0>(keys * d);
  bf16* const packed_v = scratch<bf16, 1>(keys * d);
  bf16* const summed_k = scratch<bf16, 2>(wide * height);
  bf16* const slopes = scratch<bf16, 3>(TILE * keys);
  bf16* const weight_pairs = scratch<bf16, 4>(TILE * TILE);
  bf16* const slope_pairs = scratch<bf16, 5>(TILE * TILE);
  bf16* const columns_q = scratch<bf16, 6>(wide * TILE);
  bf16* const columns_o = scratch<bf16, 7>(wide * TILE);
  float* const chances = scratch<float, 0>(TILE * TILE);
  float* const sums_k = scratch<float, 1>(keys * wide);
  float* const sums_v = scratch<float, 2>(keys * wide);
  std::fill(sums_k, sums_k + at.tokens * wide, 0.0f);
  std::fill(sums_v, sums_v + at.tokens * wide, 0.0f);
  pack_rows(k + first, key_row, at.tokens, d, packed_k);
  pack_rows(v + first, key_row, at.tokens, d, packed_v);
  pack_columns(k + first, key_row, at.tokens, d, summed_k);

  for (int64_t h = group * share; h < (group + 1) * share; h++)
    for (int64_t from = 0; from < at.tokens; from += TILE) {
      const int64_t count = std::min<int64_t>(TILE, at.tokens - from), even = up_to(count, 2);
      const int64_t here = (at.start + from) * row + h * d;
      const float* lse_here = lse + (at.start + from) * s.heads + h;
      const float* delta_here = delta + (at.start + from) * s.heads + h;
      pack_columns(q + here, row, count, d, columns_q);
      pack_columns(of_out + here, row, count, d, columns_o);
      for (int64_t tile = 0; tile * TILE < from + count; tile++) {
        product(q + here, row, count, d, packed_k + tile * TILE * d,
                [&](int64_t t, int R, auto& acc) {
                  for (int i = 0; i < R; i++) {
                    const float norm = lse_here[(t + i) * s.heads];
                    for (int j = 0; j < VECTORS; j++) {
                      const vf p = exponential(acc[i][j] * s.scale - norm);
                      acc[i][j] = where_seen(tile * TILE + j * LANES, from + t + i, p, 0.0f);
                      store_f(chances + (t + i) * TILE + j * LANES, acc[i][j]);
                    }
                  }
                  store_pairs(weight_pairs + t * TILE, R, acc);
                });
        product(of_out + here, row, count, d, packed_v + tile * TILE * d,
                [&](int64_t t, int R, auto& acc) {
                  for (int i = 0; i < R; i++) {
                    const float mean = delta_here[(t + i) * s.heads];
                    for (int j = 0; j < VECTORS; j++) {
                      const vf p = load_f(chances + (t + i) * TILE + j * LANES);
                      acc[i][j] = p * (acc[i][j] - mean) * s.scale;
                      store(slopes + (t + i) * keys + tile * TILE + j * LANES, acc[i][j]);
                    }
                  }
                  store_pairs(slope_pairs + t * TILE, R, acc);
                });
        const int64_t behind = std::min<int64_t>(TILE, at.tokens - tile * TILE);
        for (int64_t part = 0; part < tiles(d); part++) {
          const int64_t to = tile * TILE * wide + part * TILE, from_part = part * TILE * even;
          add_product(weight_pairs, behind, (int)even, columns_o + from_part, sums_v + to, wide);
          add_product(slope_pairs, behind, (int)even, columns_q + from_part, sums_k + to, wide);
        }
      }
      for (int64_t tile = 0; tile < tiles(d); tile++)
        product(slopes, keys, count, (int)up_to(from + count, 2), summed_k + tile * TILE * height,
                [&](int64_t t, int R, auto& acc) {
                  emit_tile(tile, d, R, [&](int i, int64_t column, int j) {
                    bf16* to = of_q + here + (t + i) * row + column;
                    store_some(to, acc[i][j], d - column);
                  });
                });
    }
  for (int64_t token = 0; token < at.tokens; token++)
    for (int64_t i = 0; i < d; i += LANES) {
      const int64_t to = first + token * key_row + i, sum_at = token * wide + i;
      store_some(of_k + to, load_f(sums_k + sum_at), d - i);
      store_some(of_v + to, load_f(sums_v + sum_at), d - i);
    }
}

}  // namespace

extern "C" {

// Work `item` of a batch is sequence item / groups, key head item % groups.
void ll_attention_forward(const Shape* s, const Sequence* sequences, int64_t item, int64_t end,
                          const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse) {
  for (; item < end; item++)
    forward(*s, sequences[item / s->groups], item % s->groups, q, k, v, out, lse);
}

void ll_attention_backward(const Shape* s, const Sequence* sequences, int64_t item, int64_t end,
                           const bf16* q, const bf16* k, const bf16* v, const bf16* of_out,
                           const float* lse, const float* delta, bf16* of_q, bf16* of_k,
                           bf16* of_v) {
  for (; item < end; item++)
    backward(*s, sequences[item / s->groups], item % s->groups, q, k, v, of_out, lse, delta, of_q,
             of_k, of_v);
}

// delta (n,) of rows (n, width): sum of a b.
void ll_attention_delta(const bf16* a, const bf16* b, float* delta, int64_t n, int64_t width) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t i = 0; i < n; i++, a += width, b += width) {
    vf total{};
    for (int64_t j = 0; j < whole; j += LANES) total += load(a + j) * load(b + j);
    delta[i] = sum(total);
    for (int64_t j = whole; j < width; j++) delta[i] += to_float(a[j]) * to_float(b[j]);
  }
}
}
