// A forward step: what happens to the rows between their tokens and their logits.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "model.h"

namespace ll {

// Sense-reversing barrier that spins briefly, then yields: cores here may be shared.
class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    if (n_ == 1) return;
    int phase = phase_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
      if (spins > 2000) std::this_thread::yield();
  }

 private:
  const int n_;
  std::atomic<int> waiting_{0}, phase_{0};
};

struct Step {
  int T, R;
  const int32_t *tokens, *positions, *sequence, *member;
  const int32_t* pages;       // (sequences, pages_ld) page numbers
  int64_t pages_ld;
  bf16* cache;                // [layer][page][kv head][key half, value half]
  int64_t capacity;           // pages
  const int32_t* out_rows;    // (R,) rows whose logits are wanted
  float* logits;              // (R, vocab) or null
  int64_t* best;              // (R,)
  int threads;
};

class Forward {
 public:
  Forward(Model& m, const Step& s)
      : m_(m),
        s_(s),
        barrier_(s.threads),
        residual_(m.space.residual),
        qkv_(m.space.qkv),
        scores_(m.space.scores),
        head_best_(m.space.head_best),
        x_(m.space.x),
        mixed_(m.space.mixed),
        q_(m.space.q),
        h_(m.space.h) {
    const int64_t T = s.T;
    qkv_ld_ = (int64_t)m.tiles_of(QKV) * TILE;
    int columns = 0;
    for (auto& layer : m.layers)
      for (auto& lora : layer.lora) columns = std::max(columns, lora.any ? lora.columns : 0);
    h_ld_ = columns;
    wide_ = std::max({m.hidden, m.inner, m.heads * m.hd});
    residual_.resize(T * m.hidden);
    x_.resize(T * wide_);
    mixed_.resize(T * wide_);
    qkv_.resize(T * qkv_ld_);
    q_.resize(T * m.heads * m.hd);
    h_.resize(T * std::max<int64_t>(h_ld_, 1));
    int32_t longest = 0;
    for (int t = 0; t < T; t++) longest = std::max(longest, s.positions[t]);
    scores_ld_ = (longest / PAGE + 2) * PAGE;
    scores_.resize(s.threads * scores_ld_ * 4);
    counters_ = std::vector<std::atomic<int>>(m.layers.size() * 16 + 16);
    for (auto& c : counters_) c.store(0);
    page_values_ = (int64_t)2 * PAGE * m.hd;
    head_best_.resize((int64_t)s.threads * s.R * 3);
  }

  void run() {
    std::vector<std::thread> pool;
    for (int i = 1; i < s_.threads; i++) pool.emplace_back([this, i] { work(i); });
    work(0);
    for (auto& t : pool) t.join();
    merge_best();
  }

 private:
  // Items are handed out one at a time: a core that is taken away by a neighbour holds up nothing.
  // Which thread does an item never changes its value.
  template <class F>
  void share(int counter, int items, F f) {
    if (s_.threads == 1) {
      for (int i = 0; i < items; i++) f(i);
      return;
    }
    auto& next = counters_[counter];
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
    barrier_.wait();
  }

