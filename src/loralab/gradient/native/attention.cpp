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

constexpr int64_t PAIRS = TILE / 2;

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
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

inline void store_pair(bf16* p, vf low, vf high) { *(vi_any*)p = rounded(low) | rounded(high) << 16; }

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

// to (count, wide) += X^T W, of one tile of 64 of the width.
void add_product(const bf16* x, int64_t count, int K, const bf16* w, float* to, int64_t wide) {
  auto block = [&](auto size, int64_t row) {
    constexpr int R = decltype(size)::value;
    vf acc[R][VECTORS];
    multiply_columns<R>(x + 2 * row, K, w, acc);
    for (int i = 0; i < R; i++)
      for (int j = 0; j < VECTORS; j++) {
        float* at = to + (row + i) * wide + j * LANES;
        store_f(at, load_f(at) + acc[i][j]);
      }
  };
  int64_t row = 0;
  for (; row + ROWS <= count; row += ROWS) block(std::integral_constant<int, ROWS>{}, row);
  for (; row + 2 <= count; row += 2) block(std::integral_constant<int, 2>{}, row);
  if (row < count) block(std::integral_constant<int, 1>{}, row);
}

inline Rows rows_of(const bf16* x, int64_t stride, int64_t count) {
  return Rows{x, stride, nullptr, 0, nullptr, (int)count, 0};
}

// Lanes of keys from `key` on that the query may see.
inline vf hide(vf scores, int64_t key, int64_t query) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane <= splat_i((int32_t)(query - key)), scores, splat(-INFINITY));
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

using Halves = std::vector<bf16>;
using Floats = std::vector<float>;

