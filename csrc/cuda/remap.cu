// The remap table on the GPU: a block takes a chunk of one sequence, scans the lengths of its rows, 256 tokens at a
// time, and writes its pieces. What it computes: vocabdistil/reference/remap.py.
//
// Bytes, per teacher token: 8 (id, int64) + 8 (mask, if there is one) + 16 (pair), and 16 (id and mask) per student
// token of the padded result; the table stays in the L2 cache. Launches: one for sequences of up to kRemapChunk tokens
// and a given width, another that measures the chunks for longer ones or where the width is asked for; sums over chunks
// are the caller's. The pieces of a warp's tokens stand side by side, so each lane takes a place there and looks for the
// token that covers it: stores meet in whole sectors, however long a row is.
//
// Nothing is atomic. No id outside the table is ever used as an index: it is the unknown token. Bounds of rows are
// clamped to the pieces, positions to the width, and pairs to their number.
#include "rows.cuh"

namespace vocabdistil {
namespace cuda {
namespace {

constexpr int kRemapThreads = 256, kRemapWarps = kRemapThreads / 32;
// As many as a multiprocessor holds: a turn waits for one load after the other, which other blocks hide.
constexpr int kRemapBlocks = 8;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kRemapChunk % kRemapThreads == 0, "a turn of a block must not reach into the next chunk");

struct alignas(16) Sums {
  int64_t first, second;
};

// Of two sums of each warp, which its last lane has, those of the warps before and of all.
class Warps {
 public:
  __device__ explicit Warps(Sums (*parts)[kRemapWarps]) : parts_(parts) {}

  __device__ Sums sum(const Sums& own, Sums& before) {
    Sums* const parts = parts_[turn_];
    turn_ ^= 1;  // two buffers: the next but one sum is behind a barrier that follows the reads of this one
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 31) parts[warp] = own;
    __syncthreads();
    Sums all{};
#pragma unroll
    for (int w = 0; w < kRemapWarps; ++w) {
      if (w == warp) before = all;
      all.first += parts[w].first, all.second += parts[w].second;
    }
    return all;
  }

