// What losses of a softmax share: exponentials, reductions over the threads of a pair, and the terms of rows that are
// close (csrc/cpu/softmax.h).
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

// a / b, rounded, so 1 where both are equal: of numbers that are far from the largest and the smallest, which a division
// has to look for.
__device__ float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = fmaf(r, fmaf(-b, r, 1.0f), r);
  const float q = a * r;
  return fmaf(fmaf(-b, q, a), r, q);
#else
  return a / b;
#endif
}

// sum += p x, but for no mass p nothing, even where x is infinite. The compiler would branch.
__device__ void add_product(float& sum, float p, float x) {
#ifdef __CUDA_ARCH__
  asm("{ .reg .pred some; setp.neu.f32 some, %1, 0f00000000; @some fma.rn.f32 %0, %1, %2, %0; }"
      : "+f"(sum)
      : "f"(p), "f"(x));
#else
  if (p != 0) sum = fmaf(p, x, sum);
#endif
}

inline __device__ bool any_of_warp(bool x) { return __ballot_sync(0xffffffffu, x) != 0; }

// Sums or maxima over the threads that share a pair, in a fixed order, the same in all of them: 8 or 16 neighbours of a
// warp, a warp or a block. Whole warps call this, as a shuffle of some lanes would have to look for them first.
class Group {
 public:
  __device__ explicit Group(float4 (*parts)[32]) : parts_(parts) {}

  template <class Op, class... Float>
  __device__ void reduce(Op op, Float&... value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2)
      if (mask < 8 || mask < static_cast<int>(blockDim.x))
        ((value = op(value, __shfl_xor_sync(0xffffffffu, value, mask))), ...);
    if (blockDim.x > 32) across_warps(op, value...);
  }
  template <class... Float>
  __device__ void sum(Float&... value) {
    reduce([](float x, float y) { return x + y; }, value...);
  }
  template <class... Float>
  __device__ void max(Float&... value) {
    reduce([](float x, float y) { return fmaxf(x, y); }, value...);
  }

 private:
  template <class Op>
  __device__ void across_warps(Op op, float& a, float& b, float& c) {
    float4* parts = parts_[turn_];
    turn_ ^= 1;  // two buffers: the next but one reduction is behind a barrier that follows the reads of this one
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = make_float4(a, b, c, 0);
    __syncthreads();
    a = parts[0].x, b = parts[0].y, c = parts[0].z;
#pragma unroll 1  // three more, as a rule
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

// What all threads would form.
struct Temperature {
  float value, squared, inverse, in_log2;
};
inline Temperature temperature_of(double x) {
  const float value = static_cast<float>(x);
  return {value, value * value, 1 / value, kLog2E / value};
}

// (exp(d) - 1 - d) / d^2 for |d| < 1/2.
inline __device__ float exp_series(float d) {
  float x = 1.0f / 40320;
  for (const float c : {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) x = fmaf(x, d, c);
  return x;
}
// Of one column p (exp d - 1), p d and p (exp d - 1 - d); by_q turns q's exponential into p exp d.
struct Step {
  float first, along, rest;
};
inline __device__ Step step_of(float p, float q, float by_q, float d) {
  const bool small = fabsf(d) < 0.5f;
  const float near = p * (d * d * exp_series(d)), along = p == 0 ? 0 : p * d, far = q * by_q - p;
  return {small ? near + along : far, along, small ? near : far - along};
}

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
