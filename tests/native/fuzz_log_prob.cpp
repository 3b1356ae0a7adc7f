// Runs csrc/cpu/log_prob.cpp and linear_log_prob.cpp as fuzz_linear.cpp runs its operation: random shapes, dtypes, ids
// (valid and not, of rows that are needed and not) and wishes, every array of exactly its size. Checks that all of the
// gradients is written, and one row's log-probability and gradient against plain sums in double.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "matrix.h"

namespace vocabdistil {
namespace VD_ISA {
void log_prob_fwd(const LogProbArgs&);
void log_prob_bwd(const LogProbBwdArgs&);
void linear_log_prob_fwd(const LinearLogProbArgs&);
void linear_log_prob_bwd(const LinearLogProbBwdArgs&);
}
}  // namespace vocabdistil

namespace {

size_t size(int64_t count) { return static_cast<size_t>(count); }

template <class Acc>
struct Odds {
  std::vector<Acc> log_prob, shift, share;

  explicit Odds(int64_t rows) {
    const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
    for (auto* x : {&log_prob, &shift, &share}) x->assign(size(rows), nan);
  }
  TokenOddsOut args() { return {log_prob.data(), shift.data(), share.data()}; }
};

// The log-softmax of a row of logits.
template <class Logit>
std::vector<double> log_softmax(int64_t columns, Logit&& logit) {
  std::vector<double> z;
  for (int64_t v = 0; v < columns; ++v) z.push_back(logit(v));
  const double top = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (double x : z) sum += std::exp(x - top);
  for (double& x : z) x -= top + std::log(sum);
  return z;
}

bool near(double got, double want, double tolerance) { return std::abs(got - want) <= tolerance * (1 + std::abs(want)); }

template <class Acc>
bool one_case(DType dtype) {
  const int64_t rows = pick(0, 120), columns = pick(1, 260), dim = pick(0, 150);
  const DType weights = dtype == DType::bf16 || dtype == DType::f16 ? (pick(0, 1) ? dtype : DType::f32) : dtype;
  const Matrix hidden(dtype, rows, dim, 1), weight(weights, columns, dim, 0.5), logits(dtype, rows, columns, 3);
  std::vector<Acc> bias(size(pick(0, 1) * columns)), grad(size(rows));
  for (auto& b : bias) b = static_cast<Acc>(pick(-9, 9)) / 4;
  for (auto& g : grad) g = static_cast<Acc>(pick(-2, 2)) / 2;
  std::vector<int64_t> ids(size(rows));
  std::vector<uint8_t> needed(size(rows));
  for (auto& id : ids) id = pick(0, columns - 1);
  for (int64_t r = 0; r < rows; ++r) {
    needed[size(r)] = pick(0, 2) > 0;
    if (!needed[size(r)]) ids[size(r)] = pick(0, 1) ? -100 : int64_t{1} << 40;
  }
  bool bad = false;
  if (rows > 0 && pick(0, 9) == 0) {
    const size_t r = size(pick(0, rows - 1));
    needed[r] = bad = true;
    ids[r] = pick(0, 1) ? -1 : columns;
  }
  const Tokens tokens{ids.data(), needed.data()};
  const LinearTokens linear{hidden.rows, weight.rows, bias.empty() ? nullptr : bias.data(), tokens};
  const int threads = static_cast<int>(pick(1, 3));
  Odds<Acc> from_logits(rows), from_hidden(rows);
  int refused = 0;
  auto attempt = [&](auto&& f) {
    try {
      f();
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  };
  attempt([&] { VD_ISA::log_prob_fwd({logits.rows, tokens, from_logits.args(), threads}); });
  attempt([&] { VD_ISA::linear_log_prob_fwd({linear, from_hidden.args(), threads}); });
  require(refused == (bad ? 2 : 0), "ids out of range, and they alone, are refused");
  if (bad) return false;

  const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  std::vector<char> g_logits(size(rows * columns) * item_size(dtype), static_cast<char>(0xff));
  std::vector<Acc> g_hidden(size(pick(0, 1) * rows * dim), nan), g_weight(size(pick(0, 1) * columns * dim), nan);
  std::vector<Acc> g_bias(size(pick(0, 1) * columns), nan);
  auto address = [](std::vector<Acc>& x) { return x.empty() ? nullptr : x.data(); };
  VD_ISA::log_prob_bwd({logits.rows, tokens, from_logits.args(), grad.data(), g_logits.data(), threads});
  VD_ISA::linear_log_prob_bwd({linear, from_hidden.args(), grad.data(), pick(0, 1) << pick(0, 20), address(g_hidden),
                               address(g_weight), address(g_bias), threads});
  for (const auto* g : {&g_hidden, &g_weight, &g_bias})
    for (const Acc x : *g) require(std::isfinite(x), "every gradient is written");
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < rows * columns; ++i)
      require(std::isfinite(load(reinterpret_cast<const T*>(g_logits.data())[i])), "that of the logits too");
  });
  if (rows == 0) return true;

  const int64_t r = pick(0, rows - 1), id = ids[size(r)];
  const double tolerance = dtype == DType::f64 ? 1e-9 : 2e-4;
  const double upstream = needed[size(r)] ? static_cast<double>(grad[size(r)]) : 0;
  const auto dense = log_softmax(columns, [&](int64_t v) { return logits.at(r, v); });
  const auto formed = log_softmax(columns, [&](int64_t v) {
    double z = bias.empty() ? 0 : static_cast<double>(bias[size(v)]);
    for (int64_t k = 0; k < dim; ++k) z += hidden.at(r, k) * weight.at(v, k);
    return z;
  });
  for (auto* of : {&from_logits, &from_hidden}) {
    const auto& want = of == &from_logits ? dense : formed;
    const double got = static_cast<double>(of->log_prob[size(r)]);
    require(near(got, needed[size(r)] ? want[size(id)] : 0, tolerance), "the log-probability is that of plain sums");
  }
  for (int64_t k = 0; k < dim && !g_hidden.empty(); ++k) {
    double want = 0;
    for (int64_t v = 0; v < columns; ++v) want += upstream * ((v == id) - std::exp(formed[size(v)])) * weight.at(v, k);
    require(near(static_cast<double>(g_hidden[size(r * dim + k)]), want, 10 * tolerance), "so is the gradient");
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, [] {
    const auto dtype = static_cast<DType>(pick(0, 3));
    return dtype == DType::f64 ? one_case<double>(dtype) : one_case<float>(dtype);
  });
}
