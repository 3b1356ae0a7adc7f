// Rows in chunks, whose logits lie in panels, as [panel][column][row] (panels.h). Threads share out the tasks of one
// step after the other: the logits of both sides; the student's combined for the rows of the table, which are sums of
// whole lanes, with the sums of exponentials of each block of them; the sums of each row; the gradient of the combined
// logits, in the memory of the teacher's; carried back through the transposed table to the student's logits, in their
// memory; its product with the hidden states, and with the weight. Formulas: vocabdistil/reference/remapped_kl.py.
#include <functional>

#include "../block.h"
#include "panel_sums.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

template <class Acc>
class Sweep {
 public:
  explicit Sweep(const LinearRemappedKlArgs& a)
      : a_(a),
        width_(a.columns),
        mapped_(a.plan.mapped),
        weights_(static_cast<const Acc*>(a.plan.weights)),
        weights_of_(static_cast<const Acc*>(a.plan.weights_of)),
        inv_temperature_(static_cast<Acc>(1 / a.temperature)),
        top_k_(std::min(a.top_k, mapped_)),
        whole_(top_k_ > 0 && a.remainder != Unmatched::renormalize),
        wanted_(a.grad_hidden || a.grad_weight || a.grad_bias) {
    // The blocks: rows of the table for both sides and, where those outside the top k count, for each alone.
    auto add_blocks = [&](bool student, bool teacher) {
      for (int64_t begin = 0; begin < mapped_; begin += kBlockColumns)
        blocks_.push_back({begin, std::min(mapped_, begin + kBlockColumns), student, teacher});
    };
    add_blocks(true, true);
    if (whole_) add_blocks(true, false), add_blocks(false, true);
    int64_t first = 0, entry = 0;
    for (int64_t b = 0; b < a.plan.buckets; ++b) {
      const int64_t length = a.plan.shapes[2 * b], count = a.plan.shapes[2 * b + 1];
      lengths_.push_back({first, first + count, length, entry});
      first += count, entry += length * count;
    }
  }

