// Span averaging on the GPU: one block per pair, 16-byte accesses where addresses allow, no atomics. Spans are
// clamped to the rows, so that no position, however wrong, reads or writes outside the tensors.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../ops.h"

namespace vocabdistil {
namespace cuda {
namespace {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <class A, class T>
__device__ A load(T x) {
  return static_cast<A>(x);
}
template <>
__device__ float load<float>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ float load<float>(__half x) {
  return __half2float(x);
}
template <class T, class A>
__device__ T store(A x) {
  return static_cast<T>(x);
}
template <>
__device__ __nv_bfloat16 store<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __half store<__half>(float x) {
  return __float2half_rn(x);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

__device__ int64_t clamp(int64_t position, int64_t rows) { return max(int64_t{0}, min(position, rows)); }

template <class T, int N>
__global__ void fwd_kernel(const T* __restrict__ x, int64_t row_stride, int64_t rows, Spans spans, int64_t pairs,
                           int64_t dim, bool mean, T* __restrict__ out) {
  using A = typename Accumulator<T>::type;
  using P = Pack<T, N>;
  for (int64_t p = blockIdx.x; p < pairs; p += gridDim.x) {
    const int64_t start = clamp(spans.start[p], rows), end = clamp(spans.end[p], rows);
    const A share = mean && end > start ? A{1} / static_cast<A>(end - start) : A{1};
    for (int64_t d = int64_t{threadIdx.x} * N; d < dim; d += int64_t{blockDim.x} * N) {
      A sum[N] = {};
      for (int64_t i = start; i < end; ++i) {
        const P pack = *reinterpret_cast<const P*>(x + i * row_stride + d);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += load<A>(pack.value[k]);
      }
      P result;
#pragma unroll
      for (int k = 0; k < N; ++k) result.value[k] = store<T>(sum[k] * share);
      *reinterpret_cast<P*>(out + p * dim + d) = result;
    }
  }
}

// The block of pair p also clears the rows between the span before and its own, the last one the tail: every row is
// written once, and none twice.
template <class T, int N>
__global__ void bwd_kernel(const T* __restrict__ grad, int64_t grad_stride, Spans spans, int64_t pairs, int64_t dim,
                           bool mean, T* __restrict__ out, int64_t rows) {
  using A = typename Accumulator<T>::type;
  using P = Pack<T, N>;
  for (int64_t p = blockIdx.x; p < pairs; p += gridDim.x) {
    const int64_t begin = p ? clamp(spans.end[p - 1], rows) : 0;
    const int64_t start = clamp(spans.start[p], rows), end = clamp(spans.end[p], rows);
    const int64_t last = p + 1 == pairs ? rows : end;
    const A share = mean && end > start ? A{1} / static_cast<A>(end - start) : A{1};
    for (int64_t d = int64_t{threadIdx.x} * N; d < dim; d += int64_t{blockDim.x} * N) {
      const P in = *reinterpret_cast<const P*>(grad + p * grad_stride + d);
      P value, zero;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        value.value[k] = store<T>(load<A>(in.value[k]) * share);
        zero.value[k] = store<T>(A{0});
      }
      for (int64_t i = begin; i < last; ++i)
        *reinterpret_cast<P*>(out + i * dim + d) = i >= start && i < end ? value : zero;
    }
  }
}

bool aligned(const void* address, int64_t stride, size_t size) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && (stride * size) % 16 == 0;
}

struct Launch {
  unsigned blocks, threads;
};
Launch shape(int64_t pairs, int64_t dim, int pack) {
  const int64_t lanes = (dim + pack - 1) / pack;
  return {static_cast<unsigned>(std::min<int64_t>(pairs, 1 << 30)),
          static_cast<unsigned>(std::min<int64_t>(256, (lanes + 31) / 32 * 32))};
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class F>
const char* with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
  }
  return "unknown dtype code";
}

}  // namespace

const char* span_mean_fwd(DType dtype, const void* x, int64_t row_stride, int64_t rows, Spans spans, int64_t pairs,
                          int64_t dim, bool mean, void* out, void* stream) {
  if (pairs == 0 || dim == 0) return nullptr;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    const auto* in = static_cast<const T*>(x);
    auto* to = static_cast<T*>(out);
    const auto s = static_cast<cudaStream_t>(stream);
    if (dim % N == 0 && aligned(x, row_stride, sizeof(T)) && aligned(out, dim, sizeof(T))) {
      const Launch l = shape(pairs, dim, N);
      fwd_kernel<T, N><<<l.blocks, l.threads, 0, s>>>(in, row_stride, rows, spans, pairs, dim, mean, to);
    } else {
      const Launch l = shape(pairs, dim, 1);
      fwd_kernel<T, 1><<<l.blocks, l.threads, 0, s>>>(in, row_stride, rows, spans, pairs, dim, mean, to);
    }
    return text(cudaGetLastError());
  });
}

const char* span_mean_bwd(DType dtype, const void* grad, int64_t grad_stride, Spans spans, int64_t pairs, int64_t dim,
                          bool mean, void* out, int64_t rows, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return with_type(dtype, [&](auto type) -> const char* {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    auto* to = static_cast<T*>(out);
    if (rows == 0 || dim == 0) return nullptr;
    if (pairs == 0) return text(cudaMemsetAsync(out, 0, sizeof(T) * rows * dim, s));
    const auto* in = static_cast<const T*>(grad);
    if (dim % N == 0 && aligned(grad, grad_stride, sizeof(T)) && aligned(out, dim, sizeof(T))) {
      const Launch l = shape(pairs, dim, N);
      bwd_kernel<T, N><<<l.blocks, l.threads, 0, s>>>(in, grad_stride, spans, pairs, dim, mean, to, rows);
    } else {
      const Launch l = shape(pairs, dim, 1);
      bwd_kernel<T, 1><<<l.blocks, l.threads, 0, s>>>(in, grad_stride, spans, pairs, dim, mean, to, rows);
    }
    return text(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace vocabdistil
