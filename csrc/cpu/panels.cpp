#include "panels.h"

namespace vocabdistil {
namespace VD_ISA {

template <class Acc>
void find_rows(const Rows& weight, const RowIds& ids, int64_t count, int64_t from, int64_t width, const Acc** rows,
               std::vector<Acc>& scratch) {
  with_type(weight.dtype, [&](auto type) {
    using T = decltype(type);
    const T* base = static_cast<const T*>(weight.data) + from;
    if constexpr (std::is_same_v<T, Acc>) {
      for (int64_t i = 0; i < count; ++i) rows[i] = base + ids[i] * weight.stride;
    } else {
      scratch.resize(count * width);
      for (int64_t i = 0; i < count; ++i) {
        const T* __restrict row = base + ids[i] * weight.stride;
        Acc* __restrict out = scratch.data() + i * width;
        for (int64_t k = 0; k < width; ++k) out[k] = static_cast<Acc>(load(row[k]));
        rows[i] = out;
      }
    }
  });
}

template <class Acc>
void pack_panel(const Rows& x, const RowIds& ids, int64_t count, Acc* panel, Acc* plain, int64_t stride) {
  constexpr int64_t w = kPanelRows<Acc>;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    std::fill_n(panel, x.columns * w, Acc{0});
    if (plain) std::fill_n(plain, w * stride, Acc{0});
    for (int64_t r = 0; r < count; ++r) {
      const T* row = static_cast<const T*>(x.data) + ids[r] * x.stride;
      for (int64_t k = 0; k < x.columns; ++k) panel[k * w + r] = static_cast<Acc>(load(row[k]));
      for (int64_t k = 0; plain && k < x.columns; ++k) plain[r * stride + k] = static_cast<Acc>(load(row[k]));
    }
  });
}

template <class Acc>
void panel_logits(const Acc* const* rows, int64_t count, int64_t dim, const Acc* panel, int vectors, Acc* out) {
  constexpr int64_t w = kPanelRows<Acc>;
  for_row_tiles(0, count, [&](int m, int64_t i) {
    tile_in_parts<Acc>(m, vectors, rows + i, dim, panel, w, {out + i * w, w});
    for (int r = 0; r < m; ++r) std::fill(out + (i + r) * w + vectors * kLanes<Acc>, out + (i + r + 1) * w, Acc{0});
  });
}

template <class Acc>
void tops(const Acc* __restrict z, int64_t count, Acc* __restrict top) {
  constexpr int64_t w = kPanelRows<Acc>;
  Acc m[w];
  for (int64_t r = 0; r < w; ++r) m[r] = -std::numeric_limits<Acc>::infinity();
  for (int64_t i = 0; i < count; ++i)
    VD_SIMD for (int64_t r = 0; r < w; ++r) m[r] = z[i * w + r] > m[r] ? z[i * w + r] : m[r];
  for (int64_t r = 0; r < w; ++r) top[r] = m[r];
}

template <class Acc>
void weight_grad(const Acc* d, const RowIds& ids, int64_t count, int64_t panels, int64_t apart, const Acc* x,
                 int64_t stride, int64_t dim, bool add, Acc* grad) {
  constexpr int64_t w = kPanelRows<Acc>, depth = std::max<int64_t>(1, kDepth / w);
  for (int64_t from = 0; from < panels; from += depth, add = true) {
    const int64_t parts = std::min(depth, panels - from);
    for (int64_t j = 0; j < dim; j += w) {
      const int n = vectors_of<Acc>(dim - j);
      const int64_t columns = std::min(w, dim - j);
      for_row_tiles(0, count, [&](int m, int64_t i) {
        const Acc* rows[kTileRows];
        Acc* to[kTileRows];
        for (int r = 0; r < m; ++r) {
          rows[r] = d + from * apart + (i + r) * w;
          to[r] = grad + ids[i + r] * dim + j;
          for (int v = 0; v < n; ++v) __builtin_prefetch(to[r] + v * kLanes<Acc>, 1);
        }
        alignas(64) Acc sum[kTileRows * w];
        tile_of_rows<Acc>(m, n, rows, 0, parts, apart, w, x + from * w * stride + j, stride, {sum, w});
        for (int r = 0; r < m; ++r) {
          const Acc* __restrict from_sum = sum + r * w;
          Acc* __restrict out = to[r];
          for (int64_t k = 0; k < columns; ++k) out[k] = add ? out[k] + from_sum[k] : from_sum[k];
        }
      });
    }
  }
}

