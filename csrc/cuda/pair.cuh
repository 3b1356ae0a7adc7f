// A pair of averaged rows in the registers of a warp or of a block, and its divergences. Formulas:
// vocabdistil/reference/span_loss.py. Where both rows are equal the gradient is exactly 0: each is written such that a
// fused multiply-add cannot break that.
#pragma once

#include "rows.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kClose = 0.0625f;  // as that of csrc/cpu/softmax.h

// 2^x, 0 under 2^-126; one instruction, which the scaling for subnormal results would triple.
__device__ float exp2_flushed(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}

inline __device__ void prefetch(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Sums or maxima over the threads that share a pair, in a fixed order, the same in all of them.
class Group {
 public:
  __device__ explicit Group(float4 (*parts)[32]) : parts_(parts) {}

  template <class Op, class... Float>
  __device__ void reduce(Op op, Float&... value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) ((value = op(value, __shfl_xor_sync(0xffffffffu, value, mask))), ...);
    if (blockDim.x > 32) across_warps(op, value...);
  }
  template <class... Float>
  __device__ void sum(Float&... value) {
    reduce([](float x, float y) { return x + y; }, value...);
  }
  __device__ void max(float& a, float& b) {
    reduce([](float x, float y) { return fmaxf(x, y); }, a, b);
  }

 private:
  template <class Op>
  __device__ void across_warps(Op op, float& a, float& b, float& c) {
    float4* parts = parts_[turn_];
    turn_ ^= 1;  // two buffers: the next but one reduction is behind a barrier that follows the reads of this one
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = make_float4(a, b, c, 0);
    __syncthreads();
    a = parts[0].x, b = parts[0].y, c = parts[0].z;
    for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) {
      const float4 part = parts[w];
      a = op(a, part.x), b = op(b, part.y), c = op(c, part.z);
    }
  }
  template <class Op>
  __device__ void across_warps(Op op, float& a, float& b) {
    float none = 0;
    across_warps(op, a, b, none);
  }
  template <class Op>
  __device__ void across_warps(Op op, float& a) {
    float none = 0;
    across_warps(op, a, none);
  }

  float4 (*parts_)[32];
  int turn_ = 0;
};

// A thread's share of a pair, whose rows are of type S (student) and T (teacher): K packs of N columns of both averages. A warp's columns are consecutive, and a
// thread's packs 32 N columns apart: a constant, so one address serves them all.
// Each divergence returns the loss and leaves its gradient in s, up to the factor `scale`.
template <class S, class T, int N, int K>
struct Pair {
  static constexpr int kSize = N * K;
  float s[kSize], t[kSize];
  float scale;

  __device__ Pair(int dim) : column_(threadIdx.x / 32 * (32 * kSize) + threadIdx.x % 32 * N), dim_(dim) {}

  __device__ int column(int k) const { return column_ + k * 32 * N; }
  __device__ bool inside(int k) const { return column(k) < dim_; }  // of a whole pack: N divides dim

