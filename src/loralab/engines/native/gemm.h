// Matrix products of bf16 rows with packed bf16 weights, and the adapters' two thin products.
//
// Packed weights: tiles of 64 outputs, [tile][K/2][64][2], so that one 64-byte load holds a pair of
// inputs for 16 outputs. Every output element is one chain of dot products over K in order, then
// over the rank: its value depends neither on the number of rows nor on the number of threads.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace ll {

constexpr int TILE = 64;     // outputs a tile
constexpr int VECTORS = 4;   // vectors of 16 outputs in a tile
constexpr int ROWS = 6;      // rows a register block: 6 x 4 accumulators of the 32 registers
constexpr int CHUNK = 8;     // columns of A a chunk

// One tile's share of the adapters. Both halves (32 outputs) of a tile may belong to different
// modules (gate and up), so each has its own offset into the rows of h.
struct TileLora {
  const bf16* b = nullptr;  // [member][rank/2][64][2]; null when the module has no adapter
  int offset[2] = {0, 0};   // column of h where the module of this half starts
};

// Memory that a block fetches while it multiplies: `soon` is needed right after the block (its
// members' B), `later` by the next tile. One line at a time between the products: a burst would
// fill the line buffers and stall (measured: 380 instead of 430 to 470 GFLOP/s).
struct Ahead {
  const char *soon, *later;
  int64_t soon_lines, later_lines;
};

template <int R>
static inline void multiply(const bf16* x, int64_t ldx, int K, const bf16* w, Ahead ahead,
                            vf (&acc)[R][VECTORS]) {
  for (int i = 0; i < R; i++)
    for (int j = 0; j < VECTORS; j++) acc[i][j] = vf{};
  // Always inlined: called, the accumulators would live in memory (measured: half the speed).
  auto step = [&](int k) __attribute__((always_inline)) {
    vi wv[VECTORS];
    for (int j = 0; j < VECTORS; j++) wv[j] = load_i(w + k * TILE + 32 * j);
    for (int i = 0; i < R; i++) {
      vi xv = splat_pair(x + i * ldx + k);
      for (int j = 0; j < VECTORS; j++) acc[i][j] = dot(acc[i][j], wv[j], xv);
    }
  };
  // Fetches `lines` over the steps up to `limit`, several a step where they are too few.
  int k = 0;
  auto fetch = [&](const char* p, int64_t lines, int limit) __attribute__((always_inline)) {
    const int64_t room = (limit - k) / 2;
    if (lines <= 0 || room <= 0) return;
    const int64_t each = (lines + room - 1) / room;
    for (; lines > 0; lines -= each, k += 2) {
      for (int64_t i = 0; i < each; i++, p += 64) __builtin_prefetch(p, 0, 2);
      step(k);
    }
  };
  fetch(ahead.soon, ahead.soon_lines, K / 2);
  fetch(ahead.later, ahead.later_lines, K);
  for (; k < K; k += 2) step(k);
}

// acc += h B^T of each row's own member: the adapter joins the sum before it is rounded.
template <int R>
static inline void add_lora(const TileLora& lora, const bf16* h, int64_t ldh, const int32_t* member,
                            int rank, vf (&acc)[R][VECTORS]) {
  const int64_t block = (int64_t)rank * TILE;
  auto add = [&](const bf16* b, int r, int from, int to) __attribute__((always_inline)) {
    const vi b0 = load_i(b), b1 = load_i(b + 32), b2 = load_i(b + 64), b3 = load_i(b + 96);
    for (int i = from; i < to; i++) {
      const vi p0 = splat_pair(h + i * ldh + lora.offset[0] + r);
      const vi p1 = splat_pair(h + i * ldh + lora.offset[1] + r);
      acc[i][0] = dot(acc[i][0], b0, p0);
      acc[i][1] = dot(acc[i][1], b1, p0);
      acc[i][2] = dot(acc[i][2], b2, p1);
      acc[i][3] = dot(acc[i][3], b3, p1);
    }
  };
  bool same = true;
  for (int i = 1; i < R; i++) same &= member[i] == member[0];
  if (same) {  // as in a prefill, or with many prompts a member: B is loaded once for all rows
    if (member[0] < 0) return;
    const bf16* b = lora.b + member[0] * block;
    for (int r = 0; r < rank; r += 2, b += 2 * TILE) add(b, r, 0, R);
    return;
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; i++) {
    if (member[i] < 0) continue;
    const bf16* b = lora.b + member[i] * block;
    for (int r = 0; r < rank; r += 2, b += 2 * TILE) add(b, r, i, i + 1);
  }
}

