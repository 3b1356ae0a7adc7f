// The softmax divergences of rows that lie in the cache: shared by the losses over a vocabulary.
#pragma once

#include "rows.h"

namespace vocabdistil {
namespace VD_ISA {

constexpr int64_t kBlock = 1024;  // float32 sums of this many terms are added in double: no drift with the vocabulary

constexpr double kLog2 = 0.6931471805599453;

// A KL under this is left with too few digits by the difference of cross entropy and entropy. It is formed anew: with
// d = log q - log p less its mean under p,
//   KL(p || q) = log1p(sum_i p_i (exp d_i - 1 - d_i)),
// of which no term is negative, and q_i - p_i = p_i (exp(d_i - KL) - 1), which is as exact as d is.
constexpr double kClose = 0.0625;

// The sum of term(i) for i < count.
template <class Acc, class F>
inline double sum_in_blocks(int64_t count, F&& term) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += term(i);
    total += static_cast<double>(sum);
  }
  return total;
}

// (exp(d) - 1 - d) 2 / d^2 for |d| < 1/2, to the precision of the type.
template <class Acc, int K = 3>
inline Acc exp_series(Acc d) {
  if constexpr (K > (sizeof(Acc) == 8 ? 16 : 8)) {
    return 1;
  } else {
    return madd(d * (Acc{1} / K), exp_series<Acc, K + 1>(d), Acc{1});
  }
}

// (atanh z - z) / z^3 of the square of |z| < 1/4, likewise.
template <class Acc, int K = 3>
inline Acc atanh_series(Acc square) {
  if constexpr (K == (sizeof(Acc) == 8 ? 27 : 11)) {
    return Acc{1} / K;
  } else {
    return madd(square, atanh_series<Acc, K + 2>(square), Acc{1} / K);
  }
}
// y - log(1 + y) for |log(1 + y)| < 1/2, as exact as y is: log(1 + y) = 2 atanh(y / (2 + y)).
template <class Acc>
inline Acc less_its_log(Acc y) {
  const Acc z = y / (2 + y), square = z * z;
  return z * (y - 2 * square * atanh_series(square));
}

// Of one column, in units of p's sum of exponentials: p (exp d - 1) and p (exp d - 1 - d).
template <class Acc>
struct Step {
  Acc first, rest;
};
// scale: what turns q's exponential into p exp d.
template <class Acc>
inline Step<Acc> step_of(Acc ep, Acc eq, Acc scale, Acc d) {
  const Acc near = ep * (d * d * exp_series(d) * Acc{0.5}), along = ep == 0 ? Acc{0} : ep * d;
  const Acc far = eq * scale - ep;
  const bool small = d < Acc{0.5} && d > Acc{-0.5};
  return {small ? near + along : far, small ? near : far - along};
}