  template <class E>
  __device__ void fetch(Pack<E, N> (&raw)[K], const LayerTable& layers, int layer, int position) const {
    const char* row = layers.address<E>(layer, position);
#pragma unroll
    for (int k = 0; k < K; ++k) raw[k] = inside(k) ? read<E, N>(row, layers.dtype, column(k)) : Pack<E, N>{};
  }
  template <class E>
  static __device__ void add(float (&x)[kSize], const Pack<E, N> (&raw)[K], float weight) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) x[e] = fmaf(weight, load<float>(raw[e / N].value[e % N]), x[e]);
  }
  // All rows of a span in all layers, but for the first: that one was fetched before.
  template <class E>
  __device__ void add_rest(float (&x)[kSize], const LayerTable& layers, const Span& span) const {
#pragma unroll 1  // registers are dearer here than loads in flight
    for (int l = 0; l < layers.count; ++l) {
      const float weight = layers.weight<float>(l);
#pragma unroll 1
      for (int i = span.start + (l == 0); i < span.end; ++i) {
        Pack<E, N> raw[K];
        fetch<E>(raw, layers, l, i);
        add<E>(x, raw, weight);
      }
    }
  }

  // Averages both rows; columns past the end get `outside`. The first loads of both sides, for most spans the only
  // ones, are in flight together.
  __device__ void average(const LayerTable& student, const Span& student_span, const LayerTable& teacher,
                          const Span& teacher_span, bool mean, float outside) {
    Pack<S, N> first_s[K];
    Pack<T, N> first_t[K];
    fetch<S>(first_s, student, 0, student_span.start);
    fetch<T>(first_t, teacher, 0, teacher_span.start);
#pragma unroll
    for (int e = 0; e < kSize; ++e) s[e] = t[e] = inside(e / N) ? 0 : outside;
    add<S>(s, first_s, student.weight<float>(0));
    add<T>(t, first_t, teacher.weight<float>(0));
    add_rest<S>(s, student, student_span);
    add_rest<T>(t, teacher, teacher_span);
    if (mean) {
      divide(s, student_span.end - student_span.start);
      divide(t, teacher_span.end - teacher_span.start);
    }
  }
  // Once, after adding up: a sum of shares rounds more where rows have a large part in common.
  static __device__ void divide(float (&x)[kSize], int count) {
    if (count == 1) return;
#pragma unroll
    for (int e = 0; e < kSize; ++e) x[e] /= static_cast<float>(count);
  }

  // Asks for a span's rows in all layers, to lie in the L2 cache when their turn comes: 128 bytes a thread, and no
  // register for what is under way.
  template <class E>
  __device__ void ask_for(const LayerTable& layers, const Span& span) const {
    const int bytes = dim_ * static_cast<int>(layers.item<E>());
#pragma unroll 1
    for (int l = 0; l < layers.count; ++l)
#pragma unroll 1
      for (int i = span.start; i < span.end; ++i)
        for (int d = threadIdx.x * 128; d < bytes; d += blockDim.x * 128) prefetch(layers.address<E>(l, i) + d);
  }

  // The largest values of both rows.
  __device__ void tops(Group& group, float& max_s, float& max_t) const {
    max_s = max_t = -INFINITY;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      max_s = fmaxf(max_s, s[e]);
      max_t = fmaxf(max_t, t[e]);
    }
    group.max(max_s, max_t);
  }

  // s and t become base-2 exponents: (x - max x) / (T ln 2).
  __device__ void exponents(Group& group, float temperature) {
    float max_s, max_t;
    tops(group, max_s, max_t);
    const float factor = kLog2E / temperature;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      s[e] = (s[e] - max_s) * factor;
      t[e] = (t[e] - max_t) * factor;
    }
  }

  __device__ float kl(Group& group, float temperature) {
    float sum_s = 0, sum_t = 0, sum = 0;
    exponents(group, temperature);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float difference = t[e] - s[e];
      s[e] = exp2_flushed(s[e]);
      t[e] = exp2_flushed(t[e]);
      sum_s += s[e];
      sum_t += t[e];
      if (t[e] != 0) sum += t[e] * difference;  // no mass, no contribution, even where the difference is infinite
    }
    group.sum(sum_s, sum_t, sum);
    const float ratio = sum_s / sum_t;
    scale = temperature / sum_s;
#pragma unroll
    for (int e = 0; e < kSize; ++e) s[e] -= t[e] * ratio;
    return temperature * temperature * (kLn2 * (sum / sum_t) + logf(ratio));
  }

  __device__ float reverse_kl(Group& group, float temperature) {
    float sum_s = 0, sum_t = 0, sum = 0;
    exponents(group, temperature);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float difference = s[e] - t[e];
      s[e] = exp2_flushed(s[e]);
      sum_s += s[e];
      sum_t += exp2_flushed(t[e]);
      if (s[e] != 0) sum += s[e] * difference;
      t[e] = difference;
    }
    group.sum(sum_s, sum_t, sum);
    const float expected = sum / sum_s;
    scale = kLn2 * temperature / sum_s;
