// KL over the matched vocabulary on the GPU, with its gradient, in one launch: a block per pair, which sweeps the
// student's columns three times: for the largest logits, for the sums of exponentials, and to write the gradient; rows
// that are close and classes of nearly equal logits take one sweep more each. Formulas:
// vocabdistil/reference/matched_kl.py.
//
// What crosses the memory is the student's row, its gradient and, of the teacher, the sectors of 32 bytes that hold a
// matched column, once, as the first sweep keeps what it gathers of the teacher in shared memory; with the unmatched
// classes its whole row, of which a sweep before the others leaves the matched columns there. The student's row, short
// beside it, is read again from the cache, and so are columns that shared memory has no room for. Of 4,700 matched
// among 5,031 and 119,547 columns in bf16 that is 133 KB a pair, or 259 KB. The interpreter of tests/ptx counts 37,000
// instructions of a warp, by reasoning as long on an H200 as its memory takes, or 196,000, which is several times as
// long. Rows whose columns make packs take a fifth to a third less.
#include "finish.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

// Columns of a thread at a time: adjacent, 16 bytes or 32, where rows allow it, else as many apart as the block has
// threads. Two blocks of 10 warps, 5 to each quarter of a multiprocessor, leave 96 registers to a thread, have 8
// sectors of each in flight, several times what latency times bandwidth asks for, and on an H200 shared memory for
// 28,000 columns each.
constexpr int kColumns = 8, kMostThreads = 320, kBlocks = 2;

struct LogitSide {
  const char* data;
  int64_t stride, rows;  // stride: in bytes
  int columns, item;     // item: bytes of an element
  DType dtype;
};

struct MatchedArgs {
  LogitSide student, teacher;
  Spans student_spans, teacher_spans;  // start == nullptr: row p with row p
  const int32_t* teacher_of;           // [student columns], -1 where there is none
  const int32_t* student_of;           // [teacher columns], read with the unmatched classes only, as the next
  const int8_t* teacher_matched;       // [teacher columns]
  int matched;  // how many columns are
  Unmatched unmatched;
  bool mean, teacher_aligned;
  int kept;  // the teacher's logits of so many of the student's columns stay in shared memory, a number of turns
  Temperature temperature;
  const float *scale, *upstream, *formed;  // [pairs], [1], [1]; the last two may be null
  float* loss;                             // [pairs] or null
  void* grad;                              // contiguous, or null
};

// The columns of a thread: `first` and those behind it, `step` apart.
struct Columns {
  int first, step, count;

  __device__ int at(int k) const { return first + k * step; }
  __device__ bool inside(int k) const { return at(k) < count; }
};
template <bool kPacked>
__device__ Columns columns_of(int base, int count) {
  return {base + static_cast<int>(threadIdx.x) * (kPacked ? kColumns : 1), kPacked ? 1 : static_cast<int>(blockDim.x),
          count};
}
inline __device__ int columns_at_once() { return kColumns * static_cast<int>(blockDim.x); }

inline __device__ float* shared_floats() {
#ifdef __CUDACC__
  extern __shared__ float4 floats[];
  return reinterpret_cast<float*>(floats);
#else
  return cuda_on_host::shared_floats();
#endif
}

// One entry of a table for each column, `outside` past the end.
template <bool kPacked, class T>
__device__ void entries(T (&x)[kColumns], const T* table, const Columns& columns, T outside) {
  if constexpr (kPacked) {
    Pack<T, kColumns> pack;
    if (columns.inside(0)) pack = *reinterpret_cast<const Pack<T, kColumns>*>(table + columns.first);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = columns.inside(0) ? pack.value[k] : outside;
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = columns.inside(k) ? table[columns.at(k)] : outside;
  }
}

template <bool kPacked>
__device__ void keep(float* kept, const float (&x)[kColumns], const Columns& columns) {
  if constexpr (kPacked) {
    Pack<float, kColumns> pack;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) pack.value[k] = x[k];
    if (columns.inside(0)) *reinterpret_cast<Pack<float, kColumns>*>(kept + columns.first) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      if (columns.inside(k)) kept[columns.at(k)] = x[k];
  }
}

// The pooled logits of a span at the columns `ids`, 0 where one is negative; `adjacent`: they make one aligned pack.
inline __device__ void pooled(float (&x)[kColumns], const LogitSide& side, const Span& span, bool mean,
                              const int (&ids)[kColumns], bool adjacent) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) x[k] = 0;
