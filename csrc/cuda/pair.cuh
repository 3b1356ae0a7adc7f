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

// A thread's share of a pair: kSize columns of both rows. They come in packs: those of the pair's lanes in a warp are
// consecutive, and a thread's own as many packs apart. Of rows that allow no packs, and of very wide ones, kPacked is
// false: columns one by one and kept in memory, which is slow but little code.
//
// Each divergence leaves its gradient in s, up to the factor `scale`. Those of softmaxes have two forms. The first keeps
// the exponentials there, but of rows that are close the loss has too few digits left; of the terms of the second none is
// negative (csrc/cpu/softmax.h), and it needs the averages once more. Which of them a pair needs only its sums tell, so
// the caller says which one it expects, averages anew where that was wrong, and then takes the other.
template <int kSize, bool kPacked>
struct Pair {
  static constexpr int kUnroll = kPacked ? kSize : 1;
  float s[kSize], t[kSize];
  float scale;

  __device__ Pair(int dim, int width)
      : width_(width), lanes_(blockDim.x < 32 ? blockDim.x : 32),
        column_(threadIdx.x / 32 * (32 * kSize) + threadIdx.x % 32 * width) {
    const int step = lanes_ * width, packs = dim > column_ ? (dim - column_ + step - 1) / step : 0;
    size_ = packs * width < kSize ? packs * width : kSize;
    // A pair with an empty side goes through all that its warp goes through.
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) s[e] = t[e] = 0;
  }

  // A whole pack is inside, or none of it: 4 or 8 divide the hidden size.
  __device__ bool inside(int e) const { return (kPacked ? e / 4 * 4 : e) < size_; }

  // Averages both rows, neither of an empty span; columns past the end get `outside`. The loads of both sides are in
  // flight together.
  __device__ void average(const LayerTable& student, const Span& student_span, const LayerTable& teacher,
                          const Span& teacher_span, bool mean, float outside) {
    Walk of_s(student, student_span), of_t(teacher, teacher_span);
    uint32_t raw_s[kSize], raw_t[kSize];
    fetch(raw_s, of_s);
    fetch(raw_t, of_t);
    begin(s, raw_s, of_s);
    begin(t, raw_t, of_t);
#pragma unroll 1
    while (of_s.more() || of_t.more()) {
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
            each_pack<P>([&](int k) {
              Pack<uint32_t, P::words> pack;
#pragma unroll
              for (int w = 0; w < P::words; ++w) pack.value[w] = raw[k * P::words + w];
              reinterpret_cast<Pack<uint32_t, P::words>*>(row)[k * lanes_] = pack;
            });
          });
        }
      }
    });
  }

  // Asks for the first rows of a span, layer by layer, to lie in the L2 cache when their turn comes: 128 bytes a thread,
  // which has no more columns, and no register for what is under way. At most `rows`: what is more would push out what
  // others have asked for, as all warps of a GPU ask at once.
  static __device__ void ask_for(const LayerTable& layers, const Span& span, int dim, int rows) {
    static_assert(kSize <= 32, "more than 128 bytes");
    const int at = threadIdx.x * 128;
    if (at >= dim * layers.item) return;
#pragma unroll 1
    for (int l = 0; l < layers.count; ++l) {
      const char* row = layers.at(l, span.start, 0) + at;
#pragma unroll 1
      for (int i = span.start; i < span.end; ++i, row += layers.stride[l]) {
        if (--rows < 0) return;
        prefetch(row);
      }
    }
  }
  // The largest values of both rows, which every divergence of softmaxes asks for first.
  __device__ void tops(Group& group, const Temperature& temperature) {
    float top_s = -INFINITY, top_t = -INFINITY;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      top_s = fmaxf(top_s, s[e]);
      top_t = fmaxf(top_t, t[e]);
    }
    group.max(top_s, top_t);
    top_s_ = top_s;
    top_t_ = top_t;
    // Far below where products with the temperature overflow.
    constexpr float kMost = 1 << 24;
    if (fabsf(top_s * temperature.in_log2) < kMost && fabsf(top_t * temperature.in_log2) < kMost) return;
    top_s_ = top_t_ = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      s[e] -= top_s;
      t[e] -= top_t;
    }
  }
  // Of one column exp((x - max x) / T) of both sides, and how far the teacher's exponent is above the student's, as one
  // of 2: exact where the values are close, as their difference is taken first; what its rounded shift lacks is common to
  // a row. The exponentials are shifted first, so that the largest is exactly 1: rows of one large column need that.
  struct Column {
    float s, t, above;
  };
  __device__ Column column_of(int e, const Temperature& temperature) const {
    const float in_log2 = temperature.in_log2;
    return {exp2_flushed((s[e] - top_s_) * in_log2), exp2_flushed((t[e] - top_t_) * in_log2),
            fmaf(t[e] - s[e], in_log2, (top_s_ - top_t_) * in_log2)};
  }

  // Keeps the compiler from holding what it has formed of all columns until that is asked for again.
  __device__ void forget() {
#ifdef __CUDA_ARCH__
    if constexpr (kPacked) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) asm volatile("" : "+f"(s[e]), "+f"(t[e]));
    }