#pragma unroll
    for (int e = 0; e < kSize; ++e) s[e] = s[e] == 0 ? 0 : s[e] * (t[e] - expected);
    return temperature * temperature * (kLn2 * expected + logf(sum_t / sum_s));
  }

  // KL(p || q) of rows that are close, from the averaged rows as they are, p the teacher or (kReverse) the student. Of
  // its terms none is negative (csrc/cpu/softmax.h).
  template <bool kReverse>
  __device__ float close_kl(Group& group, float temperature) {
    float(&p)[kSize] = kReverse ? s : t;
    float(&q)[kSize] = kReverse ? t : s;
    float max_p, max_q;
    kReverse ? tops(group, max_p, max_q) : tops(group, max_q, max_p);
    const float inverse = 1 / temperature, factor = kLog2E / temperature, apart = max_p - max_q;
    float sum_p = 0, sum_q = 0, cross = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float ep = exp2_flushed((p[e] - max_p) * factor);
      sum_p += ep;
      sum_q += exp2_flushed((q[e] - max_q) * factor);
      if (ep != 0) cross += ep * (((p[e] - q[e]) - apart) * inverse);
    }
    group.sum(sum_p, sum_q, cross);
    const float mean = cross / sum_p, ratio = sum_p / sum_q, by_q = ratio * expf(mean - logf(ratio));
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float ep = exp2_flushed((p[e] - max_p) * factor), eq = exp2_flushed((q[e] - max_q) * factor);
      const float d = mean - ((p[e] - q[e]) - apart) * inverse;
      const Step step = step_of(ep, eq, by_q, d);
      sum += step.rest;
      if (kReverse) {
        s[e] = ep == 0 ? 0 : -ep * d;
      } else {
        s[e] = step.first;
        t[e] = ep;
      }
    }
    group.sum(sum);
    const float excess = sum / sum_p;
    scale = temperature / sum_p;
    if (!kReverse) {
      scale /= 1 + excess;
#pragma unroll
      for (int e = 0; e < kSize; ++e) s[e] -= t[e] * excess;
    }
    return temperature * temperature * log1pf(excess);
  }
  // Of one column p (exp d - 1) and p (exp d - 1 - d); by_q turns q's exponential into p exp d.
  struct Step {
    float first, rest;
  };
  static __device__ Step step_of(float p, float q, float by_q, float d) {
    const bool small = fabsf(d) < 0.5f;
    const float near = p * (d * d * exp_series(d) * 0.5f), along = p == 0 ? 0 : p * d, far = q * by_q - p;
    return {small ? near + along : far, small ? near : far - along};
  }
  // (exp(d) - 1 - d) 2 / d^2 for |d| < 1/2.
  static __device__ float exp_series(float d) {
    float x = 1;
#pragma unroll
    for (int k = 8; k > 2; --k) x = fmaf(d * (1.0f / k), x, 1.0f);
    return x;
  }

  // close: whether the student's KL from the teacher is, so that the loss is left with too few digits.
  __device__ float jsd(Group& group, float temperature, float beta, bool& close) {
    float sum_s = 0, sum_t = 0, cross = 0, kl_r = 0, kl_q = 0;
    exponents(group, temperature);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float difference = s[e] - t[e];
      s[e] = exp2_flushed(s[e]);
      t[e] = exp2_flushed(t[e]);
      sum_s += s[e];
      sum_t += t[e];
      if (s[e] != 0) cross += s[e] * difference;
    }
    group.sum(sum_s, sum_t, cross);
    close = kLn2 * (cross / sum_s) + logf(sum_t / sum_s) < kClose;
    const float inverse_s = 1 / sum_s, inverse_t = 1 / sum_t;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float r = normal(s[e] * inverse_s), q = normal(t[e] * inverse_t);
      // log(r / m) = -log(1 + beta (q - r) / r): exactly 0 where q = r, and accurate where they are close.
      const float above_r = r == 0 ? 0 : beta * __fdividef(q - r, r);
      const float above_q = q == 0 ? 0 : (1 - beta) * __fdividef(r - q, q);
      // What m is above r adds up to nothing, so that no term need be negative: r (above_r - log(1 + above_r)).
      kl_r += r == 0 ? beta * q : r * log_excess(above_r);
      kl_q += q == 0 ? (1 - beta) * r : q * log_excess(above_q);
      s[e] = r;
      t[e] = r == 0 ? 0 : -log1pf(above_r);
    }
    group.sum(kl_r, kl_q);
    scale = (1 - beta) * temperature;
