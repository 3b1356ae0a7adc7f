// The logits of the rows whose token is asked for, formed a block of columns at a time. Forward, a block's exponentials
// are added up while it lies in the cache, by tasks of kBlocks blocks and kRowPanels panels, and those sums brought
// together in the order of the columns. Backward, the logits of all rows at as many columns as the budget has room for
// are formed again and turned into their gradient in place; one product gives those columns' rows of the weight's
// gradient, whole, and another is added to the gradient of the hidden states. Formula:
// vocabdistil/reference/span_likelihood.py.
#include "../block.h"
#include "panels.h"
#include "tokens.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

constexpr int64_t kBlocks = 16;
constexpr int64_t kRowPanels = 64;

template <class Acc>
class Layer {
 public:
  Layer(const LinearTokens& of, std::vector<int64_t> needed, int threads)
      : hidden_(of.hidden),
        weight_(of.weight),
        bias_(static_cast<const Acc*>(of.bias)),
        ids_(of.tokens.ids),
        needed_(std::move(needed)),
        rows_(static_cast<int64_t>(needed_.size())),
        panels_(ceil_div(rows_, kW)),
        threads_(useful_threads(threads, rows_ * weight_.rows * (hidden_.columns + 16) / 16)) {}

  void forward(const TokenWriter<Acc>& out) {
    if (rows_ == 0) return;
    const int64_t blocks = ceil_div(weight_.rows, kBlockColumns), parts = ceil_div(blocks, kBlocks);
    const int64_t groups = ceil_div(panels_, kRowPanels), lanes = panels_ * kW;
    Acc *top, *sum, *own;
    const Arrays<Acc> memory{
        {&packed_, lanes * hidden_.columns}, {&top, parts * lanes}, {&sum, parts * lanes}, {&own, lanes}};
    parallel_tasks(panels_, threads_, [&](int64_t panel) { pack(panel); });
    parallel_tasks(parts * groups, threads_, [&](int64_t i) {
      const int64_t part = i / groups, first = i % groups * kRowPanels;
      const int64_t begin = part * kBlocks * kBlockColumns;
      sums(begin, std::min(weight_.rows, begin + kBlocks * kBlockColumns), first,
           std::min(panels_, first + kRowPanels), top + part * lanes, sum + part * lanes, own);
    });
    for (int64_t r = 0; r < rows_; ++r) {
      ExpTotal others;
      for (int64_t part = 0; part < parts; ++part)
        others.add(static_cast<double>(top[part * lanes + r]), static_cast<double>(sum[part * lanes + r]));
      out.write(needed_[r], token_odds(static_cast<double>(own[r]), others));
    }
  }

