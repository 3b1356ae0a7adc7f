#pragma once
#include "cuda_bf16.h"

using __half = vocabdistil::host::f16;
inline float __half2float(__half x) { return vocabdistil::host::load(x); }
inline __half __float2half_rn(float x) { return vocabdistil::host::store<__half>(x); }
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
