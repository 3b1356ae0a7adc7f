// One pair at a time: its averaged rows s, t stay in the cache, where the loss and both gradients are formed; only
// the gradient leaves it. Formulas: vocabdistil/reference/span_loss.py.
#include "rows.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

template <class Acc>
struct Pair {
  int64_t dim;
  Acc temperature, beta;
  Acc *s, *t;    // averaged rows; the softmax divergences turn them into (x - max) / T
  Acc *es, *et;  // exp of those
  Acc *gs, *gt;  // d loss / d s and d loss / d t
  bool want_s, want_t;
};

template <class Acc>
Acc row_max(const Acc* __restrict x, int64_t dim) {
  Acc m = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < dim; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

template <class Acc>
struct Partition {
  double log_ratio;  // log sum exp s - log sum exp t
  Acc inv_s, inv_t;  // 1 / sum exp
};

template <class Acc>
Partition<Acc> softmax_both(const Pair<Acc>& a) {
  const Acc inv_temperature = Acc{1} / a.temperature;
  const Acc max_s = row_max(a.s, a.dim), max_t = row_max(a.t, a.dim);
  Acc *__restrict s = a.s, *__restrict t = a.t, *__restrict es = a.es, *__restrict et = a.et;
  Acc zs = 0, zt = 0;
#pragma omp simd reduction(+ : zs, zt)
  for (int64_t i = 0; i < a.dim; ++i) {
    s[i] = (s[i] - max_s) * inv_temperature;
    t[i] = (t[i] - max_t) * inv_temperature;
    es[i] = exp_nonpositive(s[i]);
    et[i] = exp_nonpositive(t[i]);
    zs += es[i];
    zt += et[i];
  }
  return {std::log(static_cast<double>(zs) / static_cast<double>(zt)), Acc{1} / zs, Acc{1} / zt};
}

// T^2 KL(p || q). log p - log q = lp - lq + log_ratio with log_ratio = log zq - log zp. Gradients (times T^2 / T):
// q - p for the logits of q, p (log p - log q - KL) for those of p.
template <class Acc>
double kl(Acc temperature, int64_t dim, const Acc* __restrict lp, const Acc* __restrict lq, const Acc* __restrict ep,
          const Acc* __restrict eq, Acc inv_p, Acc inv_q, double log_ratio, Acc* __restrict gp, Acc* __restrict gq) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < dim; ++i) {
    const Acc term = ep[i] * (lp[i] - lq[i]);
    sum += ep[i] == 0 ? Acc{0} : term;  // no mass, no contribution, even where the difference is infinite
  }
  const double loss = static_cast<double>(sum) * static_cast<double>(inv_p) + log_ratio;
  if (gp) {
    const Acc shift = static_cast<Acc>(log_ratio - loss);
    VD_SIMD for (int64_t i = 0; i < dim; ++i) {
      const Acc g = temperature * (ep[i] * inv_p) * (lp[i] - lq[i] + shift);
      gp[i] = ep[i] == 0 ? Acc{0} : g;
    }
  }
  if (gq) {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) gq[i] = temperature * (eq[i] * inv_q - ep[i] * inv_p);
  }
  return loss * static_cast<double>(temperature) * static_cast<double>(temperature);
}

// T^2 [beta KL(q || m) + (1 - beta) KL(r || m)], m = beta q + (1 - beta) r, q the teacher's, r the student's.
// Gradient for the student's logits: (1 - beta) r (log(r / m) - KL(r || m)); for the teacher's likewise.
template <class Acc>
double jsd(const Pair<Acc>& a) {
  const Partition<Acc> z = softmax_both(a);
  Acc *__restrict log_r = a.s, *__restrict log_q = a.t, *__restrict r = a.es, *__restrict q = a.et;
  Acc kl_r = 0, kl_q = 0;
#pragma omp simd reduction(+ : kl_r, kl_q)
  for (int64_t i = 0; i < a.dim; ++i) {
    r[i] *= z.inv_s;
    q[i] *= z.inv_t;
    const Acc mixture = r[i] + a.beta * (q[i] - r[i]);  // exactly r where q = r
    const Acc m = mixture == 0 ? Acc{1} : mixture;
    // r / m <= 1 / (1 - beta): the quotient, unlike a difference of logarithms, is exact where both are close.
    const Acc lr = log_positive(r[i] / m), lq = log_positive(q[i] / m);
    log_r[i] = r[i] == 0 ? Acc{0} : lr;
    log_q[i] = q[i] == 0 ? Acc{0} : lq;
    kl_r += r[i] * log_r[i];
    kl_q += q[i] * log_q[i];
  }
  Acc *__restrict gs = a.gs, *__restrict gt = a.gt;
  const Acc scale_s = (1 - a.beta) * a.temperature, scale_t = a.beta * a.temperature;
  if (a.want_s) {
    VD_SIMD for (int64_t i = 0; i < a.dim; ++i) gs[i] = scale_s * r[i] * (log_r[i] - kl_r);
  }
  if (a.want_t) {
    VD_SIMD for (int64_t i = 0; i < a.dim; ++i) gt[i] = scale_t * q[i] * (log_q[i] - kl_q);
  }
  const double beta = static_cast<double>(a.beta), temperature = static_cast<double>(a.temperature);
  return temperature * temperature * (beta * static_cast<double>(kl_q) + (1 - beta) * static_cast<double>(kl_r));
}

