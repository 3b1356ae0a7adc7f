// One pair at a time: the student's row is combined into the teacher's vocabulary in the cache, where the divergence
// is formed; only the student's gradient, a gather over the transposed table, leaves it. Formulas:
// vocabdistil/reference/remapped_kl.py.
#include "softmax.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

// out[i] = sum over k of s[ids[k * count + i]]: rows of one length, interleaved, so that they are summed side by side.
template <class Acc>
void combine_sum(const Acc* __restrict s, const int32_t* __restrict ids, int64_t length, int64_t count,
                 Acc* __restrict out) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    VD_SIMD for (int64_t i = begin; i < end; ++i) out[i] = s[ids[i]];
    for (int64_t k = 1; k < length; ++k) {
      const int32_t* __restrict piece = ids + k * count;
      VD_SIMD for (int64_t i = begin; i < end; ++i) out[i] += s[piece[i]];
    }
  }
}

template <class Acc>
void combine_logsumexp(const Acc* __restrict s, const int32_t* __restrict ids, int64_t length, int64_t count,
                       Acc* __restrict out) {
  const Acc none = -std::numeric_limits<Acc>::infinity();
  Acc sums[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    std::fill(out + begin, out + end, none);
    std::fill(sums, sums + (end - begin), Acc{0});
    for (int64_t k = 0; k < length; ++k) {
      const int32_t* __restrict piece = ids + k * count;
      VD_SIMD for (int64_t i = begin; i < end; ++i) out[i] = s[piece[i]] > out[i] ? s[piece[i]] : out[i];
    }
    for (int64_t k = 0; k < length; ++k) {
      const int32_t* __restrict piece = ids + k * count;
      VD_SIMD for (int64_t i = begin; i < end; ++i) {
        sums[i - begin] += exp_nonpositive(s[piece[i]] - (out[i] == none ? Acc{0} : out[i]));
      }
    }
    VD_SIMD for (int64_t i = begin; i < end; ++i) {
      const Acc sum = sums[i - begin];
      out[i] = sum == 0 ? none : out[i] == none ? sum : out[i] + log_positive(sum);  // no largest but a sum: NaN
    }
  }
}

template <class Acc>
Acc sum_at(const Acc* __restrict x, const int32_t* __restrict at, int64_t count) {
  return static_cast<Acc>(sum_in_blocks<Acc>(count, [=](int64_t i) { return x[at[i]]; }));
}

// sum_v x[v] exp(s - z[v]) over the listed v: d z(v) / d s is the share of s in the sum.
template <class Acc>
Acc share_at(const Acc* __restrict x, const Acc* __restrict z, Acc s, const int32_t* __restrict at, int64_t count) {
  if (s == -std::numeric_limits<Acc>::infinity()) return 0;
  return static_cast<Acc>(
      sum_in_blocks<Acc>(count, [=](int64_t i) { return x[at[i]] * exp_nonpositive(s - z[at[i]]); }));
}

template <class Acc>
void run(const RemappedKlArgs& a) {
  const OwnSpans student_spans(kStudentSpans, a.student_spans, a.pairs, a.student.rows);
  const OwnSpans teacher_spans(kTeacherSpans, a.teacher_spans, a.pairs, a.teacher.rows);
  const Acc* scale = static_cast<const Acc*>(a.scale);
  Acc* loss = static_cast<Acc*>(a.loss);
  const Acc temperature = static_cast<Acc>(a.temperature), inv_temperature = Acc{1} / temperature;
  const RemapPlan& plan = a.plan;
  const int64_t mapped = plan.mapped, columns = a.student.columns;
  const Spans &ss = student_spans, &ts = teacher_spans;
  const double one = 1;
  const Layers student{a.student.dtype, 1, &a.student.data, &a.student.stride, &one, a.student.rows};

  if (a.grad && a.pairs == 0) zero_grad(a.student, a.grad);
  const int threads = useful_threads(a.threads, a.pairs * 4 * (mapped + columns + 64));
  parallel_for(a.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(columns + 3 * mapped);
    Acc *s = scratch.data(), *z = s + columns, *t = z + mapped, *kept = t + mapped;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t s_begin = ss.start ? ss.start[p] : p, s_end = ss.start ? ss.end[p] : p + 1;
      const int64_t t_begin = ts.start ? ts.start[p] : p, t_end = ts.start ? ts.end[p] : p + 1;
      const bool empty = s_end <= s_begin || t_end <= t_begin || mapped == 0;
      loss[p] = 0;
      Acc factor = 0;
      Divergent out{0, 0, 0, 0};
      if (!empty) {
        auto read = [&] {
          load_mean(student, s_begin, s_end, columns, true, s);
          const int32_t* ids = plan.ids;
          Acc* out = z;
          for (int64_t b = 0; b < plan.buckets; ++b) {
            const int64_t length = plan.shapes[2 * b], count = plan.shapes[2 * b + 1];
            if (a.logsumexp) {
              combine_logsumexp(s, ids, length, count, out);
            } else {
              combine_sum(s, ids, length, count, out);
            }
            ids += length * count;
            out += count;
          }
          return gather(a.teacher, t_begin, t_end, true, plan.rows, mapped, t);
        };
        const Acc top_t = shift_of(read());
        if (a.logsumexp && a.grad) std::copy(z, z + mapped, kept);
        Sums sums;
        out = diverge(z, t, mapped, shift_of(max_of(z, mapped)), top_t, inv_temperature, sums, read);
        loss[p] = static_cast<Acc>(a.temperature * a.temperature * out.loss);
        factor = temperature * scale[p] / static_cast<Acc>(s_end - s_begin);
      }
      if (!a.grad) continue;
      write_grad<Acc>(a.student, a.grad, ss, p, a.pairs, empty, false, [&](auto* __restrict row) {
        using T = std::remove_reference_t<decltype(*row)>;
        const Acc by_s = static_cast<Acc>(out.student), by_t = static_cast<Acc>(out.teacher);
        VD_SIMD for (int64_t i = 0; i < mapped; ++i) t[i] = z[i] * by_s - t[i] * by_t;
        for (int64_t j = 0; j < columns; ++j) {
          const int32_t* at = plan.pieces_of + plan.indptr[j];
          const int64_t count = plan.indptr[j + 1] - plan.indptr[j];
          row[j] = store<T>(factor * (a.logsumexp ? share_at(t, kept, s[j], at, count) : sum_at(t, at, count)));
        }
      });
    }
  });
  *static_cast<Acc*>(a.total) = weighted_total(loss, scale, a.pairs);
}

}  // namespace

void remapped_kl(const RemappedKlArgs& a) {
  const bool wide = a.student.dtype == DType::f64 || a.teacher.dtype == DType::f64;
  wide ? run<double>(a) : run<float>(a);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
