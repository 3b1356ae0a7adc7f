// What the GPU kernels share: element types, packs of 16 bytes, the layers of a side, spans clamped to the rows so that
// no position, however wrong, reads or writes outside the tensors, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

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
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

// An element whose type, float or a half type, is known at run time only: it is held as a float.
struct AnyFloat {
  float value;
};
template <>
__device__ float load<float>(AnyFloat x) {
  return x.value;
}
template <>
__device__ AnyFloat store<AnyFloat>(float x) {
  return {x};
}

// A half type that is known at run time only, as it lies in memory: what stands between loads and stores is compiled
// once for both. `with_element` calls f with one of the type, for a whole row, so that the branch costs nothing.
struct AnyHalf {
  uint16_t bits;
};
template <class E, class F>
__device__ void with_element(DType dtype, F&& f) {
  if constexpr (!std::is_same<E, AnyHalf>::value)
    f(E{});
  else if (dtype == DType::bf16)
    f(__nv_bfloat16{});
  else
    f(__half{});
}
template <class To, class From>
__device__ To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class T, int N>
__device__ Pack<T, N> read(const void* row, DType, int64_t column) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(row) + column);
}
template <>
__device__ Pack<AnyFloat, 1> read<AnyFloat, 1>(const void* row, DType dtype, int64_t column) {
  switch (dtype) {
    case DType::bf16: return {load<float>(static_cast<const __nv_bfloat16*>(row)[column])};
    case DType::f16: return {load<float>(static_cast<const __half*>(row)[column])};
    default: return {static_cast<const float*>(row)[column]};
  }
}
template <class T, int N>
__device__ void write(void* row, DType, int64_t column, const Pack<T, N>& value) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(row) + column) = value;
}
template <>
__device__ void write<AnyFloat, 1>(void* row, DType dtype, int64_t column, const Pack<AnyFloat, 1>& value) {
  const float x = value.value[0].value;
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(row)[column] = store<__nv_bfloat16>(x); break;
    case DType::f16: static_cast<__half*>(row)[column] = store<__half>(x); break;
    default: static_cast<float*>(row)[column] = x;
  }
}
inline __host__ __device__ int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A kernel argument: the addresses travel with the launch, so nothing is copied from the host beforehand.
struct LayerTable {
  void* data[kMaxLayers];
  int64_t stride[kMaxLayers];
  int64_t rows;
  int count;
  DType dtype;
  const double* coef;

  template <class T>
  __device__ T* row(int layer, int64_t position) const {
    return static_cast<T*>(data[layer]) + position * stride[layer];
  }
  template <class T>
  __device__ int64_t item() const {
    return std::is_same<T, AnyFloat>::value ? size_of(dtype) : static_cast<int64_t>(sizeof(T));
  }
  template <class T>
  __device__ const char* address(int layer, int64_t position) const {
    return static_cast<const char*>(data[layer]) + position * stride[layer] * item<T>();
  }
  template <class A>
  __device__ A weight(int layer) const {
    return coef ? static_cast<A>(coef[layer]) : A{1} / static_cast<A>(count);
  }
};

struct Span {
  int start, end;
};
struct Rows {
  int64_t start, end;
};
inline __device__ int clamp(int position, int64_t rows) {
  return position < 0 ? 0 : position < rows ? position : static_cast<int>(rows);
}
inline __device__ Span clamp(const Span& s, int64_t rows) { return {clamp(s.start, rows), clamp(s.end, rows)}; }
inline __device__ Span span(const Spans& spans, int64_t p) { return {spans.start[p], spans.end[p]}; }
// What pair p writes of a gradient: the gap between the end of the span before (0 for the first) and its span, the span,
// and for the last pair the tail. So every row is written once, and none twice.
inline __device__ Rows written_rows(int before, const Span& s, bool last, int64_t rows) {
  return {clamp(before, rows), last ? rows : s.end};
}
inline __device__ int end_before(const Spans& spans, int64_t p) { return p ? spans.end[p - 1] : 0; }
template <class A>
__device__ A share(const Span& s, bool mean) {
  return mean && s.end > s.start ? A{1} / static_cast<A>(s.end - s.start) : A{1};
}

// One column pack of a gradient: the value on the rows of the span, 0 on the others of `written`.
template <class T, int N>
__device__ void store_rows(void* out, DType dtype, int64_t stride, int64_t column, const Span& s, const Rows& written,
                           const Pack<T, N>& value) {
  const Pack<T, N> zero{};
#pragma unroll 1  // one to three rows as a rule
  for (int64_t i = written.start; i < written.end; ++i)
    write<T, N>(out, dtype, i * stride + column, i >= s.start && i < s.end ? value : zero);
}

inline LayerTable table(const GpuLayers& x) {
  LayerTable t{};
  t.rows = x.rows;
  t.count = static_cast<int>(x.count);
  t.dtype = x.dtype;
  t.coef = x.coef;
  for (int l = 0; l < t.count; ++l) {
    t.data[l] = x.data[l];
    t.stride[l] = x.row_stride[l];
  }
  return t;
}

inline bool aligned(const void* address, int64_t stride, size_t size) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && (stride * size) % 16 == 0;
}
inline bool aligned(const LayerTable& x, size_t size) {
  for (int l = 0; l < x.count; ++l)
    if (!aligned(x.data[l], x.stride[l], size)) return false;
  return true;
}

inline const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

inline const char* clear(const LayerTable& x, size_t row_bytes, cudaStream_t stream) {
  for (int l = 0; l < x.count; ++l)
    if (const char* error = text(cudaMemsetAsync(x.data[l], 0, x.rows * row_bytes, stream))) return error;
  return nullptr;
}

// `threads` per pair: a warp, of which a block holds four, or a block. The grid covers the GPU `times` over and loops:
// once for a kernel that asks for its next pair ahead, twice for one that does not, to even out spans of different
// length.
template <class Args>
const char* launch(void (*kernel)(Args), const Args& args, int64_t pairs, int threads, int times,
                   cudaStream_t stream) {
  int device = 0, processors = 0, resident = 0;
  if (const char* error = text(cudaGetDevice(&device))) return error;
  const auto attribute = cudaDevAttrMultiProcessorCount;
  if (const char* error = text(cudaDeviceGetAttribute(&processors, attribute, device))) return error;
  const int shared = threads == 32 ? 4 : 1;
  const auto occupied = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads * shared, 0);
  if (const char* error = text(occupied)) return error;
  const int64_t most = int64_t{times} * processors * std::max(resident, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min((pairs + shared - 1) / shared, most)));
  config.blockDim = dim3(threads, shared);
  config.stream = stream;
  return text(cudaLaunchKernelEx(&config, kernel, args));
}
inline __device__ int64_t first_pair() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
inline __device__ int64_t pair_step() { return int64_t{gridDim.x} * blockDim.y; }

inline int round_up(int64_t n, int step) { return static_cast<int>((n + step - 1) / step * step); }

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
