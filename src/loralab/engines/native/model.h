// A decoder's weights and members as the kernels want them: packed, aligned, by layer and site.
#pragma once
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

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

}  // namespace ll
