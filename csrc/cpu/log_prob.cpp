// Each row on its own: what its token's logit and those of all others leave behind, and the gradient from that.
// Formula: vocabdistil/reference/span_likelihood.py.
#include "tokens.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

// Adds the exponentials of x[begin, end) to `total`.
template <class Acc, class T>
void add_range(const T* __restrict x, int64_t begin, int64_t end, ExpTotal& total) {
  for (; begin < end; begin += kBlock) {
    const int64_t stop = std::min(end, begin + kBlock);
    Acc top = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t i = begin; i < stop; ++i) {
      const Acc z = static_cast<Acc>(load(x[i]));
      top = z > top ? z : top;
    }
    const Acc shift = shift_of(top);
    Acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < stop; ++i) sum += exp_nonpositive(static_cast<Acc>(load(x[i])) - shift);
    total.add(static_cast<double>(top), static_cast<double>(sum));
  }
}

// f(Acc{}, T{}) with the types of logits.
template <class F>
void with_types(DType dtype, F&& f) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    f(std::conditional_t<std::is_same_v<T, double>, double, float>{}, type);
  });
}

}  // namespace

void log_prob_fwd(const LogProbArgs& a) {
  const int64_t columns = a.logits.columns;
  const std::vector<int64_t> rows =
      needed_rows(a.tokens, a.logits.rows, columns, [](int64_t) { return true; });
  with_types(a.logits.dtype, [&](auto acc, auto type) {
    using Acc = decltype(acc);
    using T = decltype(type);
    const TokenWriter<Acc> out(a.out, a.logits.rows);
    const int64_t count = static_cast<int64_t>(rows.size());
    parallel_for(count, useful_threads(a.threads, count * columns / 8), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = static_cast<const T*>(a.logits.data) + rows[i] * a.logits.stride;
        const int64_t id = a.tokens.ids[rows[i]];
        ExpTotal others;
        add_range<Acc>(row, 0, id, others);
        add_range<Acc>(row, id + 1, columns, others);
        out.write(rows[i], token_odds(static_cast<double>(load(row[id])), others));
      }
    });
  });
}

void log_prob_bwd(const LogProbBwdArgs& a) {
  const int64_t columns = a.logits.columns;
  with_types(a.logits.dtype, [&](auto acc, auto type) {
    using Acc = decltype(acc);
    using T = decltype(type);
    const auto of = token_grads<Acc>(a.of, a.grad);
    needed_rows(a.tokens, a.logits.rows, columns, [](int64_t) { return true; });
    const int threads = useful_threads(a.threads, a.logits.rows * columns / 8);
    parallel_for(a.logits.rows, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* __restrict out = static_cast<T*>(a.grad_logits) + i * columns;
        if (!a.tokens.needed[i] || !of.any(i)) {
          zero_rows(a.logits.dtype, out, 0, 1, columns);
          continue;
        }
        const T* __restrict row = static_cast<const T*>(a.logits.data) + i * a.logits.stride;
        const Acc factor = of.factor(i), shift = of.shift[i];
        VD_SIMD for (int64_t k = 0; k < columns; ++k)
          out[k] = store<T>(factor * exp_nonpositive(static_cast<Acc>(load(row[k])) - shift));
        out[a.tokens.ids[i]] = store<T>(of.of_token(i));
      }
    });
  });
}

}  // namespace VD_ISA
}  // namespace vocabdistil
