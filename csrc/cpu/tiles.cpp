#include "tiles.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace vocabdistil {
namespace VD_ISA {
namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

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

// element(m, p, k): that of row m.
template <int M, int N, class T, class Element>
inline __attribute__((always_inline)) void multiply(const Element& element, int64_t parts, int64_t count, const T* b,
                                                    int64_t stride, const TileOut<T>& out) {
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
        const Vector<T> x = element(m, p, k) - Vector<T>{};  // in all lanes; + 0 would not be the same for -0
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = madd(x, row[n], sum[m][n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* const at = out.to + m * out.stride + n * kLanes<T>;
      store_vector(at, (out.add ? load_vector(at) + sum[m][n] : sum[m][n]) * out.factor);
    }
  }
}

// Calls f(std::integral_constant<int, M>{}) for the rows of a tile, and likewise for its vectors.
template <int M = kTileRows, class F>
inline void with_rows(int rows, F&& f) {
  if constexpr (M > 1) {
    if (rows < M) return with_rows<(M + 1) / 2>(rows, f);
  }
  f(std::integral_constant<int, M>{});
}
template <int N = kTileVectors, class F>
inline void with_vectors(int vectors, F&& f) {
  if constexpr (N > 1) {
    if (vectors < N) return with_vectors<N - 1>(vectors, f);
  }
  f(std::integral_constant<int, N>{});
}

}  // namespace

template <class T>
void tile_of_rows(int rows, int vectors, const T* const* a, int64_t from, int64_t parts, int64_t apart, int64_t count,
                  const T* b, int64_t b_stride, const TileOut<T>& out) {
  with_rows(rows, [&](auto m) {
    with_vectors(vectors, [&](auto n) {
      const T* row[decltype(m)::value];
      for (int r = 0; r < m; ++r) row[r] = a[r] + from;
      multiply<m, n>([&](int r, int64_t p, int64_t k) { return row[r][p * apart + k]; }, parts, count, b, b_stride,
                     out);
    });
  });
}

template <class T>
void tile_of_columns(int rows, int vectors, const T* const* a, int64_t from, int64_t count, const T* b,
                     int64_t b_stride, const TileOut<T>& out) {
  with_rows(rows, [&](auto m) {
    with_vectors(vectors, [&](auto n) {
      multiply<m, n>([&](int r, int64_t, int64_t k) { return a[k][from + r]; }, 1, count, b, b_stride, out);
    });
  });
}

template void tile_of_rows(int, int, const float* const*, int64_t, int64_t, int64_t, int64_t, const float*, int64_t,
                           const TileOut<float>&);
template void tile_of_rows(int, int, const double* const*, int64_t, int64_t, int64_t, int64_t, const double*, int64_t,
                           const TileOut<double>&);
template void tile_of_columns(int, int, const float* const*, int64_t, int64_t, const float*, int64_t,
                              const TileOut<float>&);
template void tile_of_columns(int, int, const double* const*, int64_t, int64_t, const double*, int64_t,
                              const TileOut<double>&);

}  // namespace VD_ISA
}  // namespace vocabdistil
