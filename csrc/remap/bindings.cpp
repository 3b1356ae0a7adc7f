// Python face of the remap table and the match alignment. Addresses and sizes are checked by the Python callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>

#include "remap.h"

namespace py = pybind11;

namespace vocabdistil {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Views of the strings of a list, None becoming a view without data. Valid as long as the list is unchanged.
std::vector<std::string_view> token_views(const py::list& tokens) {
  std::vector<std::string_view> views;
  views.reserve(tokens.size());
  for (const auto& token : tokens) {
    if (token.is_none()) {
      views.emplace_back();
      continue;
    }
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(token.ptr(), &size);
    if (!data) throw py::error_already_set();
    views.emplace_back(data, static_cast<size_t>(size));
  }
  return views;
}

std::unique_ptr<RemapIndex> build(const py::list& teacher, const py::list& student, const std::string& teacher_prefix,
                                  const std::string& student_prefix, int64_t max_chars, int32_t unk_id,
                                  const std::map<int64_t, std::vector<int32_t>>& overrides, int64_t student_size) {
  const auto teacher_views = token_views(teacher);
  const auto student_views = token_views(student);
  const std::vector<std::pair<int64_t, std::vector<int32_t>>> fixed(overrides.begin(), overrides.end());
  py::gil_scoped_release nogil;
  return std::make_unique<RemapIndex>(
      build_rows(teacher_views, student_views, {teacher_prefix, student_prefix, max_chars, unk_id}, fixed),
      student_size);
}

std::unique_ptr<RemapIndex> from_csr(uintptr_t indptr, int64_t bounds, uintptr_t ids, int64_t nnz,
                                     int64_t student_size) {
  py::gil_scoped_release nogil;
  Csr csr;
  csr.indptr.assign(at<int32_t>(indptr), at<int32_t>(indptr) + bounds);
  csr.ids.assign(at<int32_t>(ids), at<int32_t>(ids) + nnz);
  return std::make_unique<RemapIndex>(std::move(csr), student_size);
}

using View = std::tuple<uintptr_t, int, int64_t>;  // address, bytes per item, row stride in items

BatchView view(const View& v) { return {at<const void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)}; }

MatchArgs match_args(uintptr_t teacher_ids, uintptr_t student_ids, uintptr_t teacher_mask, uintptr_t student_mask,
                     const std::tuple<int64_t, int64_t, int64_t>& sizes, const std::tuple<uintptr_t, int64_t>& teacher,
                     const std::tuple<uintptr_t, int64_t>& student, int64_t matched, uintptr_t found, uintptr_t counts,
                     int threads) {
  return {at<const int64_t>(teacher_ids),
          at<const int64_t>(student_ids),
          at<const uint8_t>(teacher_mask),
          at<const uint8_t>(student_mask),
          std::get<0>(sizes),
          std::get<1>(sizes),
          std::get<2>(sizes),
          at<const int32_t>(std::get<0>(teacher)),
          at<const int32_t>(std::get<0>(student)),
          std::get<1>(teacher),
          std::get<1>(student),
          matched,
          at<int32_t>(found),
          at<int64_t>(counts),
          threads};
}

}  // namespace

void bind_remap(py::module_& module) {
  static_assert(sizeof(RowPlan) == 3 * sizeof(int64_t), "the Python side allocates int64 [batch, 3]");

  py::class_<RemapIndex>(module, "RemapIndex")
      .def_property_readonly("rows", &RemapIndex::rows)
      .def_property_readonly("nnz", [](const RemapIndex& self) { return self.csr().ids.size(); })
      .def_property_readonly("has_empty_rows", &RemapIndex::has_empty_rows)
      .def("copy_to", [](const RemapIndex& self, uintptr_t indptr, uintptr_t ids) {
        std::copy(self.csr().indptr.begin(), self.csr().indptr.end(), at<int32_t>(indptr));
        std::copy(self.csr().ids.begin(), self.csr().ids.end(), at<int32_t>(ids));
      });
  module.def("remap_build", &build);
  module.def("remap_from_csr", &from_csr);
  module.def("remap_plan", [](const RemapIndex& index, const View& ids, const View& mask, int64_t batch,
                              int64_t length, int64_t max_length, uintptr_t plan, int threads) {
    BatchPlan total;
    {
      py::gil_scoped_release nogil;
      total = index.plan(view(ids), view(mask), batch, length, max_length, at<RowPlan>(plan), threads);
    }
    return py::make_tuple(total.bad_row, total.length, total.pairs);
  });
  module.def("remap_write", [](const RemapIndex& index, const View& ids, const View& mask, int64_t batch,
                               int64_t length, uintptr_t plan, int64_t student_length, int64_t pad_id,
                               uintptr_t input_ids, uintptr_t attention_mask, uintptr_t pairs, int threads) {
    py::gil_scoped_release nogil;
    index.write(view(ids), view(mask), batch, length, at<const RowPlan>(plan), student_length, pad_id,
                at<int64_t>(input_ids), at<int64_t>(attention_mask), at<int32_t>(pairs), threads);
  });

  py::class_<MatchArgs>(module, "MatchArgs").def(py::init(&match_args));
  module.def("align_match_plan", &match_plan, py::call_guard<py::gil_scoped_release>());
  module.def(
      "align_match_write", [](const MatchArgs& args, uintptr_t pairs) { match_write(args, at<int32_t>(pairs)); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace vocabdistil
