// Reading averaged rows and writing their gradients back: shared by span_mean and span_loss.
#pragma once

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "numeric.h"

namespace vocabdistil {
namespace VD_ISA {

template <class Acc, class T>
inline void add_row(Acc* __restrict out, const T* __restrict row, Acc coef, int64_t dim, bool first) {
  if (first) {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) out[i] = coef * static_cast<Acc>(load(row[i]));
  } else {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) out[i] = madd(coef, static_cast<Acc>(load(row[i])), out[i]);
  }
}

// out = sum_l coef[l] * sum or mean of layer l's rows [start, end). An empty span gives 0.
template <class Acc>
inline void load_mean(const Layers& x, int64_t start, int64_t end, int64_t dim, bool mean, Acc* out) {
  if (end <= start) {
    std::fill(out, out + dim, Acc{0});
    return;
  }
  const double share = mean ? 1.0 / static_cast<double>(end - start) : 1.0;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    bool first = true;
    for (int64_t l = 0; l < x.count; ++l) {
      const auto* base = static_cast<const T*>(x.data[l]);
      const Acc coef = static_cast<Acc>(x.coef[l] * share);
      for (int64_t i = start; i < end; ++i, first = false)
        add_row(out, base + i * x.row_stride[l], coef, dim, first);
    }
  });
}

template <class T>
inline void zero_rows(void* data, int64_t begin, int64_t end, int64_t dim) {
  if (end > begin) std::memset(static_cast<T*>(data) + begin * dim, 0, sizeof(T) * (end - begin) * dim);
}

// Asks for the rows [start, end) ahead of time: the hardware's own prefetching ends at each page, which is often a row.
inline void prefetch_rows(const Layers& x, int64_t start, int64_t end, int64_t dim) {
  const int64_t size = static_cast<int64_t>(item_size(x.dtype));
  for (int64_t l = 0; l < x.count; ++l) {
    for (int64_t i = start; i < end; ++i) {
      const char* row = static_cast<const char*>(x.data[l]) + i * x.row_stride[l] * size;
      for (int64_t at = 0; at < dim * size; at += 64) __builtin_prefetch(row + at);
    }
  }
}

// A gradient that is formed while it is written: a x - b y, or a x where y is null.
template <class Acc>
struct Combination {
  const Acc *x, *y;
  Acc a, b;
};

template <class Acc, class T>
inline void write_row(T* __restrict row, const Combination<Acc>& g, Acc coef, int64_t dim) {
  const Acc* __restrict x = g.x;
  const Acc* __restrict y = g.y;
  const Acc a = coef * g.a, b = coef * g.b;
  if (y) {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) row[i] = store<T>(a * x[i] - b * y[i]);
  } else {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) row[i] = store<T>(a * x[i]);
  }
}

// The owner of pair p writes the rows from the end of pair p - 1 to the end of its own span, and the last pair
// also the tail: every row is written exactly once, whichever thread it falls to.
template <class Acc>
inline void store_grad(const LayerGrads& out, const Spans& spans, int64_t p, int64_t pairs, int64_t dim, bool mean,
                       const Combination<Acc>& grad, Acc scale, bool is_zero) {
  const int64_t start = spans.start[p], end = spans.end[p];
  const int64_t gap = p ? spans.end[p - 1] : 0;
  const double share = mean && end > start ? 1.0 / static_cast<double>(end - start) : 1.0;
  with_type(out.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t l = 0; l < out.count; ++l) {
      auto* base = static_cast<T*>(out.data[l]);
      zero_rows<T>(base, gap, is_zero ? end : start, dim);
      if (!is_zero && end > start) {
        const Acc coef = static_cast<Acc>(out.coef[l] * share * static_cast<double>(scale));
        T* row = base + start * dim;
        write_row(row, grad, coef, dim);
        for (int64_t k = start + 1; k < end; ++k) std::memcpy(base + k * dim, row, sizeof(T) * dim);
      }
      if (p + 1 == pairs) zero_rows<T>(base, end, out.rows, dim);
    }
  });
}

inline void zero_grads(const LayerGrads& out, int64_t dim) {
  with_type(out.dtype, [&](auto type) {
    for (int64_t l = 0; l < out.count; ++l) zero_rows<decltype(type)>(out.data[l], 0, out.rows, dim);
  });
}

// Threads worth waking for `work` elementary steps: a thread is woken for no less than it costs to wake it.
inline int useful_threads(int threads, int64_t work) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / 32768)));
}

}  // namespace VD_ISA
}  // namespace vocabdistil
