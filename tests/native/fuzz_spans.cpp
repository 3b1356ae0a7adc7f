// Runs the kernels of csrc/cpu that follow spans, with spans that were good and then written to: before the call, and now
// and then by another thread during it. Every array has exactly its size; meant to be built with the address and
// undefined behaviour sanitizers, for the instruction set that VD_ISA names. Checks that spans are refused exactly where
// they do not ascend, overlap or leave the rows, and that else every loss and all of the gradients are written.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/numeric.h"
#include "fuzz.h"

namespace vocabdistil {
namespace VD_ISA {
void span_mean_fwd(const SpanMeanArgs&);
void span_mean_bwd(const SpanMeanBwdArgs&);
void span_loss(const SpanLossArgs&);
void matched_kl(const MatchedKlArgs&);
void remapped_kl(const RemappedKlArgs&);
}  // namespace VD_ISA
}  // namespace vocabdistil

using namespace vocabdistil;
using namespace vocabdistil::VD_ISA;

namespace {

size_t size(int64_t n) { return static_cast<size_t>(n); }

// [rows, columns] of numbers above 0, and as much memory for their gradient.
struct Matrix {
  DType dtype;
  int64_t rows, columns;
  std::unique_ptr<char[]> memory, grad;

  Matrix(DType dtype, int64_t rows, int64_t columns) : dtype(dtype), rows(rows), columns(columns) {
    const size_t bytes = size(rows * columns) * item_size(dtype);
    memory = std::make_unique<char[]>(bytes);
    grad = std::make_unique<char[]>(bytes);
    std::fill_n(grad.get(), bytes, static_cast<char>(0xff));  // NaN in all of them
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < rows * columns; ++i)
        reinterpret_cast<T*>(memory.get())[i] = store<T>(static_cast<float>(pick(1, 16)) / 4);
    });
  }
  Rows view() const { return {dtype, memory.get(), columns, rows, columns}; }
  bool written() const {
    bool all = true;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < rows * columns; ++i)
        all &= std::isfinite(static_cast<double>(load(reinterpret_cast<const T*>(grad.get())[i])));
    });
    return all;
  }
};

struct SpanSide {
  std::vector<int32_t> start, end;

  SpanSide(int64_t pairs, int64_t rows) {
    std::vector<int32_t> cuts(size(2 * pairs));
    for (auto& cut : cuts) cut = static_cast<int32_t>(pick(0, rows));
    std::sort(cuts.begin(), cuts.end());
    for (size_t p = 0; p < size(pairs); ++p) start.push_back(cuts[2 * p]), end.push_back(cuts[2 * p + 1]);
  }
  void tamper() {
    if (start.empty()) return;
    auto& positions = pick(0, 1) ? start : end;
    const int64_t values[] = {-1, 0, 1, pick(-3, 40), pick(-3, 40), 1 << 20, 2147483647, -2147483647 - 1};
    positions[size(pick(0, static_cast<int64_t>(positions.size()) - 1))] = static_cast<int32_t>(values[pick(0, 7)]);
  }
  bool good(int64_t rows) const {
    int32_t before = 0;
    for (size_t p = 0; p < start.size(); ++p) {
      if (start[p] < before || end[p] < start[p]) return false;
      before = end[p];
    }
    return before <= rows;
  }
  Spans view() const { return {start.data(), end.data()}; }
};

std::vector<int32_t> some_ids(int64_t count, int64_t columns) {
  std::vector<int32_t> ids(size(columns));
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), rng);
  ids.resize(size(count));
  return ids;
}