  void backward(const LinearLogProbBwdArgs& a) {
    const auto of = token_grads<Acc>(a.of, a.grad);
    const int64_t dim = hidden_.columns;
    Acc* const grad_hidden = static_cast<Acc*>(a.grad_hidden);
    Acc* const grad_weight = static_cast<Acc*>(a.grad_weight);
    Acc* const grad_bias = static_cast<Acc*>(a.grad_bias);
    if (grad_hidden) std::fill_n(grad_hidden, hidden_.rows * dim, Acc{0});
    if (rows_ == 0) {
      if (grad_weight) std::fill_n(grad_weight, weight_.rows * dim, Acc{0});
      if (grad_bias) std::fill_n(grad_bias, weight_.rows, Acc{0});
      return;
    }
    const int64_t lanes = panels_ * kW, column_bytes = lanes * static_cast<int64_t>(sizeof(Acc));
    const int64_t most = std::max<int64_t>(1, a.budget / column_bytes / kBlockColumns) * kBlockColumns;
    const int64_t step = std::min(most, weight_.rows);
    const int64_t stride = ceil_div(dim, kLanes<Acc>) * kLanes<Acc>;
    const int64_t groups = ceil_div(panels_, kRowPanels), strips = ceil_div(dim, kStrip);
    Acc *d, *plain;
    const Arrays<Acc> memory{{&packed_, lanes * dim}, {&plain, lanes * stride}, {&d, lanes * step}};
    parallel_tasks(panels_, threads_, [&](int64_t panel) { pack(panel, plain + panel * kW * stride, stride); });
    for (int64_t begin = 0; begin < weight_.rows; begin += step) {
      const int64_t width = std::min(step, weight_.rows - begin), blocks = ceil_div(width, kBlockColumns);
      auto each_block = [&](int64_t block, auto&& f) {
        const int64_t first = block * kBlockColumns;
        f(begin + first, std::min(kBlockColumns, width - first), d + first * kW);
      };
      parallel_tasks(blocks * groups, threads_, [&](int64_t i) {
        const int64_t first = i % groups * kRowPanels, last = std::min(panels_, first + kRowPanels);
        each_block(i / groups, [&](int64_t column, int64_t count, Acc* at) {
          slopes(column, count, first, last, of, at, width * kW);
        });
      });
      if (grad_weight || grad_bias) {
        parallel_tasks(blocks, threads_, [&](int64_t block) {
          each_block(block, [&](int64_t column, int64_t count, const Acc* at) {
            if (grad_weight)
              weight_grad(at, RowIds(column), count, panels_, width * kW, plain, stride, dim, false, grad_weight);
            for (int64_t i = 0; grad_bias && i < count; ++i) grad_bias[column + i] = sum_of(at + i * kW, width * kW);
          });
        });
      }
      if (!grad_hidden) continue;
      const int64_t tasks = ceil_div(panels_, kGroup);
      parallel_tasks(strips * tasks, threads_, [&](int64_t i) {
        const int64_t from = i / tasks * kStrip, first = i % tasks * kGroup;
        hidden_grad<Acc>(weight_, RowIds(begin), width, from, d + first * width * kW,
                         std::min(kGroup * kW, rows_ - first * kW), width * kW,
                         {grad_hidden, dim, RowIds(needed_.data() + first * kW), true});
      });
    }
  }

 private:
  static constexpr int64_t kW = kPanelRows<Acc>;

  int64_t in_panel(int64_t panel) const { return std::min(kW, rows_ - panel * kW); }
  int vectors(int64_t panel) const { return vectors_of<Acc>(in_panel(panel)); }

  void pack(int64_t panel, Acc* plain = nullptr, int64_t stride = 0) const {
    pack_panel(hidden_, RowIds(needed_.data() + panel * kW), in_panel(panel), packed_ + panel * kW * hidden_.columns,
               plain, stride);
  }

  // f(panel, logits [count][row]) of columns [first, first + count); to(panel) is where they go.
  template <class To, class F>
  void logits(int64_t column, int64_t count, int64_t first, int64_t last, To&& to, F&& f) const {
    const Acc* rows[kBlockColumns];
    std::vector<Acc> scratch;
    const int64_t dim = hidden_.columns;
    find_rows(weight_, RowIds(column), count, 0, dim, rows, scratch);
    for (int64_t panel = first; panel < last; ++panel) {
      Acc* const z = to(panel);
      panel_logits(rows, count, dim, packed_ + panel * kW * dim, vectors(panel), z);
      for (int64_t i = 0; bias_ && i < count; ++i)
        VD_SIMD for (int64_t r = 0; r < kW; ++r) z[i * kW + r] += bias_[column + i];
      f(panel, z);
    }
  }

  // f(r, where) of the rows of a panel whose token lies in columns [column, column + count).
  template <class F>
  void tokens_in(int64_t column, int64_t count, int64_t panel, F&& f) const {
    for (int64_t r = 0; r < in_panel(panel); ++r) {
      const int64_t at = ids_[needed_[panel * kW + r]] - column;
      if (at >= 0 && at < count) f(r, at * kW + r);
    }
  }

  // The tokens' own logits, and the sums of the exponentials of all others at columns [column, end).
  void sums(int64_t column, int64_t end, int64_t first, int64_t last, Acc* top, Acc* sum, Acc* own) const {
    const Acc none = -std::numeric_limits<Acc>::infinity();
    std::fill(top + first * kW, top + last * kW, none);
    std::fill(sum + first * kW, sum + last * kW, Acc{0});
    alignas(64) Acc block[kBlockColumns * kW];
    for (; column < end; column += kBlockColumns) {
      const int64_t count = std::min(kBlockColumns, end - column);
      logits(column, count, first, last, [&](int64_t) { return block; }, [&](int64_t panel, Acc* z) {
        tokens_in(column, count, panel,
                  [&](int64_t r, int64_t at) { own[panel * kW + r] = std::exchange(z[at], none); });
        add_block(z, count, top + panel * kW, sum + panel * kW);
      });
    }
  }

