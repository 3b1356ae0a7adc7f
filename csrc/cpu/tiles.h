// The register tile of a matrix product: M rows times N vectors of columns stay in registers while the inner dimension
// runs. One operand is read element by element where it lies, so that rows chosen by an index are never copied; the
// other a vector at a time. Larger products are loops over tiles that keep their operands in the cache.
#pragma once

#include <algorithm>

#include "numeric.h"

namespace vocabdistil {
namespace VD_ISA {

// What fills the registers: M N sums, N vectors of columns and one element. The nearer a tile is to a square, the
// fewer loads go with a multiplication.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 9, kTileVectors = 3;  // 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 9, kTileVectors = 3;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

// Where a tile goes: vector n of row m to to[m * stride + n * kLanes], added to what is there with `add`, and then times
// `factor`.
template <class T>
struct TileOut {
  T* to;
  int64_t stride;
  bool add = false;
  T factor = 1;
};

// Both are compiled once, in tiles.cpp. rows: a number that for_row_tiles gives; vectors: from 1 to kTileVectors.

// Row m: the sum over parts p < parts and k < count of a[m][from + p * apart + k] * row p * count + k of b.
template <class T>
void tile_of_rows(int rows, int vectors, const T* const* a, int64_t from, int64_t parts, int64_t apart, int64_t count,
                  const T* b, int64_t b_stride, const TileOut<T>& out);

// Row m: the sum over k < count of a[k][from + m] * row k of b.
template <class T>
void tile_of_columns(int rows, int vectors, const T* const* a, int64_t from, int64_t count, const T* b,
                     int64_t b_stride, const TileOut<T>& out);

constexpr int64_t kTerms = 128;  // products summed up before they are added: a long sum rounds more

// tile_of_rows over `count` terms, kTerms at a time at most.
template <class T>
inline void tile_in_parts(int rows, int vectors, const T* const* a, int64_t count, const T* b, int64_t b_stride,
                          TileOut<T> out) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(count, kTerms));
  const T factor = out.factor;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = count * part / parts, to = count * (part + 1) / parts;
    out.add = part > 0;
    out.factor = part + 1 == parts ? factor : T{1};
    tile_of_rows(rows, vectors, a, from, 1, 0, to - from, b + from * b_stride, b_stride, out);
  }
}

// The vectors that `columns` columns fill, at most those of a tile.
template <class T>
inline int vectors_of(int64_t columns) {
  return static_cast<int>(ceil_div(std::min<int64_t>(kTileColumns<T>, columns), kLanes<T>));
}

// Calls f(rows, first row) for tiles of kTileRows rows, and of fewer for what is left.
template <class F>
inline void for_row_tiles(int64_t begin, int64_t end, F&& f) {
  for (int rows = kTileRows; begin < end; rows = (rows + 1) / 2)
    for (; begin + rows <= end; begin += rows) f(rows, begin);
}

}  // namespace VD_ISA
}  // namespace vocabdistil
