#include "rows.h"

namespace vocabdistil {
namespace VD_ISA {

constexpr const char* kSpans = "start, end: expected ascending disjoint spans";

template <class Acc>
static void fwd(const SpanMeanArgs& a) {
  const OwnSpans own(kSpans, a.spans, a.pairs, a.x.rows);
  const Spans& spans = own;
  const int threads = useful_threads(a.threads, a.pairs * (a.dim + 32) * a.x.count);
  parallel_for(a.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> row(a.dim);
    with_type(a.out_dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t p = begin; p < end; ++p) {
        load_mean(a.x, spans.start[p], spans.end[p], a.dim, a.mean, row.data());
        T* __restrict out = static_cast<T*>(a.out) + p * a.dim;
        const Acc* __restrict in = row.data();
        VD_SIMD for (int64_t i = 0; i < a.dim; ++i) out[i] = store<T>(in[i]);
      }
    });
  });
}

template <class Acc>
static void bwd(const SpanMeanBwdArgs& a) {
  const OwnSpans own(kSpans, a.spans, a.pairs, a.out.rows);
  const Spans& spans = own;
  if (a.pairs == 0) return zero_grads(a.out, a.dim);
  const int threads = useful_threads(a.threads, a.out.rows * (a.dim + 32) * a.out.count);
  parallel_for(a.pairs, threads, [&](int64_t begin, int64_t end) {
    std::vector<Acc> row(a.dim);
    with_type_within<Acc>(a.grad_dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t p = begin; p < end; ++p) {
        const T* __restrict in = static_cast<const T*>(a.grad) + p * a.grad_stride;
        Acc* __restrict out = row.data();
        VD_SIMD for (int64_t i = 0; i < a.dim; ++i) out[i] = static_cast<Acc>(load(in[i]));
        store_grad(a.out, spans, p, a.pairs, a.dim, a.mean, {row.data(), nullptr, Acc{1}, Acc{0}}, Acc{1}, false);
      }
    });
  });
}

void span_mean_fwd(const SpanMeanArgs& a) { a.x.dtype == DType::f64 ? fwd<double>(a) : fwd<float>(a); }
void span_mean_bwd(const SpanMeanBwdArgs& a) {
  a.grad_dtype == DType::f64 || a.out.dtype == DType::f64 ? bwd<double>(a) : bwd<float>(a);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
