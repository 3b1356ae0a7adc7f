// The module, and the Python face of the remap table and the match alignment: the only file that knows pybind11.
// Addresses and sizes are checked by the Python callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <set>

#include "../bindings.h"
#include "../block.h"
#include "../parallel.h"
#include "boundary.h"
#include "remap.h"
#include "words.h"

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

// (bad_row, width, pairs, pairs that are not empty, block): the block holds input_ids and attention_mask, int64 [batch,
// width], and spans, int32 [4, pairs]. It is None where an id is outside the table, or the positions do not fit 32 bits.
py::tuple run(const RemapIndex& index, const View& ids, const View& mask, int64_t batch, int64_t length,
              int64_t max_length, int64_t pad_id, int threads) {
  std::unique_ptr<Block> block;
  BatchPlan total;
  int64_t nonempty = 0;
  {
    py::gil_scoped_release nogil;
    std::vector<RowPlan> plan(static_cast<size_t>(batch));
    total = index.plan(view(ids), view(mask), batch, length, max_length, plan.data(), threads);
    const int64_t tokens = batch * total.length;
    if (total.bad_row < 0 && tokens <= std::numeric_limits<int32_t>::max()) {
      block = std::make_unique<Block>(static_cast<size_t>(16 * (tokens + total.pairs)));
      auto* input_ids = static_cast<int64_t*>(block->data());
      nonempty = index.write(view(ids), view(mask), batch, length, plan.data(), total.length, pad_id, input_ids,
                             input_ids + tokens, reinterpret_cast<int32_t*>(input_ids + 2 * tokens), threads);
    }
  }
  return py::make_tuple(total.bad_row, total.length, total.pairs, nonempty, std::move(block));
}

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

std::shared_ptr<Surfaces> surfaces(const py::list& tokens, const py::bytes& kinds,
                                   std::vector<std::pair<uint32_t, std::string>> spaces, bool bytes, bool folds,
                                   bool drops_unknown, bool whole_words) {
  std::vector<std::string_view> views;
  views.reserve(tokens.size());
  for (const auto& token : tokens) views.emplace_back(token.cast<std::string_view>());
  const std::string_view flags = kinds;
  return std::make_shared<Surfaces>(
      views, std::vector<uint8_t>(flags.begin(), flags.end()),
      Surfaces::Habits{std::move(spaces), bytes, folds, drops_unknown, whole_words});
}

// What becomes of each character of a page, and its decomposition.
using FoldPage = std::vector<std::pair<std::vector<std::string>, std::string>>;

void add_folds(Surfaces& surfaces, uint32_t number, FoldPage chars) {
  Folds::Page page;
  for (size_t i = 0; i < std::min(page.size(), chars.size()); ++i) {
    page[i] = {std::move(chars[i].first), std::move(chars[i].second)};
  }
  surfaces.folds().add(number, std::move(page));
}

int32_t to_int(PyObject* value) {
  const long number = PyLong_AsLong(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<int32_t>(number);
}

std::string_view utf8(PyObject* text) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text, &size);
  if (!data) throw py::error_already_set();
  return {data, static_cast<size_t>(size)};
}

// None becomes -1.
std::vector<int32_t> to_ints(const py::list& values) {
  std::vector<int32_t> ints(values.size());
  for (size_t k = 0; k < ints.size(); ++k) {
    PyObject* value = PyList_GET_ITEM(values.ptr(), k);
    ints[k] = value == Py_None ? -1 : to_int(value);
  }
  return ints;
}

py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

py::list list_of(PyObject* object, const py::str& name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
  if (!value) throw py::error_already_set();
  if (!PyList_Check(value.ptr())) throw py::type_error("encodings: expected a list of each attribute");
  return py::reinterpret_steal<py::list>(value.release());
}

// One row of a padded batch.
void put_padded(const int32_t* ids, int64_t size, int64_t length, int64_t pad_id, int64_t* input_ids,
                int64_t* attention_mask) {
  if (size > length) throw std::invalid_argument("length: shorter than a row");
  std::copy(ids, ids + size, input_ids);
  std::fill(input_ids + size, input_ids + length, pad_id);
  std::fill(attention_mask, attention_mask + size, int64_t{1});
  std::fill(attention_mask + size, attention_mask + length, int64_t{0});
}

