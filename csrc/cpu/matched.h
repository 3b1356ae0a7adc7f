// The divergence over a matched vocabulary from the sums of exponentials, and the check of its ids: shared by
// matched_kl and linear_matched_kl. Formulas: vocabdistil/reference/matched_kl.py.
#pragma once

#include "softmax.h"

namespace vocabdistil {
namespace VD_ISA {

inline std::string range_error(const char* side, int64_t columns, int32_t id) {
  return std::string("matched.") + side + "_ids: expected ids from 0 to " + std::to_string(columns - 1) + ", got " +
         std::to_string(id);
}

// Raises for an id out of range or, with `distinct`, for one that stands twice; the ids not listed, if wanted.
inline std::vector<int32_t> other_ids(const char* side, const int32_t* ids, int64_t count, int64_t columns,
                                      bool distinct, bool wanted) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= columns) throw std::invalid_argument(range_error(side, columns, ids[i]));
  std::vector<int32_t> others;
  if (!distinct) return others;
  std::vector<uint8_t> listed(columns);
  for (int64_t i = 0; i < count; ++i) {
    if (listed[ids[i]]++) {
      throw std::invalid_argument(std::string("matched.") + side + "_ids: expected each id once, got id " +
                                  std::to_string(ids[i]) + " repeatedly");
    }
  }
  if (wanted) {
    others.reserve(columns - count);
    for (int64_t v = 0; v < columns; ++v)
      if (!listed[v]) others.push_back(static_cast<int32_t>(v));
  }
  return others;
}

// Of the unmatched logits of one side: log sum exp(x / T), and 1 / sum exp((x - top) / T).
template <class Acc>
struct Rest {
  double log_sum;
  Acc inv_sum;
};

// log of the matched and of the unmatched share of a row: a and b minus log(exp a + exp b).
struct Shares {
  double matched, rest;
};

inline Shares log_shares(double a, double b) {
  const double top = std::max(a, b);
  const double total = top + std::log(std::exp(a - top) + std::exp(b - top));
  return {a - total, b - total};
}

// d loss / d logit of the student = matched: student * exp s - teacher * exp t; unmatched: rest * exp u.
template <class Acc>
struct Outcome {
  double loss;
  Acc student, teacher, rest;
};

template <class Acc>
inline Outcome<Acc> renormalised(const Sums& z) {
  return {z.dot / z.t + std::log(z.s / z.t), static_cast<Acc>(1 / z.s), static_cast<Acc>(1 / z.t), 0};
}

// Each class has its own shift, so that neither log q_U nor log r_U underflows.
template <class Acc>
inline Outcome<Acc> with_unmatched(const Sums& z, double top_s, double top_t, const Rest<Acc>& s, double teacher_rest,
                            bool drop) {
  const Shares r = log_shares(top_s + std::log(z.s), s.log_sum), q = log_shares(top_t + std::log(z.t), teacher_rest);
  const double mass = std::exp(q.matched), rest = std::exp(q.rest);
  double loss = 0;
  if (!(mass == 0)) loss += mass * (z.dot / z.t + (q.matched - std::log(z.t)) - (r.matched - std::log(z.s)));
  if (!drop && !(rest == 0)) loss += rest * (q.rest - r.rest);
  const double share = drop ? mass : 1;
  return {loss, static_cast<Acc>(z.s == 0 ? 0 : share * std::exp(r.matched) / z.s),
          static_cast<Acc>(z.t == 0 ? 0 : mass / z.t),
          static_cast<Acc>(drop ? mass * std::exp(r.rest) : std::exp(r.rest) - rest) * s.inv_sum};
}

}  // namespace VD_ISA
}  // namespace vocabdistil