// The divergence, and what p (exp d - 1) and p, of exponentials whose sum for p is z_p, count in q - p: the former
// times `step` less the latter times `base`.
struct Close {
  double kl, step, base;
};
inline Close close_divergence(double sum, double z_p) {
  const double rest = sum / z_p;
  return {std::log1p(rest), 1 / ((1 + rest) * z_p), rest / ((1 + rest) * z_p)};
}

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
  const Acc apart = top_t - top_s;  // rows that are close lose nothing where their difference is taken first
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Acc zs = 0, zt = 0, dot = 0;
#pragma omp simd reduction(+ : zs, zt, dot)
    for (int64_t i = begin; i < end; ++i) {
      const Acc ls = (s[i] - top_s) * inv_temperature, lt = (t[i] - top_t) * inv_temperature;
      const Acc es = exp_nonpositive(ls), et = exp_nonpositive(lt);
      const Acc term = et * (((t[i] - s[i]) - apart) * inv_temperature);
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

// The divergence of two rows of logits, and what their exponentials count in its gradient: student * exp s - teacher *
// exp t. A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
struct Divergent {
  double loss, student, teacher;
  double ratio;  // log of the student's sum of exponentials over the teacher's
};
inline Divergent divergence_of(const Sums& z) {
  const double ratio = std::log(z.s / z.t);
  if (z.t == 0) return {0, 0, 0, ratio};
  if (z.s == 0) return {std::numeric_limits<double>::infinity(), 0, 0, ratio};
  return {z.dot / z.t + ratio, 1 / z.s, 1 / z.t, ratio};
}

// Is it close? Of a NaN and of a teacher without mass no.
inline bool is_close(const Divergent& row, const Sums& z) { return row.loss < kClose && z.t != 0; }

// The divergence of close rows, of the sum of Step.rest.
inline Divergent close_sum(double sum, const Sums& z) {
  const Close close = close_divergence(sum, z.t);
  return {close.kl, close.step, close.base, close.kl - z.dot / z.t};
}

// The same where the rows are close, from the logits that exp_both was given: s becomes exp t (exp d - 1), t exp t.
template <class Acc>
inline Divergent close_rows(Acc* __restrict s, Acc* __restrict t, int64_t count, Acc top_s, Acc top_t,
                            Acc inv_temperature, const Sums& z) {
  const Acc apart = top_s - top_t, mean = static_cast<Acc>(z.dot / z.t);
  const Acc scale = static_cast<Acc>(std::exp(z.dot / z.t));
  const double total = sum_in_blocks<Acc>(count, [=](int64_t i) {
    const Acc es = exp_nonpositive((s[i] - top_s) * inv_temperature);
    const Acc et = exp_nonpositive((t[i] - top_t) * inv_temperature);
    const Step<Acc> step = step_of(et, es, scale, ((s[i] - t[i]) - apart) * inv_temperature + mean);
    s[i] = step.first;
    t[i] = et;
    return step.rest;
  });
  return close_sum(total, z);
}

// exp_both and the divergence; `again` brings the logits back.
template <class Acc, class Again>
inline Divergent diverge(Acc* s, Acc* t, int64_t count, Acc top_s, Acc top_t, Acc inv_temperature, Sums& z,
                         Again&& again) {
  z = exp_both(s, t, count, top_s, top_t, inv_temperature);
  const Divergent out = divergence_of(z);
  if (!is_close(out, z)) return out;
  again();
  return close_rows(s, t, count, top_s, top_t, inv_temperature, z);
}

// exp(x) - 1 for x <= 0.
template <class Acc>
inline Acc less_one(Acc x) {
  return x > Acc{-0.5} ? madd(x * x * Acc{0.5}, exp_series(x), x) : exp_nonpositive(x) - 1;
}

// The sum of `count` exponentials, of which each is at most 1, and `less`, which is `sum - count`, with the digits that
// a sum near `count` has not.
struct ExpSum {
  double sum = 0, less = 0, count = 0;

  void add(double s, double l, double n) { sum += s, less += l, count += n; }
  double log() const {
    return is_near_count(less, count) ? std::log(count) + std::log1p(less / count) : std::log(sum);
  }
  // Is it worth adding up what each exponential lacks of 1?
  template <class Acc>
  static bool is_near_count(Acc less, Acc count) { return less > Acc{-0.5} * count; }
};

// Writes the gradient of pair p: `fill` forms the first row of its span (zeroed before, if `clear`), the others are
// copies of it. The owner of a pair writes the rows from the end of the pair before it, the last pair also the tail:
// every row is written exactly once, whichever thread it falls to.
template <class Acc, class F>
inline void write_grad(const Rows& student, void* grad, const Spans& spans, int64_t p, int64_t pairs, bool empty,
                       bool clear, F&& fill) {
  const int64_t gap = !spans.start ? p : p ? spans.end[p - 1] : 0;
  const int64_t begin = spans.start ? spans.start[p] : p, end = spans.start ? spans.end[p] : p + 1;
  const int64_t columns = student.columns;
  zero_rows(student.dtype, grad, gap, empty ? end : clear ? begin + 1 : begin, columns);
  if (!empty) {
    with_type_within<Acc>(student.dtype, [&](auto type) {
      auto* base = static_cast<decltype(type)*>(grad);
      auto* row = base + begin * columns;
      fill(row);
      for (int64_t k = begin + 1; k < end; ++k) std::memcpy(base + k * columns, row, sizeof(type) * columns);
    });
  }
  if (p + 1 == pairs) zero_rows(student.dtype, grad, end, student.rows, columns);
}

inline void zero_grad(const Rows& student, void* grad) {
  zero_rows(student.dtype, grad, 0, student.rows, student.columns);
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
