// Rows in chunks, whose logits lie in panels, as [panel][column][row] (panels.h). Threads share out the tasks of one
// step after the other: the logits, with the sums of exponentials of each block of columns; the sums of each row; the
// logits' gradient, in the memory of the student's logits; its product with the hidden states, and with the weight. The
// exponentials are formed twice rather than kept: those of rows that are close have lost what the rows differ by.
// Formulas: vocabdistil/reference/matched_kl.py.
#include "../block.h"
#include "matched.h"
#include "panels.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

// What a block of columns leaves behind for each row of a panel. Of a block of -inf logits only, the sums are 0.
template <class Acc>
struct Partial {
  static constexpr int64_t kRows = kTileColumns<Acc>;
  // top: the largest logit. s, t: sum exp((x - top) / T). dot: sum exp(t) (t - s) of the shifted, divided logits. less:
  // of unmatched logits, see ExpSum.
  Acc top_s[kRows], top_t[kRows], s[kRows], t[kRows], dot[kRows], less[kRows];
};

// What the gradient of a panel's rows is formed of.
template <class Acc>
struct Slopes {
  static constexpr int64_t kRows = kTileColumns<Acc>;
  Acc top_s[kRows], top_t[kRows], top_rest[kRows];  // what the logits are shifted by, each class by its own
  Acc student[kRows], teacher[kRows], rest[kRows];  // factors: see Outcome
  Acc mean[kRows], scale[kRows], close[kRows];      // of close rows (1, others 0): see close_rows

  bool any_close() const {
    return std::any_of(close, close + kRows, [](Acc is) { return is != 0; });
  }
  // Of row r at a matched column with logits s and t. es, et: their exponentials.
  Step<Acc> step(int64_t r, Acc s, Acc t, Acc es, Acc et, Acc inv_temperature) const {
    return step_of(et, es, scale[r], ((s - t) - (top_s[r] - top_t[r])) * inv_temperature + mean[r]);
  }
};

template <class Acc>
void add_bias(Acc* __restrict z, int64_t count, const int32_t* ids, const Acc* bias, const Acc* __restrict lengths) {
  for (int64_t i = 0; bias && i < count; ++i) {
    const Acc b = bias[ids[i]];
    VD_SIMD for (int64_t r = 0; r < kTileColumns<Acc>; ++r)  // of a sum of no rows none, even if it is infinite
      z[i * kTileColumns<Acc> + r] += lengths[r] == 0 ? Acc{0} : b * lengths[r];
  }
}

// The sums of exponentials of one side's logits.
template <class Acc>
void sum_one(const Acc* __restrict z, int64_t count, const Acc* top, Acc inv_temperature, Acc* __restrict sum,
             Acc* __restrict less) {
  constexpr int64_t w = kTileColumns<Acc>;
  Acc shift[w];
  for (int64_t r = 0; r < w; ++r) shift[r] = shift_of(top[r]);
  auto add_up = [&](Acc* __restrict out, auto&& of) {
    Acc total[w] = {};
    for (int64_t i = 0; i < count; ++i)
      VD_SIMD for (int64_t r = 0; r < w; ++r) total[r] += of((z[i * w + r] - shift[r]) * inv_temperature);
    std::copy_n(total, w, out);
  };
  add_up(sum, [](Acc x) { return exp_nonpositive(x); });
  bool near_count = false;
  for (int64_t r = 0; r < w; ++r) {
    less[r] = sum[r] - static_cast<Acc>(count);
    near_count |= ExpSum::is_near_count(less[r], static_cast<Acc>(count));
  }
  if (near_count) add_up(less, [](Acc x) { return less_one(x); });
}

// Of both sides.
template <class Acc>
void sum_two(const Acc* __restrict s, const Acc* __restrict t, int64_t count, Acc inv_temperature, Partial<Acc>& out) {
  constexpr int64_t w = kTileColumns<Acc>;
  Acc shift_s[w], shift_t[w], apart[w], sum_s[w], sum_t[w], dot[w];
  for (int64_t r = 0; r < w; ++r) {
    shift_s[r] = shift_of(out.top_s[r]);
    shift_t[r] = shift_of(out.top_t[r]);
    apart[r] = shift_t[r] - shift_s[r];
    sum_s[r] = sum_t[r] = dot[r] = 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Acc *__restrict x = s + i * w, *__restrict y = t + i * w;
    VD_SIMD for (int64_t r = 0; r < w; ++r) {
      const Acc es = exp_nonpositive((x[r] - shift_s[r]) * inv_temperature);
      const Acc et = exp_nonpositive((y[r] - shift_t[r]) * inv_temperature);
      const Acc term = et * (((y[r] - x[r]) - apart[r]) * inv_temperature);
      sum_s[r] += es;
      sum_t[r] += et;
      dot[r] += et == 0 ? Acc{0} : term;  // no mass, no contribution, even where the difference is infinite
    }
  }
  for (int64_t r = 0; r < w; ++r) out.s[r] = sum_s[r], out.t[r] = sum_t[r], out.dot[r] = dot[r];
}

