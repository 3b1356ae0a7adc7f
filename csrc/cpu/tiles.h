// The register tile of a matrix product: M rows times N vectors of columns stay in registers while the inner dimension
// runs. One operand is read element by element where it lies, so that rows chosen by an index are never copied; the
// other a vector at a time. Larger products are loops over tiles that keep their operands in the cache.
#pragma once

#include "numeric.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace vocabdistil {
namespace VD_ISA {

// What fills the registers: M N sums, N vectors of columns and one element. The nearer a tile is to a square, the
// fewer loads go with a multiplication.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 9, kTileVectors = 3;  // 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 9, kTileVectors = 3;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

template <class T>
inline Vector<T> load_vector(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
template <class T>
inline void store_vector(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof(x));
}

#if defined(__AVX512F__)
inline Vector<float> madd(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vector<double> madd(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
inline Vector<float> madd(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vector<double> madd(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
inline Vector<float> madd(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vector<double> madd(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
inline V madd(V a, V b, V c) {
  return a * b + c;
}
#endif

// out(m, n, sum over parts p and k < count of a(m, p, k) * vector n of row p * count + k of b), for m < M, n < N.
template <class T, int M, int N, class A, class Out>
inline __attribute__((always_inline)) void tile(int64_t parts, int64_t count, A&& a, const T* b, int64_t stride,
                                                Out&& out) {
  Vector<T> sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = Vector<T>{};
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t k = 0; k < count; ++k, b += stride) {
      Vector<T> row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load_vector(b + n * kLanes<T>);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vector<T> x = a(m, p, k) - Vector<T>{};  // in all lanes; + 0 would not be the same for -0
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = madd(x, row[n], sum[m][n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) out(m, n, sum[m][n]);
}

// Calls f(std::integral_constant<int, N>{}) for the number of vectors, from 1 to kTileVectors.
template <int N = kTileVectors, class F>
inline void with_vectors(int64_t vectors, F&& f) {
  if constexpr (N > 1) {
    if (vectors < N) return with_vectors<N - 1>(vectors, f);
  }
  f(std::integral_constant<int, N>{});
}

// Calls f(std::integral_constant<int, M>{}, first row) for tiles of kTileRows rows, and of fewer for what is left.
template <int M = kTileRows, class F>
inline void for_row_tiles(int64_t begin, int64_t end, F&& f) {
  for (; begin + M <= end; begin += M) f(std::integral_constant<int, M>{}, begin);
  if constexpr (M > 1) {
    if (begin < end) for_row_tiles<(M + 1) / 2>(begin, end, f);
  }
}

}  // namespace VD_ISA
}  // namespace vocabdistil
