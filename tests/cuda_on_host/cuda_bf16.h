#pragma once
#ifndef VD_ISA
#define VD_ISA host
#endif
#include "../../csrc/cpu/numeric.h"

using __nv_bfloat16 = vocabdistil::host::bf16;
inline float __bfloat162float(__nv_bfloat16 x) { return vocabdistil::host::load(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return vocabdistil::host::store<__nv_bfloat16>(x); }
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