#endif
  }

  // The sums of the exponentials of both sides, and the mean of the exponents' differences by the shares of the teacher
  // or (reverse) of the student. `keep` takes a column and its exponentials.
  template <bool kReverse, class Keep>
  __device__ void sums(Group& group, const Temperature& temperature, Keep&& keep) {
    forget();
    float cross = 0;
    sum_s_ = sum_t_ = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      Column x = column_of(e, temperature);
      sum_s_ += x.s;
      sum_t_ += x.t;
      // No mass, no contribution, even where the difference is infinite.
      if constexpr (kReverse) {
        if (x.s == 0) x.above = 0;
        cross = fmaf(x.s, x.above, cross);
      } else {
        add_product(cross, x.t, x.above);
      }
      keep(e, x);
    }
    group.sum(sum_s_, sum_t_, cross);
    mean_ = quotient(cross, kReverse ? sum_s_ : sum_t_);
    if (mean_ != mean_) mean_ = cross;  // infinite where one side has no mass and the other has some
  }
  // KL of these sums, from the teacher or (reverse) from the student.
  template <bool kReverse>
  __device__ float kl_of_sums() const {
    const float ratio = kReverse ? quotient(sum_t_, sum_s_) : quotient(sum_s_, sum_t_);
    return fmaf(kReverse ? -kLn2 : kLn2, mean_, logf(ratio));
  }
  // KL from the teacher or (reverse) from the student. close: which form is expected; returns whether the rows are close.
  template <bool kReverse>
  __device__ bool kl(Group& group, const Temperature& temperature, bool close, float& loss) {
    if (close) {
      sums<kReverse>(group, temperature, [](auto...) {});
      close = kl_of_sums<kReverse>() < kClose;
      loss = close_kl<kReverse>(group, temperature);
      return close;
    }
    sums<kReverse>(group, temperature, [&](int e, const Column& x) {
      s[e] = x.s;
      t[e] = kReverse ? x.above : x.t;
    });
    loss = kl_of_sums<kReverse>();
    close = loss < kClose;
    loss *= temperature.squared;
    scale = quotient(kReverse ? kLn2 * temperature.value : temperature.value, sum_s_);
    const float ratio = quotient(sum_s_, sum_t_);
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      if constexpr (kReverse)
        s[e] *= mean_ - t[e];
      else
        s[e] = fmaf(-ratio, t[e], s[e]);
    }
    return close;
  }

  // Of rows that are close: sum_i p_i exp d_i - 1, p the teacher's shares or (reverse) the student's, where log q_i is
  // log p_i + d_i but for a constant and d has the mean 0. `keep` takes a column, its exponentials and its step.
  template <bool kReverse, class Keep>
  __device__ float excess(Group& group, const Temperature& temperature, Keep&& keep) {
    forget();
    const float sum_p = kReverse ? sum_s_ : sum_t_, ratio = quotient(sum_p, kReverse ? sum_t_ : sum_s_);
    const float by_q = ratio * expf(fmaf(kReverse ? -kLn2 : kLn2, mean_, -logf(ratio)));
    const float shift = (kReverse ? -kLn2 : kLn2) * mean_;
    float sum = 0;
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) {
      const Column x = column_of(e, temperature);
      const float d = fmaf(kReverse ? kLn2 : -kLn2, x.above, shift);
      const Step step = step_of(kReverse ? x.s : x.t, kReverse ? x.t : x.s, by_q, d);
      sum += step.rest;
      keep(e, x, step);
    }
    group.sum(sum);
    return quotient(sum, sum_p);
  }

  // KL(p || q) of rows that are close, p the teacher or (reverse) the student.
  template <bool kReverse>
  __device__ float close_kl(Group& group, const Temperature& temperature) {
    const float more = excess<kReverse>(group, temperature, [&](int e, const Column& x, const Step& step) {
      s[e] = kReverse ? -step.along : step.first;
      t[e] = x.t;
    });
    scale = quotient(temperature.value, kReverse ? sum_s_ : sum_t_ * (1 + more));
    if constexpr (!kReverse) {
#pragma unroll kUnroll
      for (int e = 0; e < kSize; ++e) s[e] = fmaf(-more, t[e], s[e]);
    }
    return temperature.squared * log1pf(more);
  }
  // close: in the student's KL from the teacher.
  __device__ bool jsd(Group& group, const Temperature& temperature, float beta, bool close, float& loss) {
    if (close) {
      sums<true>(group, temperature, [](auto...) {});
      close = kl_of_sums<true>() < kClose;
      loss = close_jsd(group, temperature, beta);
      return close;
    }
    sums<true>(group, temperature, [&](int e, const Column& x) {
      s[e] = x.s;
      t[e] = x.t;
    });
    const float of_s = quotient(1, sum_s_), of_t = quotient(1, sum_t_);
    loss = jsd_of(group, temperature, beta, [&](int e) { return shares_of(s[e] * of_s, t[e] * of_t); });
    return kl_of_sums<true>() < kClose;
  }

  // The same of rows that are close.
  __device__ float close_jsd(Group& group, const Temperature& temperature, float beta) {
    const float shift = fmaf(kLn2, mean_, log1pf(excess<true>(group, temperature, [](auto...) {})));
    forget();
    const float of_s = quotient(1, sum_s_), of_t = quotient(1, sum_t_);
    return jsd_of(group, temperature, beta, [&](int e) {
      const Column x = column_of(e, temperature);
      Shares shares = shares_of(x.s * of_s, x.t * of_t);
      const float u = fmaf(kLn2, x.above, -shift);  // log q - log r
      if (fabsf(u) < 0.125f) {
        const float more = fmaf(u * u, exp_series(u), u);
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
  static __device__ Shares shares_of(float share_s, float share_t) {
    const float r = normal(share_s), q = normal(share_t);
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
      if (scaled || !any_of_warp(!(ss < INFINITY && tt < INFINITY))) break;
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
  // Calls f with the number of each pack that lies within the row.
  template <class P, class F>
  __device__ void each_pack(F&& f) const {
    if (size_ == kSize) {  // no question per pack, then
#pragma unroll
      for (int k = 0; k < kSize / P::columns; ++k) f(k);
    } else {
#pragma unroll
      for (int k = 0; k < kSize / P::columns; ++k)
        if (inside(k * P::columns)) f(k);
    }
  }
  __device__ void fetch(uint32_t (&raw)[kSize], const Walk& walk) const {
    if constexpr (kPacked) {
      const char* row = walk.at(column_);
      with_packs(walk.dtype(), width_, [&](auto packs) {
        using P = decltype(packs);
        each_pack<P>([&](int k) {
          const auto pack = reinterpret_cast<const Pack<uint32_t, P::words>*>(row)[k * lanes_];
#pragma unroll
          for (int w = 0; w < P::words; ++w) raw[k * P::words + w] = pack.value[w];
        });
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
        raw[e / 2] = same_bits<uint32_t>(store_two(E{}, weight * s[e], weight * s[e + 1]));
    }
  }
  // The first row, as a rule the only one and with the weight 1, needs no arithmetic.
  __device__ void begin(float (&x)[kSize], const uint32_t (&raw)[kSize], Walk& walk) const {
    const float weight = walk.weight();
    each_column(raw, walk, [&](int e, float value) { x[e] = value; });
    if (weight != 1) {
#pragma unroll kUnroll
      for (int e = 0; e < kSize; ++e) x[e] *= weight;
    }
    walk.next();
  }
  __device__ void add(float (&x)[kSize], const uint32_t (&raw)[kSize], Walk& walk) const {
    const float weight = walk.weight();
    each_column(raw, walk, [&](int e, float value) { x[e] = fmaf(weight, value, x[e]); });
    walk.next();
  }
  // Calls f with every column and its value.
  template <class F>
  __device__ void each_column(const uint32_t (&raw)[kSize], const Walk& walk, F&& f) const {
    with_element(walk.dtype(), [&](auto element) {
      using E = decltype(element);
      if constexpr (!kPacked) {
        const E* row = reinterpret_cast<const E*>(walk.at(column_));
#pragma unroll 1
        for (int e = 0; e < kSize; ++e) f(e, inside(e) ? load<float>(row[e * 32]) : 0);
      } else if constexpr (sizeof(E) == 4) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) f(e, same_bits<float>(raw[e]));
      } else {
#pragma unroll
        for (int e = 0; e < kSize; e += 2) {
          const auto two = same_bits<Two<E>>(raw[e / 2]);
          f(e, load<float>(two.low));
          f(e + 1, load<float>(two.high));
        }
      }
    });
  }
  // Once, after adding up: a sum of shares rounds more where rows have a large part in common.
  static __device__ void divide(float (&x)[kSize], int count) {
    if (count == 1) return;
    const float share = quotient(1, static_cast<float>(count));
#pragma unroll kUnroll
    for (int e = 0; e < kSize; ++e) x[e] *= share;
  }

  int width_, lanes_, column_;  // of a pack; how many of a warp share the pair; the first column of this thread
  int size_;                    // how many of this thread's columns lie within the row
  float top_s_, top_t_;         // the largest values
  float sum_s_, sum_t_, mean_;  // of the exponentials; of the exponents' differences by the first side's shares
};

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
