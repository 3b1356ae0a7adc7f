// What is left to do after the pairs of a loss.
#pragma once

#include "softmax.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

// What is left to do after the pairs: a total of their losses, a part to a block, and the rows of the gradients that none
// of them writes.
struct FinishArgs {
  const float *loss, *weights;  // [pairs]; weights may be null
  int64_t losses, per, parts;   // how many losses, in all and of a part
  float base;
  float* total;  // [parts]

  void* grad[kMaxLayers];
  int layers;
  bool aligned;
  int64_t rows, teacher_rows, bytes;
  Spans student_spans, teacher_spans;
  int64_t pairs;
  const float *upstream, *formed;
};
constexpr int kFinishThreads = 256;

// base * sum_p weights[p] * loss[p] of part k: a fixed order, so the same sum every time and on every GPU.
inline __device__ void write_total(const FinishArgs& a, int64_t k) {
  __shared__ float4 parts[2][32];
  const int64_t end = k * a.per + a.per < a.losses ? k * a.per + a.per : a.losses;
  float sum = 0;
#pragma unroll 8
  for (int64_t p = k * a.per + threadIdx.x; p < end; p += blockDim.x) sum += a.loss[p] * (a.weights ? a.weights[p] : 1);
  Group(parts).sum(sum);
  if (threadIdx.x == 0) a.total[k] = a.base * sum;
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ FinishArgs a) {
  if (blockIdx.x < a.parts) return write_total(a, blockIdx.x);
  if (a.formed && *a.formed == *a.upstream) return;
  const auto written = [&](int64_t p, int64_t row) {
    const Span student = clamp(span(a.student_spans, p), a.rows);
    const Span teacher = clamp(span(a.teacher_spans, p), a.teacher_rows);
    return student.start <= row && teacher.start < teacher.end;
  };
  const auto at = [&](int l, int64_t row) { return static_cast<char*>(a.grad[l]) + row * a.bytes; };
  const int64_t warps = blockDim.x / 32, warp = (blockIdx.x - a.parts) * warps + threadIdx.x / 32;
  const int64_t all = (gridDim.x - a.parts) * warps;
  if (a.aligned)
    clear_between<Pack<uint32_t, 4>>(warp, all, a.student_spans, a.pairs, a.rows, a.layers, a.bytes, written, at);
  else
    clear_between<uint16_t>(warp, all, a.student_spans, a.pairs, a.rows, a.layers, a.bytes, written, at);
}

const char* launch_finish(const FinishArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.parts + ceil_div(a.layers ? a.rows : 0, kFinishThreads);
  return blocks ? launch(finish_kernel, a, blocks, kFinishThreads, stream) : nullptr;
}

// In as many parts as the losses take, which are added up by a second launch where there is memory for `parts`.
const char* finish(FinishArgs a, float* parts, cudaStream_t stream) {
  if (!a.total) return launch_finish(a, stream);
  a.per = kTotalPairs;
  a.parts = std::max<int64_t>(ceil_div(a.losses, a.per), 1);
  if (!parts) return launch_finish(a, stream);
  FinishArgs second{};
  second.loss = parts, second.losses = second.per = a.parts, second.parts = 1;
  second.base = a.base, second.total = a.total;
  a.total = parts, a.base = 1;
  const char* error = launch_finish(a, stream);
  return error ? error : launch_finish(second, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace vocabdistil
