// One forward step of a Llama-like decoder for rows of many members, in one call.
//
// RMSNorm, rotary positions, grouped-query attention over a paged cache, SwiGLU; optional biases
// (Qwen2), per-head query and key norms (Qwen3) and a sliding window (Mistral). Weights, cache and
// inputs of products are bf16; sums, the residual stream, norms and softmax are fp32.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "attention.h"
#include "gemm.h"

namespace ll {

// Uninitialised, 64-byte aligned memory; large blocks ask for huge pages, which spare TLB misses.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& o) noexcept { std::swap(data_, o.data_), std::swap(size_, o.size_); }
  ~Buffer() { std::free(data_); }
  void resize(int64_t n) {
    if (n <= size_) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const size_t huge = 2 << 20, bytes = (size_t)n * sizeof(T);
    const size_t align = bytes >= huge ? huge : 64;
    void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align);
    if (!p) throw std::bad_alloc();
#ifdef __linux__
    if (bytes >= huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    data_ = (T*)p;
    size_ = n;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// The products of a layer. Each is a run of modules with the same input, packed one after another
// in whole tiles; gate and up are woven in halves of a tile so that SwiGLU happens in registers.
enum Site { QKV, O, GATE_UP, DOWN, SITES };
enum Module { MQ, MK, MV, MO, MGATE, MUP, MDOWN, MODULES };
static const Site SITE_OF[MODULES] = {QKV, QKV, QKV, O, GATE_UP, GATE_UP, DOWN};

struct Packed {
  int in = 0, tiles = 0;
  Buffer<bf16> w;        // [tile][in/2][64][2]
  Buffer<float> bias;    // [tile][64]
  bool has_bias = false;

  const bf16* tile(int i) const { return &w[(int64_t)i * in * TILE]; }
  int64_t tile_bytes() const { return (int64_t)in * TILE * sizeof(bf16); }
};

struct SiteLora {
  bool any = false, shared = true;
  int columns = 0;                  // of h, all modules of the site, padded to whole chunks
  Buffer<bf16> a;                   // [member or 1][chunk][K/4][8][4]
  Buffer<bf16> b;                   // [tile][member][rank/2][64][2]
};

struct Layer {
  Packed site[SITES];
  SiteLora lora[SITES];
  std::vector<float> norm_attention, norm_mlp, norm_q, norm_k;
  int window = 0;  // 0: attends to everything before it
};

// Scratch of a forward step, kept between steps: fresh memory would be paged in every time.
struct Workspace {
  Buffer<float> residual, qkv, scores, head_best;
  Buffer<bf16> x, mixed, q, h;
};

struct Model {
  Workspace space;
  int hidden, inner, heads, kv_heads, hd, vocab, max_positions;
  float eps, softmax_scale;
  std::vector<Layer> layers;
  Packed head;
  std::vector<float> norm_final;
  const bf16* embedding = nullptr;  // (vocab, hidden), owned by the caller
  const float *cos = nullptr, *sin = nullptr;  // (max_positions, hd), owned by the caller
  int members = 0, rank = 0;
  float scaling = 1;

  int out_of(int m) const {
    switch (m) {
      case MQ: return heads * hd;
      case MK: case MV: return kv_heads * hd;
      case MO: case MDOWN: return hidden;
      default: return inner;
    }
  }
  int in_of(int site) const {
    return site == O ? heads * hd : site == DOWN ? inner : hidden;
  }
  static int tiles_for(int n) { return (n + TILE - 1) / TILE; }
  int tiles_of(int site) const {
    switch (site) {
      case QKV: return tiles_for(heads * hd) + 2 * tiles_for(kv_heads * hd);
      case GATE_UP: return (inner + TILE / 2 - 1) / (TILE / 2);
      default: return tiles_for(hidden);
    }
  }
  // Where output n of a module lies: tile and place in the tile.
  void place(int m, int n, int& tile, int& spot) const {
    if (m == MGATE || m == MUP) {
      tile = n / (TILE / 2);
      spot = n % (TILE / 2) + (m == MUP ? TILE / 2 : 0);
      return;
    }
    tile = n / TILE;
    spot = n % TILE;
    if (m == MK || m == MV) tile += tiles_for(heads * hd);
    if (m == MV) tile += tiles_for(kv_heads * hd);
  }
};

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

using namespace ll;

extern "C" {

Model* ll_new(int hidden, int inner, int layers, int heads, int kv_heads, int hd, int vocab,
              int max_positions, float eps, float softmax_scale) {
  auto* m = new Model{};
  m->hidden = hidden, m->inner = inner, m->heads = heads, m->kv_heads = kv_heads, m->hd = hd;
  m->vocab = vocab, m->max_positions = max_positions, m->eps = eps;
  m->softmax_scale = softmax_scale;
  m->layers.resize(layers);
  for (auto& layer : m->layers)
    for (int s = 0; s < SITES; s++) {
      layer.site[s].in = m->in_of(s);
      layer.site[s].tiles = m->tiles_of(s);
      const int64_t values = (int64_t)layer.site[s].tiles * TILE * layer.site[s].in;
      layer.site[s].w.resize(values);
      std::fill_n(layer.site[s].w.get(), values, 0);
    }
  return m;
}

void ll_free(Model* m) { delete m; }

// w: (out, in) bf16, row-major; bias: (out,) fp32 or null.
void ll_set_module(Model* m, int layer, int module, const bf16* w, const float* bias) {
  Packed& p = m->layers[layer].site[SITE_OF[module]];
  const int out = m->out_of(module), in = p.in;
  for (int n = 0; n < out; n++) {
    int tile, spot;
    m->place(module, n, tile, spot);
    bf16* to = &p.w[(int64_t)tile * TILE * in];
    const bf16* from = w + (int64_t)n * in;
    for (int k = 0; k < in; k += 2) std::memcpy(to + k * TILE + spot * 2, from + k, 4);
    if (bias) {
      if (!p.has_bias) {
        p.bias.resize((int64_t)p.tiles * TILE);
        std::fill_n(p.bias.get(), (int64_t)p.tiles * TILE, 0.0f);
        p.has_bias = true;
      }
      p.bias[(int64_t)tile * TILE + spot] = bias[n];
    }
  }
}

// which: 0 before attention, 1 before the MLP, 2 queries, 3 keys, 4 final.
void ll_set_norm(Model* m, int layer, int which, const float* w) {
  auto set = [&](std::vector<float>& v, int n) { v.assign(w, w + n); };
  switch (which) {
    case 0: set(m->layers[layer].norm_attention, m->hidden); break;
    case 1: set(m->layers[layer].norm_mlp, m->hidden); break;
    case 2: set(m->layers[layer].norm_q, m->hd); break;
    case 3: set(m->layers[layer].norm_k, m->hd); break;
    case 4: set(m->norm_final, m->hidden); break;
  }
}

void ll_set_window(Model* m, int layer, int window) { m->layers[layer].window = window; }

void ll_set_tables(Model* m, const bf16* embedding, const float* cos, const float* sin) {
  m->embedding = embedding, m->cos = cos, m->sin = sin;
}

void ll_set_head(Model* m, const bf16* w) {
  Packed& p = m->head;
  p.in = m->hidden;
  p.tiles = Model::tiles_for(m->vocab);
  const int64_t values = (int64_t)p.tiles * TILE * p.in;
  p.w.resize(values);
  std::fill_n(&p.w[values - (int64_t)TILE * p.in], (int64_t)TILE * p.in, 0);
  for (int n = 0; n < m->vocab; n++)
    for (int k = 0; k < p.in; k += 2)
      std::memcpy(&p.w[(int64_t)(n / TILE) * TILE * p.in + k * TILE + n % TILE * 2],
                  w + (int64_t)n * p.in + k, 4);
}

// Forgets the members. rank: the largest, rounded up to a multiple of 8.
void ll_set_members(Model* m, int members, int rank, float scaling) {
  m->members = members, m->rank = rank, m->scaling = scaling;
  for (auto& layer : m->layers)
    for (auto& lora : layer.lora) lora.any = false;
}

// The factors of one module for all members: a[i] (ranks[i], in), b[i] (out, ranks[i]), bf16.
// a[i] == null: member i does not adapt this module. shared: every a[i] is the same memory.
// `site_shared` says whether that holds for all modules of the site.
void ll_set_lora(Model* m, int layer, int module, const bf16* const* a, const bf16* const* b,
                 const int32_t* ranks, int site_shared) {
  const int site = SITE_OF[module], in = m->in_of(site), out = m->out_of(module);
  SiteLora& lora = m->layers[layer].lora[site];
  const int slots = site == QKV ? 3 : site == GATE_UP ? 2 : 1;
  const int slot = site == QKV ? module - MQ : site == GATE_UP ? module - MGATE : 0;
  if (!lora.any) {
    lora.any = true;
    lora.shared = site_shared;
    lora.columns = slots * m->rank;
    const int64_t na = (int64_t)(site_shared ? 1 : m->members) * lora.columns * in;
    const int64_t nb = (int64_t)m->tiles_of(site) * m->members * m->rank * TILE;
    lora.a.resize(na);
    lora.b.resize(nb);
    std::fill_n(lora.a.get(), na, 0);
    std::fill_n(lora.b.get(), nb, 0);
  }
  for (int i = 0; i < (site_shared ? 1 : m->members); i++) {
    if (!a[i]) continue;
    bf16* to = &lora.a[(int64_t)i * lora.columns * in];
    for (int r = 0; r < ranks[i]; r++) {
      const int column = slot * m->rank + r;
      bf16* chunk = to + (int64_t)(column / CHUNK) * in * CHUNK + column % CHUNK * 4;
      for (int k = 0; k < in; k += 4)
        std::memcpy(chunk + (int64_t)k * CHUNK, a[i] + (int64_t)r * in + k, 8);
    }
  }
  const int64_t block = (int64_t)m->rank * TILE;
  for (int i = 0; i < m->members; i++) {
    if (!b[i]) continue;
    for (int n = 0; n < out; n++) {
      int tile, spot;
      m->place(module, n, tile, spot);
      bf16* to = &lora.b[((int64_t)tile * m->members + i) * block + spot * 2];
      const bf16* from = b[i] + (int64_t)n * ranks[i];
      for (int r = 0; r < ranks[i]; r++) to[(r / 2) * TILE * 2 + r % 2] = from[r];
    }
  }
}

int64_t ll_page_bytes(const Model* m) {
  return (int64_t)m->layers.size() * m->kv_heads * 2 * PAGE * m->hd * sizeof(bf16);
}

void ll_forward(Model* m, int T, const int32_t* tokens, const int32_t* positions,
                const int32_t* sequence, const int32_t* member, const int32_t* pages,
                int64_t pages_ld, void* cache, int64_t capacity, int R, const int32_t* out_rows, float* logits,
                int64_t* best, int threads) {
  Step s{T, R, tokens, positions, sequence, member, pages, pages_ld, (bf16*)cache, capacity,
         out_rows, logits, best, threads};
  Forward(*m, s).run();
}

const char* ll_kernel() {
#if defined(__AVX512BF16__)
  return "avx512bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

}