// A class of logits of one row (one side's matched or unmatched ones) over all its blocks: the largest, and the sum
// of exponentials shifted by it.
struct Class {
  double top = -std::numeric_limits<double>::infinity();
  ExpSum of;  // `less` and `count` of unmatched logits only

  void meet(double other) { top = other > top ? other : top; }
  // Adds the sums of a block, and returns what turns its exponentials into those shifted by the largest.
  double add(double block_top, double sum, double less, double count, double inv_temperature) {
    const bool none = block_top == -std::numeric_limits<double>::infinity();
    const double low = (block_top - top) * inv_temperature, weight = none ? 0 : std::exp(low);
    of.add(weight * sum, count == 0 ? 0 : weight * less + count * (none ? -1 : std::expm1(low)), count);
    return weight;
  }
  Rest<double> rest(double inv_temperature) const {
    return {shift_of(top) * inv_temperature + of.log(), of.sum == 0 ? 0 : 1 / of.sum};
  }
};

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
    zero_unlisted();
    if (rows == 0) return;
    threads_ = useful_threads(a_.threads, rows * (width_ * (ds + kDepth) + a_.matched * dt) / 16);
    const int64_t row_bytes = sizeof(Acc) * (width_ + a_.matched + 2 * ds + dt);
    const int64_t weight_bytes = a_.matched * (ds * static_cast<int64_t>(item_size(a_.student.weight.dtype)) +
                                               dt * static_cast<int64_t>(item_size(a_.teacher.weight.dtype)));
    const int64_t most = std::max(kW, std::max(a_.budget, weight_bytes / 4) / row_bytes / kW * kW);
    const int64_t step = ceil_div(ceil_div(rows, ceil_div(rows, most)), kW) * kW;  // as many chunks, of one size
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

  struct Columns {
    int64_t begin, end;
    bool student, teacher;

    bool matched() const { return student && teacher; }
  };

  // The matched columns of a side and, where the unmatched ones count, those.
  std::vector<int32_t> columns(const char* name, const LinearSide& side, bool distinct) const {
    std::vector<int32_t> all(side.ids, side.ids + a_.matched);
    const std::vector<int32_t> others = other_ids(name, all.data(), a_.matched, side.weight.rows, distinct, whole_);
    all.insert(all.end(), others.begin(), others.end());
    return all;
  }

  // Gradients of rows of the weight, and of biases, that no logit comes from.
  void zero_unlisted() {
    const int64_t rows = a_.student.weight.rows, dim = a_.student.weight.columns;
    std::vector<uint8_t> listed(rows);
    if (a_.student.hidden.rows > 0)
      for (int32_t id : s_ids_) listed[id] = 1;
    parallel_for(rows, useful_threads(a_.threads, rows * dim), [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        if (listed[v]) continue;
        if (a_.grad_weight) std::fill_n(static_cast<Acc*>(a_.grad_weight) + v * dim, dim, Acc{0});
        if (a_.grad_bias) static_cast<Acc*>(a_.grad_bias)[v] = 0;
      }
    });
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
    const Columns c = blocks_[block];
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

  // The sums of row r of a panel over its blocks; s, t: its matched and its unmatched logits.
  Sums sums_of(int64_t panel, int64_t r, Class (&s)[2], Class (&t)[2]) const {
    const double inv_temperature = 1 / a_.temperature;
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    for (int64_t b = 0; b < blocks; ++b) {
      const bool rest = !blocks_[b].matched();
      if (blocks_[b].student) s[rest].meet(static_cast<double>(partial(b, panel).top_s[r]));
      if (blocks_[b].teacher) t[rest].meet(static_cast<double>(partial(b, panel).top_t[r]));
    }
    double dot = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const Partial<Acc>& p = partial(b, panel);
      const bool rest = !blocks_[b].matched();
      const double count = rest ? static_cast<double>(blocks_[b].end - blocks_[b].begin) : 0;
      const double less = rest ? static_cast<double>(p.less[r]) : 0;
      const double top_s = static_cast<double>(p.top_s[r]), top_t = static_cast<double>(p.top_t[r]);
      if (blocks_[b].student) s[rest].add(top_s, static_cast<double>(p.s[r]), less, count, inv_temperature);
      if (!blocks_[b].teacher) continue;
      const double weight = t[rest].add(top_t, static_cast<double>(p.t[r]), less, count, inv_temperature);
      if (!rest && weight != 0 && p.t[r] != 0) {
        const double moved = (top_t - t[0].top) - (shift_of(top_s) - shift_of(s[0].top));
        dot += weight * (static_cast<double>(p.dot[r]) + static_cast<double>(p.t[r]) * moved * inv_temperature);
      }
    }
    return {s[0].of.sum, t[0].of.sum, dot};
  }

  // Of each close row of a panel the sum of Step.rest.
  void close_sums(int64_t panel, double* total) const {
    const Slopes<Acc>& p = slopes_[panel];
    const Acc inv_temperature = static_cast<Acc>(1 / a_.temperature);
    std::fill_n(total, kW, 0.0);
    for (int64_t begin = 0; begin < a_.matched; begin += kBlockColumns) {
      const int64_t end = std::min(a_.matched, begin + kBlockColumns);
      Acc sum[kW] = {};
      for (int64_t i = begin; i < end; ++i) {
        const Acc *__restrict s = student(panel, i), *__restrict t = teacher(panel, i);
        VD_SIMD for (int64_t r = 0; r < kW; ++r) {
          const Acc es = exp_nonpositive((s[r] - p.top_s[r]) * inv_temperature);
          const Acc et = exp_nonpositive((t[r] - p.top_t[r]) * inv_temperature);
          sum[r] += p.step(r, s[r], t[r], es, et, inv_temperature).rest;
        }
      }
      for (int64_t r = 0; r < kW; ++r) total[r] += static_cast<double>(sum[r]);
    }
  }

  // The loss of each row of a panel from its blocks' sums, and what its gradient is formed of.
  void sums(int64_t panel) const {
    const double inv_temperature = 1 / a_.temperature;
    const Acc* scale = static_cast<const Acc*>(a_.scale) + begin_ + panel * kW;
    Acc* loss = static_cast<Acc*>(a_.loss) + begin_ + panel * kW;
    Slopes<Acc>& out = slopes_[panel];
    out = {};
    Sums z[kW];
    Rest<double> rest_s[kW];
    double rest_t[kW], close[kW];
    for (int64_t r = 0; r < in_panel(panel); ++r) {
      Class s[2], t[2];
      z[r] = sums_of(panel, r, s, t);
      rest_s[r] = s[1].rest(inv_temperature);
      rest_t[r] = t[1].rest(inv_temperature).log_sum;
      out.top_s[r] = static_cast<Acc>(shift_of(s[0].top));
      out.top_t[r] = static_cast<Acc>(shift_of(t[0].top));
      out.top_rest[r] = static_cast<Acc>(shift_of(s[1].top));
      if (scale[r] == 0 || !is_close(divergence_of(z[r]), z[r])) continue;
      out.close[r] = 1;
      out.mean[r] = static_cast<Acc>(z[r].dot / z[r].t);
      out.scale[r] = static_cast<Acc>(std::exp(z[r].dot / z[r].t));
    }
    if (out.any_close()) close_sums(panel, close);
    for (int64_t r = 0; r < in_panel(panel); ++r) {
      const Divergent row = out.close[r] != 0 ? close_sum(close[r], z[r]) : divergence_of(z[r]);
      const Outcome<double> of =
          whole_ ? with_unmatched<double>(row, z[r], static_cast<double>(out.top_s[r]) * inv_temperature,
                                          static_cast<double>(out.top_t[r]) * inv_temperature, rest_s[r], rest_t[r],
                                          a_.unmatched == Unmatched::drop)
                 : Outcome<double>{row.loss, row.student, row.teacher, 0};
      loss[r] = scale[r] == 0 ? Acc{0} : static_cast<Acc>(of.loss * a_.temperature * a_.temperature);
      // Rounded once: what is wrong with a factor is wrong with all of its columns.
      const double factor = a_.temperature * static_cast<double>(scale[r]);
      out.student[r] = static_cast<Acc>(factor * of.student);
      out.teacher[r] = static_cast<Acc>(factor * of.teacher);
      out.rest[r] = static_cast<Acc>(factor * of.rest);
    }
  }

  void gradient(int64_t block, int64_t first, int64_t last) const {
    const Columns c = blocks_[block];
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
    if (Acc* grad = static_cast<Acc*>(a_.grad_weight))
      weight_grad(student(0, first), RowIds(s_ids_.data() + first), last - first, panels_, width_ * kW, x_, x_stride_,
                  a_.student.hidden.columns, add, grad);
    if (Acc* grad = static_cast<Acc*>(a_.grad_bias)) {
      for (int64_t i = first; i < last; ++i) {
        Acc total = add ? grad[s_ids_[i]] : Acc{0};
        for (int64_t panel = 0; panel < panels_; ++panel) {
          const Acc *__restrict d = student(panel, i), *__restrict n = lengths(panel, true);
          Acc sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t r = 0; r < kW; ++r) sum += d[r] * n[r];
          total += sum;
        }
        grad[s_ids_[i]] = total;
      }
    }
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
  std::vector<Columns> blocks_;
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