template <class Acc>
double mse(const Pair<Acc>& a) {
  const Acc *__restrict s = a.s, *__restrict t = a.t;
  Acc *__restrict gs = a.gs, *__restrict gt = a.gt;
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < a.dim; ++i) {
    const Acc d = s[i] - t[i];
    sum = madd(d, d, sum);
    gs[i] = 2 * d;
    gt[i] = -2 * d;
  }
  return static_cast<double>(sum);
}

template <class Acc>
double cosine(const Pair<Acc>& a) {
  const Acc *__restrict s = a.s, *__restrict t = a.t;
  Acc ss_ = 0, tt_ = 0, st_ = 0;
#pragma omp simd reduction(+ : ss_, tt_, st_)
  for (int64_t i = 0; i < a.dim; ++i) {
    ss_ = madd(s[i], s[i], ss_);
    tt_ = madd(t[i], t[i], tt_);
    st_ = madd(s[i], t[i], st_);
  }
  const double ss = static_cast<double>(ss_), tt = static_cast<double>(tt_), st = static_cast<double>(st_);
  // Each norm is clamped at 1e-8, as torch.nn.functional.cosine_similarity does; a clamped norm is a constant.
  const double floor = 1e-16;
  const double norms = std::sqrt(std::max(ss, floor) * std::max(tt, floor));
  const double cos = st / norms;
  const Acc cross = static_cast<Acc>(1 / norms);
  const Acc own_s = static_cast<Acc>(ss > floor ? cos / ss : 0), own_t = static_cast<Acc>(tt > floor ? cos / tt : 0);
  Acc *__restrict gs = a.gs, *__restrict gt = a.gt;
  if (a.want_s) {
    VD_SIMD for (int64_t i = 0; i < a.dim; ++i) gs[i] = own_s * s[i] - cross * t[i];
  }
  if (a.want_t) {
    VD_SIMD for (int64_t i = 0; i < a.dim; ++i) gt[i] = own_t * t[i] - cross * s[i];
  }
  return ss != ss || tt != tt ? ss + tt : 1 - cos;  // max() drops a NaN
}

template <class Acc>
double divergence(Divergence kind, const Pair<Acc>& a) {
  switch (kind) {
    case Divergence::kl: {
      const Partition<Acc> z = softmax_both(a);
      return kl(a.temperature, a.dim, a.t, a.s, a.et, a.es, z.inv_t, z.inv_s, z.log_ratio, a.want_t ? a.gt : nullptr,
                a.want_s ? a.gs : nullptr);
    }
    case Divergence::reverse_kl: {
      const Partition<Acc> z = softmax_both(a);
      return kl(a.temperature, a.dim, a.s, a.t, a.es, a.et, z.inv_s, z.inv_t, -z.log_ratio, a.want_s ? a.gs : nullptr,
                a.want_t ? a.gt : nullptr);
    }
    case Divergence::jsd: return jsd(a);
    case Divergence::mse: return mse(a);
    case Divergence::cosine: return cosine(a);
  }
  return 0;
}

template <class Acc>
void run(const SpanLossArgs& args) {
  Acc* loss = static_cast<Acc*>(args.loss);
  const Acc* scale = static_cast<const Acc*>(args.scale);
  if (args.pairs == 0) {
    zero_grads(args.student_grad, args.dim);
    zero_grads(args.teacher_grad, args.dim);
  }
  const Spans &ss = args.student_spans, &ts = args.teacher_spans;
  const int64_t width = (args.dim + 31) / 32 * 32;  // rows start on cache lines of their own
  const int threads = useful_threads(args.threads, args.pairs * (args.dim + 64) * (args.student.count + args.teacher.count));
  parallel_for(args.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(6 * width + 32);
    Acc* base = scratch.data();
    base += (128 - reinterpret_cast<uintptr_t>(base) % 128) % 128 / sizeof(Acc);
    Pair<Acc> pair{args.dim,         static_cast<Acc>(args.temperature), static_cast<Acc>(args.beta), base,
                   base + width,     base + 2 * width,                   base + 3 * width,            base + 4 * width,
                   base + 5 * width, args.student_grad.count > 0,        args.teacher_grad.count > 0};
    for (int64_t p = begin; p < end; ++p) {
      const bool empty = ss.end[p] <= ss.start[p] || ts.end[p] <= ts.start[p];
      if (empty) {
        loss[p] = 0;
      } else {
        load_mean(args.student, ss.start[p], ss.end[p], args.dim, args.mean, pair.s);
        load_mean(args.teacher, ts.start[p], ts.end[p], args.dim, args.mean, pair.t);
        loss[p] = static_cast<Acc>(divergence(args.divergence, pair));
      }
      if (pair.want_s) {
        store_grad(args.student_grad, ss, p, args.pairs, args.dim, args.mean, pair.gs, scale[p], empty);
      }
      if (pair.want_t) {
        store_grad(args.teacher_grad, ts, p, args.pairs, args.dim, args.mean, pair.gt, scale[p], empty);
      }
    }
  });
  double total = 0;  // in the order of the pairs: the same sum for any number of threads
  for (int64_t p = 0; p < args.pairs; ++p) total += static_cast<double>(loss[p]) * static_cast<double>(scale[p]);
  *static_cast<Acc*>(args.total) = static_cast<Acc>(total);
}

}  // namespace

void span_loss(const SpanLossArgs& a) {
  const bool wide = a.student.dtype == DType::f64 || a.teacher.dtype == DType::f64;
  wide ? run<double>(a) : run<float>(a);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