#pragma unroll 1
  for (int i = span.start; i < span.end; ++i) {
    const char* const row = side.data + int64_t{i} * side.stride;
    with_element(side.dtype, [&](auto element) {
      using E = decltype(element);
      const E* const at = reinterpret_cast<const E*>(row);
      Pack<E, kColumns> raw{};
      if (adjacent) {
        if (ids[0] >= 0) raw = *reinterpret_cast<const Pack<E, kColumns>*>(at + ids[0]);
      } else {
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (ids[k] >= 0) raw.value[k] = at[ids[k]];
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) x[k] += load<float>(raw.value[k]);
    });
  }
  if (!mean || span.end - span.start == 1) return;
  const float part = share<float>(span, true);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) x[k] *= part;
}
template <bool kPacked>
__device__ void pooled(float (&x)[kColumns], const LogitSide& side, const Span& span, bool mean,
                       const Columns& columns) {
  int ids[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) ids[k] = columns.inside(k) ? columns.at(k) : -1;
  pooled(x, side, span, mean, ids, kPacked);
}

// A class of -inf logits only is shifted by nothing, so that its terms are exp(-inf) = 0 and not NaN.
inline __device__ float shift_of(float top) { return top == -INFINITY ? 0 : top; }

// exp(x) - 1 for x <= 0.
inline __device__ float less_one(float x) {
  return x > -0.5f ? fmaf(x * x, exp_series(x), x) : exp2_flushed(x * kLog2E) - 1;
}

// Is it worth adding up what each of `count` exponentials lacks of 1? Their sum has not its digits.
inline __device__ bool near_count(float sum, float count) { return sum > 0.5f * count; }

// Exponentials of one class: what they are shifted by, their sum, that sum less their number, and this number.
struct Class {
  float shift, sum, less, count;

  __device__ bool near_count() const { return cuda::near_count(sum, count); }
};

// What the sweeps over a pair have found, the same for all threads: in shared memory, as between the sweeps it would
// cost registers.
struct Row {
  Class s, t, rest_s, rest_t;  // of the matched and of the unmatched columns of both sides
  float ratio;                 // log of the student's matched sum over the teacher's
  float mean, tilt;  // of close rows: of the logs' differences by the teacher's shares, and exp of it
};

// The teacher's unmatched class, of a sweep over its whole row that leaves the matched logits in `kept`.
template <bool kPacked>
__device__ void teacher_rest(const MatchedArgs& a, Group& group, const Span& span, float* kept, Class& result) {
  constexpr int kAhead = 4;  // turns that a row is asked for ahead: a thread alone has 16 bytes of it in flight
  constexpr int8_t kOutside = 2;
  const float count = static_cast<float>(a.teacher.columns - a.matched);
  float top = -INFINITY, sum = 0;
  Class rest;
#pragma unroll 1
  for (bool again = false;; again = true) {
#pragma unroll 1
    for (int base = 0; base < a.teacher.columns; base += columns_at_once()) {
      const Columns columns = columns_of<kPacked>(base, a.teacher.columns);
      const int64_t ahead = columns.first + int64_t{kAhead} * columns_at_once();
      if (ahead < a.teacher.columns)
        prefetch(a.teacher.data + span.start * a.teacher.stride + ahead * a.teacher.item);
      int8_t matched[kColumns];
      float x[kColumns];
      entries<kPacked>(matched, a.teacher_matched, columns, kOutside);
      pooled<kPacked>(x, a.teacher, span, a.mean, columns);
      if (again) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (!matched[k]) sum += less_one((x[k] - top) * a.temperature.inverse);
        continue;
      }
      float high = top;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (matched[k] == 1) {
          const int d = a.student_of[columns.at(k)];
          if (static_cast<unsigned>(d) < static_cast<unsigned>(a.kept)) kept[d] = x[k];
        }
        if (matched[k]) x[k] = -INFINITY;
        high = fmaxf(high, x[k]);
      }
      const float shift = shift_of(high);
      if (high > top) sum *= exp2_flushed((top - shift) * a.temperature.in_log2);
      top = high;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sum += exp2_flushed((x[k] - shift) * a.temperature.in_log2);
    }
    if (again) {
      group.sum(sum);
      rest.less = sum;
      break;
    }
    float highest = top;
    group.max(highest);
    highest = shift_of(highest);
    sum *= exp2_flushed((top - highest) * a.temperature.in_log2);
    group.sum(sum);
    rest = {highest, sum, sum - count, count};
    if (!rest.near_count()) break;
    top = highest, sum = 0;
  }
  result = rest;
  __syncthreads();
}

