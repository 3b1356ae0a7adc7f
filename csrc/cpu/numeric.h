// Element types, conversions and vectorisable elementary functions, compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../ops.h"

#define VD_SIMD _Pragma("omp simd")

namespace vocabdistil {
namespace VD_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c, fused where the CPU has it.
inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double madd(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float load(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Scaling by 2^112 turns the half's exponent bias into the float's and is right for subnormals too.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = bit_cast<uint32_t>(scaled) | 0x7f800000u;  // infinities and NaN
  return bit_cast<float>((magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(scaled)) | sign);
}

template <class T>
inline T store(double x) {
  return static_cast<T>(x);
}
template <class T>
inline T store(float x) {
  return static_cast<T>(x);
}
template <>
inline bf16 store<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
inline f16 store<f16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias, round to nearest even. Subnormal ones: the float adder rounds at 2^-24 for us.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
}
template <>
inline bf16 store<bf16>(double x) {
  return store<bf16>(static_cast<float>(x));
}
template <>
inline f16 store<f16>(double x) {
  return store<f16>(static_cast<float>(x));
}

// 2^x for x <= 0 (or a rounding above it) to about 1 ulp; results under 2^-126 are flushed to 0; NaN stays NaN.
inline float exp2_nonpositive(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which ends in the lowest bits
  const float f = x - (shifted - 12582912.0f);
  float p = 1.53458124e-4f;  // minimax for the relative error on [-1/2, 1/2], 1.9e-9
  p = madd(p, f, 1.33999309e-3f);
  p = madd(p, f, 9.61848907e-3f);
  p = madd(p, f, 5.55032864e-2f);
  p = madd(p, f, 2.40226462e-1f);
  p = madd(p, f, 6.93147182e-1f);
  p = madd(p, f, 1.0f);
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -126.0f ? 0.0f : p * power;
}
inline double exp2_nonpositive(double x) { return std::exp2(x); }

// exp(x) for x <= 0; the relative error grows with -x, as 1e-7 (1 + |x|).
inline float exp_nonpositive(float x) { return exp2_nonpositive(x * 1.44269504f); }
inline double exp_nonpositive(double x) { return std::exp(x); }

// log(x) for normal positive x to about 1 ulp (Cephes logf); NaN stays NaN.
inline float log_positive(float x) {
  const float floored = x < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : x;
  const uint32_t bits = bit_cast<uint32_t>(floored);
  // Exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = bit_cast<float>(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = madd(p, m, -1.1514610310e-1f);
  p = madd(p, m, 1.1676998740e-1f);
  p = madd(p, m, -1.2420140846e-1f);
  p = madd(p, m, 1.4249322787e-1f);
  p = madd(p, m, -1.6668057665e-1f);
  p = madd(p, m, 2.0000714765e-1f);
  p = madd(p, m, -2.4999993993e-1f);
  p = madd(p, m, 3.3333331174e-1f);
  const float exponent = static_cast<float>(e);
  float y = m * z * p;
  y = madd(exponent, -2.12194440e-4f, y);
  y = madd(-0.5f, z, y);
  const float result = madd(exponent, 0.693359375f, m + y);
  return x == x ? result : x;
}
inline double log_positive(double x) { return std::log(x); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline size_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Calls f(T{}) with the element type of a dtype code.
template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

// The same where the type is no wider than Acc.
template <class Acc, class F>
inline void with_type_within(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64:
      if constexpr (sizeof(Acc) == sizeof(double)) return f(double{});
  }
}

}  // namespace VD_ISA
}  // namespace vocabdistil
