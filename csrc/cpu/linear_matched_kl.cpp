// Rows in chunks, whose logits lie in panels, as [panel][column][row] (panels.h). Threads share out the tasks of one
// step after the other: the logits, with the sums of exponentials of each block of columns; the sums of each row; the
// logits' gradient, in the memory of the student's logits; its product with the hidden states, and with the weight. The
// exponentials are formed twice rather than kept: those of rows that are close have lost what the rows differ by.
// Formulas: vocabdistil/reference/matched_kl.py.
#include "../block.h"
#include "panel_sums.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

template <class Acc>
class Sweep {
 public:
  explicit Sweep(const LinearMatchedKlArgs& a)
      : a_(a),
        whole_(a.unmatched != Unmatched::renormalize),
        s_ids_(columns("student", a.student, true)),
        t_ids_(columns("teacher", a.teacher, whole_)),
        width_(static_cast<int64_t>(s_ids_.size())),
        wanted_(a.grad_hidden || a.grad_weight || a.grad_bias) {
    // The blocks: matched columns of both sides, then unmatched ones of the student, then of the teacher.
    auto add_blocks = [&](int64_t begin, int64_t end, bool student, bool teacher) {
      for (; begin < end; begin += kBlockColumns)
        blocks_.push_back({begin, std::min(end, begin + kBlockColumns), student, teacher});
    };
    add_blocks(0, a.matched, true, true);
    add_blocks(a.matched, width_, true, false);
    add_blocks(a.matched, static_cast<int64_t>(t_ids_.size()), false, true);
  }

