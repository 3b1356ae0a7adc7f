// One pair at a time: its averaged rows s, t stay in the cache, where the loss and both gradients are formed; only
// the gradient leaves it. Formulas: vocabdistil/reference/span_loss.py.
#include "softmax.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

template <class Acc>
struct Pair {
  int64_t dim;
  Acc temperature, beta;
  Acc *s, *t;    // averaged rows
  Acc *es, *et;  // of the softmax divergences: exp((x - max) / T)
  bool want_s, want_t;
  Combination<Acc> gs, gt;  // d loss / d s and d loss / d t
};

template <class Acc>
struct Partition {
  Acc z_p, z_q;  // sum exp
  Acc mean;      // of log p - log q under p, up to a constant, in units of log 2
  double kl;     // KL(p || q)
};

// Softmaxes of two rows: ep and eq become their exponentials, p the difference of their logarithms up to a constant, in
// units of log 2. Taken before either row is shifted, so that rows that are close lose nothing.
template <class Acc>
Partition<Acc> softmax_both(Acc temperature, int64_t dim, Acc* __restrict p, const Acc* __restrict q,
                            Acc* __restrict ep, Acc* __restrict eq) {
  Acc max_p = -std::numeric_limits<Acc>::infinity(), max_q = max_p;
#pragma omp simd reduction(max : max_p, max_q)
  for (int64_t i = 0; i < dim; ++i) {
    max_p = p[i] > max_p ? p[i] : max_p;
    max_q = q[i] > max_q ? q[i] : max_q;
  }
  const Acc unit = static_cast<Acc>(1.4426950408889634) / temperature, apart = max_p - max_q;
  Acc zp = 0, zq = 0, cross = 0;
#pragma omp simd reduction(+ : zp, zq, cross)
  for (int64_t i = 0; i < dim; ++i) {
    ep[i] = exp2_nonpositive((p[i] - max_p) * unit);
    eq[i] = exp2_nonpositive((q[i] - max_q) * unit);
    zp += ep[i];
    zq += eq[i];
    p[i] = ((p[i] - q[i]) - apart) * unit;
    const Acc term = ep[i] * p[i];
    cross += ep[i] == 0 ? Acc{0} : term;  // no mass, no contribution, even where the difference is infinite
  }
  const Acc mean = cross / zp;
  return {zp, zq, mean,
          static_cast<double>(mean) * kLog2 + std::log(static_cast<double>(zq) / static_cast<double>(zp))};
}

// T^2 KL(p || q). Gradients (times T^2 / T): q - p for the logits of q, p (log p - log q - KL) for those of p, which
// takes the place of p.
template <class Acc>
double kl(Acc temperature, int64_t dim, Acc* __restrict p, const Acc* __restrict q, Acc* __restrict ep,
          Acc* __restrict eq, bool want_p, Combination<Acc>& gp, Combination<Acc>& gq) {
  const Partition<Acc> z = softmax_both(temperature, dim, p, q, ep, eq);
  const Acc unit = static_cast<Acc>(kLog2);
  double loss = z.kl;
  gq = {eq, ep, temperature / z.z_q, temperature / z.z_p};
  if (loss < kClose) {
    const Acc scale = static_cast<Acc>(static_cast<double>(z.z_p) / static_cast<double>(z.z_q) * std::exp(loss));
    Acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) {
      const Step<Acc> step = step_of(ep[i], eq[i], scale, (z.mean - p[i]) * unit);
      eq[i] = step.first;
      sum += step.rest;
    }
    const Close close = close_divergence(static_cast<double>(sum), static_cast<double>(z.z_p));
    loss = close.kl;
    gq = {eq, ep, static_cast<Acc>(temperature * close.step), static_cast<Acc>(temperature * close.base)};
  }
  if (want_p) {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) p[i] = ep[i] == 0 ? Acc{0} : ep[i] * (p[i] - z.mean);
    gp = {p, nullptr, temperature * unit / z.z_p, 0};
  }
  return loss * static_cast<double>(temperature) * static_cast<double>(temperature);
}