// Lists of ids -> [rows, length] of both.
void pad_lists(const py::list& rows, int64_t length, int64_t pad_id, uintptr_t input_ids, uintptr_t attention_mask) {
  int64_t at_row = 0;
  for (const auto& row : rows) {
    const auto ids = to_ints(py::reinterpret_borrow<py::list>(row));
    put_padded(ids.data(), static_cast<int64_t>(ids.size()), length, pad_id, at<int64_t>(input_ids) + at_row,
               at<int64_t>(attention_mask) + at_row);
    at_row += length;
  }
}

// The first of the texts that is no string or does not fit UTF-8, or -1. The UTF-8 stays with the string: it is what
// the tokenizer and this module read.
int64_t bad_text(const py::list& texts) {
  for (size_t i = 0; i < texts.size(); ++i) {
    PyObject* text = PyList_GET_ITEM(texts.ptr(), i);
    Py_ssize_t size = 0;
    if (PyUnicode_Check(text) && PyUnicode_AsUTF8AndSize(text, &size)) continue;
    PyErr_Clear();
    return static_cast<int64_t>(i);
  }
  return -1;
}

// One side of a batch: what a tokenizer made of each text, located in it.
class Side {
 public:
  // ask: page -> FoldPage
  Side(std::shared_ptr<Surfaces> surfaces, py::function ask, int64_t rows, const std::tuple<int64_t, int64_t>& ends,
       std::vector<std::pair<int32_t, int32_t>> kinds, int64_t max_length, bool keep_last, bool words_at_spaces,
       const py::bytes& places, std::shared_ptr<const WordPattern> pattern)
      : surfaces_(std::move(surfaces)),
        ask_(std::move(ask)),
        rules_{std::get<0>(ends), std::get<1>(ends), std::move(kinds), max_length, words_at_spaces, keep_last},
        places_(places),
        pattern_(std::move(pattern)),
        rows_(static_cast<size_t>(rows)) {}

