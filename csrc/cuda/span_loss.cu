// Divergence between averaged rows on the GPU, with its gradient, in one pass: a pair's two averaged rows stay in the
// registers of a warp or of a block, and only its loss and its rows of the gradient are written. Only the student has a
// gradient here: the teacher's is that of the mirrored divergence with the sides exchanged.
#include "pair.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

struct LossArgs {
  LayerTable student, teacher;
  void* grad[kMaxLayers];  // contiguous [student.rows, dim] each, in the student's dtype
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

// Where pair p lies. Read a pair ahead and clamped only when its turn has come, as that would be waiting for it.
struct Place {
  Span student, teacher;
  int before;
};
__device__ Place place(const LossArgs& a, int64_t p) {
  if (p >= a.pairs) return {};
  return {span(a.student_spans, p), span(a.teacher_spans, p), end_before(a.student_spans, p)};
}

// Blocks per multiprocessor that share its registers: as many as fit without spilling them.
constexpr int resident(int n, int columns, int threads) { return threads > 128 ? 1 : columns > 16 || n == 1 ? 3 : 4; }

// JSD has kernels of its own: its logarithms would cost the others registers.
template <class S, class T, int N, int K, bool kJsd, int kThreads>
__global__ void __launch_bounds__(kThreads, resident(N, N* K, kThreads))
    loss_kernel(const __grid_constant__ LossArgs a) {
  __shared__ float4 parts[2][32];
  float base = a.base;
  if (a.upstream) {
    if (*a.upstream == 1) return;  // the gradient is there already
    base *= *a.upstream;
  }
  const bool softmax = a.divergence != Divergence::mse && a.divergence != Divergence::cosine;
  Group group(parts);
  Pair<S, T, N, K> pair(a.dim);
  Place here = place(a, first_pair());
  for (int64_t p = first_pair(); p < a.pairs; p += pair_step()) {
    const Place next = place(a, p + pair_step());
    const Span student = clamp(here.student, a.student.rows), teacher = clamp(here.teacher, a.teacher.rows);
    const bool both = student.end > student.start && teacher.end > teacher.start;
    if (both) pair.average(a.student, student, a.teacher, teacher, a.mean, softmax ? -INFINITY : 0);
    pair.template ask_for<S>(a.student, clamp(next.student, a.student.rows));
    pair.template ask_for<T>(a.teacher, clamp(next.teacher, a.teacher.rows));
    float loss = 0;
    if (both) {
      bool close = false;
      if constexpr (kJsd) {
        loss = pair.jsd(group, a.temperature, a.beta, close);
      } else {
        switch (a.divergence) {
          case Divergence::kl: loss = pair.kl(group, a.temperature, close); break;
          case Divergence::reverse_kl: loss = pair.reverse_kl(group, a.temperature, close); break;
          case Divergence::mse: loss = pair.mse(group); break;
          default: loss = pair.cosine(group);
        }
      }
      if (close) {
        // Read again, from the cache: to keep the rows would cost every pair its registers.
        pair.average(a.student, student, a.teacher, teacher, a.mean, -INFINITY);
        if constexpr (kJsd)
          loss = pair.close_jsd(group, a.temperature, a.beta);
        else
          loss = pair.close_kl(group, a.temperature, a.divergence == Divergence::reverse_kl);
      }
    }
    if (a.loss && threadIdx.x == 0) a.loss[p] = loss;
    if (a.want_grad) {
      const Rows written = written_rows(here.before, student, p + 1 == a.pairs, a.student.rows);
      const float scale = pair.scale * share<float>(student, a.mean) * base * (a.weights ? a.weights[p] : 1);
#pragma unroll 1
      for (int l = 0; l < a.student.count; ++l) {
        const float weight = scale * a.student.weight<float>(l);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (!pair.inside(k)) continue;
          Pack<S, N> value;
          with_element<S>(a.student.dtype, [&](auto element) {
#pragma unroll
            for (int n = 0; n < N; ++n)
              value.value[n] = same_bits<S>(store<decltype(element)>(both ? weight * pair.s[k * N + n] : 0.0f));
          });
          store_rows(a.grad[l], a.student.dtype, a.dim, pair.column(k), student, written, value);
        }
      }
    }
    here = next;
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
// which takes a block, 4096 columns 4 warps. The 12 or 16 warps that a multiprocessor then holds have 48 KB of loads in
// flight, more than the 25 KB that latency times bandwidth asks for, but not while they compute: so each asks for its
// next pair's rows ahead. JSD, bound by its logarithms, and rows that allow no 16-byte accesses take 16 throughout.
template <class S, class T, int N, int K, bool kJsd, int kMostThreads>
const char* launch_loss(const LossArgs& a, cudaStream_t stream) {
  constexpr int kColumns = N * K;
  const int threads = a.dim <= 32 * kColumns ? 32 : round_up((a.dim + kColumns - 1) / kColumns, 32);
  const auto kernel = threads <= 128 ? loss_kernel<S, T, N, K, kJsd, 128> : loss_kernel<S, T, N, K, kJsd, kMostThreads>;
  return launch(kernel, a, a.pairs, threads, 1, stream);
}

template <class S, class T>
const char* launch_packed(const LossArgs& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(S);
  if (a.divergence == Divergence::jsd) return launch_loss<S, T, N, 16 / N, true, 1024>(a, stream);
  if (a.dim <= 512) return launch_loss<S, T, N, 16 / N, false, 128>(a, stream);
  if (a.dim <= 768) return launch_loss<S, T, N, 24 / N, false, 128>(a, stream);
  return launch_loss<S, T, N, 32 / N, false, 512>(a, stream);
}

// Projected rows are float next to a teacher in half precision; what else there is goes column by column.
const char* launch_loss(const LossArgs& a, bool packed, cudaStream_t stream) {
  const DType s = a.student.dtype, t = a.teacher.dtype;
  if (packed && s == DType::f32) {
    if (t == DType::f32) return launch_packed<float, float>(a, stream);
    return launch_packed<float, AnyHalf>(a, stream);
  }
  if (packed && t != DType::f32) return launch_packed<AnyHalf, AnyHalf>(a, stream);
  if (a.divergence == Divergence::jsd) return launch_loss<AnyFloat, AnyFloat, 1, 16, true, 1024>(a, stream);
  return launch_loss<AnyFloat, AnyFloat, 1, 16, false, 1024>(a, stream);
}

}  // namespace

const char* problem() {
  int device = 0;
  cudaFuncAttributes attributes{};
  if (const char* error = text(cudaGetDevice(&device))) return error;
  return text(cudaFuncGetAttributes(&attributes, total_kernel));
}

const char* span_loss(const GpuSpanLossArgs& x) {
  const auto stream = static_cast<cudaStream_t>(x.stream);
  const int64_t size = size_of(x.student.dtype), wide = 16 / size;
  if (x.student.dtype == DType::f64 || x.teacher.dtype == DType::f64)
    return "span_loss: expected float32, bfloat16 or float16";
  if (x.dim > 16384) return "span_loss: expected a hidden size of at most 16384";
  LossArgs a{table(x.student), table(x.teacher), {}, x.grads > 0, x.student_spans, x.teacher_spans, x.pairs,
             static_cast<int>(x.dim), x.divergence, x.mean, static_cast<float>(x.temperature),
             static_cast<float>(x.beta), static_cast<float>(x.base), x.weights, x.upstream, x.loss};
  // Of the teacher as many columns are read at once as of the student: 8 bytes where it alone is in half precision.
  bool packed = x.dim % wide == 0 && aligned(a.student, size) && aligned(a.teacher, size_of(x.teacher.dtype));
  for (int64_t l = 0; l < x.grads; ++l) {
    a.grad[l] = x.grad[l];
    packed = packed && aligned(x.grad[l], x.dim, size);
    if (x.pairs == 0)
      if (const char* error = text(cudaMemsetAsync(x.grad[l], 0, x.student.rows * x.dim * size, stream))) return error;
  }
  const char* error = nullptr;
  if (x.pairs > 0) error = launch_loss(a, packed, stream);
  if (error || !x.total) return error;
  return launch(total_kernel, TotalArgs{x.loss, x.weights, x.pairs, a.base, x.total}, 1, 1024, 1, stream);
}

}  // namespace cuda
}  // namespace vocabdistil