#pragma unroll
    for (int e = 0; e < kSize; ++e) s[e] *= t[e] - kl_r;
    return temperature * temperature * (beta * kl_q + (1 - beta) * kl_r);
  }

  // The same of rows that are close in KL(r || q), from the averaged rows as they are: of its terms none is negative.
  __device__ float close_jsd(Group& group, float temperature, float beta) {
    float max_s, max_t, sum_s = 0, sum_t = 0, cross = 0;
    tops(group, max_s, max_t);
    const float inverse = 1 / temperature, factor = kLog2E / temperature, apart = max_t - max_s;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float es = exp2_flushed((s[e] - max_s) * factor);
      sum_s += es;
      sum_t += exp2_flushed((t[e] - max_t) * factor);
      if (es != 0) cross += es * (((t[e] - s[e]) - apart) * inverse);
    }
    group.sum(sum_s, sum_t, cross);
    const float mean = cross / sum_s, by_t = expf(-mean);
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float es = exp2_flushed((s[e] - max_s) * factor), et = exp2_flushed((t[e] - max_t) * factor);
      sum += step_of(es, et, by_t, ((t[e] - s[e]) - apart) * inverse - mean).rest;
    }
    group.sum(sum);
    const float shift = mean + log1pf(sum / sum_s), inverse_s = 1 / sum_s, inverse_t = 1 / sum_t;
    float kl_r = 0, kl_q = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float r = normal(exp2_flushed((s[e] - max_s) * factor) * inverse_s);
      const float q = normal(exp2_flushed((t[e] - max_t) * factor) * inverse_t);
      const float u = ((t[e] - s[e]) - apart) * inverse - shift;  // log q - log r
      const bool small = fabsf(u) < 0.125f;
      const float more = u + u * u * exp_series(u) * 0.5f, m = r + beta * (q - r);
      const float above_r = small ? beta * more : r == 0 ? 0 : beta * __fdividef(q - r, r);
      const float above_q = small ? (beta - 1) * more / (1 + more) : q == 0 ? 0 : (1 - beta) * __fdividef(r - q, q);
      kl_r += r == 0 ? m : r * log_excess(above_r);
      kl_q += q == 0 ? m : q * log_excess(above_q);
      s[e] = r;
      t[e] = small ? log_excess(above_r) - above_r : r == 0 ? 0 : -log1pf(above_r);
    }
    group.sum(kl_r, kl_q);
    scale = (1 - beta) * temperature;
#pragma unroll
    for (int e = 0; e < kSize; ++e) s[e] *= t[e] - kl_r;
    return temperature * temperature * (beta * kl_q + (1 - beta) * kl_r);
  }

  // A share under what float divides by without overflow is none.
  static __device__ float normal(float share) { return share < 1.17549435e-38f ? 0 : share; }
  // y - log(1 + y)
  static __device__ float log_excess(float y) {
    if (!(fabsf(y) < 0.125f)) return y - log1pf(y);
    float x = 1.0f / 9;
#pragma unroll
    for (int k = 8; k > 1; --k) x = 1.0f / k - y * x;
    return y * y * x;
  }

  __device__ float mse(Group& group) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      s[e] -= t[e];
      sum += s[e] * s[e];
    }
    group.sum(sum);
    scale = 2;
    return sum;
  }

  __device__ float cosine(Group& group) {
    float ss = 0, tt = 0, st = 0, size_s = 1, size_t_ = 1;
    multiply(group, ss, tt, st);
    // Of a squared norm, as torch.nn.functional.cosine_similarity clamps it; a clamped norm is a constant.
    float floor_s = 1e-16f, floor_t = 1e-16f;
    if (!(ss < INFINITY && tt < INFINITY)) {  // too large to be squared, if it is not infinite
      float max_s = 0, max_t = 0;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        max_s = fmaxf(max_s, fabsf(s[e]));
        max_t = fmaxf(max_t, fabsf(t[e]));
      }
      group.max(max_s, max_t);
      if (!(ss < INFINITY) && max_s < INFINITY) size_s = max_s, floor_s = 0;
      if (!(tt < INFINITY) && max_t < INFINITY) size_t_ = max_t, floor_t = 0;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        s[e] /= size_s;
        t[e] /= size_t_;
      }
      multiply(group, ss, tt, st);
    }
    const bool same = ss == tt && ss > floor_s && size_s == size_t_;
    const float norms = same ? ss : sqrtf(fmaxf(ss, floor_s)) * sqrtf(fmaxf(tt, floor_t));
    const float along = ss > floor_s ? st / ss : 0;
    scale = 1 / norms / size_s;
#pragma unroll
    for (int e = 0; e < kSize; ++e) s[e] = s[e] * along - t[e];
    return ss != ss || tt != tt ? ss + tt : 1 - st / norms;  // fmaxf() drops a NaN
  }

 private:
  __device__ void multiply(Group& group, float& ss, float& tt, float& st) const {
    ss = tt = st = 0;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      ss += s[e] * s[e];
      tt += t[e] * t[e];
      st += s[e] * t[e];
    }
    group.sum(ss, tt, st);
  }

  int column_, dim_;
};

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
