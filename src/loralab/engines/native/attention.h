// Causal attention of one token over a paged cache, for one key-value head and its query heads.
//
// A page holds 16 positions of one key-value head in one layer: keys as [hd/2][16][2], so that one
// load meets 16 keys, then values as [16/2][hd][2], so that one load meets a pair of positions.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace ll {

constexpr int PAGE = 16;

static inline void write_key(bf16* page, int slot, const float* key, int hd) {
  alignas(64) bf16 rounded[LANES];
  for (int d0 = 0; d0 < hd; d0 += LANES) {
    store_bf16(rounded, load_f(key + d0));
    for (int d = 0; d < LANES; d += 2) std::memcpy(page + (d0 + d) * PAGE + slot * 2, rounded + d, 4);
  }
}

static inline void write_value(bf16* page, int slot, const float* value, int hd) {
  bf16* v = page + PAGE * hd + (slot / 2) * hd * 2 + slot % 2;
  alignas(64) bf16 rounded[LANES];
  for (int d0 = 0; d0 < hd; d0 += LANES) {
    store_bf16(rounded, load_f(value + d0));
    for (int d = 0; d < LANES; d++) v[2 * (d0 + d)] = rounded[d];
  }
}

// q: (G, hd) bf16, already times the softmax scale. scores: scratch, G * stride floats.
// `page_of(i)` gives the i-th page of the sequence, `next_page(i)` a page to fetch meanwhile, or
// null. Attends to positions [from, to].
template <int G, class PageOf, class NextPage>
static void attend(const bf16* q, int64_t ldq, int hd, int from, int to, PageOf page_of,
                   NextPage next_page, float* scores, int64_t stride, bf16* out, int64_t ldo) {
  const int first = from / PAGE, last = to / PAGE;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf minus_inf = splat(-__builtin_inff());
  vf top[G];
  for (int g = 0; g < G; g++) top[g] = minus_inf;
  for (int p = first; p <= last; p++) {
    const bf16* k = page_of(p);
    const bf16* soon = next_page(p);
    // Two chains for each head: one alone would wait for its own sum at every step.
    vf even[G], odd[G];
    for (int g = 0; g < G; g++) even[g] = odd[g] = vf{};
    for (int d = 0; d < hd; d += 4, k += 4 * PAGE) {
      if (soon) {
        __builtin_prefetch(soon + d * PAGE, 0, 2);
        __builtin_prefetch(soon + d * PAGE + 2 * PAGE, 0, 2);
      }
      vi k0 = load_i(k), k1 = load_i(k + 2 * PAGE);
      for (int g = 0; g < G; g++) {
        even[g] = dot(even[g], k0, splat_pair(q + g * ldq + d));
        odd[g] = dot(odd[g], k1, splat_pair(q + g * ldq + d + 2));
      }
    }
    vi position = lane + p * PAGE;
    vi seen = (position >= from) & (position <= to);
    for (int g = 0; g < G; g++) {
      vf s = select(seen, even[g] + odd[g], minus_inf);
      store_f(scores + g * stride + (p - first) * PAGE, s);
      // A NaN score must reach the output: larger() would drop it.
      top[g] = larger(s, top[g]);
    }
  }
  float inverse[G];
  const int n = (last - first + 1) * PAGE;
  for (int g = 0; g < G; g++) {
    float* s = scores + g * stride;
    const vf m = splat(largest(top[g]));
    vf total{};
    bf16* w = (bf16*)s;  // weights overwrite the scores, half as wide, never ahead of the reading
    for (int i = 0; i < n; i += LANES) {
      vf x = load_f(s + i);
      // Positions that are not seen weigh exactly 0, whatever exp() does with -inf.
      vf e = select(x == minus_inf, vf{}, exponential(x - m));
      total += e;
      store_bf16(w + i, e);
    }
    inverse[g] = 1.0f / sum(total);
  }
  const vi low_half = splat_i(0x0000ffff);
  for (int d0 = 0; d0 < hd; d0 += 4 * LANES) {
    const int nv = hd - d0 < 4 * LANES ? (hd - d0) / LANES : 4;
    vf acc[G][4];
    for (int g = 0; g < G; g++)
      for (int j = 0; j < 4; j++) acc[g][j] = vf{};
    for (int p = first; p <= last; p++) {
      const bf16 *v = page_of(p) + PAGE * hd + d0 * 2, *soon = next_page(p);
      const int pairs = p == last ? (to % PAGE) / 2 + 1 : PAGE / 2;
      for (int i = 0; i < pairs; i++, v += 2 * hd) {
        if (soon)
          for (int j = 0; j < nv; j++)
            __builtin_prefetch(soon + (PAGE + 2 * i) * hd + d0 * 2 + 32 * j, 0, 2);
        // The partner of the newest even position is unwritten memory: 0 x NaN would be NaN.
        const bool alone = p == last && i == pairs - 1 && to % 2 == 0;
        vi value[4];
        for (int j = 0; j < nv; j++) {
          value[j] = load_i(v + 32 * j);
          if (alone) value[j] &= low_half;
        }
        for (int g = 0; g < G; g++) {
          vi weight = splat_pair((const bf16*)(scores + g * stride) + (p - first) * PAGE + 2 * i);
          for (int j = 0; j < nv; j++) acc[g][j] = dot(acc[g][j], value[j], weight);
        }
      }
    }
    for (int g = 0; g < G; g++)
      for (int j = 0; j < nv; j++)
        store_bf16(out + g * ldo + d0 + LANES * j, acc[g][j] * inverse[g]);
  }
}

template <class PageOf, class NextPage>
static void attend_heads(int heads, const bf16* q, int64_t ldq, int hd, int from, int to,
                         PageOf page_of, NextPage next_page, float* scores, int64_t stride,
                         bf16* out, int64_t ldo) {
  auto run = [&](auto size) {
    attend<decltype(size)::value>(q, ldq, hd, from, to, page_of, next_page, scores, stride, out,
                                  ldo);
  };
  while (heads > 0) {
    int g = heads >= 4 ? 4 : heads;
    switch (g) {
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 1: run(std::integral_constant<int, 1>{}); break;
    }
    heads -= g;
    q += g * ldq;
    out += g * ldo;
  }
}

}  // namespace ll
