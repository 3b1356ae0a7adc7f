// Random matrices of any dtype, for the fuzzers of products.
#pragma once

#include <memory>
#include <vector>

#include "cpu/numeric.h"
#include "fuzz.h"

using namespace vocabdistil;
using namespace vocabdistil::VD_ISA;

// [rows, columns] of a dtype, rows a stride apart; the values as they were rounded, and the memory.
struct Matrix {
  Rows rows;
  std::vector<double> values;
  std::unique_ptr<char[]> memory;

  Matrix(DType dtype, int64_t count, int64_t columns, double size) {
    const int64_t stride = columns + pick(0, 3), item = static_cast<int64_t>(item_size(dtype));
    memory = std::make_unique<char[]>(static_cast<size_t>(count ? ((count - 1) * stride + columns) * item : 0));
    rows = {dtype, memory.get(), stride, count, columns};
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          const double value = size * std::normal_distribution<double>()(rng);
          const T stored = store<T>(static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(value));
          reinterpret_cast<T*>(memory.get())[r * stride + c] = stored;
          values.push_back(static_cast<double>(load(stored)));
        }
      }
    });
  }
  double at(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * rows.columns + c)]; }
};