// log(1 + exp x)
inline __device__ float softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }

// log(x.sum / y.sum), with the digits that sums near their counts have not.
inline __device__ float log_ratio(const Class& x, const Class& y) {
  if (!x.near_count() || !y.near_count()) return logf(x.sum / y.sum);
  const float more_x = x.less / x.count, more_y = y.less / y.count;
  return log1pf((x.count - y.count) / y.count) + log1pf((more_x - more_y) / (1 + more_y));
}

// A divergence and d divergence / d logit / T: matched by_s * (exp s, or of close rows Step.first) - by_t * exp t,
// unmatched by_rest * exp s.
struct Outcome {
  float loss, by_s, by_t, by_rest;
};

// With the unmatched classes, as with_unmatched of csrc/cpu/matched.h and _with_rest of triton_kernels/matched_kl.py.
// within: of the matched columns alone.
inline __device__ Outcome with_rest(const Outcome& within, const Row& row, float inverse, bool drop) {
  const Class s = row.s, t = row.t, rest_s = row.rest_s, rest_t = row.rest_t;
  const bool none_s = s.sum == 0, none_t = t.sum == 0;
  if (none_t && rest_t.sum == 0) return {0, 0, 0, 0};
  if (none_s && rest_s.sum == 0) return {INFINITY, 0, 0, 0};
  // Logs of the matched mass over the other; what they differ by has digits that their difference has not where the
  // sides are close.
  const float teacher_odds = (t.shift - rest_t.shift) * inverse + logf(t.sum / rest_t.sum);
  const float student_odds = (s.shift - rest_s.shift) * inverse + logf(s.sum / rest_s.sum);
  const float shifts = (s.shift - t.shift) - (rest_s.shift - rest_t.shift);
  const float apart = shifts * inverse + (row.ratio - log_ratio(rest_s, rest_t));
  const float log_mass = -softplus(-teacher_odds), log_others = -softplus(teacher_odds);
  const float mass = expf(log_mass), others = expf(log_others);
  // Of the two classes alone: log(r / q) and r of the matched one, r - q of the other, KL(q || r).
  float more, own, moved, kl;
  if (fabsf(apart) < 30) {  // else exponentials of it may overflow
    const float up = others * apart, down = -mass * apart;
    const Step of_mass = step_of(mass, mass, expf(up), up), of_others = step_of(others, others, expf(down), down);
    const float excess = of_mass.rest + of_others.rest;
    kl = log1pf(excess);
    more = up - kl;
    own = mass + (of_mass.first - excess * mass) / (1 + excess);
    moved = (of_others.first - excess * others) / (1 + excess);
  } else {
    more = -softplus(-student_odds) - log_mass;
    own = expf(-softplus(-student_odds));
    moved = expf(-softplus(student_odds)) - others;
    kl = (others == 0 ? 0 : others * (log_others + softplus(student_odds))) - (mass == 0 ? 0 : mass * more);
    if (kl < 0) kl = 0;  // a NaN stays
  }
  const float inside = mass == 0 ? 0 : mass * within.loss;
  const float loss = !drop ? inside + kl : mass == 0 ? 0 : inside - mass * more;
  const float gives = drop ? mass * (others + moved) : moved;
  if (drop) own *= mass;
  return {loss, none_s ? 0 : none_t ? own / s.sum : own * within.by_s, none_t ? 0 : own * within.by_t + gives / t.sum,
          rest_s.sum == 0 ? 0 : gives / rest_s.sum};
}

// Writes a thread's columns of the gradient to the rows of the span.
template <bool kPacked>
__device__ void store_slopes(const float (&slope)[kColumns], const MatchedArgs& a, const Span& span,
                             const Columns& columns) {
  with_element(a.student.dtype, [&](auto element) {
    using E = decltype(element);
    Pack<E, kColumns> raw;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) raw.value[k] = store<E>(slope[k]);
#pragma unroll 1
    for (int i = span.start; i < span.end; ++i) {
      E* const row = static_cast<E*>(a.grad) + int64_t{i} * columns.count;
      if constexpr (kPacked) {
        if (columns.inside(0)) *reinterpret_cast<Pack<E, kColumns>*>(row + columns.first) = raw;
      } else {
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (columns.inside(k)) row[columns.at(k)] = raw.value[k];
      }
    }
  });
}

