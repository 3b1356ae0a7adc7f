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

// (exp(d) - 1 - d) 2 / d^2 for |d| < 1/2.
inline __device__ float exp_series(float d) {
  float x = 1;
#pragma unroll
  for (int k = 8; k > 2; --k) x = fmaf(d * (1.0f / k), x, 1.0f);
  return x;
}
// Of one column p (exp d - 1) and p (exp d - 1 - d); by_q turns q's exponential into p exp d.
struct Step {
  float first, rest;
};
inline __device__ Step step_of(float p, float q, float by_q, float d) {
  const bool small = fabsf(d) < 0.5f;
  const float near = p * (d * d * exp_series(d) * 0.5f), along = p == 0 ? 0 : p * d, far = q * by_q - p;
  return {small ? near + along : far, small ? near : far - along};
}

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
