// Span averaging on the GPU: a warp per pair for narrow rows, a block for wide ones, 16-byte accesses where addresses
// allow, no atomics.
#include "rows.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

struct FwdArgs {
  LayerTable x;
  Spans spans;
  int64_t pairs, dim;
  bool mean, wide;  // wide: the averages are in the accumulation dtype, else in that of the rows
  void* out;
};

template <class T, int N>
__global__ void fwd_kernel(const __grid_constant__ FwdArgs a) {
  using A = typename Accumulator<T>::type;
  for (int64_t p = first_pair(); p < a.pairs; p += pair_step()) {
    const Span s = clamp(span(a.spans, p), a.x.rows);
    const A part = share<A>(s, a.mean);
    for (int64_t d = int64_t{threadIdx.x} * N; d < a.dim; d += int64_t{blockDim.x} * N) {
      A sum[N] = {};
      for (int l = 0; l < a.x.count; ++l) {
        const A weight = part * a.x.weight<A>(l);
        for (int i = s.start; i < s.end; ++i) {
          const auto pack = *reinterpret_cast<const Pack<T, N>*>(a.x.at(l, i, d));
#pragma unroll
          for (int n = 0; n < N; ++n) sum[n] += weight * load<A>(pack.value[n]);
        }
      }
      const auto write = [&](auto average) {
        using Out = decltype(average);
        Pack<Out, N> result;
#pragma unroll
        for (int n = 0; n < N; ++n) result.value[n] = store<Out>(sum[n]);
        *reinterpret_cast<Pack<Out, N>*>(static_cast<Out*>(a.out) + p * a.dim + d) = result;
      };
      a.wide ? write(A{}) : write(T{});
    }
  }
}

struct BwdArgs {
  const void* grad;
  int64_t grad_stride;
  Spans spans;
  int64_t pairs, dim;
  bool mean, wide;
  LayerTable out;
};

template <class T, int N>
__global__ void bwd_kernel(const __grid_constant__ BwdArgs a) {
  using A = typename Accumulator<T>::type;
  for (int64_t p = first_pair(); p < a.pairs; p += pair_step()) {
    const Span s = clamp(span(a.spans, p), a.out.rows);
    const A part = share<A>(s, a.mean);
    for (int64_t d = int64_t{threadIdx.x} * N; d < a.dim; d += int64_t{blockDim.x} * N) {
      A in[N];
      const auto read = [&](auto average) {
        using G = decltype(average);
        const auto pack = *reinterpret_cast<const Pack<G, N>*>(static_cast<const G*>(a.grad) + p * a.grad_stride + d);
#pragma unroll
        for (int n = 0; n < N; ++n) in[n] = load<A>(pack.value[n]);
      };
      a.wide ? read(A{}) : read(T{});
      for (int l = 0; l < a.out.count; ++l) {
        const A weight = part * a.out.weight<A>(l);
        Pack<T, N> value;
#pragma unroll
        for (int n = 0; n < N; ++n) value.value[n] = store<T>(weight * in[n]);
#pragma unroll 1  // one to three rows as a rule
        for (int i = s.start; i < s.end; ++i) *reinterpret_cast<Pack<T, N>*>(a.out.at(l, i, d)) = value;
      }
    }
  }
  const auto written = [&](int64_t p, int64_t row) { return clamp(a.spans.start[p], a.out.rows) <= row; };
  const auto at = [&](int l, int64_t row) { return a.out.at(l, row, 0); };
  const int64_t warps = blockDim.x * blockDim.y / 32, warp = threadIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  clear_between<Pack<T, N>>(blockIdx.x * warps + warp, gridDim.x * warps, a.spans, a.pairs, a.out.rows, a.out.count,
                            a.dim * sizeof(T), written, at);
}

int threads(int64_t dim, int pack) {
  const int64_t lanes = ceil_div(dim, pack);
  return lanes <= 128 ? 32 : static_cast<int>(std::min<int64_t>(256, round_up(lanes, 32)));
}

// Calls f with the element type of the rows; the averages have the same or, wide, that which sums them up.
template <class F>
const char* with_type(DType rows, DType averages, F&& f) {
  const bool half = rows == DType::bf16 || rows == DType::f16;
  if (averages != rows && !(half && averages == DType::f32)) return "span_mean: these dtypes do not go together";
  switch (rows) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(__nv_bfloat16{});
    default: return f(__half{});
  }
}

}  // namespace

const char* span_mean_fwd(const GpuLayers& x, Spans spans, int64_t pairs, int64_t dim, bool mean, DType out_dtype,
                          void* out, void* stream) {
  if (pairs == 0 || dim == 0) return nullptr;
  const FwdArgs a{table(x), spans, pairs, dim, mean, out_dtype != x.dtype, out};
  const auto s = static_cast<cudaStream_t>(stream);
  return with_type(x.dtype, out_dtype, [&](auto row) {
    using T = decltype(row);
    constexpr int N = 16 / sizeof(T);
    if (dim % N == 0 && aligned(a.x) && aligned(out, dim * size_of(out_dtype)))
      return launch(fwd_kernel<T, N>, a, pairs, threads(dim, N), 2, s);
    return launch(fwd_kernel<T, 1>, a, pairs, threads(dim, 1), 2, s);
  });
}

const char* span_mean_bwd(DType grad_dtype, const void* grad, int64_t grad_stride, Spans spans, int64_t pairs,
                          int64_t dim, bool mean, const GpuLayers& out, void* stream) {
  if (out.rows == 0 || dim == 0) return nullptr;
  const BwdArgs a{grad, grad_stride, spans, pairs, dim, mean, grad_dtype != out.dtype, table(out)};
  const auto s = static_cast<cudaStream_t>(stream);
  return with_type(out.dtype, grad_dtype, [&](auto row) {
    using T = decltype(row);
    constexpr int N = 16 / sizeof(T);
    if (pairs == 0) return clear(a.out, sizeof(T) * dim, s);
    if (dim % N == 0 && aligned(a.out) && aligned(grad, grad_stride * size_of(grad_dtype)))
      return launch(bwd_kernel<T, N>, a, std::max(pairs, ceil_div(out.rows, 32)), threads(dim, N), 2, s);
    return launch(bwd_kernel<T, 1>, a, std::max(pairs, ceil_div(out.rows, 32)), threads(dim, 1), 2, s);
  });
}

}  // namespace cuda
}  // namespace vocabdistil