// A sweep, in the order in which they come. The code that reads the columns stands once for all of them.
enum class Sweep { tops, sums, lacks, close, gradient };

template <bool kPacked>
__global__ void __launch_bounds__(kMostThreads, kBlocks) matched_kernel(const __grid_constant__ MatchedArgs a) {
  __shared__ float4 parts[2][32];
  __shared__ Row row;
  if (a.formed && *a.formed == *a.upstream) return;  // the gradient is there already
  const int64_t p = blockIdx.x;
  Span student{static_cast<int>(p), static_cast<int>(p) + 1}, teacher = student;
  if (a.student_spans.start) student = span(a.student_spans, p), teacher = span(a.teacher_spans, p);
  student = clamp(student, a.student.rows), teacher = clamp(teacher, a.teacher.rows);
  if (student.start >= student.end || teacher.start >= teacher.end) {
    if (a.loss && threadIdx.x == 0) a.loss[p] = 0;
    return;
  }
  Group group(parts);
  float* const kept = shared_floats();
  const bool whole = a.unmatched != Unmatched::renormalize;
  const float inverse = a.temperature.inverse, in_log2 = a.temperature.in_log2;
  if (whole) teacher_rest<kPacked>(a, group, teacher, kept, row.rest_t);
  float shift_s = 0, shift_t = 0, shift_rest = 0;
  Outcome out{0, 0, 0, 0};
  bool close = false;
#pragma unroll 1
  for (Sweep sweep = Sweep::tops;;) {
    const float from = sweep == Sweep::tops ? -INFINITY : 0;
    float of_s = from, of_t = from, of_rest = from, far = 0, near = 0;
#pragma unroll 1
    for (int base = 0; base < a.student.columns; base += columns_at_once()) {
      const Columns columns = columns_of<kPacked>(base, a.student.columns);
      int ids[kColumns];
      float x[kColumns], q[kColumns];
      entries<kPacked>(ids, a.teacher_of, columns, -1);
      pooled<kPacked>(x, a.student, student, a.mean, columns);
      const bool is_kept = base < a.kept;
      if (is_kept && (whole || sweep != Sweep::tops)) {
        entries<kPacked>(q, static_cast<const float*>(kept), columns, 0.0f);
      } else {
        bool adjacent = kPacked && a.teacher_aligned && ids[0] >= 0 && ids[0] % kColumns == 0;
#pragma unroll
        for (int k = 1; k < kColumns; ++k) adjacent = adjacent && ids[k] == ids[0] + k;
        pooled(q, a.teacher, teacher, a.mean, ids, adjacent);
        if (is_kept) keep<kPacked>(kept, q, columns);
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (ids[k] >= 0) continue;
        q[k] = -INFINITY;
        if (!whole || !columns.inside(k)) x[k] = -INFINITY;  // of a column that does not count, which may be NaN
      }
      if (sweep == Sweep::tops) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          of_s = fmaxf(of_s, ids[k] < 0 ? -INFINITY : x[k]);
          of_rest = fmaxf(of_rest, ids[k] < 0 ? x[k] : -INFINITY);
          of_t = fmaxf(of_t, q[k]);
        }
        continue;
      }
      if (sweep == Sweep::lacks) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (ids[k] < 0 && columns.inside(k)) of_rest += less_one((x[k] - shift_rest) * inverse);
        continue;
      }
      if (sweep == Sweep::sums) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const float low_s = x[k] - (ids[k] < 0 ? shift_rest : shift_s), low_t = q[k] - shift_t;
          const float exp_s = exp2_flushed(low_s * in_log2), exp_t = exp2_flushed(low_t * in_log2);
          of_s += ids[k] < 0 ? 0 : exp_s;
          of_t += exp_t;
          if (exp_t != 0) {  // no mass, no contribution, even where the difference is infinite
            far += exp_t * (low_t - low_s);
            near += exp_t * ((q[k] - x[k]) - (shift_t - shift_s));
          }
          x[k] = exp_s;
        }
        if (!whole) continue;