bool one_case() {
  const int64_t pairs = pick(0, 6), s_rows = pick(0, 12), t_rows = pick(0, 12), dim = pick(1, 9);
  const auto s_dtype = static_cast<DType>(pick(0, 3)), t_dtype = static_cast<DType>(pick(0, 3));
  const bool wide = s_dtype == DType::f64 || t_dtype == DType::f64;
  const Matrix s(s_dtype, s_rows, dim), t(t_dtype, t_rows, dim);
  SpanSide s_spans(pairs, s_rows), t_spans(pairs, t_rows);
  for (int64_t n = pick(0, 2); n > 0; --n) (pick(0, 1) ? s_spans : t_spans).tamper();
  const int operation = static_cast<int>(pick(0, 4));
  const bool both = operation >= 2, racing = pick(0, 199) == 0;
  const bool good = s_spans.good(s_rows) && (!both || t_spans.good(t_rows));

  // Of either precision the right one is read; 0 is 0 in both.
  std::vector<double> scale(size(pairs)), loss(size(std::max<int64_t>(pairs, 1))), total(1), rows(size(pairs * dim));
  for (int64_t p = 0; p < pairs; ++p) {
    if (wide) scale[size(p)] = 0.5;
    else reinterpret_cast<float*>(scale.data())[p] = 0.5f;
  }
  const double coef = 1;
  const void* const s_data = s.memory.get();
  const void* const t_data = t.memory.get();
  void* const s_grad = s.grad.get();
  const bool mean = pick(0, 1);
  const int threads = static_cast<int>(pick(1, 3));
  const Layers s_layers{s_dtype, 1, &s_data, &dim, &coef, s_rows}, t_layers{t_dtype, 1, &t_data, &dim, &coef, t_rows};
  const LayerGrads grads{s_dtype, 1, &s_grad, &coef, s_rows}, none{t_dtype, 0, nullptr, &coef, t_rows};
  const int64_t matched = pick(1, dim);
  const std::vector<int32_t> s_ids = some_ids(matched, dim), t_ids = some_ids(matched, dim);
  // Row v of the table is student id v, in the teacher's first columns.
  std::vector<int32_t> table(size(matched)), shape{1, static_cast<int32_t>(matched)}, indptr(size(dim + 1));
  std::iota(table.begin(), table.end(), 0);
  for (int64_t j = 0; j <= dim; ++j) indptr[size(j)] = static_cast<int32_t>(std::min(j, matched));

  std::atomic<bool> running{true};
  std::thread other;
  if (racing) {
    other = std::thread([&] {
      volatile int32_t* at = s_spans.end.data();
      for (uint32_t i = 0; running && pairs; ++i) at[i % static_cast<uint32_t>(pairs)] = static_cast<int32_t>(i * 7919u);
    });
  }
  bool refused = false;
  try {
    switch (operation) {
      case 0:
        VD_ISA::span_mean_fwd({s_layers, s_spans.view(), pairs, dim, mean, s_dtype == DType::f64 ? DType::f64 : DType::f32,
                       rows.data(), threads});
        break;
      case 1:
        VD_ISA::span_mean_bwd({s_dtype == DType::f64 ? DType::f64 : DType::f32, rows.data(), dim, s_spans.view(), pairs, dim,
                       mean, grads, threads});
        break;
      case 2:
        VD_ISA::span_loss({s_layers, t_layers, s_spans.view(), t_spans.view(), pairs, dim,
                   static_cast<Divergence>(pick(0, 4)), mean, 2, 0.3, scale.data(), loss.data(), total.data(), grads,
                   none, threads});
        break;
      case 3:
        VD_ISA::matched_kl({s.view(), t.view(), s_spans.view(), t_spans.view(), s_ids.data(), t_ids.data(), matched, pairs,
                    matched < dim ? static_cast<Unmatched>(pick(0, 2)) : Unmatched::renormalize, mean, 2, scale.data(),
                    loss.data(), total.data(), s_grad, threads});
        break;
      default:
        VD_ISA::remapped_kl({s.view(), t.view(), s_spans.view(), t_spans.view(),
                     {table.data(), matched, shape.data(), 1, table.data(), indptr.data(), table.data(), nullptr,
                      nullptr},
                     pairs, static_cast<bool>(pick(0, 1)), pick(0, 3), static_cast<Unmatched>(pick(0, 2)), 2, scale.data(), loss.data(), total.data(), s_grad, threads});
    }
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  running = false;
  if (racing) {
    other.join();
    return !refused;
  }
  require(refused != good, "spans are refused exactly where they are wrong");
  if (refused) return false;
  require(operation == 0 || s.written(), "every row of the gradient is written");
  for (int64_t p = 0; both && p < pairs; ++p)
    require(std::isfinite(wide ? loss[size(p)] : static_cast<double>(reinterpret_cast<float*>(loss.data())[p])),
            "every loss is written");
  return true;
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, one_case); }
