// Runs csrc/cpu/linear_remapped_kl.cpp on random shapes, dtypes, tables and wishes for the given seconds, every array of
// exactly its size; meant to be built with the address and undefined behaviour sanitizers, for the instruction set that
// VD_ISA names. Checks that all of the losses and gradients is written.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "matrix.h"

namespace vocabdistil {
namespace VD_ISA {
void linear_remapped_kl(const LinearRemappedKlArgs&);
}
}  // namespace vocabdistil

namespace {

size_t size(int64_t n) { return static_cast<size_t>(n); }

// A table of `rows` rows of `columns` columns as the kernels read it, and what they need of it.
template <class Acc>
struct Table {
  std::vector<int32_t> rows, shapes, ids, indptr, pieces_of;
  std::vector<Acc> weights, weights_of;

  Table(int64_t count, int64_t columns) : indptr(size(columns + 1)) {
    rows.resize(size(count));
    std::iota(rows.begin(), rows.end(), 0);
    std::vector<std::vector<int32_t>> uses(size(columns));
    for (int64_t first = 0, length = 1; first < count; ++length) {
      const int64_t here = pick(1, count - first);
      shapes.push_back(static_cast<int32_t>(length));
      shapes.push_back(static_cast<int32_t>(here));
      for (int64_t i = 0; i < length * here; ++i) {
        ids.push_back(static_cast<int32_t>(pick(0, columns - 1)));
        uses[size(ids.back())].push_back(static_cast<int32_t>(first + i % here));
      }
      first += here;
    }
    for (size_t j = 0; j < uses.size(); ++j) {
      pieces_of.insert(pieces_of.end(), uses[j].begin(), uses[j].end());
      indptr[j + 1] = static_cast<int32_t>(pieces_of.size());
    }
    if (pick(0, 1)) weights.assign(ids.size(), Acc{-0.5}), weights_of = weights;
  }
  RemapPlan plan() const {
    return {rows.data(),   static_cast<int64_t>(rows.size()), shapes.data(),    static_cast<int64_t>(shapes.size() / 2),
            ids.data(),    indptr.data(),                     pieces_of.data(), weights.empty() ? nullptr : weights.data(),
            weights.empty() ? nullptr : weights_of.data()};
  }
};

template <class Acc>
bool one_case(DType dtype) {
  const int64_t rows = pick(0, 120), v_s = pick(1, 260), v_t = pick(1, 260), ds = pick(0, 150), dt = pick(0, 70);
  const int64_t columns = pick(1, v_s), mapped = pick(0, v_t);
  const DType weights = dtype == DType::bf16 || dtype == DType::f16 ? (pick(0, 1) ? dtype : DType::f32) : dtype;
  const Matrix hidden_s(dtype, rows, ds, 1), weight_s(weights, v_s, ds, 0.5);
  const Matrix hidden_t(dtype, rows, dt, 1), weight_t(weights, v_t, dt, 0.5);
  const Table<Acc> table(mapped, columns);
  std::vector<int32_t> ids(size(v_s));
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), rng);
  ids.resize(size(columns));
  std::vector<Acc> bias_s(size(pick(0, 1) * v_s), Acc{0.25}), bias_t(size(pick(0, 1) * v_t), Acc{-1});
  const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  std::vector<Acc> scale(size(rows)), loss(size(rows), nan), total(1, nan);
  for (auto& x : scale) x = static_cast<Acc>(pick(0, 4)) / 4;
  std::vector<Acc> g_hidden(size(pick(0, 1) * rows * ds), nan), g_weight(size(pick(0, 1) * v_s * ds), nan);
  std::vector<Acc> g_bias(size(pick(0, 1) * v_s), nan);
  auto address = [](auto& x) { return x.empty() ? nullptr : x.data(); };
  VD_ISA::linear_remapped_kl({{hidden_s.rows, weight_s.rows, address(bias_s), nullptr, ids.data()},
                              {hidden_t.rows, weight_t.rows, address(bias_t), nullptr, nullptr},
                              table.plan(), columns, pick(0, 1) == 1, pick(0, 1) * pick(1, 300),
                              static_cast<Unmatched>(pick(0, 2)), 1 + static_cast<double>(pick(0, 2)),
                              pick(0, 1) << pick(0, 20), scale.data(), loss.data(), total.data(), address(g_hidden),
                              address(g_weight), address(g_bias), static_cast<int>(pick(1, 3))});
  for (const auto* written : {&loss, &total, &g_hidden, &g_weight, &g_bias})
    for (const Acc x : *written) require(std::isfinite(x), "all of what is wanted is written");
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, [] {
    const auto dtype = static_cast<DType>(pick(0, 3));
    return dtype == DType::f64 ? one_case<double>(dtype) : one_case<float>(dtype);
  });
}