  // Reads the given rows of the texts, each with its encoding by `tokenizers`: with `words`, also what it says of
  // words; with `spell`, by what the tokens spell; with `offsets`, where they were not to or do not spell a text or
  // tell its words, by what it says of both. Returns the rows where they do not; without offsets these have not been
  // read.
  std::vector<int64_t> read(const py::list& texts, const std::vector<int64_t>& rows, const py::list& encodings,
                            bool words, bool spell, bool offsets, int threads) {
    if (encodings.size() != rows.size()) throw py::index_error("encodings: expected one per row");
    const py::str ids_name = interned("ids"), words_name = interned("word_ids"), offsets_name = interned("offsets");
    std::vector<Reading> readings(rows.size());
    std::vector<size_t> all(rows.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      if (static_cast<size_t>(rows[r]) >= std::min(rows_.size(), texts.size())) {
        throw py::index_error("rows: outside the batch");
      }
      Reading& reading = readings[r];
      PyObject* encoding = PyList_GET_ITEM(encodings.ptr(), r);
      reading.text = utf8(PyList_GET_ITEM(texts.ptr(), rows[r]));
      reading.ids = to_ints(list_of(encoding, ids_name));
      if (words) reading.words = to_ints(list_of(encoding, words_name));
      all[r] = r;
    }
    std::vector<size_t> left = all;
    if (spell) left = locate_rows(rows, all, readings, threads, !places_.empty());
    std::vector<int64_t> missing;
    for (const size_t r : left) missing.push_back(rows[r]);
    if (!offsets || left.empty()) return missing;
    for (const size_t r : left) {
      PyObject* encoding = PyList_GET_ITEM(encodings.ptr(), r);
      if (!places_.empty()) readings[r].words = to_ints(list_of(encoding, words_name));
      const py::list pairs = list_of(encoding, offsets_name);
      readings[r].start.resize(pairs.size());
      readings[r].end.resize(pairs.size());
      for (size_t k = 0; k < pairs.size(); ++k) {
        PyObject* pair = PyList_GET_ITEM(pairs.ptr(), k);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) throw py::value_error("offsets: expected pairs");
        readings[r].start[k] = to_int(PyTuple_GET_ITEM(pair, 0));
        readings[r].end[k] = to_int(PyTuple_GET_ITEM(pair, 1));
      }
    }
    locate_rows(rows, left, readings, threads, false);
    return missing;
  }

  int64_t length() const {
    size_t longest = 0;
    for (const LocatedRow& row : rows_) longest = std::max(longest, row.ids.size());
    return static_cast<int64_t>(longest);
  }

  void write(int64_t length, int64_t pad_id, uintptr_t input_ids, uintptr_t attention_mask) const {
    py::gil_scoped_release nogil;
    auto* ids = at<int64_t>(input_ids);
    auto* mask = at<int64_t>(attention_mask);
    for (const LocatedRow& row : rows_) {
      put_padded(row.ids.data(), static_cast<int64_t>(row.ids.size()), length, pad_id, ids, mask);
      ids += length;
      mask += length;
    }
  }

  std::vector<TokenSpans> spans() const {
    std::vector<TokenSpans> spans;
    spans.reserve(rows_.size());
    for (const LocatedRow& row : rows_) {
      spans.push_back({row.start.data(), row.end.data(), 1, static_cast<int64_t>(row.ids.size()), row.lead, row.trail,
                       row.limit, row.floor});
    }
    return spans;
  }

  py::tuple row(size_t b) const { return py::make_tuple(rows_.at(b).start, rows_.at(b).end, rows_.at(b).limit); }
  int32_t floor(size_t b) const { return rows_.at(b).floor; }

  // Bytes of the texts, white space left out: all of them, and those inside the spans [start, end) of tokens, which
  // ascend. Tokens may share bytes; each counts once.
  std::pair<int64_t, int64_t> bytes(const py::list& texts, uintptr_t starts, uintptr_t ends, int64_t count,
                                    int64_t length) const {
    std::vector<std::string_view> views;
    for (const auto& text : texts) views.push_back(utf8(text.ptr()));
    py::gil_scoped_release nogil;
    const auto* start = at<const int32_t>(starts);
    const auto* end = at<const int32_t>(ends);
    std::pair<int64_t, int64_t> total{0, 0};
    int64_t p = 0;
    for (size_t b = 0; b < std::min(rows_.size(), views.size()); ++b) {
      const std::vector<int32_t> before = ink_before(views[b]);
      const auto size = static_cast<int32_t>(views[b].size());
      total.first += before[size];
      const LocatedRow& row = rows_[b];
      const int64_t base = static_cast<int64_t>(b) * length;
      int32_t counted = 0;
      for (; p < count && start[p] < base + length; ++p) {
        const int64_t stop = std::min<int64_t>(end[p] - base, static_cast<int64_t>(row.start.size()));
        int32_t from = size, to = 0;
        for (int64_t k = std::max<int64_t>(start[p] - base, 0); k < stop; ++k) {
          if (row.start[k] < 0 || row.start[k] >= row.end[k]) continue;
          from = std::min(from, row.start[k]);
          to = std::max(to, row.end[k]);
        }
        from = std::max(from, counted);
        to = std::min(to, size);
        if (from >= to) continue;
        total.second += before[to] - before[from];
        counted = to;
      }
    }
    return total;
  }

 private:
  // Locates readings[r] for each of `which`; returns those that were not found. tell: the words are what the tokens
  // tell, and a text where they do not is not found.
  std::vector<size_t> locate_rows(const std::vector<int64_t>& rows, std::vector<size_t> which,
                                  std::vector<Reading>& readings, int threads, bool tell) {
    std::vector<size_t> left;
    while (!which.empty()) {
      std::vector<uint8_t> found(which.size());
      {
        py::gil_scoped_release nogil;
        parallel_for(static_cast<int64_t>(which.size()), threads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Reading& reading = readings[which[i]];
            reading.asked.clear();
            found[i] = (!tell || number_words(*surfaces_, places_, pattern_.get(), rules_, reading.ids, reading.words)) &&
                       locate(*surfaces_, rules_, reading, rows_[rows[which[i]]]);
          }
        });
      }
      std::vector<size_t> again;
      std::set<uint32_t> asked;
      for (size_t i = 0; i < which.size(); ++i) {
        if (found[i]) continue;
        const std::vector<uint32_t>& pages = readings[which[i]].asked;
        asked.insert(pages.begin(), pages.end());
        (pages.empty() ? left : again).push_back(which[i]);
      }
      for (const uint32_t page : asked) add_folds(*surfaces_, page, ask_(page).cast<FoldPage>());
      which = std::move(again);
    }
    std::sort(left.begin(), left.end());
    return left;
  }

  std::shared_ptr<Surfaces> surfaces_;
  py::function ask_;
  Rules rules_;
  std::string places_;  // of each id in words; empty: words are not asked for in this way
  std::shared_ptr<const WordPattern> pattern_;
  std::vector<LocatedRow> rows_;
};

