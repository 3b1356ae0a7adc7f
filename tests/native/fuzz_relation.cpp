// Runs csrc/cpu/relation_loss.cpp on random sizes, labels (sane and wild) and wishes for the given seconds, every array
// of exactly its size; meant to be built with the address and undefined behaviour sanitizers, for the instruction set
// that VD_ISA names. Checks that all of the gradient is written, and one pair's loss against plain sums in double.
#include <cmath>
#include <vector>

#include "cpu/numeric.h"
#include "fuzz.h"

namespace vocabdistil {
namespace VD_ISA {
void relation_loss(const RelationLossArgs&);
}
}  // namespace vocabdistil

using namespace vocabdistil;

namespace {

template <class Acc>
std::vector<Acc> random_rows(int64_t count, int64_t width) {
  std::vector<Acc> rows(static_cast<size_t>(count * width));
  for (auto& x : rows) x = static_cast<Acc>(pick(-8, 8)) / 8;
  return rows;
}

template <class Acc>
double log_relation(const std::vector<Acc>& x, int64_t width, int64_t heads, int64_t head, int64_t i, int64_t j,
                    const std::vector<int64_t>& text) {
  const int64_t dim = width / heads;
  auto score = [&](int64_t other) {
    double sum = 0;
    for (int64_t k = head * dim; k < (head + 1) * dim; ++k)
      sum += static_cast<double>(x[static_cast<size_t>(i * width + k)]) *
             static_cast<double>(x[static_cast<size_t>(other * width + k)]);
    return sum / std::sqrt(static_cast<double>(dim));
  };
  double sum = 0;
  for (int64_t other : text) sum += std::exp(score(other));
  return score(j) - std::log(sum);
}

template <class Acc>
void one_case() {
  const bool wild = pick(0, 1), is_long = pick(0, 40) == 0;  // of several blocks of rows
  const int64_t heads = pick(1, is_long ? 1 : 4), s_dim = heads * pick(1, 40), t_dim = heads * pick(1, 40);
  const int64_t pairs = is_long ? pick(500, 800) : pick(0, 90), longest = is_long ? pairs : pick(1, 60);
  const auto count = static_cast<size_t>(pairs);
  std::vector<int32_t> first(count), last(count);
  for (int64_t p = 0; p < pairs;) {
    const int64_t size = std::min(pairs - p, is_long ? pairs : pick(1, longest));
    for (int64_t i = 0; i < size; ++i) {
      const auto at = static_cast<size_t>(p + i);
      first[at] = static_cast<int32_t>(wild ? pick(0, 2) - 1 : p);
      last[at] = wild && pick(0, 1) ? 2147483647 : pick(0, 3) ? static_cast<int32_t>(p + size) : first[at];
    }
    p += size;
  }
  const auto student = random_rows<Acc>(pairs, s_dim), teacher = random_rows<Acc>(pairs, t_dim);
  const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  std::vector<Acc> scale(count, 1), loss(count, nan), total(1, nan);
  std::vector<Acc> grad(static_cast<size_t>(pick(0, 1) * pairs * s_dim), nan);
  VD_ISA::relation_loss({sizeof(Acc) == 8 ? DType::f64 : DType::f32, student.data(), teacher.data(), pairs, s_dim,
                         t_dim, heads, first.data(), last.data(), scale.data(), loss.data(), total.data(),
                         grad.empty() ? nullptr : grad.data(), static_cast<int>(pick(1, 3))});
  require(std::isfinite(total[0]), "the total is written");
  for (const Acc x : loss) require(std::isfinite(x), "every loss is written");
  for (const Acc x : grad) require(std::isfinite(x), "every gradient is written");

  // One pair again, with all that count on either side of it up to another label.
  if (pairs == 0) return;
  const int64_t p = pick(0, pairs - 1);
  auto counts = [&](int64_t i) { return last[static_cast<size_t>(i)] > first[static_cast<size_t>(i)]; };
  auto other = [&](int64_t i) { return counts(i) && first[static_cast<size_t>(i)] != first[static_cast<size_t>(p)]; };
  if (!counts(p)) return require(loss[static_cast<size_t>(p)] == 0, "what is left out has no loss");
  std::vector<int64_t> text;
  for (int64_t i = p; i >= 0 && !other(i); --i)
    if (counts(i)) text.push_back(i);
  for (int64_t i = p + 1; i < pairs && !other(i); ++i)
    if (counts(i)) text.push_back(i);
  double want = 0;
  for (int64_t head = 0; head < heads && text.size() < 200; ++head) {
    for (int64_t j : text) {
      const double log_q = log_relation(teacher, t_dim, heads, head, p, j, text);
      want += std::exp(log_q) * (log_q - log_relation(student, s_dim, heads, head, p, j, text));
    }
  }
  want /= static_cast<double>(heads);
  const double tolerance = sizeof(Acc) == 8 ? 1e-9 : 1e-5;
  require(text.size() >= 200 || std::abs(static_cast<double>(loss[static_cast<size_t>(p)]) - want) <= tolerance,
          "the loss is that of plain sums");
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, [] {
    pick(0, 1) ? one_case<double>() : one_case<float>();
    return true;
  });
}