  static void add_block(const Acc* __restrict z, int64_t count, Acc* __restrict top, Acc* __restrict sum) {
    Acc most[kW], shift[kW], total[kW] = {};
    tops(z, count, most);
    for (int64_t r = 0; r < kW; ++r) {
      most[r] = top[r] > most[r] ? top[r] : most[r];
      shift[r] = shift_of(most[r]);
    }
    for (int64_t i = 0; i < count; ++i)
      VD_SIMD for (int64_t r = 0; r < kW; ++r) total[r] += exp_nonpositive(z[i * kW + r] - shift[r]);
    for (int64_t r = 0; r < kW; ++r) {
      sum[r] = sum[r] * exp_nonpositive(top[r] - shift[r]) + total[r];
      top[r] = most[r];
    }
  }

  // The gradient of the logits at columns [column, column + count), to `at` and so on, `apart` from panel to panel.
  void slopes(int64_t column, int64_t count, int64_t first, int64_t last, const TokenGrads<Acc>& of, Acc* at,
              int64_t apart) const {
    logits(column, count, first, last, [&](int64_t panel) { return at + panel * apart; }, [&](int64_t panel, Acc* z) {
      const int64_t rows = in_panel(panel);
      Acc factor[kW] = {}, shift[kW] = {};
      for (int64_t r = 0; r < rows; ++r) {
        factor[r] = of.factor(needed_[panel * kW + r]);
        shift[r] = of.shift[needed_[panel * kW + r]];
      }
      for (int64_t i = 0; i < count; ++i)
        VD_SIMD for (int64_t r = 0; r < kW; ++r)
          z[i * kW + r] = factor[r] * exp_nonpositive(z[i * kW + r] - shift[r]);
      tokens_in(column, count, panel, [&](int64_t r, int64_t k) { z[k] = of.of_token(needed_[panel * kW + r]); });
      // Exactly 0 where there is no row, even if a bias is infinite: the weight's gradient sums over all lanes.
      for (int64_t i = 0; rows < kW && i < count; ++i) std::fill(z + i * kW + rows, z + (i + 1) * kW, Acc{0});
    });
  }

  // Of one column over all rows.
  Acc sum_of(const Acc* d, int64_t apart) const {
    double total = 0;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      Acc sum = 0;
      for (int64_t r = 0; r < kW; ++r) sum += d[panel * apart + r];
      total += static_cast<double>(sum);
    }
    return static_cast<Acc>(total);
  }

  const Rows hidden_, weight_;
  const Acc* const bias_;
  const int64_t* const ids_;
  const std::vector<int64_t> needed_;
  const int64_t rows_, panels_;
  const int threads_;
  Acc* packed_ = nullptr;  // [panels][dim][kW]
};

template <class F>
void with_accumulator(const Rows& hidden, F&& f) {
  hidden.dtype == DType::f64 ? f(double{}) : f(float{});
}

}  // namespace

void linear_log_prob_fwd(const LinearLogProbArgs& a) {
  const LinearTokens& of = a.tokens;
  std::vector<int64_t> rows = needed_rows(of.tokens, of.hidden.rows, of.weight.rows, [](int64_t) { return true; });
  with_accumulator(of.hidden, [&](auto acc) {
    using Acc = decltype(acc);
    Layer<Acc>(of, std::move(rows), a.threads).forward(TokenWriter<Acc>(a.out, of.hidden.rows));
  });
}

void linear_log_prob_bwd(const LinearLogProbBwdArgs& a) {
  const LinearTokens& of = a.tokens;
  with_accumulator(of.hidden, [&](auto acc) {
    using Acc = decltype(acc);
    const auto grads = token_grads<Acc>(a.of, a.grad);
    auto rows = needed_rows(of.tokens, of.hidden.rows, of.weight.rows, [&](int64_t row) { return grads.any(row); });
    Layer<Acc>(of, std::move(rows), a.threads).backward(a);
  });
}

}  // namespace VD_ISA
}  // namespace vocabdistil
