// A text seen by one head at a time: a block of rows of its scores, of both sides, stays in the cache. Once over the
// blocks for the sums of each row, and once for the gradient, which needs those of every row: the scores are symmetric,
// so what row j makes of column i is known from row i's score of j. Formulas: vocabdistil/reference/relation_loss.py.
#include "../block.h"
#include "softmax.h"
#include "tiles.h"

namespace vocabdistil {
namespace VD_ISA {
namespace {

constexpr int64_t kScoreBytes = int64_t{1} << 21;  // of a block of rows, both sides

// The pairs that count, text by text. Labels are only compared with each other: none can lead astray.
struct Texts {
  std::vector<int64_t> pairs;   // [counted]
  std::vector<int64_t> starts;  // [texts + 1]: where each begins in `pairs`

  Texts(const int32_t* first, const int32_t* last, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      if (last[p] <= first[p]) continue;
      if (pairs.empty() || first[p] != first[pairs.back()]) starts.push_back(static_cast<int64_t>(pairs.size()));
      pairs.push_back(p);
    }
    starts.push_back(static_cast<int64_t>(pairs.size()));
  }
  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t size(int64_t text) const { return starts[text + 1] - starts[text]; }
};

// The rows of one text in one head: where they lie, and transposed, [panel][dim][row].
template <class Acc>
struct HeadRows {
  static constexpr int64_t kW = kTileColumns<Acc>;
  std::vector<const Acc*> rows;
  int64_t dim;
  const Acc* packed;

  static int64_t size(int64_t count, int64_t dim) { return ceil_div(count, kW) * kW * dim; }

  HeadRows(const void* data, int64_t width, int64_t heads, int64_t head, const int64_t* pairs, int64_t count, Acc* to)
      : rows(count), dim(width / heads), packed(to) {
    std::fill_n(to, size(count, dim), Acc{0});
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = static_cast<const Acc*>(data) + pairs[i] * width + head * dim;
      Acc* out = to + i / kW * kW * dim + i % kW;
      for (int64_t k = 0; k < dim; ++k) out[k * kW] = rows[i][k];
    }
  }