#pragma unroll
        for (int k = 0; k < kColumns; ++k) of_rest += ids[k] < 0 ? x[k] : 0;
        continue;
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const float exp_s = exp2_flushed((x[k] - (ids[k] < 0 ? shift_rest : shift_s)) * in_log2);
        const float exp_t = exp2_flushed((q[k] - shift_t) * in_log2);
        float own = exp_s;
        if (close && ids[k] >= 0) {
          const float above = ((q[k] - x[k]) - (shift_t - shift_s)) * inverse;
          const Step step = step_of(exp_t, exp_s, row.tilt, row.mean - above);
          own = step.first;
          of_s += step.rest;
        }
        x[k] = ids[k] < 0 ? out.by_rest * own : out.by_s * own - out.by_t * exp_t;
      }
      if (sweep == Sweep::gradient) store_slopes<kPacked>(x, a, student, columns);
    }
    // What the sweep has found, and which is next.
    Sweep next = Sweep::gradient;
    if (sweep == Sweep::tops) {
      group.max(of_s, of_t, of_rest);
      shift_s = shift_of(of_s), shift_t = shift_of(of_t), shift_rest = shift_of(of_rest);
      next = Sweep::sums;
    } else if (sweep == Sweep::sums) {
      group.sum(of_s, of_t, far);
      group.sum(of_rest, near);
      const float count = static_cast<float>(a.student.columns - a.matched);
      row.s = {shift_s, of_s, 0, 0}, row.t = {shift_t, of_t, 0, 0};
      row.rest_s = {shift_rest, of_rest, of_rest - count, count};
      // Of logits that are far apart their differences are rounded less after they are shifted, of close ones before.
      const float mean = near * inverse / of_t, ratio = logf(of_s / of_t);
      row.mean = mean, row.tilt = expf(mean), row.ratio = ratio;
      out = {far * inverse / of_t + ratio, 1 / of_s, 1 / of_t, 0};
      close = out.loss < kClose && of_t != 0;
      next = whole && near_count(of_rest, count) ? Sweep::lacks : close ? Sweep::close : Sweep::gradient;
    } else if (sweep == Sweep::lacks) {
      group.sum(of_rest);
      row.rest_s.less = of_rest;
      if (close) next = Sweep::close;
    } else if (sweep == Sweep::close) {
      group.sum(of_s);
      const float excess = of_s / row.t.sum, by = 1 / ((1 + excess) * row.t.sum);
      out = {log1pf(excess), by, excess * by, 0};
      row.ratio = out.loss - row.mean;
    } else {
      return;
    }
    __syncthreads();
    if (next == Sweep::gradient) {
      // A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
      if (row.t.sum == 0)
        out = {0, 0, 0, 0};
      else if (row.s.sum == 0)
        out = {INFINITY, 0, 0, 0};
      if (whole) out = with_rest(out, row, inverse, a.unmatched == Unmatched::drop);
      if (a.loss && threadIdx.x == 0) a.loss[p] = a.temperature.squared * out.loss;
      if (!a.grad) return;
      const float by = a.upstream ? *a.upstream : 1;
      const float factor = a.temperature.value * a.scale[p] * share<float>(student, a.mean) * by;
      out.by_s *= factor, out.by_t *= factor, out.by_rest *= factor;
    }
    sweep = next;
  }
}

// teacher_of and, with the unmatched classes, student_of and teacher_matched, of which the first two are -1 before and
// the last is 0.
struct TableArgs {
  const void *student_ids, *teacher_ids;  // [matched], of 8 bytes if `wide`, else of 4
  bool wide_student, wide_teacher;
  int64_t matched, student_columns, teacher_columns;
  int32_t *teacher_of, *student_of;
  int8_t* teacher_matched;
};
constexpr int kTableThreads = 256;

inline __device__ int64_t id_at(const void* ids, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

__global__ void __launch_bounds__(kTableThreads) table_kernel(const __grid_constant__ TableArgs a) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= a.matched) return;
  const int64_t s = id_at(a.student_ids, a.wide_student, i), t = id_at(a.teacher_ids, a.wide_teacher, i);
  if (s < 0 || s >= a.student_columns || t < 0 || t >= a.teacher_columns) return;
  a.teacher_of[s] = static_cast<int32_t>(t);
  if (!a.student_of) return;
  a.student_of[t] = static_cast<int32_t>(s);
  a.teacher_matched[t] = 1;
}

LogitSide side_of(const Rows& x) {
  const int64_t item = size_of(x.dtype);
  return {static_cast<const char*>(x.data), x.stride * item, x.rows, static_cast<int>(x.columns),
          static_cast<int>(item), x.dtype};
}
bool aligned(const LogitSide& x) { return aligned(x.data, x.stride); }

