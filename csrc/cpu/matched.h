// The divergence over a matched vocabulary from the sums of exponentials, and the check of its ids: shared by
// matched_kl, linear_matched_kl and remapped_kl. Formulas: vocabdistil/reference/matched_kl.py.
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

// Turns the unmatched logits of one side into exp((x - top) / T); `again` brings them back.
template <class Acc, class Again>
Rest<Acc> exp_rest(Acc* __restrict x, int64_t count, Acc top, double temperature, Again&& again) {
  const Acc shift = shift_of(top), inv_temperature = static_cast<Acc>(1 / temperature);
  const double sum = sum_in_blocks<Acc>(count, [=](int64_t i) {
    return x[i] = exp_nonpositive((x[i] - shift) * inv_temperature);
  });
  double less = sum - static_cast<double>(count);
  if (ExpSum::is_near_count(less, static_cast<double>(count))) {
    again();
    less = sum_in_blocks<Acc>(count, [=](int64_t i) {
      const Acc low = (x[i] - shift) * inv_temperature;
      x[i] = exp_nonpositive(low);
      return less_one(low);
    });
  }
  const ExpSum total{sum, less, static_cast<double>(count)};
  return {static_cast<double>(shift) / temperature + total.log(), static_cast<Acc>(sum == 0 ? 0 : 1 / sum)};
}

// log of the matched and of the unmatched share of a row.
struct Shares {
  double matched, rest;
};

// They are a and b minus log(exp a + exp b).
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

// Log odds further apart than this are taken from the logs of the shares: exponentials of the difference may overflow.
constexpr double kFar = 30;

// Each class has its own shift, so that neither log q_U nor log r_U underflows.
// row: of the matched logits alone.
template <class Acc>
inline Outcome<Acc> with_unmatched(const Divergent& row, const Sums& z, double top_s, double top_t, const Rest<Acc>& s,
                                   double teacher_rest, bool drop) {
  const double none = -std::numeric_limits<double>::infinity();
  const double matched_s = top_s + std::log(z.s), matched_t = top_t + std::log(z.t);
  if (matched_t == none && teacher_rest == none) return {0, 0, 0, 0};
  const Shares q = log_shares(matched_t, teacher_rest);
  const double mass = std::exp(q.matched), rest = std::exp(q.rest);
  if (matched_s == none && s.log_sum == none) return {-none, 0, 0, 0};
  // Of the two classes alone: log(r / q) and r of the matched one, r - q of the other, KL(q || r).
  double more, own, moved, kl;
  const double apart = ((top_s - top_t) + row.ratio) - (s.log_sum - teacher_rest);  // of the log odds
  if (std::abs(apart) < kFar) {
    const double up = rest * apart, down = -mass * apart;
    const Step<double> of_mass = step_of(mass, mass, std::exp(up), up);
    const Step<double> of_rest = step_of(rest, rest, std::exp(down), down);
    const Close close = close_divergence(of_mass.rest + of_rest.rest, 1);
    more = up - close.kl, kl = close.kl;
    own = mass + (close.step * of_mass.first - close.base * mass);
    moved = close.step * of_rest.first - close.base * rest;
  } else {
    const Shares r = log_shares(matched_s, s.log_sum);
    more = r.matched - q.matched, own = std::exp(r.matched), moved = std::exp(r.rest) - rest;
    const double sum = (rest == 0 ? 0 : rest * (q.rest - r.rest)) - (mass == 0 ? 0 : mass * more);
    kl = std::max(sum, 0.0);  // a share of almost all of the mass on both sides leaves a rounding; a NaN stays
  }
  const double inside = mass == 0 ? 0 : mass * row.loss;
  const double loss = !drop ? inside + kl : mass == 0 ? 0 : inside - mass * more;
  // Shares of the matched mass differ by what `row` says, the mass itself by what has moved.
  const double gives = drop ? mass * (rest + moved) : moved;
  if (drop) own *= mass;
  const bool none_s = z.s == 0, none_t = z.t == 0;
  return {loss, static_cast<Acc>(none_s ? 0 : none_t ? own / z.s : own * row.student),
          static_cast<Acc>(none_t ? 0 : own * row.teacher + gives / z.t), static_cast<Acc>(gives) * s.inv_sum};
}

}  // namespace VD_ISA
}  // namespace vocabdistil
