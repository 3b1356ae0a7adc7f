// Divergence between averaged rows on the GPU, with its gradient, in one pass: a pair's two averaged rows stay in the
// registers of a warp or of a block, and only its loss and its rows of the gradient are written. Only the student has a
// gradient here: the teacher's is that of the mirrored divergence with the sides exchanged.
#include "finish.cuh"
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
  int dim, width;  // of a row, and of its packs
  int ahead;       // rows of a side that are asked for ahead
  Divergence divergence;
  bool mean;
  Temperature temperature;
  float beta, base;
  const float* weights;              // [pairs] or null
  const float *upstream, *formed;    // [1], each may be null
  float* loss;                       // [pairs] or null
};

// Where pair p lies. Read a pair ahead and clamped only when its turn has come, as that would be waiting for it.
struct Place {
  Span student, teacher;

  __device__ void clamp(const LossArgs& a) {
    student = cuda::clamp(student, a.student.rows);
    teacher = cuda::clamp(teacher, a.teacher.rows);
  }
  __device__ bool both() const { return student.end > student.start && teacher.end > teacher.start; }
};
__device__ Place place(const LossArgs& a, int64_t p) {
  if (p >= a.pairs) return {};
  return {span(a.student_spans, p), span(a.teacher_spans, p)};
}

// Of packed columns JSD has a kernel of its own: its logarithms would cost the others registers. Columns that come one by
// one are not kept in registers.
enum class Kind { packed, packed_jsd, unpacked };

// Blocks of four warps share a multiprocessor in threes where a thread holds many columns, else in fours. What they spill
// for that (benchmarks/spills.csv), some 25 of a pair's instructions, or 50 of reverse KL with 32 columns, is not worth
// half as many warps.
template <Kind kKind, int kColumns, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 128 && kColumns > 16 ? 3 : 1)
    loss_kernel(const __grid_constant__ LossArgs a) {
  __shared__ float4 parts[2][32];
  float base = a.base;
  if (a.upstream) {
    const float upstream = *a.upstream;
    if (a.formed && *a.formed == upstream) return;  // the gradient is there already
    base *= upstream;
  }
  const bool jsd = kKind == Kind::packed_jsd || (kKind == Kind::unpacked && a.divergence == Divergence::jsd);
  const bool softmax = a.divergence != Divergence::mse && a.divergence != Divergence::cosine;
  Group group(parts);
  Pair<kColumns, kKind != Kind::unpacked> pair(a.dim, a.width);
  bool close = false;  // what the last pairs of the warp were
  Place here = place(a, first_pair());
  here.clamp(a);
  for (int64_t p = first_pair(); p - pairs_before() < a.pairs; p += pair_step()) {
    Place next = place(a, p + pair_step());
    const Span student = here.student, teacher = here.teacher;
    const bool both = here.both();
    bool left = both, again = false;
    next.clamp(a);
#pragma unroll 1
    do {
      if (left) pair.average(a.student, student, a.teacher, teacher, a.mean, softmax ? -INFINITY : 0);
      if (!again) {
        pair.ask_for(a.student, next.student, a.dim, a.ahead);
        pair.ask_for(a.teacher, next.teacher, a.dim, a.ahead);
      }
      float loss;
      bool found = close;
      if (softmax) pair.tops(group, a.temperature);
      if (jsd) {
        if constexpr (kKind != Kind::packed) found = pair.jsd(group, a.temperature, a.beta, close, loss);
      } else if constexpr (kKind != Kind::packed_jsd) {
        switch (a.divergence) {
          case Divergence::kl: found = pair.template kl<false>(group, a.temperature, close, loss); break;
          case Divergence::reverse_kl: found = pair.template kl<true>(group, a.temperature, close, loss); break;
          case Divergence::mse: loss = pair.mse(group); break;
          default: loss = pair.cosine(group);
        }
      }
      if (left && (again || found == close)) {
        left = false;
        if (a.loss && threadIdx.x == 0) a.loss[p] = loss;
        if (a.want_grad) {
          const float scale = pair.scale * share<float>(student, a.mean) * base * (a.weights ? a.weights[p] : 1);
#pragma unroll 1
          for (int l = 0; l < a.student.count; ++l)
            pair.store_gradient(a.grad[l], a.student, a.dim, scale * a.student.weight<float>(l), student);
        }
      }
      again = any_of_warp(left);
      if (again) close = !close;
    } while (again);
    if (!both && a.loss && threadIdx.x == 0 && p < a.pairs) a.loss[p] = 0;
    here = next;
  }
}

constexpr int kMostPacked = 16 * 512;  // columns of a thread, threads

