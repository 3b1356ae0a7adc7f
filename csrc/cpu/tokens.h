// The log-probability of one token of each row: shared by log_prob and linear_log_prob. Formula:
// vocabdistil/reference/span_likelihood.py.
#pragma once

#include "softmax.h"

namespace vocabdistil {
namespace VD_ISA {

// The rows whose token is asked for and of which `also` holds. Raises for a token that is not one of the columns.
template <class Also>
inline std::vector<int64_t> needed_rows(const Tokens& tokens, int64_t rows, int64_t columns, Also&& also) {
  std::vector<int64_t> needed;
  for (int64_t row = 0; row < rows; ++row) {
    if (!tokens.needed[row] || !also(row)) continue;
    if (tokens.ids[row] < 0 || tokens.ids[row] >= columns) {
      throw std::invalid_argument("ids: expected ids from 0 to " + std::to_string(columns - 1) + ", got " +
                                  std::to_string(tokens.ids[row]));
    }
    needed.push_back(row);
  }
  return needed;
}

// A sum of exponentials shifted by the largest exponent.
struct ExpTotal {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;

  // Of more exponents, the largest of which is `other`, the sum shifted by it (by nothing where it is -inf).
  void add(double other, double more) {
    if (other > top) {
      sum = sum * std::exp(top - other) + more;
      top = other;
    } else {
      sum += other == top ? more : more * std::exp(shift_of(other) - shift_of(top));
    }
  }
};

// What a row leaves for its gradient: a logit z has the probability share * exp(z - shift).
struct TokenOdds {
  double log_prob, shift, share;
};

// Of the token's logit and those of all others. A row of -inf alone has no gradient: its share is 0.
inline TokenOdds token_odds(double own, const ExpTotal& others) {
  const double none = -std::numeric_limits<double>::infinity();
  const double rest = others.sum == 0 ? none : others.top + std::log(others.sum);
  if (own == none && rest == none) return {none, 0, 0};
  const double odds = rest - own, less = std::log1p(std::exp(-std::abs(odds)));
  const double shift = std::max(own, others.top);
  return {odds > 0 ? -(odds + less) : -less, shift, std::exp(shift - (std::max(own, rest) + less))};
}

// What is left of a backward pass in which the gradient of each row's log-probability is `grad`.
template <class Acc>
struct TokenGrads {
  const Acc *log_prob, *shift, *share, *grad;

  bool any(int64_t row) const { return share[row] != 0 && grad[row] != 0; }
  Acc of_token(int64_t row) const { return -grad[row] * std::expm1(log_prob[row]); }
  Acc factor(int64_t row) const { return -grad[row] * share[row]; }  // of all others' exp(z - shift)
};
template <class Acc>
TokenGrads<Acc> token_grads(const TokenOddsOut& of, const void* grad) {
  return {static_cast<const Acc*>(of.log_prob), static_cast<const Acc*>(of.shift), static_cast<const Acc*>(of.share),
          static_cast<const Acc*>(grad)};
}

// Writes the odds of row by row, those of rows that nobody asks for as 0.
template <class Acc>
struct TokenWriter {
  Acc *log_prob, *shift, *share;

  TokenWriter(const TokenOddsOut& out, int64_t rows)
      : log_prob(static_cast<Acc*>(out.log_prob)),
        shift(static_cast<Acc*>(out.shift)),
        share(static_cast<Acc*>(out.share)) {
    for (Acc* x : {log_prob, shift, share}) std::fill_n(x, rows, Acc{0});
  }
  void write(int64_t row, const TokenOdds& of) const {
    log_prob[row] = static_cast<Acc>(of.log_prob);
    shift[row] = static_cast<Acc>(of.shift);
    share[row] = static_cast<Acc>(of.share);
  }
};

}  // namespace VD_ISA
}  // namespace vocabdistil
