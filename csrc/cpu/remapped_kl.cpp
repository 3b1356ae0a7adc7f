// One pair at a time: the student's row is combined into the teacher's vocabulary in the cache, where the divergence
// is formed; only the student's gradient, a gather over the transposed table, leaves it. Formulas:
// vocabdistil/reference/remapped_kl.py.
#include <functional>

#include "matched.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

// out[i] = sum over k of s[ids[k * count + i]], weighted: rows of one length, interleaved, so that they are summed side
// by side.
template <class Acc, bool kWeighted>
void combine_sum(const Acc* __restrict s, const int32_t* __restrict ids, const Acc* __restrict weights, int64_t length,
                 int64_t count, Acc* __restrict out) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    std::fill(out + begin, out + end, Acc{0});
    for (int64_t k = 0; k < length; ++k) {
      const int32_t* __restrict piece = ids + k * count;
      const Acc* __restrict weight = weights + (kWeighted ? k * count : 0);
      VD_SIMD for (int64_t i = begin; i < end; ++i) {
        if constexpr (kWeighted) {
          out[i] += weight[i] * s[piece[i]];
        } else {
          out[i] += s[piece[i]];
        }
      }
    }
  }
}

// Here the weights are logs.
template <class Acc, bool kWeighted>
void combine_logsumexp(const Acc* __restrict s, const int32_t* __restrict ids, const Acc* __restrict weights,
                       int64_t length, int64_t count, Acc* __restrict out) {
  const Acc none = -std::numeric_limits<Acc>::infinity();
  Acc sums[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    std::fill(out + begin, out + end, none);
    std::fill(sums, sums + (end - begin), Acc{0});
    auto each = [&](int64_t k, auto&& f) {
      const int32_t* __restrict piece = ids + k * count;
      const Acc* __restrict weight = weights + (kWeighted ? k * count : 0);
      VD_SIMD for (int64_t i = begin; i < end; ++i) {
        if constexpr (kWeighted) {
          f(i, s[piece[i]] + weight[i]);
        } else {
          f(i, s[piece[i]]);
        }
      }
    };
    for (int64_t k = 0; k < length; ++k) each(k, [&](int64_t i, Acc x) { out[i] = x > out[i] ? x : out[i]; });
    for (int64_t k = 0; k < length; ++k) {
      each(k, [&](int64_t i, Acc x) { sums[i - begin] += exp_nonpositive(x - (out[i] == none ? Acc{0} : out[i])); });
    }
    VD_SIMD for (int64_t i = begin; i < end; ++i) {
      const Acc sum = sums[i - begin];
      out[i] = sum == 0 ? none : out[i] == none ? sum : out[i] + log_positive(sum);  // no largest but a sum: NaN
    }
  }
}

template <class Acc>
void combine(const RemapPlan& plan, bool logsumexp, const Acc* s, Acc* out) {
  const int32_t* ids = plan.ids;
  const Acc* weights = static_cast<const Acc*>(plan.weights);
  const auto one_length = logsumexp ? weights ? combine_logsumexp<Acc, true> : combine_logsumexp<Acc, false>
                          : weights ? combine_sum<Acc, true>
                                    : combine_sum<Acc, false>;
  for (int64_t b = 0; b < plan.buckets; ++b) {
    const int64_t length = plan.shapes[2 * b], count = plan.shapes[2 * b + 1];
    one_length(s, ids, weights, length, count, out);
    ids += length * count;
    if (weights) weights += length * count;
    out += count;
  }
}

// The gradient of s, a logit of which the rows `at` are made, from x, that of the rows.
template <class Acc>
Acc sum_at(const Acc* __restrict x, const int32_t* __restrict at, const Acc* __restrict weights, int64_t count) {
  if (!weights) return static_cast<Acc>(sum_in_blocks<Acc>(count, [=](int64_t i) { return x[at[i]]; }));
  return static_cast<Acc>(sum_in_blocks<Acc>(count, [=](int64_t i) { return weights[i] * x[at[i]]; }));
}

