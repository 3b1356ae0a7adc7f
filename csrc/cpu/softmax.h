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

}  // namespace VD_ISA
}  // namespace vocabdistil