  void run() {
    const int64_t rows = a_.student.hidden.rows, ds = a_.student.hidden.columns, dt = a_.teacher.hidden.columns;
    zero_others();
    if (rows == 0) return;
    if (mapped_ == 0) {
      std::fill_n(static_cast<Acc*>(a_.loss), rows, Acc{0});
      if (a_.grad_hidden) std::fill_n(static_cast<Acc*>(a_.grad_hidden), rows * ds, Acc{0});
      return;
    }
    threads_ = useful_threads(a_.threads, rows * (width_ * ds + mapped_ * (dt + kDepth)) / 16);
    const int64_t row_bytes = sizeof(Acc) * (width_ + 2 * mapped_ + 2 * ds + dt);
    const int64_t weight_bytes = width_ * ds * static_cast<int64_t>(item_size(a_.student.weight.dtype)) +
                                 mapped_ * dt * static_cast<int64_t>(item_size(a_.teacher.weight.dtype));
    const int64_t step = chunk_rows<Acc>(rows, row_bytes, std::max(a_.budget, weight_bytes / 4));
    panels_ = step / kW;
    x_stride_ = ceil_div(ds, kLanes<Acc>) * kLanes<Acc>;
    const int64_t partials = static_cast<int64_t>(blocks_.size()) * panels_;
    Acc *partial = nullptr, *slopes = nullptr;
    const Arrays<Acc> memory{
        {&s_, step * width_},  {&z_, step * mapped_}, {&t_, step * mapped_},
        {&xs_, step * ds},     {&xt_, step * dt},     {&x_, step * x_stride_},
        {&least_, step},
        {&partial, partials * static_cast<int64_t>(sizeof(Partial<Acc>) / sizeof(Acc))},
        {&slopes, panels_ * static_cast<int64_t>(sizeof(Slopes<Acc>) / sizeof(Acc))},
    };
    partial_ = reinterpret_cast<Partial<Acc>*>(partial);
    slopes_ = reinterpret_cast<Slopes<Acc>*>(slopes);
    for (begin_ = 0; begin_ < rows; begin_ += step) {
      count_ = std::min(step, rows - begin_);
      panels_ = ceil_div(count_, kW);
      const int64_t groups = ceil_div(panels_, kGroup);
      // f(first column, last, first panel, last)
      auto each_block = [&](int64_t columns, auto&& f) {
        const int64_t blocks = ceil_div(columns, kBlockColumns);
        parallel_tasks(blocks * groups, threads_, [&](int64_t i) {
          const int64_t column = i % blocks * kBlockColumns, first = i / blocks * kGroup;
          f(column, std::min(columns, column + kBlockColumns), first, std::min(panels_, first + kGroup));
        });
      };
      parallel_tasks(panels_, threads_, [&](int64_t panel) { pack(panel); });
      each_block(width_, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        logits(a_.student, a_.student.ids, begin, end, xs_, first, last, s_, width_);
      });
      each_block(mapped_, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        logits(a_.teacher, a_.plan.rows, begin, end, xt_, first, last, t_, mapped_);
      });
      if (top_k_) parallel_tasks(count_, threads_, [&](int64_t row) { find_least(row / kW, row % kW); });
      each_block(mapped_, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel) {
          combine(panel, begin, end);
          block_sums(panel, begin, end);
        }
      });
      parallel_tasks(panels_, threads_, [&](int64_t panel) { sums(panel); });
      if (!wanted_) continue;
      each_block(mapped_, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel) slopes_at(panel, begin, end);
      });
      each_block(width_, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; ++panel) carry_back(panel, begin, end);
      });
      if (a_.grad_weight || a_.grad_bias)
        parallel_tasks(ceil_div(width_, kBlockColumns), threads_,
                       [&](int64_t i) { weight_grad_of(i * kBlockColumns); });
      if (a_.grad_hidden) {
        const int64_t strips = ceil_div(ds, kStrip);
        parallel_tasks(strips * groups, threads_,
                       [&](int64_t i) { hidden_grad_of(i / groups * kStrip, i % groups * kGroup); });
      }
    }
  }

 private:
  static constexpr int64_t kW = kPanelRows<Acc>;

  // Rows [begin, end) of the table, which have `length` entries each, from `entry` on.
  struct OneLength {
    int64_t begin, end, length, entry;
  };

  // Gradients of rows of the weight, and of biases, that no logit comes from.
  void zero_others() const {
    const int64_t rows = a_.student.weight.rows;
    std::vector<uint8_t> listed(rows);
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t id = a_.student.ids[i];
      if (id < 0 || id >= rows) throw std::invalid_argument("table.ids: expected ids of the student's columns");
      listed[id] = a_.student.hidden.rows > 0 && mapped_ > 0;
    }
    zero_unlisted(listed, a_.student.weight.columns, a_.threads, static_cast<Acc*>(a_.grad_weight),
                  static_cast<Acc*>(a_.grad_bias));
  }

  int64_t in_panel(int64_t panel) const { return std::max<int64_t>(0, std::min(kW, count_ - panel * kW)); }
  int vectors(int64_t panel) const { return vectors_of<Acc>(in_panel(panel)); }
  Acc* student(int64_t panel, int64_t column) const { return s_ + (panel * width_ + column) * kW; }
  Acc* combined(int64_t panel, int64_t row) const { return z_ + (panel * mapped_ + row) * kW; }
  Acc* teacher(int64_t panel, int64_t row) const { return t_ + (panel * mapped_ + row) * kW; }
  Partial<Acc>& partial(int64_t block, int64_t panel) const {
    return partial_[panel * static_cast<int64_t>(blocks_.size()) + block];
  }

  void pack(int64_t panel) const {
    const int64_t rows = in_panel(panel), first = begin_ + panel * kW;
    pack_panel(a_.student.hidden, RowIds(first), rows, xs_ + panel * a_.student.hidden.columns * kW,
               x_ + panel * kW * x_stride_, x_stride_);
    pack_panel<Acc>(a_.teacher.hidden, RowIds(first), rows, xt_ + panel * a_.teacher.hidden.columns * kW, nullptr, 0);
  }

  // Rows ids[begin, end) of the weight times panels [first, last).
  void logits(const LinearSide& side, const int32_t* ids, int64_t begin, int64_t end, const Acc* packed, int64_t first,
              int64_t last, Acc* out, int64_t columns) const {
    const int64_t dim = side.hidden.columns, count = end - begin;
    const Acc* bias = static_cast<const Acc*>(side.bias);
    const Acc* rows[kBlockColumns];
    std::vector<Acc> scratch;
    find_rows(side.weight, RowIds(ids + begin), count, 0, dim, rows, scratch);
    for (int64_t panel = first; panel < last; ++panel) {
      Acc* __restrict z = out + (panel * columns + begin) * kW;
      panel_logits(rows, count, dim, packed + panel * dim * kW, vectors(panel), z);
      for (int64_t i = 0; bias && i < count; ++i)
        VD_SIMD for (int64_t r = 0; r < kW; ++r) z[i * kW + r] += bias[ids[begin + i]];
    }
  }

  // The k-th largest of a row of the teacher's. A NaN is larger than all.
  void find_least(int64_t panel, int64_t r) const {
    std::vector<Acc> row(mapped_);
    const Acc* t = teacher(panel, 0) + r;
    const Acc most = std::numeric_limits<Acc>::infinity();
    for (int64_t i = 0; i < mapped_; ++i) row[i] = t[i * kW] == t[i * kW] ? t[i * kW] : most;
    std::nth_element(row.begin(), row.begin() + (top_k_ - 1), row.end(), std::greater<Acc>());
    least_[panel * kW + r] = row[top_k_ - 1];
  }

  void combine(int64_t panel, int64_t begin, int64_t end) const {
    for (const OneLength& of : lengths_) {
      const int64_t first = std::max(begin, of.begin), last = std::min(end, of.end), count = of.end - of.begin;
      for (int64_t v = first; v < last; ++v) {
        const int64_t entry = of.entry + (v - of.begin);
        if (a_.logsumexp) {
          combine_logsumexp(panel, entry, count, of.length, combined(panel, v));
        } else {
          combine_sum(panel, entry, count, of.length, combined(panel, v));
        }
      }
    }
  }

  // Entries `entry`, `entry + apart` and so on, of which there are `length`, of the table.
  void combine_sum(int64_t panel, int64_t entry, int64_t apart, int64_t length, Acc* __restrict out) const {
    Acc total[kW] = {};
    for (int64_t k = 0; k < length; ++k, entry += apart) {
      const Acc* __restrict s = student(panel, a_.plan.ids[entry]);
      const Acc weight = weights_ ? weights_[entry] : Acc{1};
      VD_SIMD for (int64_t r = 0; r < kW; ++r) total[r] += weight * s[r];
    }
    std::copy_n(total, kW, out);
  }

  void combine_logsumexp(int64_t panel, int64_t entry, int64_t apart, int64_t length, Acc* __restrict out) const {
    const Acc none = -std::numeric_limits<Acc>::infinity();
    auto each = [&](auto&& f) {
      for (int64_t k = 0, e = entry; k < length; ++k, e += apart) {
        const Acc* __restrict s = student(panel, a_.plan.ids[e]);
        const Acc weight = weights_ ? weights_[e] : Acc{0};
        VD_SIMD for (int64_t r = 0; r < kW; ++r) f(r, s[r] + weight);
      }
    };
    Acc top[kW], total[kW] = {};
    std::fill_n(top, kW, none);
    each([&](int64_t r, Acc x) { top[r] = x > top[r] ? x : top[r]; });
    each([&](int64_t r, Acc x) { total[r] += exp_nonpositive(x - (top[r] == none ? Acc{0} : top[r])); });
    VD_SIMD for (int64_t r = 0; r < kW; ++r)  // no largest but a sum: NaN
      out[r] = total[r] == 0 ? none : top[r] == none ? total[r] : top[r] + log_positive(total[r]);
  }

  // The sums of a block of both sides; with top_k of the rows among the k largest, and of the others.
  void block_sums(int64_t panel, int64_t begin, int64_t end) const {
    const int64_t count = end - begin, block = begin / kBlockColumns, blocks = ceil_div(mapped_, kBlockColumns);
    const Acc *z = combined(panel, begin), *t = teacher(panel, begin);
    Partial<Acc>& out = partial(block, panel);
    if (!top_k_) {
      tops(z, count, out.top_s);
      tops(t, count, out.top_t);
      sum_two(z, t, count, inv_temperature_, out);
      return;
    }
    std::vector<Acc> kept(2 * count * kW);
    Acc *kept_z = kept.data(), *kept_t = kept_z + count * kW;
    const Acc* __restrict least = least_ + panel * kW;
    auto keep = [&](const Acc* __restrict from, Acc* __restrict to, bool inside) {
      const Acc none = -std::numeric_limits<Acc>::infinity();
      for (int64_t i = 0; i < count; ++i)
        VD_SIMD for (int64_t r = 0; r < kW; ++r)
          to[i * kW + r] = (t[i * kW + r] < least[r]) != inside ? from[i * kW + r] : none;
    };
    keep(z, kept_z, true);
    keep(t, kept_t, true);
    tops(kept_z, count, out.top_s);
    tops(kept_t, count, out.top_t);
    sum_two(kept_z, kept_t, count, inv_temperature_, out);
    if (!whole_) return;
    keep(z, kept_z, false);
    keep(t, kept_t, false);
    Partial<Acc>&of_s = partial(blocks + block, panel), &of_t = partial(2 * blocks + block, panel);
    tops(kept_z, count, of_s.top_s);
    sum_one(kept_z, count, of_s.top_s, inv_temperature_, of_s.s, of_s.less);
    tops(kept_t, count, of_t.top_t);
    sum_one(kept_t, count, of_t.top_t, inv_temperature_, of_t.t, of_t.less);
  }

  // The loss of each row of a panel from its blocks' sums, and what its gradient is formed of.
  void sums(int64_t panel) const {
    const int64_t at = begin_ + panel * kW;
    const PanelDivergence of{a_.temperature, whole_, a_.remainder == Unmatched::drop};
    finish_rows<Acc>(of, blocks_, &partial(0, panel), in_panel(panel), static_cast<const Acc*>(a_.scale) + at,
                     static_cast<Acc*>(a_.loss) + at, slopes_[panel], [&](double* total) {
                       const auto of_close = top_k_ ? close_sums<Acc, true> : close_sums<Acc, false>;
                       of_close(slopes_[panel], combined(panel, 0), teacher(panel, 0), mapped_, least_ + panel * kW,
                                inv_temperature_, total);
                     });
  }

  void slopes_at(int64_t panel, int64_t begin, int64_t end) const {
    const auto form = top_k_ ? &Sweep::form_slopes<true> : &Sweep::form_slopes<false>;
    (this->*form)(panel, begin, end);
  }

  // Of the combined logits, in the memory of the teacher's.
  template <bool kLeast>
  void form_slopes(int64_t panel, int64_t begin, int64_t end) const {
    const Slopes<Acc> p = slopes_[panel];  // a copy, which the gradient's memory cannot be taken for
    const bool any_close = p.any_close();
    const int64_t rows = in_panel(panel);
    Acc least[kW];
    std::copy_n(least_ + panel * kW, kW, least);
    for (int64_t i = begin; i < end; ++i) {
      const Acc* __restrict s = combined(panel, i);
      Acc* __restrict t = teacher(panel, i);
      VD_SIMD for (int64_t r = 0; r < kW; ++r) {
        const Acc es = exp_nonpositive((s[r] - p.top_s[r]) * inv_temperature_);
        const Acc et = exp_nonpositive((t[r] - p.top_t[r]) * inv_temperature_);
        Acc own = es;
        if (any_close) own = p.close[r] != 0 ? p.step(r, s[r], t[r], es, et, inv_temperature_).first : es;
        Acc slope = p.student[r] * own - p.teacher[r] * et;
        if constexpr (kLeast) {
          const Acc other = p.rest[r] * exp_nonpositive((s[r] - p.top_rest[r]) * inv_temperature_);
          // Without the remainder those outside have no part in anything, whatever they are.
          if (t[r] < least[r]) slope = whole_ ? other : Acc{0};
        }
        t[r] = slope;
      }
      std::fill(t + rows, t + kW, Acc{0});
    }
  }

  // To the student's logits, each of which is read by its own gradient alone.
  void carry_back(int64_t panel, int64_t begin, int64_t end) const {
    const Acc none = -std::numeric_limits<Acc>::infinity();
    const int64_t rows = in_panel(panel);
    for (int64_t j = begin; j < end; ++j) {
      Acc* __restrict s = student(panel, j);
      double total[kW] = {};
      for (int64_t from = a_.plan.indptr[j]; from < a_.plan.indptr[j + 1]; from += kBlock) {
        const int64_t to = std::min<int64_t>(a_.plan.indptr[j + 1], from + kBlock);
        Acc sum[kW] = {};
        for (int64_t e = from; e < to; ++e) {
          const Acc* __restrict d = teacher(panel, a_.plan.pieces_of[e]);
          if (!a_.logsumexp) {
            const Acc weight = weights_of_ ? weights_of_[e] : Acc{1};
            VD_SIMD for (int64_t r = 0; r < kW; ++r) sum[r] += weight * d[r];
            continue;
          }
          const Acc* __restrict z = combined(panel, a_.plan.pieces_of[e]);
          const Acc weight = weights_of_ ? weights_of_[e] : Acc{0};
          VD_SIMD for (int64_t r = 0; r < kW; ++r) {
            const Acc share = exp_nonpositive((s[r] + weight) - z[r]);
            sum[r] += s[r] == none ? Acc{0} : d[r] * share;
          }
        }
        for (int64_t r = 0; r < kW; ++r) total[r] += static_cast<double>(sum[r]);
      }
      // Exactly 0 where there is no row, even if a weight is infinite: the weight's gradient sums over all lanes.
      for (int64_t r = 0; r < kW; ++r) s[r] = r < rows ? static_cast<Acc>(total[r]) : Acc{0};
    }
  }

  // Columns [first, first + kBlockColumns): their gradient over all rows of the chunk times those rows' hidden states.
  void weight_grad_of(int64_t first) const {
    const int64_t last = std::min(width_, first + kBlockColumns);
    const bool add = begin_ > 0;
    const RowIds ids(a_.student.ids + first);
    if (Acc* grad = static_cast<Acc*>(a_.grad_weight))
      weight_grad(student(0, first), ids, last - first, panels_, width_ * kW, x_, x_stride_,
                  a_.student.hidden.columns, add, grad);
    if (Acc* grad = static_cast<Acc*>(a_.grad_bias))
      bias_grad<Acc>(student(0, first), ids, last - first, panels_, width_ * kW, nullptr, 0, add, grad);
  }

  // Dims [from, from + kStrip) of the gradient of the rows of panels [first, first + kGroup).
  void hidden_grad_of(int64_t from, int64_t first) const {
    const int64_t dim = a_.student.hidden.columns;
    hidden_grad<Acc>(a_.student.weight, RowIds(a_.student.ids), width_, from, student(first, 0),
                     std::min(kGroup * kW, count_ - first * kW), width_ * kW,
                     {static_cast<Acc*>(a_.grad_hidden), dim, RowIds(begin_ + first * kW), false});
  }

  const LinearRemappedKlArgs& a_;
  const int64_t width_, mapped_;  // columns of the student that the table names, rows of it that are not empty
  const Acc *const weights_, *const weights_of_;
  const Acc inv_temperature_;
  const int64_t top_k_;
  const bool whole_, wanted_;
  std::vector<ColumnBlock> blocks_;
  std::vector<OneLength> lengths_;
  int threads_ = 1;
  // The chunk: its rows [begin_, begin_ + count_) in panels of kW, and its memory.
  int64_t begin_ = 0, count_ = 0, panels_ = 0, x_stride_ = 0;
  Acc* s_ = nullptr;                   // [panels][width][kW]
  Acc *z_ = nullptr, *t_ = nullptr;    // [panels][mapped][kW]
  Acc *xs_ = nullptr, *xt_ = nullptr;  // [panels][dim][kW]
  Acc* x_ = nullptr;                   // [panels * kW][x_stride]
  Acc* least_ = nullptr;               // [panels * kW]: the k-th largest logit of the teacher
  Partial<Acc>* partial_ = nullptr;    // [panels][blocks]
  Slopes<Acc>* slopes_ = nullptr;      // [panels]
};

}  // namespace

void linear_remapped_kl(const LinearRemappedKlArgs& a) {
  const bool wide = a.student.hidden.dtype == DType::f64 || a.teacher.hidden.dtype == DType::f64;
  auto run = [&](auto acc) {
    using Acc = decltype(acc);
    Sweep<Acc>(a).run();
    *static_cast<Acc*>(a.total) =
        weighted_total(static_cast<const Acc*>(a.loss), static_cast<const Acc*>(a.scale), a.student.hidden.rows);
  };
  wide ? run(double{}) : run(float{});
}

}  // namespace VD_ISA
}  // namespace vocabdistil