// T^2 [beta KL(q || m) + (1 - beta) KL(r || m)], m = beta q + (1 - beta) r, q the teacher's, r the student's.
// Gradient for the student's logits: (1 - beta) r (log(r / m) - KL(r || m)); for the teacher's likewise.
template <class Acc>
double jsd(Pair<Acc>& a) {
  const Partition<Acc> z = softmax_both(a.temperature, a.dim, a.s, a.t, a.es, a.et);
  Acc *__restrict log_r = a.s, *__restrict log_q = a.t, *__restrict r = a.es, *__restrict q = a.et;
  const Acc inv_r = Acc{1} / z.z_p, inv_q = Acc{1} / z.z_q, unit = static_cast<Acc>(kLog2);
  Acc kl_r = 0, kl_q = 0;
  if (z.kl < kClose) {
    const Acc scale = static_cast<Acc>(static_cast<double>(z.z_p) / static_cast<double>(z.z_q) * std::exp(z.kl));
    const Acc most = static_cast<Acc>(0.5 - kClose);  // log q - log r lies lower than d by a KL that is close
    Acc sum = 0, above_most = 0;
#pragma omp simd reduction(+ : sum, above_most)
    for (int64_t i = 0; i < a.dim; ++i) {
      const Acc d = (z.mean - log_r[i]) * unit;
      sum += step_of(r[i], q[i], scale, d).rest;
      above_most += d < most && d > -most ? Acc{0} : Acc{1};
    }
    const Acc apart = static_cast<Acc>(close_divergence(static_cast<double>(sum), static_cast<double>(z.z_p)).kl);
    auto add_up = [&](auto all_small) {
#pragma omp simd reduction(+ : kl_r, kl_q)
      for (int64_t i = 0; i < a.dim; ++i) {
        r[i] *= inv_r;
        q[i] *= inv_q;
        // What m is above r and q, as shares of these, from log q - log r where that is small.
        const Acc u = (z.mean - log_r[i]) * unit - apart, e = u + u * u * exp_series(u) * Acc{0.5};
        const Acc y = a.beta * e, x = (a.beta - 1) * e / (1 + e);
        const Acc above_r = less_its_log(y), above_q = less_its_log(x);
        Acc term_r = r[i] * above_r, term_q = q[i] * above_q, lr = above_r - y, lq = above_q - x;
        if constexpr (!all_small) {
          const bool small = u < Acc{0.5} && u > Acc{-0.5};
          const Acc mixture = r[i] + a.beta * (q[i] - r[i]), m = mixture == 0 ? Acc{1} : mixture;
          const Acc far_r = r[i] == 0 ? Acc{0} : log_positive(r[i] / m);
          const Acc far_q = q[i] == 0 ? Acc{0} : log_positive(q[i] / m);
          term_r = small ? term_r : r[i] * far_r + (mixture - r[i]);
          term_q = small ? term_q : q[i] * far_q + (mixture - q[i]);
          lr = small ? lr : far_r;
          lq = small ? lq : far_q;
        }
        kl_r += term_r;
        kl_q += term_q;
        log_r[i] = lr;
        log_q[i] = lq;
      }
    };
    above_most == 0 ? add_up(std::true_type{}) : add_up(std::false_type{});
  } else {
#pragma omp simd reduction(+ : kl_r, kl_q)
    for (int64_t i = 0; i < a.dim; ++i) {
      r[i] *= inv_r;
      q[i] *= inv_q;
      const Acc mixture = r[i] + a.beta * (q[i] - r[i]);  // exactly r where q = r
      const Acc m = mixture == 0 ? Acc{1} : mixture;
      // r / m <= 1 / (1 - beta): the quotient, unlike a difference of logarithms, is exact where both are close.
      const Acc lr = log_positive(r[i] / m), lq = log_positive(q[i] / m);
      log_r[i] = r[i] == 0 ? Acc{0} : lr;
      log_q[i] = q[i] == 0 ? Acc{0} : lq;
      kl_r += r[i] * log_r[i];
      kl_q += q[i] * log_q[i];
    }
  }
  if (a.want_s) {
    VD_SIMD for (int64_t i = 0; i < a.dim; ++i) log_r[i] = r[i] * (log_r[i] - kl_r);
  }
  if (a.want_t) {
    VD_SIMD for (int64_t i = 0; i < a.dim; ++i) log_q[i] = q[i] * (log_q[i] - kl_q);
  }
  a.gs = {log_r, nullptr, (1 - a.beta) * a.temperature, 0};
  a.gt = {log_q, nullptr, a.beta * a.temperature, 0};
  const double beta = static_cast<double>(a.beta), temperature = static_cast<double>(a.temperature);
  return temperature * temperature * (beta * static_cast<double>(kl_q) + (1 - beta) * static_cast<double>(kl_r));
}

template <class Acc>
double mse(Pair<Acc>& a) {
  Acc* __restrict s = a.s;
  const Acc* __restrict t = a.t;
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < a.dim; ++i) {
    s[i] -= t[i];  // subtracted before it is scaled: both sides may be large and close
    sum = madd(s[i], s[i], sum);
  }
  a.gs = {s, nullptr, 2, 0};
  a.gt = {s, nullptr, -2, 0};
  return static_cast<double>(sum);
}

