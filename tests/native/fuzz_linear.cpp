// Runs csrc/cpu/linear_matched_kl.cpp on random shapes, dtypes, ids (valid and not) and wishes for the given seconds,
// every array of exactly its size; meant to be built with the address and undefined behaviour sanitizers, for the
// instruction set that VD_ISA names. Checks that all of the gradients is written, and one row's loss and gradient
// against plain sums in double.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "matrix.h"

namespace vocabdistil {
namespace VD_ISA {
void linear_matched_kl(const LinearMatchedKlArgs&);
}
}  // namespace vocabdistil

namespace {

template <class Acc>
struct Side {
  Matrix hidden, weight;
  std::vector<Acc> bias, lengths;
  std::vector<int32_t> ids;

  Side(DType dtype, DType weight_dtype, int64_t rows, int64_t vocabulary, int64_t dim, int64_t matched)
      : hidden(dtype, rows, dim, 1), weight(weight_dtype, vocabulary, dim, 0.5) {
    std::vector<int32_t> all(static_cast<size_t>(vocabulary));
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), rng);
    ids.assign(all.begin(), all.begin() + matched);
    if (pick(0, 1)) bias.resize(static_cast<size_t>(vocabulary));
    for (auto& b : bias) b = pick(0, 20) ? static_cast<Acc>(pick(-9, 9)) / 4 : -std::numeric_limits<Acc>::infinity();
    if (pick(0, 1)) lengths.resize(static_cast<size_t>(rows));
    for (auto& n : lengths) n = static_cast<Acc>(pick(1, 3));
  }
  LinearSide args() const {
    return {hidden.rows, weight.rows, bias.empty() ? nullptr : bias.data(), lengths.empty() ? nullptr : lengths.data(),
            ids.data()};
  }
  double logit(int64_t r, int64_t v) const {
    double z = 0;
    for (int64_t k = 0; k < hidden.rows.columns; ++k) z += hidden.at(r, k) * weight.at(v, k);
    if (!bias.empty())
      z += static_cast<double>(bias[static_cast<size_t>(v)]) *
           (lengths.empty() ? 1 : static_cast<double>(lengths[static_cast<size_t>(r)]));
    return z;
  }
};

template <class Acc>
bool one_case(DType dtype) {
  const int64_t rows = pick(0, 120), v_s = pick(1, 260), v_t = pick(1, 260), ds = pick(0, 150), dt = pick(0, 70);
  const int64_t matched = pick(1, std::min(v_s, v_t));
  const DType weights = dtype == DType::bf16 || dtype == DType::f16 ? (pick(0, 1) ? dtype : DType::f32) : dtype;
  Side<Acc> s(dtype, weights, rows, v_s, ds, matched), t(dtype, weights, rows, v_t, dt, matched);
  const auto unmatched = static_cast<Unmatched>(pick(0, 2));
  bool bad = false;
  if (pick(0, 9) == 0) {
    auto& ids = pick(0, 1) ? s.ids : t.ids;
    ids[static_cast<size_t>(pick(0, matched - 1))] = pick(0, 1) ? -1 : 1 << 30;
    bad = true;
  }
  std::vector<Acc> scale(static_cast<size_t>(rows)), loss(scale.size()), total(1);
  for (auto& x : scale) x = static_cast<Acc>(pick(0, 4)) / 4;
  const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  std::vector<Acc> g_hidden(static_cast<size_t>(pick(0, 1) * rows * ds), nan);
  std::vector<Acc> g_weight(static_cast<size_t>(pick(0, 1) * v_s * ds), nan);
  std::vector<Acc> g_bias(static_cast<size_t>(pick(0, 1) * v_s), nan);
  auto address = [](std::vector<Acc>& x) { return x.empty() ? nullptr : x.data(); };
  const double temperature = 1 + static_cast<double>(pick(0, 2));
  try {
    VD_ISA::linear_matched_kl({s.args(), t.args(), matched, unmatched, temperature, pick(0, 1) << pick(0, 20), scale.data(),
                       loss.data(), total.data(), address(g_hidden), address(g_weight), address(g_bias),
                       static_cast<int>(pick(1, 3))});
  } catch (const std::invalid_argument&) {
    require(bad, "good input is accepted");
    return false;
  }
  require(!bad, "ids out of range are refused");
  for (const auto* g : {&g_hidden, &g_weight, &g_bias})
    for (size_t i = 0; rows == 0 && i < g->size(); ++i) require((*g)[i] == 0, "no rows, no gradient");

  // NaN is what was there before; -inf in a bias may make others.
  const bool finite = std::none_of(s.bias.begin(), s.bias.end(), [](Acc b) { return std::isinf(b); }) &&
                      std::none_of(t.bias.begin(), t.bias.end(), [](Acc b) { return std::isinf(b); });
  for (const auto* g : {&g_hidden, &g_weight, &g_bias})
    for (const Acc x : *g) require(!finite || std::isfinite(x), "every gradient is written");

  // One row again, in double: its loss over softmaxes of the matched columns, and its part of the gradient.
  if (rows == 0 || unmatched != Unmatched::renormalize) return true;
  const double tolerance = dtype == DType::f64 ? 1e-9 : 2e-4;
  const int64_t r = pick(0, rows - 1);
  auto log_softmax = [&](const Side<Acc>& side) {
    std::vector<double> z;
    for (int32_t id : side.ids) z.push_back(side.logit(r, id) / temperature);
    double sum = 0;
    for (double x : z) sum += std::exp(x);
    for (double& x : z) x -= std::log(sum);
    return z;
  };
  const auto log_s = log_softmax(s), log_t = log_softmax(t);
  double want = 0;
  std::vector<double> wanted(static_cast<size_t>(ds));
  const double weight = static_cast<double>(scale[static_cast<size_t>(r)]);
  for (size_t i = 0; i < log_s.size(); ++i) {
    if (std::exp(log_t[i]) > 0) want += std::exp(log_t[i]) * (log_t[i] - log_s[i]);
    const double d = temperature * weight * (std::exp(log_s[i]) - std::exp(log_t[i]));
    for (int64_t k = 0; k < ds; ++k) wanted[static_cast<size_t>(k)] += d * s.weight.at(s.ids[i], k);
  }
  // A column with mass for the teacher alone, or a teacher without any.
  if (!std::isfinite(want) || std::any_of(log_t.begin(), log_t.end(), [](double x) { return std::isnan(x); }))
    return true;
  want *= weight == 0 ? 0 : temperature * temperature;
  require(std::abs(static_cast<double>(loss[static_cast<size_t>(r)]) - want) <= tolerance * (1 + std::abs(want)),
          "the loss is that of plain sums");
  for (int64_t k = 0; k < ds && !g_hidden.empty(); ++k) {
    const double got = static_cast<double>(g_hidden[static_cast<size_t>(r * ds + k)]);
    require(std::abs(got - wanted[static_cast<size_t>(k)]) <= 10 * tolerance, "so is the gradient");
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
