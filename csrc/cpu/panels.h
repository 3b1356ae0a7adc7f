// Products of an output layer with hidden states, shared by the losses whose logits are formed a part at a time. Rows
// of hidden states lie in panels of as many as a tile has columns, transposed as [dim][row]; so do the logits, as
// [column][row]: a row has a lane, down which its softmax runs, and the weights are read row by row where they lie.
#pragma once

#include <vector>

#include "rows.h"
#include "tiles.h"

namespace vocabdistil {
namespace VD_ISA {

constexpr int64_t kBlockColumns = 12 * kTileRows;  // whose sums are taken together, while they lie in the cache
constexpr int64_t kDepth = 256;                    // terms of a product whose operands stay in the cache
constexpr int64_t kStrip = 8 * kTileRows;          // dims of a task of hidden_grad
constexpr int64_t kGroup = 8;                      // panels of such a task

template <class T>
constexpr int64_t kPanelRows = kTileColumns<T>;

// Rows of a matrix: `first` and those behind it, or those of a list.
class RowIds {
 public:
  explicit RowIds(int64_t first) : first_(first) {}
  explicit RowIds(const int32_t* ids) : ids_(ids) {}
  explicit RowIds(const int64_t* ids) : long_ids_(ids) {}

  int64_t operator[](int64_t i) const { return ids_ ? ids_[i] : long_ids_ ? long_ids_[i] : first_ + i; }
  RowIds from(int64_t i) const {
    return ids_ ? RowIds(ids_ + i) : long_ids_ ? RowIds(long_ids_ + i) : RowIds(first_ + i);
  }

 private:
  const int32_t* ids_ = nullptr;
  const int64_t* long_ids_ = nullptr;
  int64_t first_ = 0;
};

// All are compiled once, in panels.cpp.

// Columns [from, from + width) of the first `count` rows of a weight: where they lie, or converted into scratch
// [count, width].
template <class Acc>
void find_rows(const Rows& weight, const RowIds& ids, int64_t count, int64_t from, int64_t width, const Acc** rows,
               std::vector<Acc>& scratch);

// The first `count` rows of x as a panel, 0 where there is none, and, unless null, as they are, `stride` apart.
template <class Acc>
void pack_panel(const Rows& x, const RowIds& ids, int64_t count, Acc* panel, Acc* plain, int64_t stride);

// out[i][r] = row i of a weight times row r of a panel, of whose vectors so many are taken; 0 in the others.
template <class Acc>
void panel_logits(const Acc* const* rows, int64_t count, int64_t dim, const Acc* panel, int vectors, Acc* out);

// Largest value down each lane; a NaN is left to the sums.
template <class Acc>
void tops(const Acc* z, int64_t count, Acc* top);

// The first `count` rows of the gradient of a weight: of a column's logits in all panels, d[i] and so on, `apart` from
// panel to panel, times the rows x [panels * kPanelRows], `stride` apart.
template <class Acc>
void weight_grad(const Acc* d, const RowIds& ids, int64_t count, int64_t panels, int64_t apart, const Acc* x,
                 int64_t stride, int64_t dim, bool add, Acc* grad);

// Dims [from, from + kStrip) of the gradient of `count` rows of hidden states, which fill panels: of their logits, d
// [column][row] and so on, `apart` from panel to panel, times the first `columns` rows of the weight. Written to
// out(r)[0, kStrip), r < count, or added to what is there.
template <class Acc>
struct HiddenGrad {
  Acc* out;
  int64_t stride;
  RowIds rows;  // where row r goes
  bool add;
};
template <class Acc>
void hidden_grad(const Rows& weight, const RowIds& ids, int64_t columns, int64_t from, const Acc* d, int64_t count,
                 int64_t apart, const HiddenGrad<Acc>& to);

// The first `count` values of the gradient of a bias: of a column's logits in all panels, as in weight_grad, each times
// how often the bias is in it, lengths[r] and so on, lengths_apart from panel to panel; null: once.
template <class Acc>
void bias_grad(const Acc* d, const RowIds& ids, int64_t count, int64_t panels, int64_t apart, const Acc* lengths,
               int64_t lengths_apart, bool add, Acc* grad);

// Sets the rows of a weight's gradient [rows, dim] and the values of a bias's to 0, unless null, that are not listed.
template <class Acc>
void zero_unlisted(const std::vector<uint8_t>& listed, int64_t dim, int threads, Acc* weight, Acc* bias);

// How many rows a chunk has, in whole panels: as many chunks as the memory of `most` bytes makes necessary, of one size.
template <class Acc>
int64_t chunk_rows(int64_t rows, int64_t row_bytes, int64_t most) {
  constexpr int64_t w = kPanelRows<Acc>;
  const int64_t fitting = std::max(w, most / row_bytes / w * w);
  return ceil_div(ceil_div(rows, ceil_div(rows, fitting)), w) * w;
}

}  // namespace VD_ISA
}  // namespace vocabdistil