// Bytes of shared memory for each of kBlocks blocks, besides what they declare and what they cost.
const char* shared_memory(int64_t& bytes) {
  constexpr int kOwn = 2048, kCost = 1024;
  int device = 0, all = 0, most = 0;
  if (const char* error = text(cudaGetDevice(&device))) return error;
  const auto of_all = cudaDevAttrMaxSharedMemoryPerMultiprocessor, of_one = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  if (const char* error = text(cudaDeviceGetAttribute(&all, of_all, device))) return error;
  if (const char* error = text(cudaDeviceGetAttribute(&most, of_one, device))) return error;
  bytes = std::min(all / kBlocks - kCost, most) - kOwn;
  return nullptr;
}

template <bool kPacked>
const char* launch_matched(MatchedArgs a, int64_t pairs, cudaStream_t stream) {
  // As few turns as the largest block takes, and then no more threads than these keep busy.
  const int64_t turns = ceil_div(a.student.columns, kColumns * kMostThreads);
  const int threads = round_up(ceil_div(a.student.columns, kColumns * turns), 32);
  const int64_t turn = threads * kColumns;
  int64_t room = 0;
  if (const char* error = shared_memory(room)) return error;
  a.kept = static_cast<int>(turn * std::min<int64_t>(turns, room / (turn * sizeof(float))));
  const size_t shared = a.kept * sizeof(float);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const char* error = text(cudaFuncSetAttribute(matched_kernel<kPacked>, attribute, static_cast<int>(shared))))
    return error;
  return launch(matched_kernel<kPacked>, a, pairs, threads, stream, shared);
}

}  // namespace

const char* matched_tables(const void* student_ids, bool wide_student, const void* teacher_ids, bool wide_teacher,
                           int64_t matched, int64_t student_columns, int64_t teacher_columns,
                           const GpuMatchedTables& tables, void* on) {
  const auto stream = static_cast<cudaStream_t>(on);
  const TableArgs a{student_ids, teacher_ids, wide_student, wide_teacher, matched, student_columns, teacher_columns,
                    tables.teacher_of, tables.student_of, tables.teacher_matched};
  if (const char* error = text(cudaMemsetAsync(a.teacher_of, 0xFF, student_columns * sizeof(int32_t), stream)))
    return error;
  if (a.student_of) {
    if (const char* error = text(cudaMemsetAsync(a.student_of, 0xFF, teacher_columns * sizeof(int32_t), stream)))
      return error;
    if (const char* error = text(cudaMemsetAsync(a.teacher_matched, 0, teacher_columns, stream))) return error;
  }
  return launch(table_kernel, a, ceil_div(matched, kTableThreads), kTableThreads, stream);
}

const char* matched_kl(const GpuMatchedKlArgs& x) {
  const auto stream = static_cast<cudaStream_t>(x.stream);
  constexpr int64_t kMostColumns = 1 << 30;
  if (x.student.dtype == DType::f64 || x.teacher.dtype == DType::f64)
    return "matched_kl: expected float32, bfloat16 or float16";
  if (x.student.columns > kMostColumns || x.teacher.columns > kMostColumns)
    return "matched_kl: expected at most 2^30 columns";
  const MatchedArgs a{side_of(x.student), side_of(x.teacher), x.student_spans, x.teacher_spans, x.tables.teacher_of,
                      x.tables.student_of, x.tables.teacher_matched, static_cast<int>(x.matched), x.unmatched,
                      x.mean && x.student_spans.start, aligned(side_of(x.teacher)), 0, temperature_of(x.temperature),
                      x.scale, x.upstream, x.formed, x.loss, x.grad};
  const int64_t bytes = x.student.columns * a.student.item;
  const bool whole = x.unmatched != Unmatched::renormalize, aligned_grad = aligned(x.grad, bytes);
  const bool packed = x.student.columns % kColumns == 0 && aligned(a.student) && aligned_grad &&
                      (!whole || (x.teacher.columns % kColumns == 0 && a.teacher_aligned));
  const auto launch_pairs = packed ? launch_matched<true> : launch_matched<false>;
  if (x.pairs > 0)
    if (const char* error = launch_pairs(a, x.pairs, stream)) return error;
  // Without spans each row is written by its pair.
  const bool bare = x.grad && (x.student_spans.start || !x.pairs);
  FinishArgs rest{x.loss, x.scale, x.pairs, 0, 0, 1, x.total, {x.grad}, bare ? 1 : 0, aligned_grad,
                  x.student.rows, x.teacher.rows, bytes, x.student_spans, x.teacher_spans, x.pairs, x.upstream,
                  x.formed};
  return finish(rest, x.parts, stream);
}

}  // namespace cuda
}  // namespace vocabdistil
