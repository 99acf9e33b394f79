// What stands between the matrix products of a decoder: RMSNorm, rotary positions, SwiGLU and the
// cross-entropy, forward and backward, over plain arrays of bf16 or fp32.
//
// Each reads its inputs once, works in fp32 and rounds its result once. Widths are multiples of 16.
// Every row's result depends on that row alone, so the number of threads changes nothing.
#include <algorithm>
#include <cmath>

#include "elements.h"

namespace {

using namespace ll;

inline vf reciprocal(vf x) { return 1.0f / x; }

// y = x w / rms(x); keeps 1 / rms(x) for backward.
template <class T>
void norm_forward(const T* x, const float* w, T* y, float* inverse, int64_t rows, int64_t d,
                  float eps) {
  for (int64_t row = 0; row < rows; row++, x += d, y += d) {
    vf squares{};
    for (int64_t j = 0; j < d; j += LANES) {
      const vf v = load(x + j);
      squares += v * v;
    }
    const float r = 1.0f / std::sqrt(sum(squares) / d + eps);
    inverse[row] = r;
    for (int64_t j = 0; j < d; j += LANES) store(y + j, load(x + j) * r * load(w + j));
  }
}

// gx = r (gy w - x r^2 mean(gy w x)), r = 1 / rms; of_w += gy x r, where it is wanted.
template <class T>
void norm_backward(const T* x, const float* w, const float* inverse, const T* gy, T* gx,
                   float* of_w, int64_t rows, int64_t d) {
  for (int64_t row = 0; row < rows; row++, x += d, gy += d, gx += d) {
    vf along{};
    for (int64_t j = 0; j < d; j += LANES) along += load(gy + j) * load(w + j) * load(x + j);
    const float r = inverse[row], back = r * r * r * sum(along) / d;
    for (int64_t j = 0; j < d; j += LANES) {
      const vf v = load(x + j), g = load(gy + j);
      store(gx + j, g * load(w + j) * r - v * back);
      if (of_w) store(of_w + j, load(of_w + j) + g * v * r);
    }
  }
}

// y = gate sigmoid(gate) up
template <class T>
void swiglu_forward(const T* gate, const T* up, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const vf g = load(gate + i);
    store(y + i, g * reciprocal(1.0f + exponential(-g)) * load(up + i));
  }
}

template <class T>
void swiglu_backward(const T* gate, const T* up, const T* gy, T* of_gate, T* of_up, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const vf g = load(gate + i), of_y = load(gy + i), u = load(up + i);
    const vf s = reciprocal(1.0f + exponential(-g));
    store(of_up + i, of_y * g * s);
    store(of_gate + i, of_y * u * s * (1.0f + g * (1.0f - s)));
  }
}

// y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin for the two halves of each head; sign -1 turns back.
// x (rows, heads, d) with rows `stride` apart, y contiguous, cos and sin (rows, d / 2).
template <class T>
void rotate(const T* x, int64_t stride, const float* cos, const float* sin, float sign, T* y,
            int64_t rows, int64_t heads, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t row = 0; row < rows; row++, x += stride, cos += half, sin += half)
    for (int64_t h = 0; h < heads; h++, y += d)
      for (int64_t j = 0; j < half; j += LANES) {
        const vf a = load(x + h * d + j), b = load(x + h * d + half + j);
        const vf c = load(cos + j), s = load(sin + j) * sign;
        store(y + j, a * c - b * s);
        store(y + half + j, b * c + a * s);
      }
}

// loss = log sum exp(x) - x[target]; x becomes softmax(x) - onehot(target), its gradient.
// n: any number, the rest of a vector of 16 goes through a padded copy.
template <class T>
void cross_entropy(T* x, const int64_t* target, float* loss, int64_t rows, int64_t n, bool slopes) {
  const int64_t whole = n / LANES * LANES;
  for (int64_t row = 0; row < rows; row++, x += n) {
    float rest[LANES];
    std::fill(rest, rest + LANES, -INFINITY);
    for (int64_t i = whole; i < n; i++) {
      T one[LANES] = {x[i]};
      rest[i - whole] = load(one)[0];
    }
    vf most = load_f(rest);
    for (int64_t i = 0; i < whole; i += LANES) most = larger(load(x + i), most);
    // A NaN is not larger than anything: it has to come out of the sum.
    const float top = largest(most);
    vf total{};
    for (int64_t i = 0; i < whole; i += LANES) total += exponential(load(x + i) - top);
    float all = sum(total);
    for (int64_t i = 0; i < n - whole; i++) all += std::exp(rest[i] - top);
    T one[LANES] = {x[target[row]]};
    const float norm = top + std::log(all);
    loss[row] = norm - load(one)[0];
    if (!slopes) continue;
    for (int64_t i = 0; i < whole; i += LANES) store(x + i, exponential(load(x + i) - norm));
    T tail[LANES];
    store(tail, exponential(load_f(rest) - norm));
    std::copy(tail, tail + (n - whole), x + whole);
    store(one, splat(std::exp(-loss[row]) - 1.0f));
    x[target[row]] = one[0];
  }
}

}  // namespace

extern "C" {

void ll_norm_forward(const void* x, const float* w, void* y, float* inverse, int64_t rows,
                     int64_t d, float eps, int is_bf16) {
  is_bf16 ? norm_forward((const bf16*)x, w, (bf16*)y, inverse, rows, d, eps)
          : norm_forward((const float*)x, w, (float*)y, inverse, rows, d, eps);
}

// of_w (d,) is added to; null where it is not wanted.
void ll_norm_backward(const void* x, const float* w, const float* inverse, const void* gy, void* gx,
                      float* of_w, int64_t rows, int64_t d, int is_bf16) {
  is_bf16 ? norm_backward((const bf16*)x, w, inverse, (const bf16*)gy, (bf16*)gx, of_w, rows, d)
          : norm_backward((const float*)x, w, inverse, (const float*)gy, (float*)gx, of_w, rows, d);
}

void ll_swiglu_forward(const void* gate, const void* up, void* y, int64_t n, int is_bf16) {
  is_bf16 ? swiglu_forward((const bf16*)gate, (const bf16*)up, (bf16*)y, n)
          : swiglu_forward((const float*)gate, (const float*)up, (float*)y, n);
}

void ll_swiglu_backward(const void* gate, const void* up, const void* gy, void* of_gate,
                        void* of_up, int64_t n, int is_bf16) {
  is_bf16 ? swiglu_backward((const bf16*)gate, (const bf16*)up, (const bf16*)gy, (bf16*)of_gate,
                            (bf16*)of_up, n)
          : swiglu_backward((const float*)gate, (const float*)up, (const float*)gy, (float*)of_gate,
                            (float*)of_up, n);
}

void ll_rotate(const void* x, int64_t stride, const float* cos, const float* sin, float sign,
               void* y, int64_t rows, int64_t heads, int64_t d, int is_bf16) {
  is_bf16 ? rotate((const bf16*)x, stride, cos, sin, sign, (bf16*)y, rows, heads, d)
          : rotate((const float*)x, stride, cos, sin, sign, (float*)y, rows, heads, d);
}

void ll_cross_entropy(void* x, const int64_t* target, float* loss, int64_t rows, int64_t n,
                      int slopes, int is_bf16) {
  is_bf16 ? cross_entropy((bf16*)x, target, loss, rows, n, slopes)
          : cross_entropy((float*)x, target, loss, rows, n, slopes);
}
}