// Threads per row, by reasoning and not yet measured. In half precision the instructions per column, not the bytes, are
// near the limit of the GPU, so the fixed cost of a warp is spread over as many columns as the registers allow, 24 or 32
// of a thread, and over as many pairs: 8 or 16 threads hold a row of up to 512 columns, a warp one of 1024; none of them
// needs a barrier. A wider one takes a block, 4096 columns 4 warps. The 12 or 16 warps that a multiprocessor then holds
// have 48 KB of loads in flight, more than the 25 KB that latency times bandwidth asks for, but not while they compute:
// so each asks for its next pair's rows ahead. Rows of more than 4096 columns, of which a multiprocessor holds few, take
// 16 columns, and so does JSD, bound by its logarithms, where a warp does not hold a row with 24. What is wider still or
// allows no 16-byte accesses is rare: little code, not speed.
int threads_of(int dim, int columns) {
  const int threads = static_cast<int>(ceil_div(dim, columns));
  return threads <= 8 ? 8 : threads <= 16 ? 16 : round_up(threads, 32);
}
template <Kind kKind, int kColumns, int kThreads>
const char* launch_loss(const LossArgs& a, int threads, cudaStream_t stream) {
  return launch(loss_kernel<kKind, kColumns, kThreads>, a, a.pairs, threads, 1, stream);
}

const char* launch_loss(const LossArgs& a, cudaStream_t stream) {
  const int of_16 = threads_of(a.dim, 16), of_24 = threads_of(a.dim, 24), of_32 = threads_of(a.dim, 32);
  if (a.width == 1) return launch_loss<Kind::unpacked, 16, 1024>(a, std::max(of_16, 32), stream);
  if (a.divergence == Divergence::jsd && of_24 <= 32) return launch_loss<Kind::packed_jsd, 24, 128>(a, of_24, stream);
  if (a.divergence == Divergence::jsd) return launch_loss<Kind::packed_jsd, 16, 512>(a, of_16, stream);
  if (a.dim > 4096) return launch_loss<Kind::packed, 16, 512>(a, of_16, stream);
  if (of_24 == of_32 && of_24 <= 32) return launch_loss<Kind::packed, 24, 128>(a, of_24, stream);
  return launch_loss<Kind::packed, 32, 128>(a, of_32, stream);
}

}  // namespace

const char* problem() {
  int device = 0;
  cudaFuncAttributes attributes{};
  if (const char* error = text(cudaGetDevice(&device))) return error;
  return text(cudaFuncGetAttributes(&attributes, finish_kernel));
}

const char* span_loss(const GpuSpanLossArgs& x) {
  const auto stream = static_cast<cudaStream_t>(x.stream);
  const int64_t size = size_of(x.student.dtype), teacher_size = size_of(x.teacher.dtype);
  if (x.student.dtype == DType::f64 || x.teacher.dtype == DType::f64)
    return "span_loss: expected float32, bfloat16 or float16";
  if (x.dim > 16384) return "span_loss: expected a hidden size of at most 16384";
  // As many columns of both sides make a pack: 16 bytes, or 8 of the one that alone is in half precision.
  const int width = static_cast<int>(16 / std::max(size, teacher_size));
  // 4 rows, or 8 KB for each warp if that is less.
  const int64_t fit = 8192 * ceil_div(x.dim, 1024) / (x.dim * std::max(size, teacher_size));
  const int ahead = static_cast<int>(std::min<int64_t>(std::max<int64_t>(fit, 1), 4));
  LossArgs a{table(x.student), table(x.teacher), {}, x.grads > 0, x.student_spans, x.teacher_spans, x.pairs,
             static_cast<int>(x.dim), width, ahead, x.divergence, x.mean, temperature_of(x.temperature),
             static_cast<float>(x.beta), static_cast<float>(x.base), x.weights, x.upstream, x.formed, x.loss};
  bool packed = x.dim % width == 0 && x.dim <= kMostPacked && aligned(a.student) && aligned(a.teacher);
  FinishArgs rest{x.loss, x.weights, x.pairs, 0, 0, a.base, x.total, {}, static_cast<int>(x.grads), true,
                 x.student.rows, x.teacher.rows, x.dim * size, x.student_spans, x.teacher_spans, x.pairs, x.upstream,
                 x.formed};
  for (int64_t l = 0; l < x.grads; ++l) {
    a.grad[l] = rest.grad[l] = x.grad[l];
    rest.aligned = rest.aligned && aligned(x.grad[l], rest.bytes);
  }
  if (!packed || !rest.aligned) a.width = 1;
  if (x.pairs > 0)
    if (const char* error = launch_loss(a, stream)) return error;
  return finish(rest, x.parts, stream);
}

}  // namespace cuda
}  // namespace vocabdistil