// int32 [4, count]
py::bytearray as_bytes(const BatchPairs& pairs) {
  const int64_t count = pairs.count();
  py::bytearray bytes(nullptr, static_cast<size_t>(count) * 4 * sizeof(int32_t));
  if (count) pairs.write(reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(bytes.ptr())));
  return bytes;
}

// int32 or int64 offsets [batch, length, 2] and a mask [batch, length] of bytes or 0, both contiguous.
using Offsets = std::tuple<uintptr_t, int, uintptr_t, int64_t>;  // address, bytes per item, mask, length

// As int32, those that are left out empty; false if one does not fit. Negative ones stay so: they cover nothing.
template <class T>
bool narrow(const T* from, const uint8_t* mask, int64_t count, int32_t* to) {
  bool fits = true;
  for (int64_t k = 0; k < 2 * count; ++k) {
    fits &= from[k] <= std::numeric_limits<int32_t>::max();
    to[k] = static_cast<int32_t>(std::max<T>(from[k], -1));
  }
  for (int64_t k = 0; mask && k < count; ++k) {
    if (mask[k] == 0) to[2 * k] = to[2 * k + 1] = 0;
  }
  return fits;
}

// Of the two sides the pairs, int32 [4, count]; None where an offset does not fit 32 bits.
py::object align_offsets(const Offsets& teacher, const Offsets& student, int64_t batch, int threads) {
  BatchPairs pairs;
  std::atomic<bool> fits{true};
  const auto row = [&fits](const Offsets& side, int64_t b, std::vector<int32_t>& buffer) -> TokenSpans {
    const auto [address, itemsize, mask, length] = side;
    buffer.resize(static_cast<size_t>(2 * length));
    const uint8_t* keep = mask ? at<const uint8_t>(mask) + b * length : nullptr;
    const bool fit = itemsize == 4 ? narrow(at<const int32_t>(address) + 2 * b * length, keep, length, buffer.data())
                                   : narrow(at<const int64_t>(address) + 2 * b * length, keep, length, buffer.data());
    if (!fit) fits = false;
    return {buffer.data(), buffer.data() + 1, 2, length, 0, 0};
  };
  {
    py::gil_scoped_release nogil;
    pairs = align_batch(batch, std::get<3>(teacher), std::get<3>(student), threads, [&]() -> RowReader {
      return [&, left = std::vector<int32_t>(), right = std::vector<int32_t>()](int64_t b) mutable {
        return std::pair(row(teacher, b, left), row(student, b, right));
      };
    });
  }
  if (!fits) return py::none();
  return as_bytes(pairs);
}