// One sequence, one group. lse: (tokens, heads), natural logarithms.
void forward(const Shape& s, Sequence at, int64_t group, const bf16* q, const bf16* k,
             const bf16* v, bf16* out, float* lse) {
  const int64_t share = s.heads / s.groups, d = s.width, keys = tiles(at.tokens) * TILE;
  const int64_t row = s.heads * d, key_row = s.groups * d, first = at.start * key_row + group * d;
  thread_local Halves packed_k, packed_v, weights;
  thread_local Floats scores;
  const int64_t height = up_to(at.tokens, 2);
  packed_k.resize(keys * d), packed_v.resize(tiles(d) * TILE * height);
  weights.resize(ROWS * keys), scores.resize(ROWS * keys);
  pack_rows(k + first, key_row, at.tokens, d, packed_k.data());
  pack_columns(v + first, key_row, at.tokens, d, packed_v.data());

  for (int64_t h = group * share; h < (group + 1) * share; h++)
    for (int64_t from = 0; from < at.tokens; from += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, at.tokens - from), seen = from + count;
      const int64_t wide = tiles(seen) * TILE;
      const bf16* queries = q + (at.start + from) * row + h * d;
      for (int64_t tile = 0; tile < tiles(seen); tile++)
        run_tile(rows_of(queries, row, count), d, packed_k.data() + tile * TILE * d, NextTile{},
                 nullptr, [&](int t, int R, auto& acc) {
                   for (int i = 0; i < R; i++)
                     for (int j = 0; j < VECTORS; j++) {
                       const int64_t key = tile * TILE + j * LANES;
                       vf score = acc[i][j] * s.scale;
                       if (key + LANES > from + t + i) score = hide(score, key, from + t + i);
                       store_f(scores.data() + (t + i) * keys + key, score);
                     }
                 });
      float share_of[ROWS];
      for (int64_t i = 0; i < count; i++) {
        const float* score = scores.data() + i * keys;
        vf most = load_f(score), total{};
        for (int64_t key = LANES; key < wide; key += LANES) most = larger(load_f(score + key), most);
        const float top = largest(most);
        for (int64_t key = 0; key < wide; key += LANES) {
          const vf p = exponential(load_f(score + key) - top);
          total += p;
          store(weights.data() + i * keys + key, p);
        }
        const float sum_of = sum(total);
        share_of[i] = 1.0f / sum_of;
        lse[(at.start + from + i) * s.heads + h] = top + std::log(sum_of);
      }
      // Weights of keys that are not seen are 1e-38 and less; of pads, 0 times their values.
      for (int64_t tile = 0; tile < tiles(d); tile++)
        run_tile(rows_of(weights.data(), keys, count), (int)up_to(seen, 2),
                 packed_v.data() + tile * TILE * height, NextTile{}, nullptr,
                 [&](int t, int R, auto& acc) {
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
  thread_local Halves packed_k, packed_v, summed_k, slopes, weight_pairs, slope_pairs, columns_q,
      columns_o;
  thread_local Floats sums_k, sums_v, chances;
  packed_k.resize(keys * d), packed_v.resize(keys * d);
  summed_k.resize(tiles(d) * TILE * height);
  slopes.resize(TILE * keys), weight_pairs.resize(TILE * TILE), slope_pairs.resize(TILE * TILE);
  const int64_t wide = tiles(d) * TILE;
  columns_q.resize(wide * TILE), columns_o.resize(wide * TILE);
  sums_k.assign(keys * wide, 0.0f), sums_v.assign(keys * wide, 0.0f), chances.resize(TILE * TILE);
  pack_rows(k + first, key_row, at.tokens, d, packed_k.data());
  pack_rows(v + first, key_row, at.tokens, d, packed_v.data());
  pack_columns(k + first, key_row, at.tokens, d, summed_k.data());

  for (int64_t h = group * share; h < (group + 1) * share; h++)
    for (int64_t from = 0; from < at.tokens; from += TILE) {
      const int64_t count = std::min<int64_t>(TILE, at.tokens - from), even = up_to(count, 2);
      const int64_t here = (at.start + from) * row + h * d;
      const float* lse_here = lse + (at.start + from) * s.heads + h;
      const float* delta_here = delta + (at.start + from) * s.heads + h;
      pack_columns(q + here, row, count, d, columns_q.data());
      pack_columns(of_out + here, row, count, d, columns_o.data());
      for (int64_t tile = 0; tile * TILE < from + count; tile++) {
        run_tile(rows_of(q + here, row, count), d, packed_k.data() + tile * TILE * d, NextTile{},
                 nullptr, [&](int t, int R, auto& acc) {
                   for (int i = 0; i < R; i++) {
                     const float norm = lse_here[(t + i) * s.heads];
                     for (int j = 0; j < VECTORS; j++) {
                       const int64_t key = tile * TILE + j * LANES, query = from + t + i;
                       vf p = exponential(acc[i][j] * s.scale - norm);
                       if (key + LANES > query) {
                         const vf seen = hide(splat(0.0f), key, query);
                         p = select(seen == 0.0f, p, splat(0.0f));
                       }
                       store_f(chances.data() + (t + i) * TILE + j * LANES, p);
                       acc[i][j] = p;
                     }
                   }
                   for (int i = 0; i < R; i += 2)
                     for (int j = 0; j < VECTORS; j++)
                       store_pair(weight_pairs.data() + (t + i) * TILE + j * 2 * LANES, acc[i][j],
                                  i + 1 < R ? acc[i + 1][j] : vf{});
                 });
        run_tile(rows_of(of_out + here, row, count), d, packed_v.data() + tile * TILE * d,
                 NextTile{}, nullptr, [&](int t, int R, auto& acc) {
                   for (int i = 0; i < R; i++) {
                     const float mean = delta_here[(t + i) * s.heads];
                     for (int j = 0; j < VECTORS; j++) {
                       const vf p = load_f(chances.data() + (t + i) * TILE + j * LANES);
                       acc[i][j] = p * (acc[i][j] - mean) * s.scale;
                       store(slopes.data() + (t + i) * keys + tile * TILE + j * LANES, acc[i][j]);
                     }
                   }
                   for (int i = 0; i < R; i += 2)
                     for (int j = 0; j < VECTORS; j++)
                       store_pair(slope_pairs.data() + (t + i) * TILE + j * 2 * LANES, acc[i][j],
                                  i + 1 < R ? acc[i + 1][j] : vf{});
                 });
        const int64_t behind = std::min<int64_t>(TILE, at.tokens - tile * TILE);
        for (int64_t part = 0; part < tiles(d); part++) {
          const int64_t to = tile * TILE * wide + part * TILE, from_part = part * TILE * even;
          add_product(weight_pairs.data(), behind, (int)even, columns_o.data() + from_part,
                      sums_v.data() + to, wide);
          add_product(slope_pairs.data(), behind, (int)even, columns_q.data() + from_part,
                      sums_k.data() + to, wide);
        }
      }
      for (int64_t tile = 0; tile < tiles(d); tile++)
        run_tile(rows_of(slopes.data(), keys, count), (int)up_to(from + count, 2),
                 summed_k.data() + tile * TILE * height, NextTile{}, nullptr,
                 [&](int t, int R, auto& acc) {
                   emit_tile(tile, d, R, [&](int i, int64_t column, int j) {
                     bf16* to = of_q + here + (t + i) * row + column;
                     store_some(to, acc[i][j], d - column);
                   });
                 });
    }
  for (int64_t token = 0; token < at.tokens; token++)
    for (int64_t i = 0; i < d; i += LANES) {
      const int64_t to = first + token * key_row + i, sum_at = token * wide + i;
      store_some(of_k + to, load_f(sums_k.data() + sum_at), d - i);
      store_some(of_v + to, load_f(sums_v.data() + sum_at), d - i);
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