template <class Acc>
void hidden_grad(const Rows& weight, const RowIds& ids, int64_t columns, int64_t from, const Acc* d, int64_t count,
                 int64_t apart, const HiddenGrad<Acc>& to) {
  constexpr int64_t w = kPanelRows<Acc>;
  const int64_t width = std::min(kStrip, weight.columns - from), panels = ceil_div(count, w);
  const Acc* rows[kDepth];
  std::vector<Acc> scratch, sums(panels * kStrip * w);
  for (int64_t begin = 0; begin < columns; begin += kDepth) {
    const int64_t depth = std::min(kDepth, columns - begin);
    find_rows(weight, ids.from(begin), depth, from, width, rows, scratch);
    for (int64_t panel = 0; panel < panels; ++panel) {
      Acc* sum = sums.data() + panel * kStrip * w;
      const Acc* const part = d + panel * apart + begin * w;
      for_row_tiles(0, width, [&](int m, int64_t j) {
        tile_of_columns<Acc>(m, vectors_of<Acc>(count - panel * w), rows, j, depth, part, w, {sum + j * w, w, true});
      });
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    const Acc* __restrict sum = sums.data() + row / w * kStrip * w + row % w;
    Acc* __restrict out = to.out + to.rows[row] * to.stride + from;
    for (int64_t j = 0; j < width; ++j) out[j] = to.add ? out[j] + sum[j * w] : sum[j * w];
  }
}

template <class Acc>
void bias_grad(const Acc* d, const RowIds& ids, int64_t count, int64_t panels, int64_t apart, const Acc* lengths,
               int64_t lengths_apart, bool add, Acc* grad) {
  constexpr int64_t w = kPanelRows<Acc>;
  for (int64_t i = 0; i < count; ++i) {
    Acc total = add ? grad[ids[i]] : Acc{0};
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Acc *__restrict at = d + panel * apart + i * w, *__restrict n = lengths + panel * lengths_apart;
      Acc sum = 0;
      if (lengths) {
#pragma omp simd reduction(+ : sum)
        for (int64_t r = 0; r < w; ++r) sum += at[r] * n[r];
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t r = 0; r < w; ++r) sum += at[r];
      }
      total += sum;
    }
    grad[ids[i]] = total;
  }
}

template <class Acc>
void zero_unlisted(const std::vector<uint8_t>& listed, int64_t dim, int threads, Acc* weight, Acc* bias) {
  const int64_t rows = static_cast<int64_t>(listed.size());
  parallel_for(rows, useful_threads(threads, rows * dim), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      if (listed[v]) continue;
      if (weight) std::fill_n(weight + v * dim, dim, Acc{0});
      if (bias) bias[v] = 0;
    }
  });
}

#define VD_PANELS(Acc)                                                                                                \
  template void find_rows(const Rows&, const RowIds&, int64_t, int64_t, int64_t, const Acc**, std::vector<Acc>&);    \
  template void pack_panel(const Rows&, const RowIds&, int64_t, Acc*, Acc*, int64_t);                                \
  template void panel_logits(const Acc* const*, int64_t, int64_t, const Acc*, int, Acc*);                            \
  template void tops(const Acc*, int64_t, Acc*);                                                                     \
  template void weight_grad(const Acc*, const RowIds&, int64_t, int64_t, int64_t, const Acc*, int64_t, int64_t, bool, \
                            Acc*);                                                                                   \
  template void hidden_grad(const Rows&, const RowIds&, int64_t, int64_t, const Acc*, int64_t, int64_t,              \
                            const HiddenGrad<Acc>&);                                                                 \
  template void bias_grad(const Acc*, const RowIds&, int64_t, int64_t, int64_t, const Acc*, int64_t, bool, Acc*);    \
  template void zero_unlisted(const std::vector<uint8_t>&, int64_t, int, Acc*, Acc*);
VD_PANELS(float)
VD_PANELS(double)
#undef VD_PANELS

}  // namespace VD_ISA
}  // namespace vocabdistil
