// A pair of averaged rows in the registers of a warp or of a block, and its divergences. Formulas:
// vocabdistil/reference/span_loss.py. Where both rows are equal the gradient is exactly 0: each is written such that a
// fused multiply-add cannot break that.
#pragma once

#include "softmax.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

// How a thread's columns lie in memory: packs of N columns, of one side's dtype, in W words of 32 bits.
template <int N, int W>
struct Packs {
  static constexpr int columns = N, words = W;
};
// Calls f with the packs of a side; `width` columns of both sides make one. One code serves all dtypes, which are the
// same for a whole launch, so that the branches cost nothing: what a pair does between its loads and its stores is long.
template <class E, class F>
__device__ void with_packs(int width, F&& f) {
  if constexpr (sizeof(E) == 4)
    f(Packs<4, 4>{});
  else if (width == 8)
    f(Packs<8, 4>{});
  else
    f(Packs<4, 2>{});
}
template <class F>
__device__ void with_packs(DType dtype, int width, F&& f) {
  dtype == DType::f32 ? with_packs<float>(width, f) : with_packs<__half>(width, f);
}
template <class To, class From>
__device__ To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
template <class E>
struct Two {
  E low, high;
};

// The rows of a span in all layers, one after the other.
class Walk {
 public:
  __device__ Walk(const LayerTable& layers, const Span& span)
      : layers_(layers), span_(span), position_(span.start) {}
  __device__ bool more() const { return layer_ < layers_.count; }
  __device__ void next() {
    if (++position_ < span_.end) return;
    position_ = span_.start;
    ++layer_;
  }
  __device__ const char* at(int column) const { return layers_.at(layer_, position_, column); }
  __device__ DType dtype() const { return layers_.dtype; }
  __device__ float weight() const { return layers_.weight<float>(layer_); }

 private:
  const LayerTable& layers_;
  const Span& span_;
  int layer_ = 0, position_;
};

// A thread's share of a pair: kSize columns of both rows. They come in packs: those of a warp are consecutive, and a
// thread's 32 packs apart, a constant, so one address serves them all. Of rows that allow no packs, and of very wide
// ones, kPacked is false: columns one by one and kept in memory, which is slow but little code.
// Each divergence returns the loss and leaves its gradient in s, up to the factor `scale`. Of rows that are close the
// loss has too few digits left: it says so, and they are averaged anew for its second form, of whose terms none is
// negative (csrc/cpu/softmax.h). That form takes over the sums of the first and serves both directions of KL: the
// compiler copies all this for every column.
template <int kSize, bool kPacked>
struct Pair {
  static constexpr int kUnroll = kPacked ? kSize : 1;
  float s[kSize], t[kSize];
  float scale;

  __device__ Pair(int dim, int width)
      : width_(width), column_(threadIdx.x / 32 * (32 * kSize) + threadIdx.x % 32 * width) {
    const int packs = dim > column_ ? (dim - column_ + 32 * width - 1) / (32 * width) : 0;
    size_ = packs * width < kSize ? packs * width : kSize;
  }

  // A whole pack is inside, or none of it: 4 or 8 divide the hidden size.
  __device__ bool inside(int e) const { return (kPacked ? e / 4 * 4 : e) < size_; }

