// The softmax divergences of rows that lie in the cache: shared by the losses over a vocabulary.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace vocabdistil {
namespace VD_ISA {

constexpr int64_t kBlock = 1024;  // float32 sums of this many terms are added in double: no drift with the vocabulary

// The largest value; a NaN is left to the sums.
template <class Acc>
inline Acc max_of(const Acc* __restrict x, int64_t count) {
  Acc m = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < count; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// A class of -inf logits only is shifted by nothing, so that its terms are exp(-inf) = 0 and not NaN.
template <class Acc>
inline Acc shift_of(Acc top) {
  return top == -std::numeric_limits<Acc>::infinity() ? Acc{0} : top;
}

struct Sums {
  double s, t;  // sum exp of the student's and the teacher's shifted logits
  double dot;   // sum exp(t) (t - s)
};

// Turns the matched logits s, t into exp((x - top) / T).
template <class Acc>
inline Sums exp_both(Acc* __restrict s, Acc* __restrict t, int64_t count, Acc top_s, Acc top_t, Acc inv_temperature) {
  Sums total{0, 0, 0};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Acc zs = 0, zt = 0, dot = 0;
#pragma omp simd reduction(+ : zs, zt, dot)
    for (int64_t i = begin; i < end; ++i) {
      const Acc ls = (s[i] - top_s) * inv_temperature, lt = (t[i] - top_t) * inv_temperature;
      const Acc es = exp_nonpositive(ls), et = exp_nonpositive(lt);
      const Acc term = et * (lt - ls);
      zs += es;
      zt += et;
      dot += et == 0 ? Acc{0} : term;  // no mass, no contribution, even where the difference is infinite
      s[i] = es;
      t[i] = et;
    }
    total.s += static_cast<double>(zs);
    total.t += static_cast<double>(zt);
    total.dot += static_cast<double>(dot);
  }
  return total;
}

// Raises std::invalid_argument unless the spans are ascending, disjoint and within `rows` (without spans: unless
// there is a row for each pair).
inline void check_spans(const char* side, const Spans& spans, int64_t pairs, int64_t rows) {
  bool good = spans.start || pairs <= rows;
  for (int64_t p = 0; spans.start && p < pairs; ++p) {
    const int64_t before = p ? spans.end[p - 1] : 0;
    good = good && before <= spans.start[p] && spans.start[p] <= spans.end[p] && spans.end[p] <= rows;
  }
  if (!good) {
    throw std::invalid_argument(std::string("pairs: expected ascending disjoint ") + side + " spans within " +
                                std::to_string(rows) + " rows");
  }
}

// Rows [begin, end) of x, pooled, at the listed columns; returns the largest value (a NaN is left to the sums).
template <class Acc>
inline Acc gather(const Rows& x, int64_t begin, int64_t end, bool mean, const int32_t* __restrict ids, int64_t count,
           Acc* __restrict out) {
  const Acc share = mean ? Acc{1} / static_cast<Acc>(end - begin) : Acc{1};
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* row = static_cast<const T*>(x.data) + begin * x.stride;
    VD_SIMD for (int64_t i = 0; i < count; ++i) out[i] = share * static_cast<Acc>(load(row[ids[i]]));
    for (int64_t k = begin + 1; k < end; ++k) {
      row += x.stride;
      VD_SIMD for (int64_t i = 0; i < count; ++i) out[i] = madd(share, static_cast<Acc>(load(row[ids[i]])), out[i]);
    }
  });
  return max_of(out, count);
}

// Writes the gradient of pair p: `fill` forms the first row of its span (zeroed before, if `clear`), the others are
// copies of it. The owner of a pair writes the rows from the end of the pair before it, the last pair also the tail:
// every row is written exactly once, whichever thread it falls to.
template <class F>
inline void write_grad(const Rows& student, void* grad, const Spans& spans, int64_t p, int64_t pairs, bool empty,
                       bool clear, F&& fill) {
  const int64_t gap = !spans.start ? p : p ? spans.end[p - 1] : 0;
  const int64_t begin = spans.start ? spans.start[p] : p, end = spans.start ? spans.end[p] : p + 1;
  const int64_t columns = student.columns;
  with_type(student.dtype, [&](auto type) {
    using T = decltype(type);
    T* base = static_cast<T*>(grad);
    zero_rows<T>(base, gap, empty ? end : clear ? begin + 1 : begin, columns);
    if (!empty) {
      T* row = base + begin * columns;
      fill(row);
      for (int64_t k = begin + 1; k < end; ++k) std::memcpy(base + k * columns, row, sizeof(T) * columns);
    }
    if (p + 1 == pairs) zero_rows<T>(base, end, student.rows, columns);
  });
}

inline void zero_grad(const Rows& student, void* grad) {
  with_type(student.dtype, [&](auto type) { zero_rows<decltype(type)>(grad, 0, student.rows, student.columns); });
}

// sum_p scale[p] * loss[p] in the order of the pairs: the same for any number of threads.
template <class Acc>
inline Acc weighted_total(const Acc* loss, const Acc* scale, int64_t pairs) {
  double total = 0;
  for (int64_t p = 0; p < pairs; ++p) total += static_cast<double>(loss[p]) * static_cast<double>(scale[p]);
  return static_cast<Acc>(total);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