// Brings a row to the size of 1; the power of 2 that it was divided by.
template <class Acc>
Acc to_unit_size(Acc* __restrict x, int64_t dim) {
  Acc top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < dim; ++i) top = std::abs(x[i]) > top ? std::abs(x[i]) : top;
  if (!(top > 0 && top <= std::numeric_limits<Acc>::max())) return 1;
  const Acc size = std::ldexp(Acc{1}, std::ilogb(top)), inverse = 1 / size;
  VD_SIMD for (int64_t i = 0; i < dim; ++i) x[i] *= inverse;
  return size;
}

template <class Acc>
double cosine(Pair<Acc>& a) {
  Acc *__restrict s = a.s, *__restrict t = a.t;
  Acc ss_ = 0, tt_ = 0, st_ = 0;
  auto add_up = [&] {
    ss_ = tt_ = st_ = 0;
#pragma omp simd reduction(+ : ss_, tt_, st_)
    for (int64_t i = 0; i < a.dim; ++i) {
      ss_ = madd(s[i], s[i], ss_);
      tt_ = madd(t[i], t[i], tt_);
      st_ = madd(s[i], t[i], st_);
    }
  };
  add_up();
  // Each norm is clamped at 1e-8, as torch.nn.functional.cosine_similarity does; a clamped norm is a constant.
  double floor_s = 1e-16, floor_t = 1e-16;
  Acc size_s = 1, size_t_ = 1;
  const Acc most = std::numeric_limits<Acc>::max();
  if (!(ss_ <= most && tt_ <= most)) {  // too large to be squared, if it is not infinite
    if (!(ss_ <= most)) size_s = to_unit_size(s, a.dim), floor_s = 0;
    if (!(tt_ <= most)) size_t_ = to_unit_size(t, a.dim), floor_t = 0;
    add_up();
  }
  const double ss = static_cast<double>(ss_), tt = static_cast<double>(tt_), st = static_cast<double>(st_);
  const double norms = std::sqrt(std::max(ss, floor_s) * std::max(tt, floor_t));
  const double cos = st / norms;
  const Acc cross = static_cast<Acc>(1 / norms);
  const Acc own_s = static_cast<Acc>(ss > floor_s ? cos / ss : 0), own_t = static_cast<Acc>(tt > floor_t ? cos / tt : 0);
  a.gs = {s, t, own_s / size_s, cross / size_s};
  a.gt = {t, s, own_t / size_t_, cross / size_t_};
  return ss != ss || tt != tt ? ss + tt : 1 - cos;  // max() drops a NaN
}

template <class Acc>
double divergence(Divergence kind, Pair<Acc>& a) {
  switch (kind) {
    case Divergence::kl: return kl(a.temperature, a.dim, a.t, a.s, a.et, a.es, a.want_t, a.gt, a.gs);
    case Divergence::reverse_kl: return kl(a.temperature, a.dim, a.s, a.t, a.es, a.et, a.want_s, a.gs, a.gt);
    case Divergence::jsd: return jsd(a);
    case Divergence::mse: return mse(a);
    case Divergence::cosine: return cosine(a);
  }
  return 0;
}

template <class Acc>
void run(const SpanLossArgs& args) {
  const OwnSpans student_spans(kStudentSpans, args.student_spans, args.pairs, args.student.rows);
  const OwnSpans teacher_spans(kTeacherSpans, args.teacher_spans, args.pairs, args.teacher.rows);
  const Spans &ss = student_spans, &ts = teacher_spans;
  Acc* loss = static_cast<Acc*>(args.loss);
  const Acc* scale = static_cast<const Acc*>(args.scale);
  if (args.pairs == 0) {
    zero_grads(args.student_grad, args.dim);
    zero_grads(args.teacher_grad, args.dim);
  }
  const int64_t width = ceil_div(args.dim, 32) * 32;  // rows start on cache lines of their own
  const int threads = useful_threads(args.threads, args.pairs * (args.dim + 64) * (args.student.count + args.teacher.count));
  parallel_for(args.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(4 * width + 32);
    Acc* base = scratch.data();
    base += (128 - reinterpret_cast<uintptr_t>(base) % 128) % 128 / sizeof(Acc);
    Pair<Acc> pair{};
    pair.dim = args.dim;
    pair.temperature = static_cast<Acc>(args.temperature);
    pair.beta = static_cast<Acc>(args.beta);
    pair.s = base;
    pair.t = base + width;
    pair.es = base + 2 * width;
    pair.et = base + 3 * width;
    pair.want_s = args.student_grad.count > 0;
    pair.want_t = args.teacher_grad.count > 0;
    for (int64_t p = begin; p < end; ++p) {
      if (p + 1 < end) {
        prefetch_rows(args.student, ss.start[p + 1], ss.end[p + 1], args.dim);
        prefetch_rows(args.teacher, ts.start[p + 1], ts.end[p + 1], args.dim);
      }
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