// d z(v) / d s is the share of s in the sum.
template <class Acc>
Acc share_at(const Acc* __restrict x, const Acc* __restrict z, Acc s, const int32_t* __restrict at,
             const Acc* __restrict weights, int64_t count) {
  if (s == -std::numeric_limits<Acc>::infinity()) return 0;
  if (!weights) {
    return static_cast<Acc>(
        sum_in_blocks<Acc>(count, [=](int64_t i) { return x[at[i]] * exp_nonpositive(s - z[at[i]]); }));
  }
  return static_cast<Acc>(
      sum_in_blocks<Acc>(count, [=](int64_t i) { return x[at[i]] * exp_nonpositive((s + weights[i]) - z[at[i]]); }));
}

// The rows of a pair in another order, those of the teacher's largest logits first. `memory`: 3 * mapped.
template <class Acc>
class TopK {
 public:
  TopK(const RemappedKlArgs& a, Acc* memory)
      : a_(a), mapped_(a.plan.mapped), order_(mapped_), s_(memory), t_(s_ + mapped_), copy_(t_ + mapped_) {}

  // The divergence of combined logits z and the teacher's t, and t becomes the gradient's part that z's scale times.
  double diverge_of(const Acc* z, Acc* t) {
    const int64_t count = arrange(t), others = mapped_ - count;
    const Acc inv_temperature = static_cast<Acc>(1 / a_.temperature);
    auto take = [&](const Acc* from, int64_t first, int64_t last, Acc* to) {
      for (int64_t i = first; i < last; ++i) to[i] = from[order_[i]];
      return max_of(to + first, last - first);
    };
    const Acc top_s = shift_of(take(z, 0, count, s_)), top_t = shift_of(take(t, 0, count, t_));
    Sums sums;
    const Divergent row = diverge(s_, t_, count, top_s, top_t, inv_temperature, sums, [&] {
      take(z, 0, count, s_);
      take(t, 0, count, t_);
    });
    Outcome<Acc> out{row.loss, static_cast<Acc>(row.student), static_cast<Acc>(row.teacher), 0};
    if (a_.remainder != Unmatched::renormalize) {
      auto read_s = [&] { return take(z, count, mapped_, s_); };
      auto read_t = [&] { return take(t, count, mapped_, t_); };
      const Rest<Acc> rest_s = exp_rest(s_ + count, others, read_s(), a_.temperature, read_s);
      const double rest_t = exp_rest(t_ + count, others, read_t(), a_.temperature, read_t).log_sum;
      out = with_unmatched<Acc>(row, sums, static_cast<double>(top_s) / a_.temperature,
                                static_cast<double>(top_t) / a_.temperature, rest_s, rest_t,
                                a_.remainder == Unmatched::drop);
    }
    for (int64_t i = 0; i < count; ++i) t[order_[i]] = out.student * s_[i] - out.teacher * t_[i];
    // Without the remainder those outside have no part in anything, whatever they are.
    for (int64_t i = count; i < mapped_; ++i)
      t[order_[i]] = a_.remainder == Unmatched::renormalize ? Acc{0} : out.rest * s_[i];
    return out.loss;
  }

 private:
  // How many are no less than the k-th largest: those, and then the others, in their order. A NaN is among them.
  int64_t arrange(const Acc* t) {
    const Acc most = std::numeric_limits<Acc>::infinity();
    for (int64_t i = 0; i < mapped_; ++i) copy_[i] = t[i] == t[i] ? t[i] : most;
    const int64_t k = std::min(a_.top_k, mapped_) - 1;
    std::nth_element(copy_, copy_ + k, copy_ + mapped_, std::greater<Acc>());
    const Acc least = copy_[k];
    int64_t count = 0;
    for (int64_t i = 0; i < mapped_; ++i)
      if (!(t[i] < least)) order_[count++] = static_cast<int32_t>(i);
    int64_t at = count;
    for (int64_t i = 0; i < mapped_; ++i)
      if (t[i] < least) order_[at++] = static_cast<int32_t>(i);
    return count;
  }

