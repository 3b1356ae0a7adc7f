// The GPU kernels for Python: addresses, sizes and codes, as in ../bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"

namespace py = pybind11;

namespace vocabdistil {
namespace cuda {
namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;
using Strides = std::vector<int64_t>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
void* const* array(const Addresses& addresses) { return reinterpret_cast<void* const*>(addresses.data()); }

Spans spans(Address start, Address end) { return {at<const int32_t>(start), at<const int32_t>(end)}; }

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
  py::gil_scoped_release release;
  check(span_mean_fwd(layers(dtype, data, stride, rows, coef), spans(start, end), pairs, dim, mean,
                      static_cast<DType>(out_dtype), at<void>(out), at<void>(stream)));
}

void mean_bwd(int grad_dtype, Address grad, int64_t grad_stride, Address start, Address end, int64_t pairs,
              int64_t dim, bool mean, int dtype, const Addresses& out, const Strides& stride, int64_t rows,
              Address coef, Address stream) {
  py::gil_scoped_release release;
  check(span_mean_bwd(static_cast<DType>(grad_dtype), at<const void>(grad), grad_stride, spans(start, end), pairs, dim,
                      mean, layers(dtype, out, stride, rows, coef), at<void>(stream)));
}

void loss(int s_dtype, const Addresses& s_data, const Strides& s_stride, int64_t s_rows, Address s_coef,
          const Addresses& grad, int t_dtype, const Addresses& t_data, const Strides& t_stride, int64_t t_rows,
          Address t_coef, Address s_start, Address s_end, Address t_start, Address t_end, int64_t pairs, int64_t dim,
          int divergence, bool mean, double temperature, double beta, double base, Address weights, Address upstream,
          Address loss, Address total, Address stream) {
  py::gil_scoped_release release;
  if (!grad.empty() && grad.size() != s_data.size()) throw std::invalid_argument("expected one gradient per layer");
  check(span_loss({layers(s_dtype, s_data, s_stride, s_rows, s_coef), layers(t_dtype, t_data, t_stride, t_rows, t_coef),
                   static_cast<int64_t>(grad.size()), array(grad), spans(s_start, s_end), spans(t_start, t_end), pairs,
                   dim, static_cast<Divergence>(divergence), mean, temperature, beta, base, at<const float>(weights),
                   at<const float>(upstream), at<float>(loss), at<float>(total), at<void>(stream)}));
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_problem", [] {
    const char* error = problem();
    return std::string(error ? error : "");
  });
  m.def("cuda_span_mean_fwd", &mean_fwd);
  m.def("cuda_span_mean_bwd", &mean_bwd);
  m.def("cuda_span_loss", &loss);
}

}  // namespace cuda
}  // namespace vocabdistil
