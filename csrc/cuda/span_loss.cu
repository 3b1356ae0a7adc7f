// Divergence between averaged rows on the GPU, with its gradient, in one pass: a pair's two averaged rows stay in the
// registers of a warp or of a block, and only its loss and its rows of the gradient are written. Only the student has a
// gradient here: the teacher's is that of the mirrored divergence with the sides exchanged.
#include "pair.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

struct LossArgs {
  LayerTable student, teacher;
  void* grad[kMaxLayers];  // contiguous [student.rows, dim] each
  bool want_grad;
  Spans student_spans, teacher_spans;
  int64_t pairs;
  int dim;
  Divergence divergence;
  bool mean;
  float temperature, beta, base;
  const float *weights, *upstream;  // [pairs] and [1], each may be null
  float* loss;                      // [pairs] or null
};

// The most threads that launch_loss asks for; fewer would raise the registers per thread over 128.
constexpr int most_threads(int n, bool jsd) { return jsd || n == 1 ? 1024 : 512; }

// JSD has kernels of its own: its logarithms would cost the others registers.
template <class T, int N, int K, bool kJsd>
__global__ void __launch_bounds__(most_threads(N, kJsd), 1) loss_kernel(const __grid_constant__ LossArgs a) {
  __shared__ float4 parts[2][32];
  float base = a.base;
  if (a.upstream) {
    if (*a.upstream == 1) return;  // the gradient is there already
    base *= *a.upstream;
  }
  const bool softmax = a.divergence != Divergence::mse && a.divergence != Divergence::cosine;
  Group group(parts);
  Pair<T, N, K> pair(a.dim);
  for (int64_t p = first_pair(); p < a.pairs; p += pair_step()) {
    const Span student = span(a.student_spans, p, a.student.rows), teacher = span(a.teacher_spans, p, a.teacher.rows);
    const bool both = student.end > student.start && teacher.end > teacher.start;
    float loss = 0;
    if (both) {
      pair.average(a.student, student, a.teacher, teacher, a.mean, softmax ? -INFINITY : 0);
      if constexpr (kJsd) {
        loss = pair.jsd(group, a.temperature, a.beta);
      } else {
        switch (a.divergence) {
          case Divergence::kl: loss = pair.kl(group, a.temperature); break;
          case Divergence::reverse_kl: loss = pair.reverse_kl(group, a.temperature); break;
          case Divergence::mse: loss = pair.mse(group); break;
          default: loss = pair.cosine(group);
        }
      }
    }
    if (a.loss && threadIdx.x == 0) a.loss[p] = loss;
    if (!a.want_grad) continue;
    const Rows written = written_rows(a.student_spans, p, a.pairs, a.student.rows);
    const float scale = pair.scale * share<float>(student, a.mean) * base * (a.weights ? a.weights[p] : 1);
#pragma unroll 1
    for (int l = 0; l < a.student.count; ++l) {
      const float weight = scale * a.student.weight<float>(l);
      T* out = static_cast<T*>(a.grad[l]);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (!pair.inside(k)) continue;
        Pack<T, N> value;
#pragma unroll
        for (int n = 0; n < N; ++n) value.value[n] = store<T>(both ? weight * pair.s[k * N + n] : 0.0f);
        store_rows(out + pair.column(k), a.dim, student, written, value);
      }
    }
  }
}

struct TotalArgs {
  const float *loss, *weights;
  int64_t pairs;
  float base;
  float* total;
};

// base * sum_p weights[p] * loss[p] by one block: a fixed order, so the same sum every time.
__global__ void __launch_bounds__(1024) total_kernel(const __grid_constant__ TotalArgs a) {
  __shared__ float4 parts[2][32];
  float sum = 0;
#pragma unroll 8
  for (int64_t p = threadIdx.x; p < a.pairs; p += blockDim.x) sum += a.loss[p] * (a.weights ? a.weights[p] : 1);
  Group(parts).sum(sum);
  if (threadIdx.x == 0) *a.total = a.base * sum;
}

// Columns per thread, by reasoning and not yet measured. In half precision the instructions per column, not the bytes,
// are near the limit of the GPU, so the fixed cost of a warp is spread over as many columns as the registers allow:
// 16, 24 or 32 of a row of up to 1024 columns, which one warp holds and reduces without a barrier; 32 of a wider one,
// which takes a block, 4096 columns 4 warps. At 128 registers a thread 16 warps per multiprocessor have 64 KB of loads
// in flight, more than the 25 KB that latency times bandwidth asks for. JSD, bound by its logarithms, and rows that
// allow no 16-byte accesses take 16 throughout.
template <class T>
const char* launch_loss(const LossArgs& a, bool packed, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const auto go = [&](void (*kernel)(LossArgs), int columns) {
    const int threads = a.dim <= 32 * columns ? 32 : round_up((a.dim + columns - 1) / columns, 32);
    return launch(kernel, a, a.pairs, threads, stream);
  };
  if (a.divergence == Divergence::jsd)
    return packed ? go(loss_kernel<T, N, 16 / N, true>, 16) : go(loss_kernel<T, 1, 16, true>, 16);
  if (!packed) return go(loss_kernel<T, 1, 16, false>, 16);
  if (a.dim <= 512) return go(loss_kernel<T, N, 16 / N, false>, 16);
  if (a.dim <= 768) return go(loss_kernel<T, N, 24 / N, false>, 24);
  return go(loss_kernel<T, N, 32 / N, false>, 32);
}

}  // namespace

const char* span_loss(const GpuSpanLossArgs& x) {
  const auto stream = static_cast<cudaStream_t>(x.stream);
  const size_t size = x.student.dtype == DType::f32 ? 4 : 2;
  if (x.student.dtype != x.teacher.dtype || x.student.dtype == DType::f64)
    return "span_loss: expected one dtype on both sides, float32, bfloat16 or float16";
  if (x.dim > 16384) return "span_loss: expected a hidden size of at most 16384";
  LossArgs a{table(x.student), table(x.teacher), {}, x.grads > 0, x.student_spans, x.teacher_spans, x.pairs,
             static_cast<int>(x.dim), x.divergence, x.mean, static_cast<float>(x.temperature),
             static_cast<float>(x.beta), static_cast<float>(x.base), x.weights, x.upstream, x.loss};
  bool packed = x.dim % (16 / size) == 0 && aligned(a.student, size) && aligned(a.teacher, size);
  for (int64_t l = 0; l < x.grads; ++l) {
    a.grad[l] = x.grad[l];
    packed = packed && aligned(x.grad[l], x.dim, size);
    if (x.pairs == 0)
      if (const char* error = text(cudaMemsetAsync(x.grad[l], 0, x.student.rows * x.dim * size, stream))) return error;
  }
  const char* error = nullptr;
  if (x.pairs > 0) {
    switch (x.student.dtype) {
      case DType::f32: error = launch_loss<float>(a, packed, stream); break;
      case DType::bf16: error = launch_loss<__nv_bfloat16>(a, packed, stream); break;
      default: error = launch_loss<__half>(a, packed, stream);
    }
  }
  if (error || !x.total) return error;
  return launch(total_kernel, TotalArgs{x.loss, x.weights, x.pairs, a.base, x.total}, 1, 1024, stream);
}

}  // namespace cuda
}  // namespace vocabdistil