struct Rows {
  const bf16* x;          // (T, K)
  int64_t ldx;
  const bf16* h;          // (T, ldh), scaled x A^T; null without adapters
  int64_t ldh;
  const int32_t* member;  // (T,)
  int count;
  int rank;
};

// A tile of weights that is wanted after this one; null when there is none.
struct NextTile {
  const bf16* w = nullptr;
  int64_t bytes = 0;
};

// Runs one tile of 64 outputs over all rows; `emit(first_row, R, acc)` takes each block.
// While it works it fetches the next tile, so that the stream of weights hides behind arithmetic.
template <class Emit>
static inline void run_tile(const Rows& rows, int K, const bf16* w, NextTile next,
                            const TileLora* lora, Emit emit) {
  const bool adapted = lora && lora->b && rows.h;
  int t = 0;
  auto block = [&](auto size) {
    constexpr int R = decltype(size)::value;
    Ahead ahead{};
    if (adapted) {
      // Rows come sorted by member, so the blocks of B lie one after another.
      const int64_t bytes = (int64_t)rows.rank * TILE * 2;
      const int32_t from = rows.member[t], to = rows.member[t + R - 1];
      if (from >= 0 && to >= from && to - from < R) {
        ahead.soon = (const char*)lora->b + from * bytes;
        ahead.soon_lines = (to - from + 1) * bytes / 64;
      }
    }
    if (next.w) {
      const int64_t lines = next.bytes / 64, from = lines * t / rows.count;
      ahead.later = (const char*)next.w + from * 64;
      ahead.later_lines = lines * (t + R) / rows.count - from;
    }
    vf acc[R][VECTORS];
    multiply<R>(rows.x + t * rows.ldx, rows.ldx, K, w, ahead, acc);
    if (adapted)
      add_lora<R>(*lora, rows.h + t * rows.ldh, rows.ldh, rows.member + t, rows.rank, acc);
    emit(t, R, acc);
    t += R;
  };
  while (rows.count - t >= ROWS) block(std::integral_constant<int, ROWS>{});
  switch (rows.count - t) {
    case 5: block(std::integral_constant<int, 5>{}); break;
    case 4: block(std::integral_constant<int, 4>{}); break;
    case 3: block(std::integral_constant<int, 3>{}); break;
    case 2: block(std::integral_constant<int, 2>{}); break;
    case 1: block(std::integral_constant<int, 1>{}); break;
  }
}

// h = scaling * x A^T for `R` rows of one member (or of any, when A is shared).
// A: [chunk][K/4][8 columns][4]: lane 2c holds inputs 4k, 4k+1 of column c, lane 2c+1 the next two.
template <int R>
static inline void project(const bf16* x, int64_t ldx, int K, const bf16* a, int chunks,
                           float scaling, bf16* h, int64_t ldh) {
  for (int c = 0; c < chunks; c++, a += (int64_t)K * CHUNK) {
    vf even[R], odd[R];
    for (int i = 0; i < R; i++) even[i] = odd[i] = vf{};
    auto step = [&](vf(&acc)[R], int k) {
      vi av = load_i(a + (int64_t)k * CHUNK);
      for (int i = 0; i < R; i++) {
        int64_t four;
        std::memcpy(&four, x + i * ldx + k, 8);
        typedef int64_t v8 __attribute__((vector_size(64)));
        acc[i] = dot(acc[i], av, (vi)(v8{} + four));
      }
    };
    int k = 0;
    for (; k + 8 <= K; k += 8) {
      step(even, k);
      step(odd, k + 4);
    }
    if (k < K) step(even, k);
    for (int i = 0; i < R; i++) {
      vf s = even[i] + odd[i];
      for (int j = 0; j < CHUNK; j++)
        h[i * ldh + c * CHUNK + j] = to_bf16(scaling * (s[2 * j] + s[2 * j + 1]));
    }
  }
}

}  // namespace ll
