// What the GPU kernels share: element types, packs of 16 bytes, the layers of a side, spans clamped to the rows so that
// no position, however wrong, reads or writes outside the tensors, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
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
inline __device__ __nv_bfloat162 store_two(__nv_bfloat16, float low, float high) {
  return __floats2bfloat162_rn(low, high);
}
inline __device__ __half2 store_two(__half, float low, float high) { return __floats2half2_rn(low, high); }

// Calls f with an element of the dtype.
template <class F>
__device__ void with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: f(__nv_bfloat16{}); break;
    case DType::f16: f(__half{}); break;
    default: f(float{});
  }
}
inline __device__ void prefetch(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A kernel argument: the addresses travel with the launch, so nothing is copied from the host beforehand.
struct LayerTable {
  void* data[kMaxLayers];
  int64_t stride[kMaxLayers];  // in bytes
  int64_t rows;
  int count, item;  // item: bytes of an element
  DType dtype;
  const double* coef;  // null: `share` each
  double share;
  float share_rounded;

  __device__ char* at(int layer, int64_t position, int64_t column) const {
    return static_cast<char*>(data[layer]) + position * stride[layer] + column * item;
  }
  template <class A>
  __device__ A weight(int layer) const {
    if constexpr (sizeof(A) == sizeof(float))
      return coef ? static_cast<A>(coef[layer]) : share_rounded;
    else
      return coef ? coef[layer] : share;
  }
};

struct Span {
  int start, end;
};
inline __device__ int clamp(int position, int64_t rows) {
  const int last = rows < INT_MAX ? static_cast<int>(rows) : INT_MAX, below = position < last ? position : last;
  return below < 0 ? 0 : below;
}
inline __device__ Span clamp(const Span& s, int64_t rows) { return {clamp(s.start, rows), clamp(s.end, rows)}; }
inline __device__ Span span(const Spans& spans, int64_t p) { return {spans.start[p], spans.end[p]}; }
template <class A>
__device__ A share(const Span& s, bool mean) {
  return mean && s.end > s.start ? A{1} / static_cast<A>(s.end - s.start) : A{1};
}

// The first pair whose span ends behind a row: of ascending spans the only one that the row can lie in; `pairs` if none.
inline __device__ int64_t pair_ending_behind(const Spans& spans, int64_t pairs, int64_t row) {
  int64_t low = 0, high = pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (spans.end[middle] > row)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Clears the rows of a gradient that no pair writes: gaps and, in a batch, padding. Each of `warps` warps takes 32 rows,
// of which a lane looks up one, and so on, so that all share them, however they lie. `written(p, row)`: pair p, the only
// one that can, writes the row; at(l, row): where it begins in layer l, `bytes` in words of Word.
template <class Word, class Written, class At>
__device__ void clear_between(int64_t warp, int64_t warps, const Spans& spans, int64_t pairs, int64_t rows, int layers,
                              int64_t bytes, Written&& written, At&& at) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int64_t first = 32 * warp; first < rows; first += 32 * warps) {
    bool bare = false;
    if (first + lane < rows) {
      const int64_t p = pair_ending_behind(spans, pairs, first + lane);
      bare = p == pairs || !written(p, first + lane);
    }
    unsigned left = __ballot_sync(0xffffffffu, bare);
#pragma unroll 1
    for (int64_t row = first; left; ++row, left /= 2) {
      if (left % 2 == 0) continue;
#pragma unroll 1
      for (int l = 0; l < layers; ++l)
        for (int64_t d = lane * sizeof(Word); d < bytes; d += 32 * sizeof(Word))
          *reinterpret_cast<Word*>(at(l, row) + d) = Word{};
    }
  }
}

inline LayerTable table(const GpuLayers& x) {
  LayerTable t{};
  t.rows = x.rows;
  t.count = static_cast<int>(x.count);
  t.item = static_cast<int>(size_of(x.dtype));
  t.dtype = x.dtype;
  t.coef = x.coef;
  t.share = 1.0 / static_cast<double>(x.count);
  t.share_rounded = static_cast<float>(t.share);
  for (int l = 0; l < t.count; ++l) {
    t.data[l] = x.data[l];
    t.stride[l] = x.row_stride[l] * t.item;
  }
  return t;
}

inline bool aligned(const void* address, int64_t stride) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride % 16 == 0;
}
inline bool aligned(const LayerTable& x) {
  for (int l = 0; l < x.count; ++l)
    if (!aligned(x.data[l], x.stride[l])) return false;
  return true;
}

inline int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }
inline int round_up(int64_t n, int step) { return static_cast<int>(ceil_div(n, step) * step); }

inline const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

inline const char* clear(const LayerTable& x, size_t row_bytes, cudaStream_t stream) {
  for (int l = 0; l < x.count; ++l)
    if (const char* error = text(cudaMemsetAsync(x.data[l], 0, x.rows * row_bytes, stream))) return error;
  return nullptr;
}

template <class Args>
const char* launch(void (*kernel)(Args), const Args& args, int64_t blocks, dim3 threads, cudaStream_t stream,
                   size_t shared = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return text(cudaLaunchKernelEx(&config, kernel, args));
}
// `threads` per pair: at most a warp, of which a block holds four, or a block. The grid covers the GPU `times` over and
// loops: once for a kernel that asks for its next pair ahead, twice for one that does not, to even out spans of
// different length.
template <class Args>
const char* launch(void (*kernel)(Args), const Args& args, int64_t pairs, int threads, int times,
                   cudaStream_t stream) {
  int device = 0, processors = 0, resident = 0;
  if (const char* error = text(cudaGetDevice(&device))) return error;
  const auto attribute = cudaDevAttrMultiProcessorCount;
  if (const char* error = text(cudaDeviceGetAttribute(&processors, attribute, device))) return error;
  const int shared = threads <= 32 ? 128 / threads : 1;
  const auto occupied = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads * shared, 0);
  if (const char* error = text(occupied)) return error;
  const int64_t most = int64_t{times} * processors * std::max(resident, 1);
  return launch(kernel, args, std::min(ceil_div(pairs, shared), most), dim3(threads, shared), stream);
}
inline __device__ int64_t first_pair() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
// How many pairs of the same warp stand before a thread's own.
inline __device__ int pairs_before() { return blockDim.x < 32 ? threadIdx.y % (32 / blockDim.x) : 0; }
inline __device__ int64_t pair_step() { return int64_t{gridDim.x} * blockDim.y; }

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