  // Averages both rows; columns past the end get `outside`. The loads of both sides are in flight together.
  __device__ void average(const LayerTable& student, const Span& student_span, const LayerTable& teacher,
                          const Span& teacher_span, bool mean, float outside) {
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] = t[e] = 0;
    Walk of_s(student, student_span), of_t(teacher, teacher_span);
#pragma unroll 1
    while (of_s.more() || of_t.more()) {
      uint32_t raw_s[kSize], raw_t[kSize];
      if (of_s.more()) fetch(raw_s, of_s);
      if (of_t.more()) fetch(raw_t, of_t);
      if (of_s.more()) add(s, raw_s, of_s);
      if (of_t.more()) add(t, raw_t, of_t);
    }
    if (mean) {
      divide(s, student_span.end - student_span.start);
      divide(t, teacher_span.end - teacher_span.start);
    }
    if (size_ == kSize) return;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e)
      if (!inside(e)) s[e] = t[e] = outside;
  }

  // Writes weight * s to the rows of the span.
  __device__ void store_gradient(void* grad, const LayerTable& student, int dim, float weight,
                                 const Span& span) const {
    char* const out = static_cast<char*>(grad) + column_ * student.item;
    const int64_t stride = static_cast<int64_t>(dim) * student.item;
    with_element(student.dtype, [&](auto element) {
      using E = decltype(element);
      [[maybe_unused]] uint32_t raw[kSize];
      if constexpr (kPacked) encode<E>(raw, weight);
#pragma unroll 1  // one to three rows as a rule
      for (int64_t i = span.start; i < span.end; ++i) {
        char* const row = out + i * stride;
        if constexpr (!kPacked) {
#pragma unroll 1
          for (int e = 0; e < kSize; ++e)
            if (inside(e)) reinterpret_cast<E*>(row)[e * 32] = store<E>(weight * s[e]);
        } else {
          with_packs<E>(width_, [&](auto packs) {
            using P = decltype(packs);
#pragma unroll
            for (int k = 0; k < kSize / P::columns; ++k) {
              Pack<uint32_t, P::words> pack;
#pragma unroll
              for (int w = 0; w < P::words; ++w) pack.value[w] = raw[k * P::words + w];
              if (inside(k * P::columns)) reinterpret_cast<Pack<uint32_t, P::words>*>(row)[k * 32] = pack;
            }
          });
        }
      }
    });
  }

  // Asks for the first rows of a span, layer by layer, to lie in the L2 cache when their turn comes: 128 bytes a thread,
  // and no register for what is under way. At most 4 rows or 8 KB a warp, as all warps of a GPU ask at once: what is more
  // would push out what others have asked for.
  static __device__ void ask_for(const LayerTable& layers, const Span& span, int dim) {
    const int bytes = dim * layers.item, most = 8192 / 32 * blockDim.x;
    int left = 4 * bytes < most ? 4 * bytes : most;
#pragma unroll 1
    for (int l = 0; l < layers.count; ++l)
#pragma unroll 1
      for (int i = span.start; i < span.end; ++i) {
        for (int d = threadIdx.x * 128; d < bytes; d += blockDim.x * 128) prefetch(layers.at(l, i, 0) + d);
        if ((left -= bytes) < bytes) return;
      }
  }
  // The largest values of both rows, which every divergence of softmaxes asks for first.
  __device__ void tops(Group& group) {
    top_s_ = top_t_ = -INFINITY;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      top_s_ = fmaxf(top_s_, s[e]);
      top_t_ = fmaxf(top_t_, t[e]);
    }
    group.max(top_s_, top_t_);
  }
  // Of one column exp((x - max x) / T) of both sides, and how far the teacher's exponent is above the student's: exact
  // where the values are close, as their difference is taken first.
  struct Column {
    float s, t, above;
  };
  __device__ Column column_of(int e, const Temperature& temperature) const {
    return {exp2_flushed((s[e] - top_s_) * temperature.in_log2), exp2_flushed((t[e] - top_t_) * temperature.in_log2),
            ((t[e] - s[e]) - (top_t_ - top_s_)) * temperature.inverse};
  }

  // The exponentials of both sides: their sums, the student's in s, kKept in t, and the mean of the exponents' differences
  // by the shares of kP.
  template <float Column::*kP, float Column::*kKept>
  __device__ void exponentials(Group& group, const Temperature& temperature) {
    float cross = 0;
    sum_s_ = sum_t_ = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      const Column x = column_of(e, temperature);
      s[e] = x.s;
      t[e] = x.*kKept;
      sum_s_ += x.s;
      sum_t_ += x.t;
      if (x.*kP != 0) cross += x.*kP * x.above;  // no mass, no contribution, even where the difference is infinite
    }
    group.sum(sum_s_, sum_t_, cross);
    mean_ = cross / (kP == &Column::t ? sum_t_ : sum_s_);
  }

  __device__ float kl(Group& group, const Temperature& temperature, bool& close) {
    exponentials<&Column::t, &Column::t>(group, temperature);
    const float ratio = sum_s_ / sum_t_, loss = mean_ + logf(ratio);
    close = loss < kClose;
    scale = temperature.value / sum_s_;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] -= t[e] * ratio;
    return temperature.squared * loss;
  }

  __device__ float reverse_kl(Group& group, const Temperature& temperature, bool& close) {
    exponentials<&Column::s, &Column::above>(group, temperature);
    const float loss = logf(sum_t_ / sum_s_) - mean_;
    close = loss < kClose;
    scale = temperature.value / sum_s_;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] = s[e] == 0 ? 0 : s[e] * (mean_ - t[e]);
    return temperature.squared * loss;
  }

  // Of rows that are close: sum_i p_i exp d_i - 1, p the teacher's shares or (reverse) the student's, where log q_i is
  // log p_i + d_i but for a constant and d has the mean 0. `keep` takes a column, its d and its p (exp d - 1).
  template <class Keep>
  __device__ float excess(Group& group, const Temperature& temperature, bool reverse, Keep&& keep) const {
    const float sum_p = reverse ? sum_s_ : sum_t_, ratio = sum_p / (reverse ? sum_t_ : sum_s_);
    const float by_q = ratio * expf((reverse ? -mean_ : mean_) - logf(ratio));
    float sum = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      const Column x = column_of(e, temperature);
      const float d = reverse ? x.above - mean_ : mean_ - x.above;
      const Step step = step_of(reverse ? x.s : x.t, reverse ? x.t : x.s, by_q, d);
      sum += step.rest;
      keep(e, x, d, step.first);
    }
    group.sum(sum);
    return sum / sum_p;
  }

  // KL(p || q) of rows that are close, p the teacher or (reverse) the student.
  __device__ float close_kl(Group& group, const Temperature& temperature, bool reverse) {
    const float more = excess(group, temperature, reverse, [&](int e, const Column& x, float d, float first) {
      s[e] = !reverse ? first : x.s == 0 ? 0 : -x.s * d;
      t[e] = reverse ? 0 : x.t;
    });
    scale = temperature.value / (reverse ? sum_s_ : sum_t_ * (1 + more));
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] -= t[e] * more;
    return temperature.squared * log1pf(more);
  }
  // close: in the student's KL from the teacher.
  __device__ float jsd(Group& group, const Temperature& temperature, float beta, bool& close) {
    exponentials<&Column::s, &Column::t>(group, temperature);
    close = logf(sum_t_ / sum_s_) - mean_ < kClose;
    return jsd_of(group, temperature, beta, [&](int e) { return shares_of(s[e], t[e]); });
  }

  // The same of rows that are close.
  __device__ float close_jsd(Group& group, const Temperature& temperature, float beta) {
    const float shift = mean_ + log1pf(excess(group, temperature, true, [](auto...) {}));
    return jsd_of(group, temperature, beta, [&](int e) {
      const Column x = column_of(e, temperature);
      Shares shares = shares_of(x.s, x.t);
      const float u = x.above - shift;  // log q - log r
      if (fabsf(u) < 0.125f) {
        const float more = u + u * u * exp_series(u) * 0.5f;
        shares.more_r = more;
        shares.more_q = __fdividef(-more, 1 + more);
      }
      return shares;
    });
  }

  // A column's r of the student and q of the teacher, and (q - r) / r and (r - q) / q, 0 without a divisor.
  struct Shares {
    float r, q, more_r, more_q;
  };
  __device__ Shares shares_of(float exp_s, float exp_t) const {
    const float r = normal(exp_s * (1 / sum_s_)), q = normal(exp_t * (1 / sum_t_));
    return {r, q, r == 0 ? 0 : __fdividef(q - r, r), q == 0 ? 0 : __fdividef(r - q, q)};
  }
  // A share under what float divides by without overflow is none.
  static __device__ float normal(float share) { return share < 1.17549435e-38f ? 0 : share; }

  template <class F>
  __device__ float jsd_of(Group& group, const Temperature& temperature, float beta, F&& shares) {
    float kl_r = 0, kl_q = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      const Shares x = shares(e);
      // log(m / r) = log(1 + beta (q - r) / r): exactly 0 where q = r, and accurate where they are close.
      const Logs of_r = logs_of(beta * x.more_r), of_q = logs_of((1 - beta) * x.more_q);
      // What m is above r adds up to nothing, so that no term need be negative: m - r - r log(m / r).
      kl_r += x.r == 0 ? beta * x.q : x.r * of_r.excess;
      kl_q += x.q == 0 ? (1 - beta) * x.r : x.q * of_q.excess;
      s[e] = x.r;
      t[e] = of_r.log;
    }
    group.sum(kl_r, kl_q);
    scale = (beta - 1) * temperature.value;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] *= t[e] + kl_r;
    return temperature.squared * (beta * kl_q + (1 - beta) * kl_r);
  }

  // log(1 + y) and y - log(1 + y) for y > -1. With 1 + y = 2^k (1 + m), m from -1/4 to 1/2, one polynomial serves both:
  // m^2 times it is m - log(1 + m) to 6e-8 of its value, so that neither loses digits where y is small: there m = y.
  // log1pf() alone has twice the instructions, and a branch.
  struct Logs {
    float log, excess;
  };
  static __device__ Logs logs_of(float y) {
    constexpr int kMantissa = (1 << 23) - 1, kOne = 127 << 23, kThreeQuarters = kOne - (1 << 22);
    const int power = (same_bits<int>(1 + y) - kThreeQuarters) & ~kMantissa;  // k 2^23
    const float down = same_bits<float>(kOne - power);                        // 2^-k
    const float m = fmaf(y, down, down - 1), log_power = static_cast<float>(power) * (kLn2 / (1 << 23));
    float x = 0.0480125025f;
    for (const float c : {-0.106912151f, 0.131350651f, -0.144323364f, 0.166459084f, -0.199937478f, 0.250002027f,
                          -0.333333939f, 0.5f})
      x = fmaf(x, m, c);
    return {log_power + fmaf(-m * m, x, m), fmaf(m * m, x, (y - m) - log_power)};
  }

  __device__ float mse(Group& group) {
    float sum = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      s[e] -= t[e];
      sum += s[e] * s[e];
    }
    group.sum(sum);
    scale = 2;
    return sum;
  }

  __device__ float cosine(Group& group) {
    float ss, tt, st, size_s = 1, size_t_ = 1;
    // Of a squared norm, as torch.nn.functional.cosine_similarity clamps it; a clamped norm is a constant.
    float floor_s = 1e-16f, floor_t = 1e-16f;
#pragma unroll 1
    for (bool scaled = false;; scaled = true) {
      ss = tt = st = 0;
#pragma unroll kUnroll
      for (int e = 0; e < kSize; ++e) {
        ss += s[e] * s[e];
        tt += t[e] * t[e];
        st += s[e] * t[e];
      }
      group.sum(ss, tt, st);
      if (scaled || (ss < INFINITY && tt < INFINITY)) break;
      constexpr float kSmaller = 1.0f / (uint64_t{1} << 60) / (1 << 12);  // too large to be squared, if not infinite
      if (!(ss < INFINITY)) size_s = kSmaller, floor_s = 0;
      if (!(tt < INFINITY)) size_t_ = kSmaller, floor_t = 0;
#pragma unroll kUnroll
      for (int e = 0; e < kSize; ++e) {
        s[e] *= size_s;
        t[e] *= size_t_;
      }
    }
    const bool same = ss == tt && ss > floor_s && size_s == size_t_;
    const float norms = same ? ss : sqrtf(fmaxf(ss, floor_s)) * sqrtf(fmaxf(tt, floor_t));
    const float along = ss > floor_s ? st / ss : 0;
    scale = size_s / norms;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] = s[e] * along - t[e];
    return ss != ss || tt != tt ? ss + tt : 1 - st / norms;  // fmaxf() drops a NaN
  }

 private:
  __device__ void fetch(uint32_t (&raw)[kSize], const Walk& walk) const {
    if constexpr (kPacked) {
      const char* row = walk.at(column_);
      with_packs(walk.dtype(), width_, [&](auto packs) {
        using P = decltype(packs);
#pragma unroll
        for (int k = 0; k < kSize / P::columns; ++k) {
          Pack<uint32_t, P::words> pack{};
          if (inside(k * P::columns)) pack = reinterpret_cast<const Pack<uint32_t, P::words>*>(row)[k * 32];
#pragma unroll
          for (int w = 0; w < P::words; ++w) raw[k * P::words + w] = pack.value[w];
        }
      });
    }
  }
  template <class E>
  __device__ void encode(uint32_t (&raw)[kSize], float weight) const {
    if constexpr (sizeof(E) == 4) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) raw[e] = same_bits<uint32_t>(weight * s[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; e += 2)
        raw[e / 2] = same_bits<uint32_t>(Two<E>{store<E>(weight * s[e]), store<E>(weight * s[e + 1])});
    }
  }
  __device__ void add(float (&x)[kSize], const uint32_t (&raw)[kSize], Walk& walk) const {
    const float weight = walk.weight();
    with_element(walk.dtype(), [&](auto element) {
      using E = decltype(element);
      if constexpr (!kPacked) {
        const E* row = reinterpret_cast<const E*>(walk.at(column_));
#pragma unroll 1
        for (int e = 0; e < kSize; ++e)
          if (inside(e)) x[e] = fmaf(weight, load<float>(row[e * 32]), x[e]);
      } else if constexpr (sizeof(E) == 4) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) x[e] = fmaf(weight, same_bits<float>(raw[e]), x[e]);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; e += 2) {
          const auto two = same_bits<Two<E>>(raw[e / 2]);
          x[e] = fmaf(weight, load<float>(two.low), x[e]);
          x[e + 1] = fmaf(weight, load<float>(two.high), x[e + 1]);
        }
      }
    });
    walk.next();
  }
  // Once, after adding up: a sum of shares rounds more where rows have a large part in common.
  static __device__ void divide(float (&x)[kSize], int count) {
    if (count == 1) return;
    const float share = 1.0f / static_cast<float>(count);
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) x[e] *= share;
  }

  int width_, column_;          // of a pack; the first of this thread
  int size_;                    // how many of this thread's columns lie within the row
  float top_s_, top_t_;         // the largest values
  float sum_s_, sum_t_, mean_;  // of the exponentials; of the exponents' differences by the first side's shares
};

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
