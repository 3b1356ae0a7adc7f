// Prototypes of the native operations over plain data: addresses, sizes, dtype codes. No torch, no Python.
#pragma once

#include <cstdint>

namespace vocabdistil {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Divergence : int { kl = 0, reverse_kl = 1, jsd = 2, mse = 3, cosine = 4 };
enum class Unmatched : int { renormalize = 0, rest = 1, drop = 2 };

// One span per pair, half-open token positions [start, end), ascending and disjoint. Every operation that reads them
// looks at them itself and raises std::invalid_argument where they are not, or run past the rows.
struct Spans {
  const int32_t* start;
  const int32_t* end;
};

// The hidden states of one side: `count` layers of [rows, dim], combined as sum_l coef[l] * layer_l.
struct Layers {
  DType dtype;
  int64_t count;
  const void* const* data;    // [count], each [rows, dim] with unit column stride
  const int64_t* row_stride;  // [count], in elements
  const double* coef;         // [count]
  int64_t rows;
};

// Writable gradients of the layers of one side, contiguous [rows, dim] each, in the side's dtype.
struct LayerGrads {
  DType dtype;
  int64_t count;
  void* const* data;   // [count]; count == 0: not wanted
  const double* coef;  // [count]
  int64_t rows;
};

// out[p] = sum_l coef[l] * mean_{i in span p} layer_l[i]   (the sum over the span if !mean; 0 if empty)
struct SpanMeanArgs {
  Layers x;
  Spans spans;
  int64_t pairs, dim;
  bool mean;
  DType out_dtype;
  void* out;  // [pairs, dim]
  int threads;
};

// grad_x_l[i] = coef[l] * grad[p] / len(p) for i in span p, 0 for a token in no span.
struct SpanMeanBwdArgs {
  DType grad_dtype;
  const void* grad;  // [pairs, dim], rows grad_stride elements apart (0: one row for all pairs)
  int64_t grad_stride;
  Spans spans;
  int64_t pairs, dim;
  bool mean;
  LayerGrads out;
  int threads;
};

// Divergence between the averaged rows of both sides, and its gradients, in one pass.
struct SpanLossArgs {
  Layers student, teacher;
  Spans student_spans, teacher_spans;
  int64_t pairs, dim;
  Divergence divergence;
  bool mean;
  double temperature, beta;
  const void* scale;  // [pairs] in the accumulation dtype: what each pair's loss counts in total and gradient
  void* loss;         // [pairs], accumulation dtype, unscaled
  void* total;        // [1], accumulation dtype: sum_p scale[p] * loss[p]
  LayerGrads student_grad, teacher_grad;
  int threads;
};

// Logits [rows, columns] with unit column stride, rows `stride` elements apart.
struct Rows {
  DType dtype;
  const void* data;
  int64_t stride, rows, columns;
};

// KL over the matched columns and its gradient for the student's logits, in one pass. Raises std::invalid_argument
// for ids out of range or repeated.
struct MatchedKlArgs {
  Rows student, teacher;
  Spans student_spans, teacher_spans;        // start == nullptr: row p with row p
  const int32_t *student_ids, *teacher_ids;  // [matched]
  int64_t matched, pairs;
  Unmatched unmatched;
  bool mean;
  double temperature;
  const void* scale;  // [pairs], accumulation dtype
  void* loss;         // [pairs], accumulation dtype, unscaled
  void* total;        // [1], accumulation dtype: sum_p scale[p] * loss[p]
  void* grad;         // contiguous, the student's shape and dtype, or nullptr
  int threads;
};

// One side of the divergence between output layers. Logits are hidden weight^T + lengths bias^T.
struct LinearSide {
  Rows hidden, weight;  // [rows, dim], [vocabulary, dim]
  const void* bias;     // [vocabulary], accumulation dtype, or nullptr
  const void* lengths;  // [rows], accumulation dtype, or nullptr: 1 each
  const int32_t* ids;   // [matched]
};

// matched_kl of the logits of two output layers, which are formed `budget` bytes at a time (or a quarter of what the
// matched rows of both weights take, if that is more), and the gradients for the student's. Raises as matched_kl.
struct LinearMatchedKlArgs {
  LinearSide student, teacher;
  int64_t matched;
  Unmatched unmatched;
  double temperature;
  int64_t budget;
  const void* scale;  // [rows], accumulation dtype
  void* loss;         // [rows], accumulation dtype, unscaled
  void* total;        // [1], accumulation dtype: sum_p scale[p] * loss[p]
  void *grad_hidden, *grad_weight, *grad_bias;  // contiguous, accumulation dtype, all of it written, or nullptr
  int threads;
};

// A token for each row, of those rows that need one.
struct Tokens {
  const int64_t* ids;     // [rows]
  const uint8_t* needed;  // [rows]: 0 or 1
};

// The log-probability of each row's token, and what the backward pass takes from the forward pass: the probability of a
// logit z is share * exp(z - shift). 0 for rows that need none. All [rows], accumulation dtype.
struct TokenOddsOut {
  void *log_prob, *shift, *share;
};

// Of logits. Raises std::invalid_argument for a needed id that is none of the columns.
struct LogProbArgs {
  Rows logits;
  Tokens tokens;
  TokenOddsOut out;
  int threads;
};
struct LogProbBwdArgs {
  Rows logits;
  Tokens tokens;
  TokenOddsOut of;
  const void* grad;   // [rows], accumulation dtype
  void* grad_logits;  // contiguous, the shape and dtype of the logits
  int threads;
};

// Of the logits hidden weight^T + bias, of which those of all rows are formed at as many columns as `budget` bytes have
// room for, and at no fewer than fill a few tiles.
struct LinearTokens {
  Rows hidden, weight;  // [rows, dim], [vocabulary, dim]
  const void* bias;     // [vocabulary], accumulation dtype, or nullptr
  Tokens tokens;
};
struct LinearLogProbArgs {
  LinearTokens tokens;
  TokenOddsOut out;
  int threads;
};
struct LinearLogProbBwdArgs {
  LinearTokens tokens;
  TokenOddsOut of;
  const void* grad;  // [rows], accumulation dtype
  int64_t budget;
  void *grad_hidden, *grad_weight, *grad_bias;  // contiguous, accumulation dtype, all of it written, or nullptr
  int threads;
};

// A remap table as the kernel reads it: the non-empty rows sorted by length; within the rows of one length, which lie
// side by side, entry i of piece k is ids[k * count + i].
struct RemapPlan {
  const int32_t* rows;  // [mapped]: teacher ids
  int64_t mapped;
  const int32_t* shapes;  // [buckets, 2]: length and count of the rows of one length
  int64_t buckets;
  const int32_t* ids;        // [nnz]: student ids
  const int32_t* indptr;     // [student columns + 1]: the transposed table
  const int32_t* pieces_of;  // [nnz]: positions in `rows` that the student id is a piece of
  // What the entries count, or their logs for logsumexp, as `ids` and as `pieces_of`; accumulation dtype, null for 1.
  const void *weights, *weights_of;
};

// KL over the mapped teacher tokens and its gradient for the student's logits, in one pass.
struct RemappedKlArgs {
  Rows student, teacher;
  Spans student_spans, teacher_spans;  // start == nullptr: row p with row p
  RemapPlan plan;
  int64_t pairs;
  bool logsumexp;
  int64_t top_k;        // 0: all
  Unmatched remainder;  // what becomes of those outside
  double temperature;
  const void* scale;  // [pairs], accumulation dtype
  void* loss;         // [pairs], accumulation dtype, unscaled
  void* total;        // [1], accumulation dtype: sum_p scale[p] * loss[p]
  void* grad;         // contiguous, the student's shape and dtype, or nullptr
  int threads;
};

// remapped_kl of the logits of two output layers, which are formed `budget` bytes at a time (or a quarter of what the
// rows of both weights that the table names take, if that is more), and the gradients for the student's. The plan's ids
// are positions in the `columns` ids of the student's side; the teacher's side has no ids, and neither has lengths.
struct LinearRemappedKlArgs {
  LinearSide student, teacher;
  RemapPlan plan;
  int64_t columns;
  bool logsumexp;
  int64_t top_k;        // 0: all
  Unmatched remainder;  // what becomes of those outside
  double temperature;
  int64_t budget;
  const void* scale;  // [rows], accumulation dtype; a row of scale 0 has loss 0
  void* loss;         // [rows], accumulation dtype, unscaled
  void* total;        // [1], accumulation dtype: sum_p scale[p] * loss[p]
  void *grad_hidden, *grad_weight, *grad_bias;  // contiguous, accumulation dtype, all of it written, or nullptr
  int threads;
};

// KL between the softmax relations of the rows of each text, by heads, and its gradient for the student's rows.
struct RelationLossArgs {
  DType dtype;                    // of every array but the labels: f32 or f64
  const void *student, *teacher;  // contiguous [pairs, dim], each dim a multiple of heads
  int64_t pairs, student_dim, teacher_dim, heads;
  const int32_t *first, *last;  // [pairs]: neighbours of one text have one `first`; last <= first: left out
  const void* scale;            // [pairs]
  void* loss;                   // [pairs], unscaled, the mean over the heads
  void* total;                  // [1]: sum_p scale[p] * loss[p]
  void* grad;                   // contiguous [pairs, student_dim], or nullptr
  int threads;
};

// CPU. The accumulation dtype is f64 if any input is f64, else f32.
void span_mean_fwd(const SpanMeanArgs&);
void span_mean_bwd(const SpanMeanBwdArgs&);
void span_loss(const SpanLossArgs&);
void matched_kl(const MatchedKlArgs&);
void linear_matched_kl(const LinearMatchedKlArgs&);
void log_prob_fwd(const LogProbArgs&);
void log_prob_bwd(const LogProbBwdArgs&);
void linear_log_prob_fwd(const LinearLogProbArgs&);
void linear_log_prob_bwd(const LinearLogProbBwdArgs&);
void remapped_kl(const RemappedKlArgs&);
void linear_remapped_kl(const LinearRemappedKlArgs&);
void relation_loss(const RelationLossArgs&);
const char* active_isa();

// GPU, where it was built.
namespace cuda {

constexpr int kMaxLayers = 64;        // as many as fit the 4 KB of a kernel's arguments
constexpr int64_t kTotalPairs = 8192;  // of more a total is added up in two stages
constexpr int kRemapChunk = 2048;      // tokens that a block of a remap takes

// The layers of one side, read or written: `coef` lies on the device, null for 1 / count each.
struct GpuLayers {
  DType dtype;
  int64_t count;
  void* const* data;          // [count], each [rows, dim] with unit column stride
  const int64_t* row_stride;  // [count], in elements
  int64_t rows;
  const double* coef;  // [count] on the device, or null
};

// As SpanLossArgs, in float32, with the gradient of the student alone.
struct GpuSpanLossArgs {
  GpuLayers student, teacher;
  int64_t grads;      // 0: not wanted
  void* const* grad;  // [grads], contiguous [rows, dim] each, in the student's dtype
  Spans student_spans, teacher_spans;
  int64_t pairs, dim;
  Divergence divergence;
  bool mean;
  double temperature, beta, base;
  const float* weights;   // [pairs] or null: pair p counts base * weights[p]
  const float* upstream;  // [1] or null: another factor, of the gradients alone
  const float* formed;    // [1] or null: where it equals upstream the gradients are left as they are
  float* loss;            // [pairs] or null, unscaled
  float* total;           // [1] or null
  float* parts;           // [ceil(pairs / kTotalPairs)], of the first stage of the total; null where there is no second
  void* stream;
};

// What stands in one column of each side, of the matched ids: kept from call to call.
struct GpuMatchedTables {
  int32_t* teacher_of;      // [student columns]: -1 where there is none
  int32_t* student_of;      // [teacher columns], likewise; null, as the next, for Unmatched::renormalize
  int8_t* teacher_matched;  // [teacher columns]
};

// As MatchedKlArgs, in float32.
struct GpuMatchedKlArgs {
  Rows student, teacher;
  Spans student_spans, teacher_spans;  // start == nullptr: row p with row p
  GpuMatchedTables tables;
  int64_t matched, pairs;
  Unmatched unmatched;
  bool mean;
  double temperature;
  const float* scale;     // [pairs]
  const float* upstream;  // as in GpuSpanLossArgs, as all from here on
  const float* formed;
  float* loss;
  float* total;
  float* parts;
  void* grad;  // contiguous, the student's shape and dtype, or nullptr
  void* stream;
};

// Rows of integers of `bytes` each (1, 4 or 8) with adjacent columns, `stride` elements apart.
struct IntRows {
  const void* data;
  int bytes;
  int64_t stride;
};

// Teacher ids [batch, length], those of mask 0 left out, and the remap table, whose row r is pieces[indptr[r]] up to
// pieces[indptr[r + 1] - 1]. A sequence has ceil(length / kRemapChunk) chunks, and at least 1.
struct GpuRemapBatch {
  IntRows ids, mask;  // mask.data == nullptr: none
  int64_t batch, length;
  const int32_t *indptr, *pieces;  // [rows + 1], [nnz]
  int64_t rows, nnz;
};

// vocabdistil/reference/remap.py says what stands where.
struct GpuRemapOut {
  const int64_t* ends;       // [batch, chunks]: pieces of a sequence up to the end of a chunk; null where it has one
  const int64_t* pair_ends;  // [batch * chunks]: tokens kept up to the end of a chunk; null: a pair for every token
  int64_t width, pairs, unk_id, pad_id;
  int64_t *input_ids, *attention;  // [batch, width]
  int32_t* spans;                  // [4, pairs]
  int32_t* nonempty;               // [batch * chunks]: pairs of two spans that are not empty
};

// Why no kernel can run here (an old driver, an architecture that was not built), or nullptr.
const char* problem();

// Launched on `stream`; each returns an error text, or nullptr.
const char* span_mean_fwd(const GpuLayers& x, Spans spans, int64_t pairs, int64_t dim, bool mean, DType out_dtype,
                          void* out, void* stream);
const char* span_mean_bwd(DType grad_dtype, const void* grad, int64_t grad_stride, Spans spans, int64_t pairs,
                          int64_t dim, bool mean, const GpuLayers& out, void* stream);
const char* span_loss(const GpuSpanLossArgs&);
// Fills the tables from `matched` ids, of int64 where they are wide and else of int32; those out of range are left out.
const char* matched_tables(const void* student_ids, bool wide_student, const void* teacher_ids, bool wide_teacher,
                           int64_t matched, int64_t student_columns, int64_t teacher_columns,
                           const GpuMatchedTables& tables, void* stream);
const char* matched_kl(const GpuMatchedKlArgs&);
// out: [4, batch, chunks]: pieces, tokens that are kept, those with pieces, those that are in no row.
const char* remap_measure(const GpuRemapBatch&, int64_t* out, void* stream);
const char* remap_write(const GpuRemapBatch&, const GpuRemapOut&, void* stream);

}  // namespace cuda

}  // namespace vocabdistil
