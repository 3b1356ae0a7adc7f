// The GPU kernels for Python: addresses, sizes and codes, as in ../bindings.cpp.
#include "../arguments.h"
#include "../bindings.h"

namespace vocabdistil {
namespace cuda {
namespace {

using functions::Address;
using functions::at;
using functions::function;
using functions::matrix;
using functions::PyRows;
using functions::Released;
using functions::spans;
using Addresses = std::vector<Address>;
using Strides = std::vector<int64_t>;

void* const* array(const Addresses& addresses) { return reinterpret_cast<void* const*>(addresses.data()); }

GpuLayers layers(int dtype, const Addresses& data, const Strides& stride, int64_t rows, Address coef) {
  if (data.size() > static_cast<size_t>(kMaxLayers))
    throw std::invalid_argument("expected at most " + std::to_string(kMaxLayers) + " layers, got " +
                                std::to_string(data.size()));
  return {static_cast<DType>(dtype), static_cast<int64_t>(data.size()), array(data), stride.data(), rows,
          at<const double>(coef)};
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("vocabdistil: CUDA kernel failed: ") + error);
}

void mean_fwd(int dtype, const Addresses& data, const Strides& stride, int64_t rows, Address coef, Address start,
              Address end, int64_t pairs, int64_t dim, bool mean, int out_dtype, Address out, Address stream) {
  const Released released;
  check(span_mean_fwd(layers(dtype, data, stride, rows, coef), spans(start, end), pairs, dim, mean,
                      static_cast<DType>(out_dtype), at<void>(out), at<void>(stream)));
}

void mean_bwd(int grad_dtype, Address grad, int64_t grad_stride, Address start, Address end, int64_t pairs,
              int64_t dim, bool mean, int dtype, const Addresses& out, const Strides& stride, int64_t rows,
              Address coef, Address stream) {
  const Released released;
  check(span_mean_bwd(static_cast<DType>(grad_dtype), at<const void>(grad), grad_stride, spans(start, end), pairs, dim,
                      mean, layers(dtype, out, stride, rows, coef), at<void>(stream)));
}

void loss(int s_dtype, const Addresses& s_data, const Strides& s_stride, int64_t s_rows, Address s_coef,
          const Addresses& grad, int t_dtype, const Addresses& t_data, const Strides& t_stride, int64_t t_rows,
          Address t_coef, Address s_start, Address s_end, Address t_start, Address t_end, int64_t pairs, int64_t dim,
          int divergence, bool mean, double temperature, double beta, double base, Address weights, Address upstream,
          Address formed, Address loss, Address total, Address parts, Address stream) {
  const Released released;
  if (!grad.empty() && grad.size() != s_data.size()) throw std::invalid_argument("expected one gradient per layer");
  check(span_loss({layers(s_dtype, s_data, s_stride, s_rows, s_coef), layers(t_dtype, t_data, t_stride, t_rows, t_coef),
                   static_cast<int64_t>(grad.size()), array(grad), spans(s_start, s_end), spans(t_start, t_end), pairs,
                   dim, static_cast<Divergence>(divergence), mean, temperature, beta, base, at<const float>(weights),
                   at<const float>(upstream), at<const float>(formed), at<float>(loss), at<float>(total),
                   at<float>(parts), at<void>(stream)}));
}

void tables(Address student_ids, bool wide_student, Address teacher_ids, bool wide_teacher, int64_t matched,
            int64_t student_columns, int64_t teacher_columns, Address teacher_of, Address student_of,
            Address teacher_matched, Address stream) {
  const Released released;
  check(matched_tables(at<const void>(student_ids), wide_student, at<const void>(teacher_ids), wide_teacher, matched,
                       student_columns, teacher_columns,
                       {at<int32_t>(teacher_of), at<int32_t>(student_of), at<int8_t>(teacher_matched)},
                       at<void>(stream)));
}

void matched(const PyRows& student, const PyRows& teacher, Address s_start, Address s_end, Address t_start,
             Address t_end, Address teacher_of, Address student_of, Address teacher_matched, int64_t count,
             int64_t pairs, int unmatched, bool mean, double temperature, Address scale, Address upstream,
             Address formed, Address loss, Address total, Address parts, Address grad, Address stream) {
  const Released released;
  check(matched_kl({matrix(student), matrix(teacher), spans(s_start, s_end), spans(t_start, t_end),
                    {at<int32_t>(teacher_of), at<int32_t>(student_of), at<int8_t>(teacher_matched)}, count, pairs,
                    static_cast<Unmatched>(unmatched), mean, temperature, at<const float>(scale),
                    at<const float>(upstream), at<const float>(formed), at<float>(loss), at<float>(total),
                    at<float>(parts), at<void>(grad), at<void>(stream)}));
}

// A batch and the table: ids and mask as (address, bytes of an integer, row stride).
using PyIntegers = std::tuple<Address, int, int64_t>;
using PyBatch = std::tuple<PyIntegers, PyIntegers, int64_t, int64_t, Address, Address, int64_t, int64_t>;

IntRows integers(const PyIntegers& x) { return {at<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

GpuRemapBatch batch(const PyBatch& x) {
  const auto& [ids, mask, batch, length, indptr, pieces, rows, nnz] = x;
  return {integers(ids), integers(mask), batch, length, at<const int32_t>(indptr), at<const int32_t>(pieces), rows,
          nnz};
}

void measured(const PyBatch& x, Address out, Address stream) {
  const Released released;
  check(remap_measure(batch(x), at<int64_t>(out), at<void>(stream)));
}

void remapped(const PyBatch& x, Address ends, Address pair_ends, int64_t width, int64_t pairs, int64_t unk_id,
              int64_t pad_id, Address input_ids, Address attention, Address spans, Address nonempty, Address stream) {
  const Released released;
  check(remap_write(batch(x),
                    {at<const int64_t>(ends), at<const int64_t>(pair_ends), width, pairs, unk_id, pad_id,
                     at<int64_t>(input_ids), at<int64_t>(attention), at<int32_t>(spans), at<int32_t>(nonempty)},
                    at<void>(stream)));
}

const char* problem_or_none() {
  const char* error = problem();
  return error ? error : "";
}

PyMethodDef operations[] = {
    function<&problem_or_none>("cuda_problem"),
    function<&mean_fwd>("cuda_span_mean_fwd"),
    function<&mean_bwd>("cuda_span_mean_bwd"),
    function<&loss>("cuda_span_loss"),
    function<&tables>("cuda_matched_tables"),
    function<&matched>("cuda_matched_kl"),
    function<&measured>("cuda_remap_measure"),
    function<&remapped>("cuda_remap_write"),
    {},
};

}  // namespace

int bind_operations(PyObject* module) { return PyModule_AddFunctions(module, operations); }

}  // namespace cuda
}  // namespace vocabdistil
