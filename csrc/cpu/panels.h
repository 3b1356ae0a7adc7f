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

// Columns [from, from + width) of rows id(i), i < count, of a weight: where they lie, or converted into scratch
// [count, width].
template <class Acc, class Id>
void find_rows(const Rows& weight, int64_t count, Id&& id, int64_t from, int64_t width, const Acc** rows,
               std::vector<Acc>& scratch) {
  with_type(weight.dtype, [&](auto type) {
    using T = decltype(type);
    const T* base = static_cast<const T*>(weight.data) + from;
    if constexpr (std::is_same_v<T, Acc>) {
      for (int64_t i = 0; i < count; ++i) rows[i] = base + id(i) * weight.stride;
    } else {
      scratch.resize(count * width);
      for (int64_t i = 0; i < count; ++i) {
        const T* __restrict row = base + id(i) * weight.stride;
        Acc* __restrict out = scratch.data() + i * width;
        for (int64_t k = 0; k < width; ++k) out[k] = static_cast<Acc>(load(row[k]));
        rows[i] = out;
      }
    }
  });
}

// Rows row_of(r), r < count, of x as a panel, 0 where there is none, and, unless null, as they are, `stride` apart.
template <class Acc, class RowOf>
void pack_panel(const Rows& x, int64_t count, RowOf&& row_of, Acc* panel, Acc* plain, int64_t stride) {
  constexpr int64_t w = kPanelRows<Acc>;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    std::fill_n(panel, x.columns * w, Acc{0});
    if (plain) std::fill_n(plain, w * stride, Acc{0});
    for (int64_t r = 0; r < count; ++r) {
      const T* row = static_cast<const T*>(x.data) + row_of(r) * x.stride;
      for (int64_t k = 0; k < x.columns; ++k) panel[k * w + r] = static_cast<Acc>(load(row[k]));
      for (int64_t k = 0; plain && k < x.columns; ++k) plain[r * stride + k] = static_cast<Acc>(load(row[k]));
    }
  });
}

// out[i][r] = row i of a weight times row r of a panel, of whose vectors so many are taken; 0 in the others.
template <class Acc>
void panel_logits(const Acc* const* rows, int64_t count, int64_t dim, const Acc* panel, int vectors, Acc* out) {
  constexpr int64_t w = kPanelRows<Acc>;
  for_row_tiles(0, count, [&](int m, int64_t i) {
    tile_in_parts<Acc>(m, vectors, rows + i, dim, panel, w, {out + i * w, w});
    for (int r = 0; r < m; ++r) std::fill(out + (i + r) * w + vectors * kLanes<Acc>, out + (i + r + 1) * w, Acc{0});
  });
}

// Largest value down each lane; a NaN is left to the sums.
template <class Acc>
void tops(const Acc* __restrict z, int64_t count, Acc* __restrict top) {
  constexpr int64_t w = kPanelRows<Acc>;
  Acc m[w];
  for (int64_t r = 0; r < w; ++r) m[r] = -std::numeric_limits<Acc>::infinity();
  for (int64_t i = 0; i < count; ++i)
    VD_SIMD for (int64_t r = 0; r < w; ++r) m[r] = z[i * w + r] > m[r] ? z[i * w + r] : m[r];
  for (int64_t r = 0; r < w; ++r) top[r] = m[r];
}

// Row id(i), i < count, of the gradient of a weight: of a column's logits in all panels, d[i] and so on, `apart` from
// panel to panel, times the rows x [panels * kPanelRows], `stride` apart.
template <class Acc, class Id>
void weight_grad(const Acc* d, int64_t count, int64_t panels, int64_t apart, const Acc* x, int64_t stride, int64_t dim,
                 Id&& id, bool add, Acc* grad) {
  constexpr int64_t w = kPanelRows<Acc>, depth = std::max<int64_t>(1, kDepth / w);
  for (int64_t from = 0; from < panels; from += depth, add = true) {
    const int64_t parts = std::min(depth, panels - from);
    for (int64_t j = 0; j < dim; j += w) {
      const int n = vectors_of<Acc>(dim - j);
      const int64_t columns = std::min(w, dim - j);
      for_row_tiles(0, count, [&](int m, int64_t i) {
        const Acc* rows[kTileRows];
        for (int r = 0; r < m; ++r) {
          rows[r] = d + from * apart + (i + r) * w;
          for (int v = 0; v < n; ++v) __builtin_prefetch(grad + id(i + r) * dim + j + v * kLanes<Acc>, 1);
        }
        alignas(64) Acc sum[kTileRows * w];
        tile_of_rows<Acc>(m, n, rows, 0, parts, apart, w, x + from * w * stride + j, stride, {sum, w});
        for (int r = 0; r < m; ++r) {
          const Acc* __restrict from_sum = sum + r * w;
          Acc* __restrict out = grad + id(i + r) * dim + j;
          for (int64_t k = 0; k < columns; ++k) out[k] = add ? out[k] + from_sum[k] : from_sum[k];
        }
      });
    }
  }
}

// Dims [from, from + kStrip) of the gradient of the rows of `panels` panels: of their logits, d [column][row] and so
// on, `apart` from panel to panel, times rows id(i), i < count, of the weight. done(panel, width, sum [dim][row]).
template <class Acc, class Id, class Vectors, class Done>
void hidden_grad(const Rows& weight, int64_t count, Id&& id, int64_t from, const Acc* d, int64_t panels, int64_t apart,
                 Vectors&& vectors, Done&& done) {
  constexpr int64_t w = kPanelRows<Acc>;
  const int64_t width = std::min(kStrip, weight.columns - from);
  const Acc* rows[kDepth];
  std::vector<Acc> scratch, sums(panels * kStrip * w);
  for (int64_t begin = 0; begin < count; begin += kDepth) {
    const int64_t depth = std::min(kDepth, count - begin);
    find_rows(weight, depth, [&](int64_t i) { return id(begin + i); }, from, width, rows, scratch);
    for (int64_t panel = 0; panel < panels; ++panel) {
      Acc* sum = sums.data() + panel * kStrip * w;
      const Acc* const part = d + panel * apart + begin * w;
      for_row_tiles(0, width, [&](int m, int64_t j) {
        tile_of_columns<Acc>(m, vectors(panel), rows, j, depth, part, w, {sum + j * w, w, true});
      });
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel) done(panel, width, sums.data() + panel * kStrip * w);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
