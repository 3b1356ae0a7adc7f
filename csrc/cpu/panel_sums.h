// The divergence of rows whose logits lie in panels, [column][row], block of columns by block of columns: shared by
// linear_matched_kl and linear_remapped_kl. The exponentials are formed twice rather than kept: those of rows that are
// close have lost what the rows differ by. Formulas: vocabdistil/reference/matched_kl.py.
#pragma once

#include "matched.h"
#include "panels.h"

namespace vocabdistil {
namespace VD_ISA {

// What a block of columns leaves behind for each row of a panel. Of a block of -inf logits only, the sums are 0.
template <class Acc>
struct Partial {
  static constexpr int64_t kRows = kTileColumns<Acc>;
  // top: the largest logit. s, t: sum exp((x - top) / T). dot: sum exp(t) (t - s) of the shifted, divided logits. less:
  // of unmatched logits, see ExpSum.
  Acc top_s[kRows], top_t[kRows], s[kRows], t[kRows], dot[kRows], less[kRows];
};

// Columns of which a Partial holds the sums: of both sides those that go together, or others of one side.
struct ColumnBlock {
  int64_t begin, end;
  bool student, teacher;

  bool matched() const { return student && teacher; }
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

// The sums of row r of a panel over its blocks, whose Partials stand side by side; s, t: its matched and its unmatched
// logits.
template <class Acc>
Sums sums_of(const std::vector<ColumnBlock>& blocks, const Partial<Acc>* partial, int64_t r, double inv_temperature,
             Class (&s)[2], Class (&t)[2]) {
  const int64_t count_of = static_cast<int64_t>(blocks.size());
  for (int64_t b = 0; b < count_of; ++b) {
    const bool rest = !blocks[b].matched();
    if (blocks[b].student) s[rest].meet(static_cast<double>(partial[b].top_s[r]));
    if (blocks[b].teacher) t[rest].meet(static_cast<double>(partial[b].top_t[r]));
  }
  double dot = 0;
  for (int64_t b = 0; b < count_of; ++b) {
    const Partial<Acc>& p = partial[b];
    const bool rest = !blocks[b].matched();
    const double count = rest ? static_cast<double>(blocks[b].end - blocks[b].begin) : 0;
    const double less = rest ? static_cast<double>(p.less[r]) : 0;
    const double top_s = static_cast<double>(p.top_s[r]), top_t = static_cast<double>(p.top_t[r]);
    if (blocks[b].student) s[rest].add(top_s, static_cast<double>(p.s[r]), less, count, inv_temperature);
    if (!blocks[b].teacher) continue;
    const double weight = t[rest].add(top_t, static_cast<double>(p.t[r]), less, count, inv_temperature);
    if (!rest && weight != 0 && p.t[r] != 0) {
      const double moved = (top_t - t[0].top) - (shift_of(top_s) - shift_of(s[0].top));
      dot += weight * (static_cast<double>(p.dot[r]) + static_cast<double>(p.t[r]) * moved * inv_temperature);
    }
  }
  return {s[0].of.sum, t[0].of.sum, dot};
}

// Of each close row of a panel the sum of Step.rest over `count` columns; with kLeast over those where the teacher has
// at least `least`.
template <class Acc, bool kLeast>
void close_sums(const Slopes<Acc>& p, const Acc* s, const Acc* t, int64_t count, const Acc* __restrict least,
                Acc inv_temperature, double* total) {
  constexpr int64_t w = kPanelRows<Acc>;
  std::fill_n(total, w, 0.0);
  for (int64_t begin = 0; begin < count; begin += kBlockColumns) {
    const int64_t end = std::min(count, begin + kBlockColumns);
    Acc sum[w] = {};
    for (int64_t i = begin; i < end; ++i) {
      const Acc *__restrict x = s + i * w, *__restrict y = t + i * w;
      VD_SIMD for (int64_t r = 0; r < w; ++r) {
        const Acc es = exp_nonpositive((x[r] - p.top_s[r]) * inv_temperature);
        const Acc et = exp_nonpositive((y[r] - p.top_t[r]) * inv_temperature);
        const Acc rest = p.step(r, x[r], y[r], es, et, inv_temperature).rest;
        if constexpr (kLeast) {
          sum[r] += y[r] < least[r] ? Acc{0} : rest;
        } else {
          sum[r] += rest;
        }
      }
    }
    for (int64_t r = 0; r < w; ++r) total[r] += static_cast<double>(sum[r]);
  }
}

struct PanelDivergence {
  double temperature;
  bool whole, drop;  // do unmatched columns count, and only by their mass
};

// The losses of the `rows` rows of a panel from its blocks' sums, and what their gradient is formed of. of_close(total):
// as close_sums, which reads `out`.
template <class Acc, class OfClose>
void finish_rows(const PanelDivergence& of, const std::vector<ColumnBlock>& blocks, const Partial<Acc>* partial,
                 int64_t rows, const Acc* scale, Acc* loss, Slopes<Acc>& out, OfClose&& of_close) {
  constexpr int64_t w = kPanelRows<Acc>;
  const double inv_temperature = 1 / of.temperature;
  out = {};
  Sums z[w];
  Rest<double> rest_s[w];
  double rest_t[w], close[w];
  for (int64_t r = 0; r < rows; ++r) {
    Class s[2], t[2];
    z[r] = sums_of(blocks, partial, r, inv_temperature, s, t);
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
  if (out.any_close()) of_close(close);
  for (int64_t r = 0; r < rows; ++r) {
    const Divergent row = out.close[r] != 0 ? close_sum(close[r], z[r]) : divergence_of(z[r]);
    const Outcome<double> end =
        of.whole ? with_unmatched<double>(row, z[r], static_cast<double>(out.top_s[r]) * inv_temperature,
                                          static_cast<double>(out.top_t[r]) * inv_temperature, rest_s[r], rest_t[r],
                                          of.drop)
                 : Outcome<double>{row.loss, row.student, row.teacher, 0};
    loss[r] = scale[r] == 0 ? Acc{0} : static_cast<Acc>(end.loss * of.temperature * of.temperature);
    // Rounded once: what is wrong with a factor is wrong with all of its columns.
    const double factor = of.temperature * static_cast<double>(scale[r]);
    out.student[r] = static_cast<Acc>(factor * end.student);
    out.teacher[r] = static_cast<Acc>(factor * end.teacher);
    out.rest[r] = static_cast<Acc>(factor * end.rest);
  }
}

}  // namespace VD_ISA
}  // namespace vocabdistil