  const RemappedKlArgs& a_;
  const int64_t mapped_;
  std::vector<int32_t> order_;
  Acc *s_, *t_, *copy_;
};

template <class Acc>
void run(const RemappedKlArgs& a) {
  const OwnSpans student_spans(kStudentSpans, a.student_spans, a.pairs, a.student.rows);
  const OwnSpans teacher_spans(kTeacherSpans, a.teacher_spans, a.pairs, a.teacher.rows);
  const Acc* scale = static_cast<const Acc*>(a.scale);
  Acc* loss = static_cast<Acc*>(a.loss);
  const Acc temperature = static_cast<Acc>(a.temperature), inv_temperature = Acc{1} / temperature;
  const RemapPlan& plan = a.plan;
  const int64_t mapped = plan.mapped, columns = a.student.columns;
  const Acc* const weights_of = static_cast<const Acc*>(plan.weights_of);
  const Spans &ss = student_spans, &ts = teacher_spans;
  const double one = 1;
  const Layers student{a.student.dtype, 1, &a.student.data, &a.student.stride, &one, a.student.rows};

  if (a.grad && a.pairs == 0) zero_grad(a.student, a.grad);
  const int threads = useful_threads(a.threads, a.pairs * 4 * (mapped + columns + 64));
  parallel_for(a.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(columns + (a.top_k ? 6 : 3) * mapped);
    Acc *s = scratch.data(), *z = s + columns, *t = z + mapped, *kept = t + mapped;
    TopK<Acc> largest(a, kept + mapped);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t s_begin = ss.start ? ss.start[p] : p, s_end = ss.start ? ss.end[p] : p + 1;
      const int64_t t_begin = ts.start ? ts.start[p] : p, t_end = ts.start ? ts.end[p] : p + 1;
      const bool empty = s_end <= s_begin || t_end <= t_begin || mapped == 0;
      double divergence = 0;
      if (!empty) {
        auto read = [&] {
          load_mean(student, s_begin, s_end, columns, true, s);
          combine(plan, a.logsumexp, s, z);
          return gather(a.teacher, t_begin, t_end, true, plan.rows, mapped, t);
        };
        const Acc top_t = shift_of(read());
        if (a.logsumexp && a.grad) std::copy(z, z + mapped, kept);
        if (a.top_k) {
          divergence = largest.diverge_of(z, t);
        } else {
          Sums sums;
          const Divergent out =
              diverge(z, t, mapped, shift_of(max_of(z, mapped)), top_t, inv_temperature, sums, read);
          divergence = out.loss;
          const Acc by_s = static_cast<Acc>(out.student), by_t = static_cast<Acc>(out.teacher);
          VD_SIMD for (int64_t i = 0; i < mapped; ++i) t[i] = z[i] * by_s - t[i] * by_t;
        }
      }
      loss[p] = static_cast<Acc>(a.temperature * a.temperature * divergence);
      if (!a.grad) continue;
      const Acc factor = empty ? Acc{0} : temperature * scale[p] / static_cast<Acc>(s_end - s_begin);
      write_grad<Acc>(a.student, a.grad, ss, p, a.pairs, empty, false, [&](auto* __restrict row) {
        using T = std::remove_reference_t<decltype(*row)>;
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t first = plan.indptr[j], count = plan.indptr[j + 1] - first;
          const int32_t* at = plan.pieces_of + first;
          const Acc* weights = weights_of ? weights_of + first : nullptr;
          row[j] = store<T>(
              factor * (a.logsumexp ? share_at(t, kept, s[j], at, weights, count) : sum_at(t, at, weights, count)));
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
