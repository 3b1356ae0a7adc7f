#include "softmax.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

// out (+)= coef * row, and that over the divisor with kLast.
template <bool kFirst, bool kLast, class Acc, class T>
inline void add_row(Acc* __restrict out, const T* __restrict row, Acc coef, Acc divisor, int64_t dim) {
  VD_SIMD for (int64_t i = 0; i < dim; ++i) {
    const Acc x = static_cast<Acc>(load(row[i]));
    const Acc sum = kFirst ? coef * x : madd(coef, x, out[i]);
    out[i] = kLast ? sum / divisor : sum;
  }
}
template <class Acc, class T>
inline void add_row(Acc* out, const T* row, Acc coef, Acc divisor, int64_t dim, bool first, bool last) {
  if (last && divisor != 1) {
    first ? add_row<true, true>(out, row, coef, divisor, dim) : add_row<false, true>(out, row, coef, divisor, dim);
  } else {
    first ? add_row<true, false>(out, row, coef, divisor, dim) : add_row<false, false>(out, row, coef, divisor, dim);
  }
}

template <class Acc, class T>
inline void write_row(T* __restrict row, const Combination<Acc>& g, Acc coef, int64_t dim) {
  const Acc* __restrict x = g.x;
  const Acc* __restrict y = g.y;
  const Acc a = coef * g.a, b = coef * g.b;
  if (y) {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) row[i] = store<T>(a * x[i] - b * y[i]);
  } else {
    VD_SIMD for (int64_t i = 0; i < dim; ++i) row[i] = store<T>(a * x[i]);
  }
}

}  // namespace

template <class Acc>
void load_mean(const Layers& x, int64_t start, int64_t end, int64_t dim, bool mean, Acc* out) {
  if (end <= start) {
    std::fill(out, out + dim, Acc{0});
    return;
  }
  const bool uniform = std::all_of(x.coef, x.coef + x.count, [&](double coef) { return coef == x.coef[0]; });
  const Acc divisor = static_cast<Acc>(static_cast<double>(mean ? end - start : 1) / (uniform ? x.coef[0] : 1));
  with_type_within<Acc>(x.dtype, [&](auto type) {
    using T = decltype(type);
    bool first = true;
    for (int64_t l = 0; l < x.count; ++l) {
      const auto* base = static_cast<const T*>(x.data[l]);
      const Acc coef = uniform ? Acc{1} : static_cast<Acc>(x.coef[l]);
      for (int64_t i = start; i < end; ++i, first = false) {
        const bool last = l + 1 == x.count && i + 1 == end;
        add_row(out, base + i * x.row_stride[l], coef, divisor, dim, first, last);
      }
    }
  });
}

template <class Acc>
Acc gather(const Rows& x, int64_t begin, int64_t end, bool mean, const int32_t* __restrict ids, int64_t count,
           Acc* __restrict out) {
  with_type_within<Acc>(x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* row = static_cast<const T*>(x.data) + begin * x.stride;
    VD_SIMD for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Acc>(load(row[ids[i]]));
    for (int64_t k = begin + 1; k < end; ++k) {
      row += x.stride;
      VD_SIMD for (int64_t i = 0; i < count; ++i) out[i] += static_cast<Acc>(load(row[ids[i]]));
    }
  });
  const Acc divisor = static_cast<Acc>(mean ? end - begin : 1);
  if (divisor != 1) {
    VD_SIMD for (int64_t i = 0; i < count; ++i) out[i] /= divisor;
  }
  return max_of(out, count);
}

template <class Acc>
void store_grad(const LayerGrads& out, const Spans& spans, int64_t p, int64_t pairs, int64_t dim, bool mean,
                const Combination<Acc>& grad, Acc scale, bool is_zero) {
  const int64_t start = spans.start[p], end = spans.end[p];
  const int64_t gap = p ? spans.end[p - 1] : 0;
  const double share = mean && end > start ? 1.0 / static_cast<double>(end - start) : 1.0;
  with_type_within<Acc>(out.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t l = 0; l < out.count; ++l) {
      auto* base = static_cast<T*>(out.data[l]);
      zero_rows(out.dtype, base, gap, is_zero ? end : start, dim);
      if (!is_zero && end > start) {
        const Acc coef = static_cast<Acc>(out.coef[l] * share * static_cast<double>(scale));
        T* row = base + start * dim;
        write_row(row, grad, coef, dim);
        for (int64_t k = start + 1; k < end; ++k) std::memcpy(base + k * dim, row, sizeof(T) * dim);
      }
      if (p + 1 == pairs) zero_rows(out.dtype, base, end, out.rows, dim);
    }
  });
}

template void load_mean(const Layers&, int64_t, int64_t, int64_t, bool, float*);
template void load_mean(const Layers&, int64_t, int64_t, int64_t, bool, double*);
template float gather(const Rows&, int64_t, int64_t, bool, const int32_t*, int64_t, float*);
template double gather(const Rows&, int64_t, int64_t, bool, const int32_t*, int64_t, double*);
template void store_grad(const LayerGrads&, const Spans&, int64_t, int64_t, int64_t, bool, const Combination<float>&,
                         float, bool);
template void store_grad(const LayerGrads&, const Spans&, int64_t, int64_t, int64_t, bool, const Combination<double>&,
                         double, bool);

}  // namespace VD_ISA
}  // namespace vocabdistil