  void norm(const float* x, const float* w, int n, bf16* out) const {
    vf total{};
    float tail = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
      vf v = load_f(x + i);
      total += v * v;
    }
    for (; i < n; i++) tail += x[i] * x[i];
    const float r = 1.0f / std::sqrt((sum(total) + tail) / n + m_.eps);
    for (i = 0; i + LANES <= n; i += LANES) store_bf16(out + i, load_f(x + i) * r * load_f(w + i));
    for (; i < n; i++) out[i] = to_bf16(x[i] * r * w[i]);
  }

  void norm_rows(int counter, const std::vector<float>& w) {
    share(counter, (s_.T + 7) / 8, [&](int g) {
      for (int t = g * 8; t < std::min(s_.T, g * 8 + 8); t++)
        norm(&residual_[(int64_t)t * m_.hidden], w.data(), m_.hidden, &x_[(int64_t)t * wide_]);
    });
  }

  // h = scaling * x A^T for every row; rows of one member go together.
  void project_rows(int counter, const SiteLora& lora, const bf16* x, int K) {
    if (!lora.any || !m_.members) return;
    share(counter, (s_.T + 7) / 8, [&](int g) {
      int t = g * 8;
      const int end = std::min(s_.T, t + 8), chunks = lora.columns / CHUNK;
      while (t < end) {
        int n = 1;
        while (t + n < end && n < 8 && (lora.shared || s_.member[t + n] == s_.member[t])) n++;
        const int member = lora.shared ? 0 : s_.member[t];
        if (member >= 0) {
          const bf16* a = &lora.a[(int64_t)member * lora.columns * K];
          const bf16* in = x + (int64_t)t * wide_;
          bf16* h = &h_[t * h_ld_];
          switch (n) {
            case 8: project<8>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 7: project<7>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 6: project<6>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 5: project<5>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 4: project<4>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 3: project<3>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 2: project<2>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
            case 1: project<1>(in, wide_, K, a, chunks, m_.scaling, h, h_ld_); break;
          }
        }
        t += n;
      }
    });
  }

  // Where each tile of a site finds its columns of h and its block of B.
  TileLora tile_lora(const SiteLora& lora, int site, int tile) const {
    TileLora t;
    if (!lora.any || !m_.members) return t;
    t.b = &lora.b[(int64_t)tile * m_.members * m_.rank * TILE];
    if (site == GATE_UP) {
      t.offset[1] = m_.rank;
    } else if (site == QKV) {
      const int nq = Model::tiles_for(m_.heads * m_.hd), nk = Model::tiles_for(m_.kv_heads * m_.hd);
      t.offset[0] = t.offset[1] = tile < nq ? 0 : tile < nq + nk ? m_.rank : 2 * m_.rank;
    }
    return t;
  }

  // `then` is the product after this one: the last tiles fetch its first.
  template <class Emit>
  void product(int counter, const Packed& p, const Packed* then, const SiteLora* lora, int site,
               const Rows& rows, Emit emit) {
    share(counter, p.tiles, [&](int tile) {
      const int ahead = tile + s_.threads;
      const bf16* w = p.tile(tile);
      NextTile next;
      if (ahead < p.tiles) {
        next = {p.tile(ahead), p.tile_bytes()};
      } else if (then && ahead - p.tiles < then->tiles) {
        next = {then->tile(ahead - p.tiles), then->tile_bytes()};
      }
      TileLora l;
      if (lora) l = tile_lora(*lora, site, tile);
      const float* bias = p.has_bias ? &p.bias[(int64_t)tile * TILE] : nullptr;
      run_tile(rows, p.in, w, next, &l, [&](int t, int n, auto& acc) { emit(tile, bias, t, n, acc); });
    });
  }

  void add_to_residual(int counter, const Layer& layer, int site, const Packed* then,
                       const Rows& rows) {
    product(counter, layer.site[site], then, &layer.lora[site], site, rows,
            [&](int tile, const float* bias, int t, int n, auto& acc) {
              const int from = tile * TILE, width = std::min(TILE, m_.hidden - from);
              for (int i = 0; i < n; i++) {
                float* r = &residual_[(int64_t)(t + i) * m_.hidden + from];
                for (int j = 0; j < VECTORS; j++) {
                  vf v = acc[i][j];
                  if (bias) v += load_f(bias + j * LANES);
                  if ((j + 1) * LANES <= width) {
                    store_f(r + j * LANES, load_f(r + j * LANES) + v);
                  } else {
                    for (int k = j * LANES; k < width; k++) r[k] += v[k - j * LANES];
                  }
                }
              }
            });
  }

  Rows rows_of(const bf16* x) const {
    return {x, wide_, m_.members ? h_.get() : nullptr, h_ld_, s_.member, s_.T, m_.rank};
  }

  bf16* page(int layer, int sequence, int index, int kv) const {
    const int64_t number = s_.pages[sequence * s_.pages_ld + index];
    return s_.cache + ((layer * s_.capacity + number) * m_.kv_heads + kv) * page_values_;
  }

  void head_norm(float* x, const std::vector<float>& w) const {
    float total = 0;
    for (int i = 0; i < m_.hd; i++) total += x[i] * x[i];
    const float r = 1.0f / std::sqrt(total / m_.hd + m_.eps);
    for (int i = 0; i < m_.hd; i++) x[i] *= r * w[i];
  }

  void rotate(float* x, int position) const {
    const float *c = m_.cos + (int64_t)position * m_.hd, *s = m_.sin + (int64_t)position * m_.hd;
    const int half = m_.hd / 2;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
      const vf a = load_f(x + i), b = load_f(x + i + half);
      store_f(x + i, a * load_f(c + i) - b * load_f(s + i));
      store_f(x + i + half, b * load_f(c + i + half) + a * load_f(s + i + half));
    }
    for (; i < half; i++) {
      const float a = x[i], b = x[i + half];
      x[i] = a * c[i] - b * s[i];
      x[i + half] = b * c[i + half] + a * s[i + half];
    }
  }

  // A key goes into every line of its half page: they are asked for one row ahead.
  void fetch_slot(int layer, int t) const {
    const int position = s_.positions[t];
    for (int h = 0; h < m_.kv_heads; h++) {
      const bf16* p = page(layer, s_.sequence[t], position / PAGE, h);
      for (int i = 0; i < PAGE * m_.hd; i += 32) __builtin_prefetch(p + i, 1, 2);
      const bf16* v = p + PAGE * m_.hd + position % PAGE / 2 * m_.hd * 2;
      for (int i = 0; i < 2 * m_.hd; i += 32) __builtin_prefetch(v + i, 1, 2);
    }
  }

  // Positions the queries and keys, and puts keys and values into the cache.
  void place_rows(int counter, const Layer& layer, int index) {
    const int64_t k0 = (int64_t)Model::tiles_for(m_.heads * m_.hd) * TILE;
    const int64_t v0 = k0 + (int64_t)Model::tiles_for(m_.kv_heads * m_.hd) * TILE;
    share(counter, s_.T, [&](int t) {
      float* row = &qkv_[t * qkv_ld_];
      const int position = s_.positions[t];
      for (int h = 0; h < m_.heads; h++) {
        float* q = row + h * m_.hd;
        if (!layer.norm_q.empty()) head_norm(q, layer.norm_q);
        rotate(q, position);
        bf16* out = &q_[((int64_t)t * m_.heads + h) * m_.hd];
        for (int i = 0; i < m_.hd; i += LANES) store_bf16(out + i, load_f(q + i) * m_.softmax_scale);
      }
      if (t + 1 < s_.T) fetch_slot(index, t + 1);
      for (int h = 0; h < m_.kv_heads; h++) {
        float* k = row + k0 + h * m_.hd;
        if (!layer.norm_k.empty()) head_norm(k, layer.norm_k);
        rotate(k, position);
        bf16* p = page(index, s_.sequence[t], position / PAGE, h);
        write_key(p, position % PAGE, k, m_.hd);
        write_value(p, position % PAGE, row + v0 + h * m_.hd, m_.hd);
      }
    });
  }

  void attention(int counter, const Layer& layer, int index, int thread) {
    const int group = m_.heads / m_.kv_heads;
    float* scores = &scores_[thread * scores_ld_ * 4];
    share(counter, s_.T, [&](int t) {
      const int to = s_.positions[t];
      const int from = layer.window ? std::max(0, to - layer.window + 1) : 0;
      // Rows of a decode step each have pages of their own, which are in memory and not in the
      // cache: while one head is attended to, the pages of the next are on their way.
      const bool alone = (t == 0 || s_.sequence[t - 1] != s_.sequence[t]) &&
                         (t + 1 == s_.T || s_.sequence[t + 1] != s_.sequence[t]);
      for (int h = 0; h < m_.kv_heads; h++) {
        auto current = [&](int i) { return page(index, s_.sequence[t], i, h); };
        auto next = [&](int i) -> const bf16* {
          if (!alone) return nullptr;
          if (h + 1 < m_.kv_heads) return page(index, s_.sequence[t], i, h + 1);
          if (t + 1 < s_.T && i <= s_.positions[t + 1] / PAGE)
            return page(index, s_.sequence[t + 1], i, 0);
          return nullptr;
        };
        attend_heads(group, &q_[((int64_t)t * m_.heads + h * group) * m_.hd], m_.hd, m_.hd, from,
                     to, current, next, scores, scores_ld_, &mixed_[t * wide_ + h * group * m_.hd],
                     m_.hd);
      }
    });
  }

  void work(int thread) {
    share(0, s_.T, [&](int t) {
      const bf16* e = m_.embedding + (int64_t)s_.tokens[t] * m_.hidden;
      for (int i = 0; i < m_.hidden; i++) residual_[(int64_t)t * m_.hidden + i] = to_float(e[i]);
    });
    int counter = 1;
    for (size_t l = 0; l < m_.layers.size(); l++) {
      const Layer& layer = m_.layers[l];
      norm_rows(counter++, layer.norm_attention);
      project_rows(counter++, layer.lora[QKV], x_.get(), m_.hidden);
      product(counter++, layer.site[QKV], &layer.site[O], &layer.lora[QKV], QKV, rows_of(x_.get()),
              [&](int tile, const float* bias, int t, int n, auto& acc) {
                for (int i = 0; i < n; i++)
                  for (int j = 0; j < VECTORS; j++) {
                    vf v = acc[i][j];
                    if (bias) v += load_f(bias + j * LANES);
                    store_f(&qkv_[(t + i) * qkv_ld_ + tile * TILE + j * LANES], v);
                  }
              });
      place_rows(counter++, layer, l);
      attention(counter++, layer, l, thread);
      project_rows(counter++, layer.lora[O], mixed_.get(), m_.heads * m_.hd);
      add_to_residual(counter++, layer, O, &layer.site[GATE_UP], rows_of(mixed_.get()));
      norm_rows(counter++, layer.norm_mlp);
      project_rows(counter++, layer.lora[GATE_UP], x_.get(), m_.hidden);
      product(counter++, layer.site[GATE_UP], &layer.site[DOWN], &layer.lora[GATE_UP], GATE_UP,
              rows_of(x_.get()), [&](int tile, const float* bias, int t, int n, auto& acc) {
                const int from = tile * (TILE / 2);
                for (int i = 0; i < n; i++)
                  for (int j = 0; j < 2; j++) {
                    vf g = acc[i][j], u = acc[i][j + 2];
                    if (bias) {
                      g += load_f(bias + j * LANES);
                      u += load_f(bias + (j + 2) * LANES);
                    }
                    vf y = g / (1.0f + exponential(-g)) * u;
                    bf16* out = &mixed_[(t + i) * wide_ + from + j * LANES];
                    const int left = m_.inner - from - j * LANES;
                    if (left >= LANES) {
                      store_bf16(out, y);
                    } else {
                      for (int k = 0; k < left; k++) out[k] = to_bf16(y[k]);
                    }
                  }
              });
      project_rows(counter++, layer.lora[DOWN], mixed_.get(), m_.inner);
      const bool last = l + 1 == m_.layers.size();
      const Packed* then = last ? &m_.head : &m_.layers[l + 1].site[QKV];
      add_to_residual(counter++, layer, DOWN, then, rows_of(mixed_.get()));
    }
    share(counter++, s_.R, [&](int r) {
      norm(&residual_[(int64_t)s_.out_rows[r] * m_.hidden], m_.norm_final.data(), m_.hidden,
           &x_[(int64_t)r * wide_]);
    });
    head(counter++, thread);
  }

  void head(int counter, int thread) {
    float* best = &head_best_[(int64_t)thread * s_.R * 3];
    for (int r = 0; r < s_.R; r++) {
      best[3 * r] = -__builtin_inff();
      best[3 * r + 1] = 0;  // index, exact in fp32 up to 2^24
      best[3 * r + 2] = 0;  // NaN seen
    }
    Rows rows{x_.get(), wide_, nullptr, 0, s_.member, s_.R, 0};
    product(counter, m_.head, nullptr, nullptr, 0, rows,
            [&](int tile, const float*, int t, int n, auto& acc) {
              const int from = tile * TILE, width = std::min(TILE, m_.vocab - from);
              for (int i = 0; i < n; i++) {
                float* b = best + 3 * (t + i);
                vf top = larger(larger(acc[i][0], acc[i][1]), larger(acc[i][2], acc[i][3]));
                vf nan = acc[i][0] + acc[i][1] + acc[i][2] + acc[i][3];
                vi bad = nan != nan;
                vi over = top > splat(b[0]);
                bool look = width < TILE;
                for (int j = 0; j < LANES; j++) look |= (bad[j] | over[j]) != 0;
                if (look)
                  for (int k = 0; k < width; k++) {
                    float v = acc[i][k / LANES][k % LANES];
                    if (v != v) b[2] = 1;
                    // Threads take tiles in any order: on a tie the lower index wins.
                    if (v > b[0] || (v == b[0] && from + k < b[1])) b[0] = v, b[1] = from + k;
                  }
                if (s_.logits) {
                  float* out = s_.logits + (int64_t)(t + i) * m_.vocab + from;
                  for (int k = 0; k < width; k++) out[k] = acc[i][k / LANES][k % LANES];
                }
              }
            });
  }

  void merge_best() {
    for (int r = 0; r < s_.R; r++) {
      float top = -__builtin_inff(), index = -1, nan = 0;
      for (int i = 0; i < s_.threads; i++) {
        const float* b = &head_best_[((int64_t)i * s_.R + r) * 3];
        nan += b[2];
        if (b[0] > top || (b[0] == top && b[1] < index)) top = b[0], index = b[1];
      }
      s_.best[r] = nan > 0 ? -1 : (int64_t)index;
    }
  }

  const Model& m_;
  const Step& s_;
  Barrier barrier_;
  int64_t qkv_ld_, h_ld_, wide_, scores_ld_, page_values_;
  Buffer<float>&residual_, &qkv_, &scores_, &head_best_;
  Buffer<bf16>&x_, &mixed_, &q_, &h_;
  std::vector<std::atomic<int>> counters_;
};

}  // namespace ll
