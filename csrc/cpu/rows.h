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

// What is declared here without a body is compiled once, in rows.cpp.

// out = sum_l coef[l] * sum or mean of layer l's rows [start, end). An empty span gives 0. Added up first and divided
// once: a sum of shares rounds more where rows have a large part in common.
template <class Acc>
void load_mean(const Layers& x, int64_t start, int64_t end, int64_t dim, bool mean, Acc* out);

// Rows [begin, end) of x, pooled, at the listed columns; returns the largest value (a NaN is left to the sums).
template <class Acc>
Acc gather(const Rows& x, int64_t begin, int64_t end, bool mean, const int32_t* ids, int64_t count, Acc* out);

inline void zero_rows(DType dtype, void* data, int64_t begin, int64_t end, int64_t dim) {
  const int64_t bytes = dim * static_cast<int64_t>(item_size(dtype));
  if (end > begin) std::memset(static_cast<char*>(data) + begin * bytes, 0, (end - begin) * bytes);
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

// The owner of pair p writes the rows from the end of pair p - 1 to the end of its own span, and the last pair
// also the tail: every row is written exactly once, whichever thread it falls to.
template <class Acc>
void store_grad(const LayerGrads& out, const Spans& spans, int64_t p, int64_t pairs, int64_t dim, bool mean,
                const Combination<Acc>& grad, Acc scale, bool is_zero);

inline void zero_grads(const LayerGrads& out, int64_t dim) {
  for (int64_t l = 0; l < out.count; ++l) zero_rows(out.dtype, out.data[l], 0, out.rows, dim);
}

// Threads worth waking for `work` elementary steps: a thread is woken for no less than it costs to wake it.
inline int useful_threads(int threads, int64_t work) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / 32768)));
}

}  // namespace VD_ISA
}  // namespace vocabdistil