 private:
  Sums (*parts_)[kRemapWarps];
  int turn_ = 0;
};

inline __device__ int64_t integer(const IntRows& x, int64_t row, int64_t column) {
  const int64_t at = row * x.stride + column;
  switch (x.bytes) {
    case 8: return static_cast<const int64_t*>(x.data)[at];
    case 4: return static_cast<const int32_t*>(x.data)[at];
    default: return static_cast<const int8_t*>(x.data)[at];
  }
}

// One token of a batch: whether it is kept and in the table, where its row begins and how long that is (1 for an id
// outside the table, 0 for a token left out).
struct Token {
  bool keep, known;
  int first, count;
};
inline __device__ Token look_up(const GpuRemapBatch& a, int64_t b, int64_t at) {
  Token token{};
  if (at >= a.length || (a.mask.data && integer(a.mask, b, at) == 0)) return token;
  const int64_t id = integer(a.ids, b, at);
  token.keep = true;
  token.known = id >= 0 && id < a.rows;
  token.count = 1;
  if (!token.known) return token;
  token.first = clamp(a.indptr[id], a.nnz);
  const int count = clamp(a.indptr[id + 1], a.nnz) - token.first;
  token.count = count < 0 ? 0 : count;
  return token;
}

inline __device__ int least(int64_t x, int64_t y) { return static_cast<int>(x < y ? x : y); }

struct MeasureArgs {
  GpuRemapBatch batch;
  unsigned chunks;
  int64_t* out;  // [4, batch, chunks]
};

__global__ void __launch_bounds__(kRemapThreads) measure_kernel(const __grid_constant__ MeasureArgs a) {
  __shared__ Sums parts[2][kRemapWarps];
  Warps warps(parts);
  const int64_t b = blockIdx.x / a.chunks, begin = int64_t{blockIdx.x % a.chunks} * kRemapChunk;
  int64_t pieces = 0, kept = 0, filled = 0, outside = 0;
#pragma unroll 1
  for (int64_t at = begin; at < a.batch.length && at < begin + kRemapChunk; at += kRemapThreads) {
    const Token token = look_up(a.batch, b, at + threadIdx.x);
    pieces += token.count;
    kept += __popc(__ballot_sync(kAllLanes, token.keep));
    filled += __popc(__ballot_sync(kAllLanes, token.count > 0));
    outside += __popc(__ballot_sync(kAllLanes, token.keep && !token.known));
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) pieces += __shfl_xor_sync(kAllLanes, pieces, mask);
  Sums before;
  const Sums found = warps.sum({pieces, kept}, before), others = warps.sum({filled, outside}, before);
  if (threadIdx.x != 0) return;
  a.out[blockIdx.x] = found.first;
  a.out[gridDim.x + blockIdx.x] = found.second;
  a.out[2 * int64_t{gridDim.x} + blockIdx.x] = others.first;
  a.out[3 * int64_t{gridDim.x} + blockIdx.x] = others.second;
}

struct RemapArgs {
  GpuRemapBatch batch;
  unsigned chunks;
  GpuRemapOut out;
};

// The pieces of a warp's tokens, those of a lane at [start, end), and nothing for those at `to` and behind.
inline __device__ void write_pieces(const RemapArgs& a, const Token& token, int start, int end, int from, int to,
                                    int64_t* ids, int64_t* attention) {
  const int first = token.known ? token.first : -1;
#pragma unroll 1
  for (int64_t base = from; base < to; base += 32) {
    const int64_t at = base + threadIdx.x % 32;
    int owner = 0;  // the first lane whose end lies behind
#pragma unroll
    for (int step = 16; step; step /= 2)
      if (__shfl_sync(kAllLanes, end, owner + step - 1) <= at) owner += step;
    const int row = __shfl_sync(kAllLanes, first, owner), begin = __shfl_sync(kAllLanes, start, owner);
    if (at >= to) continue;
    ids[at] = row < 0 ? a.out.unk_id : a.batch.pieces[row + (at - begin)];
    attention[at] = 1;
  }
}

__global__ void __launch_bounds__(kRemapThreads, kRemapBlocks) remap_kernel(const __grid_constant__ RemapArgs a) {
  __shared__ Sums parts[2][kRemapWarps];
  Warps warps(parts);
  const GpuRemapOut& out = a.out;
  const unsigned chunk = blockIdx.x % a.chunks;
  const int64_t b = blockIdx.x / a.chunks, length = a.batch.length, stop = (int64_t{chunk} + 1) * kRemapChunk;
  const int lane = threadIdx.x % 32;
  const int64_t begin = out.ends && chunk ? out.ends[blockIdx.x - 1] : 0;
  int64_t before = begin, pair = out.pair_ends && blockIdx.x ? out.pair_ends[blockIdx.x - 1] : 0;
  int64_t* const ids = out.input_ids + b * out.width;
  int64_t* const attention = out.attention + b * out.width;
  int filled = 0, written = 0;
#pragma unroll 1
  for (int64_t first = stop - kRemapChunk; first < length && first < stop; first += kRemapThreads) {
    const int64_t at = first + threadIdx.x;
    const Token token = look_up(a.batch, b, at);
    int64_t end = token.count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += other;
    }
    const unsigned kept = __ballot_sync(kAllLanes, token.keep);
    Sums earlier;
    const Sums all = warps.sum({end, __popc(kept)}, earlier);
    end += before + earlier.first;
    before += all.first;
    // Ends ascend, so whatever follows a token that does not fit does not fit either.
    const bool fits = end <= out.width, there = token.keep && fits;
    const int start = least(end - token.count, out.width), last = least(end, out.width);
    const int fitting = __popc(__ballot_sync(kAllLanes, fits));
    filled += __popc(__ballot_sync(kAllLanes, there && token.count > 0));

    const int from = __shfl_sync(kAllLanes, start, 0), to = __shfl_sync(kAllLanes, last, (fitting + 31) % 32);
    if (fitting) {
      write_pieces(a, token, start, last, from, to, ids, attention);
      written += to - from;
    }
    const int64_t nth = pair + earlier.second + __popc(kept & ((1u << lane) - 1));
    pair += all.second;
    const int64_t p = out.pair_ends ? nth : b * length + at;
    if (p >= out.pairs || !(out.pair_ends ? there : at < length)) continue;
    const int64_t student = b * out.width + start, teacher = b * length + at;
    out.spans[p] = static_cast<int32_t>(student);
    out.spans[out.pairs + p] = static_cast<int32_t>(student + (there ? token.count : 0));
    out.spans[2 * out.pairs + p] = static_cast<int32_t>(teacher);
    out.spans[3 * out.pairs + p] = static_cast<int32_t>(teacher + there);
  }
  Sums none;
  const Sums all = warps.sum({filled, written}, none);
  if (threadIdx.x == 0) out.nonempty[blockIdx.x] = static_cast<int32_t>(all.first);
  // What is left of the row: a share for each chunk, or what the first chunk that does not fit leaves.
  const int64_t total = out.ends ? out.ends[(b + 1) * a.chunks - 1] : before;
  const int64_t rest = total < out.width ? out.width - total : 0, share = (rest + a.chunks - 1) / a.chunks;
  const bool cut = begin <= out.width && before > out.width;
  const int64_t pad = cut ? begin + all.second : least(total + chunk * share, out.width);
  const int64_t pad_stop = cut ? out.width : least(total + (chunk + 1) * share, out.width);
  for (int64_t at = pad + threadIdx.x; at < pad_stop; at += kRemapThreads) ids[at] = out.pad_id, attention[at] = 0;
}

unsigned chunks_of(const GpuRemapBatch& batch) {
  return static_cast<unsigned>(std::max<int64_t>(ceil_div(batch.length, kRemapChunk), 1));
}

}  // namespace

const char* remap_measure(const GpuRemapBatch& batch, int64_t* out, void* stream) {
  const unsigned chunks = chunks_of(batch);
  const MeasureArgs a{batch, chunks, out};
  return launch(measure_kernel, a, batch.batch * chunks, kRemapThreads, static_cast<cudaStream_t>(stream));
}

const char* remap_write(const GpuRemapBatch& batch, const GpuRemapOut& out, void* stream) {
  const unsigned chunks = chunks_of(batch);
  const RemapArgs a{batch, chunks, out};
  return launch(remap_kernel, a, batch.batch * chunks, kRemapThreads, static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace vocabdistil
