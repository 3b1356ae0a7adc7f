// What the bindings of operations have in common: arguments of Python as those of ops.h.
#pragma once

#include "functions.h"
#include "ops.h"

namespace vocabdistil {
namespace functions {

inline Spans spans(Address start, Address end) { return {at<const int32_t>(start), at<const int32_t>(end)}; }

// A matrix as Python hands it over: dtype code, address, row stride (elements), rows, columns.
using PyRows = std::tuple<int, Address, int64_t, int64_t, int64_t>;

inline Rows matrix(const PyRows& x) {
  return {static_cast<DType>(std::get<0>(x)), at<const void>(std::get<1>(x)), std::get<2>(x), std::get<3>(x),
          std::get<4>(x)};
}

}  // namespace functions
}  // namespace vocabdistil
