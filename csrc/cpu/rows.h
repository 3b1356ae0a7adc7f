// Reading averaged rows and writing their gradients back: shared by span_mean and span_loss.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../parallel.h"
#include "numeric.h"

namespace vocabdistil {
namespace VD_ISA {

// The spans of one side as a kernel reads them, without `start` row p for pair p. A copy: what was looked at is what is
// read, whoever writes to the caller's memory meanwhile. Raises std::invalid_argument unless they ascend, are disjoint
// and lie within the rows.
class OwnSpans {
 public:
  OwnSpans(const char* what, const Spans& spans, int64_t pairs, int64_t rows) {
    bool good = pairs <= rows;
    if (spans.start) {
      positions_.reset(new int32_t[2 * pairs]);
      int32_t *start = positions_.get(), *end = start + pairs;
      if (pairs > 0) {
        std::memcpy(start, spans.start, sizeof(int32_t) * pairs);
        std::memcpy(end, spans.end, sizeof(int32_t) * pairs);
      }
      int wrong = pairs > 0 && (start[0] < 0 || end[pairs - 1] > rows);
      for (int64_t p = 0; p < pairs; ++p) wrong |= end[p] < start[p];
      for (int64_t p = 1; p < pairs; ++p) wrong |= start[p] < end[p - 1];
      good = !wrong;
      view_ = {start, end};
    }
    if (!good) {
      throw std::invalid_argument(std::string(what) + " within " + std::to_string(rows) + " rows");
    }
  }
  operator const Spans&() const { return view_; }

 private:
  std::unique_ptr<int32_t[]> positions_;
  Spans view_{nullptr, nullptr};
};

constexpr const char* kStudentSpans = "pairs: expected ascending disjoint student spans";
constexpr const char* kTeacherSpans = "pairs: expected ascending disjoint teacher spans";

// out (+)= coef * row, and that over the divisor with kLast.
template <bool kFirst, bool kLast, class Acc, class T>
inline void add_row(Acc* __restrict out, const T* __restrict row, Acc coef, Acc divisor, int64_t dim) {
  VD_SIMD for (int64_t i = 0; i < dim; ++i) {
    const Acc x = static_cast<Acc>(load(row[i]));
    const Acc sum = kFirst ? coef * x : madd(coef, x, out[i]);
    out[i] = kLast ? sum / divisor : sum;
  }
}
template <class Acc, class T>
inline void add_row(Acc* out, const T* row, Acc coef, Acc divisor, int64_t dim, bool first, bool last) {
  if (last && divisor != 1) {
    first ? add_row<true, true>(out, row, coef, divisor, dim) : add_row<false, true>(out, row, coef, divisor, dim);
  } else {
    first ? add_row<true, false>(out, row, coef, divisor, dim) : add_row<false, false>(out, row, coef, divisor, dim);
  }
}

// out = sum_l coef[l] * sum or mean of layer l's rows [start, end). An empty span gives 0. Added up first and divided
// once: a sum of shares rounds more where rows have a large part in common.
template <class Acc>
inline void load_mean(const Layers& x, int64_t start, int64_t end, int64_t dim, bool mean, Acc* out) {
  if (end <= start) {
    std::fill(out, out + dim, Acc{0});
    return;
  }
  const bool uniform = std::all_of(x.coef, x.coef + x.count, [&](double coef) { return coef == x.coef[0]; });
  const Acc divisor = static_cast<Acc>(static_cast<double>(mean ? end - start : 1) / (uniform ? x.coef[0] : 1));
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    bool first = true;
    for (int64_t l = 0; l < x.count; ++l) {
      const auto* base = static_cast<const T*>(x.data[l]);
      const Acc coef = uniform ? Acc{1} : static_cast<Acc>(x.coef[l]);
      for (int64_t i = start; i < end; ++i, first = false) {
        const bool last = l + 1 == x.count && i + 1 == end;
        add_row(out, base + i * x.row_stride[l], coef, divisor, dim, first, last);
      }
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