  // out[i - begin, j] = <row i, row j> / sqrt(dim), for rows [begin, end): the same bits for (i, j) and (j, i).
  void scores(int64_t begin, int64_t end, Acc* out, int64_t stride) const {
    const int64_t count = static_cast<int64_t>(rows.size());
    const Acc inv_root = static_cast<Acc>(1 / std::sqrt(static_cast<double>(dim)));
    for_row_tiles(begin, end, [&](int m, int64_t i) {
      for (int64_t j = 0; j < count; j += kW) {
        tile_in_parts<Acc>(m, vectors_of<Acc>(count - j), rows.data() + i, dim, packed + j * dim, kW,
                           {out + (i - begin) * stride + j, stride, false, inv_root});
      }
    });
  }
};

// Of each row of a text: its largest score, and what exp(score - top) counts in the gradient.
template <class Acc>
struct Softmax {
  Acc *top, *factor;
};

// Turns row i of the scores s, in place, into what its rows count in the gradient of row i.
template <class Acc>
void slopes(Acc* __restrict s, const Acc* __restrict t, int64_t i, int64_t count, const Softmax<Acc>& of_s,
            const Softmax<Acc>& of_t) {
  const Acc *__restrict s_top = of_s.top, *__restrict t_top = of_t.top;
  const Acc *__restrict s_factor = of_s.factor, *__restrict t_factor = of_t.factor;
  const Acc top_s = s_top[i], top_t = t_top[i], factor_s = s_factor[i], factor_t = t_factor[i];
  VD_SIMD for (int64_t j = 0; j < count; ++j) {
    const Acc own = factor_s * exp_nonpositive(s[j] - top_s) - factor_t * exp_nonpositive(t[j] - top_t);
    s[j] = own + (s_factor[j] * exp_nonpositive(s[j] - s_top[j]) - t_factor[j] * exp_nonpositive(t[j] - t_top[j]));
  }
}

// Rows [begin, end) of the gradient: slopes [end - begin, count] times the rows x [count, x_stride], over sqrt(dim).
template <class Acc>
void write_rows(const Acc* slopes, int64_t stride, int64_t begin, int64_t end, const Acc* x, int64_t x_stride,
                int64_t count, int64_t dim, int64_t width, const int64_t* pairs, Acc* grad) {
  const Acc inv_root = static_cast<Acc>(1 / std::sqrt(static_cast<double>(dim)));
  const int64_t vectors = x_stride / kLanes<Acc>;
  const int64_t step = ceil_div(vectors, ceil_div(vectors, kTileVectors));  // panels of one size
  for_row_tiles(begin, end, [&](int m, int64_t i) {
    const Acc* rows[kTileRows];
    for (int r = 0; r < m; ++r) rows[r] = slopes + (i - begin + r) * stride;
    for (int64_t first = 0; first < vectors; first += step) {
      const int64_t at = first * kLanes<Acc>, columns = std::min(step * kLanes<Acc>, dim - at);
      alignas(64) Acc sum[kTileRows * kTileColumns<Acc>];
      tile_in_parts<Acc>(m, vectors_of<Acc>(columns), rows, count, x + at, x_stride, {sum, kTileColumns<Acc>});
      for (int r = 0; r < m; ++r) {
        const Acc* __restrict from = sum + r * kTileColumns<Acc>;
        Acc* __restrict out = grad + pairs[i + r] * width + at;
        for (int64_t k = 0; k < columns; ++k) out[k] = from[k] * inv_root;
      }
    }
  });
}

// The losses of one text in one head, [pairs], and that head's part of its rows of the gradient.
template <class Acc>
void one_head(const RelationLossArgs& a, const int64_t* pairs, int64_t count, int64_t head, Acc* loss) {
  const int64_t dim = a.student_dim / a.heads, stride = ceil_div(count, kLanes<Acc>) * kLanes<Acc>;
  const int64_t x_stride = ceil_div(dim, kLanes<Acc>) * kLanes<Acc>;
  const int64_t most = std::max<int64_t>(1, kScoreBytes / (2 * static_cast<int64_t>(sizeof(Acc)) * stride));
  const int64_t blocks = ceil_div(count, most), step = ceil_div(count, blocks);

  Acc *packed_s, *packed_t, *s, *t, *spare, *x, *rows;
  const Arrays<Acc> memory{
      {&packed_s, HeadRows<Acc>::size(count, dim)},
      {&packed_t, HeadRows<Acc>::size(count, a.teacher_dim / a.heads)},
      {&s, step * stride},
      {&t, step * stride},
      {&spare, 2 * stride},
      {&x, a.grad ? count * x_stride : 0},
      {&rows, 4 * stride},
  };
  const HeadRows<Acc> student(a.student, a.student_dim, a.heads, head, pairs, count, packed_s);
  const HeadRows<Acc> teacher(a.teacher, a.teacher_dim, a.heads, head, pairs, count, packed_t);
  const Softmax<Acc> of_s{rows, rows + stride}, of_t{rows + 2 * stride, rows + 3 * stride};
  const Acc* scale = static_cast<const Acc*>(a.scale);

  auto scores = [&](int64_t begin, int64_t end) {
    student.scores(begin, end, s, stride);
    teacher.scores(begin, end, t, stride);
  };
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t end = std::min(count, begin + step);
    scores(begin, end);
    for (int64_t i = begin; i < end; ++i) {
      auto copy = [&] {
        std::copy_n(s + (i - begin) * stride, count, spare);
        std::copy_n(t + (i - begin) * stride, count, spare + stride);
      };
      copy();
      of_s.top[i] = max_of(spare, count);
      of_t.top[i] = max_of(spare + stride, count);
      const Sums sums = exp_both(spare, spare + stride, count, of_s.top[i], of_t.top[i], Acc{1});
      double value = sums.dot / sums.t + std::log(sums.s / sums.t);
      if (value < kClose) {
        copy();
        value = close_rows(spare, spare + stride, count, of_s.top[i], of_t.top[i], Acc{1}, sums).loss;
      }
      loss[pairs[i]] = static_cast<Acc>(value);
      const double weight = static_cast<double>(scale[pairs[i]]) / static_cast<double>(a.heads);
      of_s.factor[i] = static_cast<Acc>(weight / sums.s);
      of_t.factor[i] = static_cast<Acc>(weight / sums.t);
    }
  }
  if (!a.grad) return;
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(student.rows[i], dim, x + i * x_stride);
    std::fill(x + i * x_stride + dim, x + (i + 1) * x_stride, Acc{0});
  }
  for (int64_t block = blocks - 1; block >= 0; --block) {
    const int64_t begin = block * step, end = std::min(count, begin + step);
    if (end < count) scores(begin, end);  // those of the last block are still there
    for (int64_t i = begin; i < end; ++i)
      slopes(s + (i - begin) * stride, t + (i - begin) * stride, i, count, of_s, of_t);
    write_rows(s, stride, begin, end, x, x_stride, count, dim, a.student_dim, pairs,
               static_cast<Acc*>(a.grad) + head * dim);
  }
}

template <class Acc>
void run(const RelationLossArgs& a) {
  const Texts texts(a.first, a.last, a.pairs);
  Acc *loss = static_cast<Acc*>(a.loss), *grad = static_cast<Acc*>(a.grad);
  for (int64_t p = 0; grad && p < a.pairs; ++p)
    if (a.last[p] <= a.first[p]) std::fill_n(grad + p * a.student_dim, a.student_dim, Acc{0});

  std::vector<Acc> of_heads(a.heads * a.pairs);
  int64_t work = 0;
  for (int64_t i = 0; i < texts.count(); ++i) work += texts.size(i) * texts.size(i);
  const int threads = useful_threads(a.threads, work / 8 * (a.student_dim + a.teacher_dim + 8 * a.heads));
  parallel_tasks(texts.count() * a.heads, threads, [&](int64_t i) {
    const int64_t text = i / a.heads, head = i % a.heads;
    one_head(a, texts.pairs.data() + texts.starts[text], texts.size(text), head, of_heads.data() + head * a.pairs);
  });
  for (int64_t p = 0; p < a.pairs; ++p) {
    double sum = 0;
    for (int64_t head = 0; head < a.heads; ++head) sum += static_cast<double>(of_heads[head * a.pairs + p]);
    loss[p] = static_cast<Acc>(sum / static_cast<double>(a.heads));
  }
  *static_cast<Acc*>(a.total) = weighted_total(loss, static_cast<const Acc*>(a.scale), a.pairs);
}

}  // namespace

void relation_loss(const RelationLossArgs& a) { a.dtype == DType::f64 ? run<double>(a) : run<float>(a); }

}  // namespace VD_ISA
}  // namespace vocabdistil