void bind_remap(py::module_& module) {
  py::class_<Block>(module, "Block", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](const Block& self) {
        return py::buffer_info(static_cast<uint8_t*>(self.data()), static_cast<py::ssize_t>(self.size()));
      });
  py::class_<RemapIndex>(module, "RemapIndex")
      .def_property_readonly("rows", &RemapIndex::rows)
      .def_property_readonly("nnz", [](const RemapIndex& self) { return self.csr().ids.size(); })
      .def("copy_to", [](const RemapIndex& self, uintptr_t indptr, uintptr_t ids) {
        std::copy(self.csr().indptr.begin(), self.csr().indptr.end(), at<int32_t>(indptr));
        std::copy(self.csr().ids.begin(), self.csr().ids.end(), at<int32_t>(ids));
      });
  module.def("remap_build", &build);
  module.def("remap_from_csr", &from_csr);
  module.def("remap_run", &run);

  py::class_<MatchArgs>(module, "MatchArgs").def(py::init(&match_args));
  module.def("align_match_plan", &match_plan, py::call_guard<py::gil_scoped_release>());
  module.def(
      "align_match_write", [](const MatchArgs& args, uintptr_t pairs) { match_write(args, at<int32_t>(pairs)); },
      py::call_guard<py::gil_scoped_release>());

  py::class_<Surfaces, std::shared_ptr<Surfaces>>(module, "Surfaces").def(py::init(&surfaces));
  py::class_<WordPattern, std::shared_ptr<WordPattern>>(module, "WordPattern")
      .def(py::init([](int style, bool contractions, int64_t digits, const py::bytes& classes) {
        return std::make_shared<WordPattern>(static_cast<WordPattern::Style>(style), contractions, digits, classes);
      }))
      .def("cut", [](const WordPattern& self, const std::string& text) -> py::object {
        std::vector<int64_t> ends;
        if (!self.cut(text, ends)) return py::none();
        return py::cast(ends);
      });
  py::class_<Side>(module, "Side")
      .def(py::init<std::shared_ptr<Surfaces>, py::function, int64_t, const std::tuple<int64_t, int64_t>&,
                    std::vector<std::pair<int32_t, int32_t>>, int64_t, bool, bool, const py::bytes&,
                    std::shared_ptr<const WordPattern>>())
      .def("read", &Side::read)
      .def("length", &Side::length)
      .def("write", &Side::write)
      .def("row", &Side::row)
      .def("floor", &Side::floor)
      .def("bytes", &Side::bytes);
  module.def("align_sides", [](const Side& teacher, const Side& student, int64_t teacher_length,
                               int64_t student_length, int threads) {
    BatchPairs pairs;
    {
      py::gil_scoped_release nogil;
      const auto left = teacher.spans(), right = student.spans();
      const auto batch = static_cast<int64_t>(std::min(left.size(), right.size()));
      pairs = align_batch(batch, teacher_length, student_length, threads, [&]() -> RowReader {
        return [&](int64_t b) { return std::pair(left[b], right[b]); };
      });
    }
    return as_bytes(pairs);
  });
  module.def("align_offsets", &align_offsets);
  module.def("align_pad", &pad_lists);
  module.def("align_bad_text", &bad_text);
  module.def("align_cover", [](uintptr_t ids, uintptr_t mask, int64_t size, const std::array<uintptr_t, 4>& spans,
                               int64_t count, int64_t unknown_id, size_t examples) {
    SideCoverage found;
    {
      py::gil_scoped_release nogil;
      const int32_t* span[4];
      for (int k = 0; k < 4; ++k) span[k] = at<const int32_t>(spans[k]);
      found = cover(at<const int64_t>(ids), at<const int64_t>(mask), size, span[0], span[1], span[2], span[3], count,
                    unknown_id, examples);
    }
    return py::make_tuple(found.pairs, found.singles, found.tokens, found.covered, found.unknown, found.left_out);
  });
}

}  // namespace
}  // namespace vocabdistil

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vocabdistil. Private: call the functions of the package instead.";
  m.attr("cxx_compiler") = VD_CXX_COMPILER;
  m.attr("isas") = VD_ISA_LIST;
  vocabdistil::bind_remap(m);
  if (vocabdistil::bind_operations(m.ptr())) throw py::error_already_set();
#ifdef VD_CUDA
  m.attr("cuda_compiler") = VD_CUDA_COMPILER;
  m.attr("cuda_architectures") = VD_CUDA_ARCHITECTURES;
  if (vocabdistil::cuda::bind_operations(m.ptr())) throw py::error_already_set();
#else
  m.attr("cuda_compiler") = py::none();
  m.attr("cuda_architectures") = "";
#endif
}
