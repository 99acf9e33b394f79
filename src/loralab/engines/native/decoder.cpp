// One forward step of a Llama-like decoder for rows of many members, in one call.
//
// RMSNorm, rotary positions, grouped-query attention over a paged cache, SwiGLU; optional biases
// (Qwen2), per-head query and key norms (Qwen3) and a sliding window (Mistral). Weights, cache and
// inputs of products are bf16; sums, the residual stream, norms and softmax are fp32.
//
// This file is the plain C interface that backend.py calls; model.h holds the weights, forward.h
// runs the step, gemm.h and attention.h do the arithmetic.
#include <algorithm>
#include <cstring>

#include "forward.h"

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
