// One pair at a time: the matched columns of both rows are gathered into the cache, where the divergence is formed;
// only the student's gradient leaves it. Formulas: vocabdistil/reference/matched_kl.py.
#include "matched.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

template <class Acc>
void run(const MatchedKlArgs& a) {
  const OwnSpans student_spans(kStudentSpans, a.student_spans, a.pairs, a.student.rows);
  const OwnSpans teacher_spans(kTeacherSpans, a.teacher_spans, a.pairs, a.teacher.rows);
  const bool whole = a.unmatched != Unmatched::renormalize;
  const std::vector<int32_t> s_others =
      other_ids("student", a.student_ids, a.matched, a.student.columns, true, whole);
  const std::vector<int32_t> t_others =
      other_ids("teacher", a.teacher_ids, a.matched, a.teacher.columns, whole, whole);
  const int64_t num_s = static_cast<int64_t>(s_others.size()), num_t = static_cast<int64_t>(t_others.size());
  const Acc* scale = static_cast<const Acc*>(a.scale);
  Acc* loss = static_cast<Acc*>(a.loss);
  const Acc temperature = static_cast<Acc>(a.temperature), inv_temperature = Acc{1} / temperature;
  const Spans &ss = student_spans, &ts = teacher_spans;

  if (a.grad && a.pairs == 0) zero_grad(a.student, a.grad);
  const int threads = useful_threads(a.threads, a.pairs * 4 * (a.matched + num_s + num_t + 64));
  parallel_for(a.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(2 * a.matched + num_s + num_t);
    Acc *s = scratch.data(), *t = s + a.matched, *us = t + a.matched, *ut = us + num_s;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t s_begin = ss.start ? ss.start[p] : p, s_end = ss.start ? ss.end[p] : p + 1;
      const int64_t t_begin = ts.start ? ts.start[p] : p, t_end = ts.start ? ts.end[p] : p + 1;
      const bool empty = s_end <= s_begin || t_end <= t_begin;
      Outcome<Acc> out{0, 0, 0, 0};
      if (!empty) {
        const Acc top_s = shift_of(gather(a.student, s_begin, s_end, a.mean, a.student_ids, a.matched, s));
        const Acc top_t = shift_of(gather(a.teacher, t_begin, t_end, a.mean, a.teacher_ids, a.matched, t));
        Sums z;
        const Divergent row = diverge(s, t, a.matched, top_s, top_t, inv_temperature, z, [&] {
          gather(a.student, s_begin, s_end, a.mean, a.student_ids, a.matched, s);
          gather(a.teacher, t_begin, t_end, a.mean, a.teacher_ids, a.matched, t);
        });
        if (!whole) {
          out = {row.loss, static_cast<Acc>(row.student), static_cast<Acc>(row.teacher), 0};
        } else {
          auto read_s = [&] { return gather(a.student, s_begin, s_end, a.mean, s_others.data(), num_s, us); };
          auto read_t = [&] { return gather(a.teacher, t_begin, t_end, a.mean, t_others.data(), num_t, ut); };
          const Rest<Acc> rest_s = exp_rest(us, num_s, read_s(), a.temperature, read_s);
          const double rest_t = exp_rest(ut, num_t, read_t(), a.temperature, read_t).log_sum;
          out = with_unmatched<Acc>(row, z, static_cast<double>(top_s) / a.temperature,
                                    static_cast<double>(top_t) / a.temperature, rest_s, rest_t,
                                    a.unmatched == Unmatched::drop);
        }
      }
      loss[p] = static_cast<Acc>(out.loss * a.temperature * a.temperature);
      if (!a.grad) continue;
      const Acc share = a.mean && !empty ? Acc{1} / static_cast<Acc>(s_end - s_begin) : Acc{1};
      const Acc factor = temperature * scale[p] * share;
      write_grad<Acc>(a.student, a.grad, ss, p, a.pairs, empty, !whole, [&](auto* __restrict row) {
        using T = std::remove_reference_t<decltype(*row)>;
        const int32_t *__restrict ids = a.student_ids, *__restrict others = s_others.data();
        for (int64_t i = 0; i < a.matched; ++i)
          row[ids[i]] = store<T>(factor * (out.student * s[i] - out.teacher * t[i]));
        for (int64_t i = 0; i < num_s; ++i) row[others[i]] = store<T>(factor * out.rest * us[i]);
      });
    }
  });
  *static_cast<Acc*>(a.total) = weighted_total(loss, scale, a.pairs);
}

}  // namespace

void matched_kl(const MatchedKlArgs& a) {
  const bool wide = a.student.dtype == DType::f64 || a.teacher.dtype == DType::f64;
  wide ? run<double>(a) : run<float>(a);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