  void run() {
    const int64_t rows = a_.student.hidden.rows, ds = a_.student.hidden.columns, dt = a_.teacher.hidden.columns;
    zero_others();
    if (rows == 0) return;
    threads_ = useful_threads(a_.threads, rows * (width_ * (ds + kDepth) + a_.matched * dt) / 16);
    const int64_t row_bytes = sizeof(Acc) * (width_ + a_.matched + 2 * ds + dt);
    const int64_t weight_bytes = a_.matched * (ds * static_cast<int64_t>(item_size(a_.student.weight.dtype)) +
                                               dt * static_cast<int64_t>(item_size(a_.teacher.weight.dtype)));
    const int64_t step = chunk_rows<Acc>(rows, row_bytes, std::max(a_.budget, weight_bytes / 4));
    panels_ = step / kW;
    x_stride_ = ceil_div(ds, kLanes<Acc>) * kLanes<Acc>;
    const int64_t partials = static_cast<int64_t>(blocks_.size()) * panels_;
    Acc *partial = nullptr, *slopes = nullptr;
    const Arrays<Acc> memory{
        {&s_, step * width_},    {&t_, step * a_.matched}, {&xs_, step * ds},
        {&xt_, step * dt},       {&x_, step * x_stride_},  {&lengths_, 2 * step},
        {&partial, partials * static_cast<int64_t>(sizeof(Partial<Acc>) / sizeof(Acc))},
        {&slopes, panels_ * static_cast<int64_t>(sizeof(Slopes<Acc>) / sizeof(Acc))},
    };
    partial_ = reinterpret_cast<Partial<Acc>*>(partial);
    slopes_ = reinterpret_cast<Slopes<Acc>*>(slopes);
    for (begin_ = 0; begin_ < rows; begin_ += step) {
      count_ = std::min(step, rows - begin_);
      panels_ = ceil_div(count_, kW);
      const int64_t groups = ceil_div(panels_, kGroup), blocks = static_cast<int64_t>(blocks_.size());
      auto each_block = [&](auto&& f) {
        parallel_tasks(blocks * groups, threads_, [&](int64_t i) {
          const int64_t first = i / blocks * kGroup;
          f(i % blocks, first, std::min(panels_, first + kGroup));
        });
      };
      parallel_tasks(panels_, threads_, [&](int64_t panel) { pack(panel); });
      each_block([&](int64_t b, int64_t first, int64_t last) { logits(b, first, last); });
      parallel_tasks(panels_, threads_, [&](int64_t panel) { sums(panel); });
      if (!wanted_) continue;
      each_block([&](int64_t b, int64_t first, int64_t last) { gradient(b, first, last); });
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
  static constexpr int64_t kW = kTileColumns<Acc>;

  // The matched columns of a side and, where the unmatched ones count, those.
  std::vector<int32_t> columns(const char* name, const LinearSide& side, bool distinct) const {
    std::vector<int32_t> all(side.ids, side.ids + a_.matched);
    const std::vector<int32_t> others = other_ids(name, all.data(), a_.matched, side.weight.rows, distinct, whole_);
    all.insert(all.end(), others.begin(), others.end());
    return all;
  }

  // Gradients of rows of the weight, and of biases, that no logit comes from.
  void zero_others() {
    std::vector<uint8_t> listed(a_.student.weight.rows);
    if (a_.student.hidden.rows > 0)
      for (int32_t id : s_ids_) listed[id] = 1;
    zero_unlisted(listed, a_.student.weight.columns, a_.threads, static_cast<Acc*>(a_.grad_weight),
                  static_cast<Acc*>(a_.grad_bias));
  }

  int64_t in_panel(int64_t panel) const { return std::max<int64_t>(0, std::min(kW, count_ - panel * kW)); }
  int vectors(int64_t panel) const { return vectors_of<Acc>(in_panel(panel)); }
  Acc* student(int64_t panel, int64_t column) const { return s_ + (panel * width_ + column) * kW; }
  Acc* teacher(int64_t panel, int64_t column) const { return t_ + (panel * a_.matched + column) * kW; }
  Partial<Acc>& partial(int64_t block, int64_t panel) const {
    return partial_[panel * static_cast<int64_t>(blocks_.size()) + block];
  }
  Acc* lengths(int64_t panel, bool of_student) const { return lengths_ + (2 * panel + !of_student) * kW; }

  // The rows of a panel: transposed [dim][row] for the logits, and the student's as they are for the weight's gradient.
  void pack(int64_t panel) const {
    const int64_t rows = in_panel(panel), first = begin_ + panel * kW;
    const LinearSide &s = a_.student, &t = a_.teacher;
    pack_panel(s.hidden, RowIds(first), rows, xs_ + panel * s.hidden.columns * kW, x_ + panel * kW * x_stride_,
               x_stride_);
    pack_panel<Acc>(t.hidden, RowIds(first), rows, xt_ + panel * t.hidden.columns * kW, nullptr, 0);
    for (const LinearSide* side : {&s, &t}) {
      const Acc* given = static_cast<const Acc*>(side->lengths);
      Acc* out = lengths(panel, side == &s);
      for (int64_t r = 0; r < kW; ++r) out[r] = r >= rows ? Acc{0} : given ? given[first + r] : Acc{1};
    }
  }

  // Rows `ids` of the weight times panels [first, last) -> to(panel)[id][row].
  template <class To>
  void product(const LinearSide& side, const int32_t* ids, int64_t count, const Acc* packed, int64_t first,
               int64_t last, To&& to) const {
    const int64_t dim = side.hidden.columns;
    const Acc* rows[kBlockColumns];
    std::vector<Acc> scratch;
    find_rows(side.weight, RowIds(ids), count, 0, dim, rows, scratch);
    for (int64_t panel = first; panel < last; ++panel)
      panel_logits(rows, count, dim, packed + panel * dim * kW, vectors(panel), to(panel));
  }

  void logits(int64_t block, int64_t first, int64_t last) const {
    const ColumnBlock c = blocks_[block];
    const int64_t count = c.end - c.begin;
    const int32_t *s_ids = s_ids_.data() + c.begin, *t_ids = t_ids_.data() + c.begin;
    const Acc inv_temperature = static_cast<Acc>(1 / a_.temperature);
    std::vector<Acc> passing;  // logits of which only the sums are needed
    if (!c.student) passing.resize((last - first) * kBlockColumns * kW);
    auto s_at = [&](int64_t panel) { return student(panel, c.begin); };
    auto t_at = [&](int64_t panel) {
      return c.student ? teacher(panel, c.begin) : passing.data() + (panel - first) * kBlockColumns * kW;
    };
    if (c.student) product(a_.student, s_ids, count, xs_, first, last, s_at);
    if (c.teacher) product(a_.teacher, t_ids, count, xt_, first, last, t_at);
    for (int64_t panel = first; panel < last; ++panel) {
      Partial<Acc>& out = partial(block, panel);
      if (c.student) {
        add_bias(s_at(panel), count, s_ids, static_cast<const Acc*>(a_.student.bias), lengths(panel, true));
        tops(s_at(panel), count, out.top_s);
      }
      if (c.teacher) {
        add_bias(t_at(panel), count, t_ids, static_cast<const Acc*>(a_.teacher.bias), lengths(panel, false));
        tops(t_at(panel), count, out.top_t);
      }
      if (c.matched()) {
        sum_two(s_at(panel), t_at(panel), count, inv_temperature, out);
      } else if (c.student) {
        sum_one(s_at(panel), count, out.top_s, inv_temperature, out.s, out.less);
      } else {
        sum_one(t_at(panel), count, out.top_t, inv_temperature, out.t, out.less);
      }
    }
  }

  // The loss of each row of a panel from its blocks' sums, and what its gradient is formed of.
  void sums(int64_t panel) const {
    const int64_t at = begin_ + panel * kW;
    const PanelDivergence of{a_.temperature, whole_, a_.unmatched == Unmatched::drop};
    finish_rows<Acc>(of, blocks_, &partial(0, panel), in_panel(panel), static_cast<const Acc*>(a_.scale) + at,
                     static_cast<Acc*>(a_.loss) + at, slopes_[panel], [&](double* total) {
                       close_sums<Acc, false>(slopes_[panel], student(panel, 0), teacher(panel, 0), a_.matched, nullptr,
                                              static_cast<Acc>(1 / a_.temperature), total);
                     });
  }

  void gradient(int64_t block, int64_t first, int64_t last) const {
    const ColumnBlock c = blocks_[block];
    for (int64_t panel = first; c.student && panel < last; ++panel) {
      const Slopes<Acc> p = slopes_[panel];  // a copy, which the gradient's memory cannot be taken for
      Acc* s = student(panel, c.begin);
      const int64_t count = c.end - c.begin;
      if (!c.teacher) {
        rest_slopes(p, s, count);
      } else if (p.any_close()) {
        matched_slopes<true>(p, s, teacher(panel, c.begin), count);
      } else {
        matched_slopes<false>(p, s, teacher(panel, c.begin), count);
      }
      // Exactly 0 where there is no row, even if a weight is infinite: the weight's gradient sums over all lanes.
      for (int64_t i = 0; in_panel(panel) < kW && i < count; ++i)
        std::fill(s + i * kW + in_panel(panel), s + (i + 1) * kW, Acc{0});
    }
  }

  void rest_slopes(const Slopes<Acc>& p, Acc* __restrict s, int64_t count) const {
    const Acc inv_temperature = static_cast<Acc>(1 / a_.temperature);
    for (int64_t i = 0; i < count; ++i, s += kW)
      VD_SIMD for (int64_t r = 0; r < kW; ++r)
        s[r] = p.rest[r] * exp_nonpositive((s[r] - p.top_rest[r]) * inv_temperature);
  }

  template <bool kAnyClose>
  void matched_slopes(const Slopes<Acc>& p, Acc* __restrict s, const Acc* __restrict t, int64_t count) const {
    const Acc inv_temperature = static_cast<Acc>(1 / a_.temperature);
    for (int64_t i = 0; i < count; ++i, s += kW, t += kW) {
      VD_SIMD for (int64_t r = 0; r < kW; ++r) {
        const Acc es = exp_nonpositive((s[r] - p.top_s[r]) * inv_temperature);
        const Acc et = exp_nonpositive((t[r] - p.top_t[r]) * inv_temperature);
        Acc own = es;
        if constexpr (kAnyClose)
          own = p.close[r] != 0 ? p.step(r, s[r], t[r], es, et, inv_temperature).first : es;
        s[r] = p.student[r] * own - p.teacher[r] * et;
      }
    }
  }

  // Columns [first, first + kBlockColumns): their gradient over all rows of the chunk times those rows' hidden states.
  void weight_grad_of(int64_t first) const {
    const int64_t last = std::min(width_, first + kBlockColumns);
    const bool add = begin_ > 0;
    const RowIds ids(s_ids_.data() + first);
    if (Acc* grad = static_cast<Acc*>(a_.grad_weight))
      weight_grad(student(0, first), ids, last - first, panels_, width_ * kW, x_, x_stride_,
                  a_.student.hidden.columns, add, grad);
    if (Acc* grad = static_cast<Acc*>(a_.grad_bias))
      bias_grad(student(0, first), ids, last - first, panels_, width_ * kW, lengths(0, true), 2 * kW, add, grad);
  }

  // Dims [from, from + kStrip) of the gradient of the rows of panels [first, first + kGroup).
  void hidden_grad_of(int64_t from, int64_t first) const {
    const int64_t dim = a_.student.hidden.columns;
    hidden_grad<Acc>(a_.student.weight, RowIds(s_ids_.data()), width_, from, student(first, 0),
                     std::min(kGroup * kW, count_ - first * kW), width_ * kW,
                     {static_cast<Acc*>(a_.grad_hidden), dim, RowIds(begin_ + first * kW), false});
  }

  const LinearMatchedKlArgs& a_;
  const bool whole_;
  const std::vector<int32_t> s_ids_, t_ids_;
  const int64_t width_;  // columns of the student whose logits are formed
  const bool wanted_;
  std::vector<ColumnBlock> blocks_;
  int threads_ = 1;
  // The chunk: its rows [begin_, begin_ + count_) in panels of kW, and its memory.
  int64_t begin_ = 0, count_ = 0, panels_ = 0, x_stride_ = 0;
  Acc *s_ = nullptr, *t_ = nullptr;    // [panels][width][kW], [panels][matched][kW]
  Acc *xs_ = nullptr, *xt_ = nullptr;  // [panels][dim][kW]
  Acc* x_ = nullptr;                   // [panels * kW][x_stride]
  Acc* lengths_ = nullptr;             // [panels][2][kW]
  Partial<Acc>* partial_ = nullptr;    // [panels][blocks]
  Slopes<Acc>* slopes_ = nullptr;      // [panels]
};

}  // namespace

void linear_matched_kl(const LinearMatchedKlArgs& a) {
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
