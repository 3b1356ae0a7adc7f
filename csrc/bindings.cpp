// The operations for Python. Everything crosses as addresses, sizes and codes: vocabdistil/core/native.py has already
// checked shapes, dtypes and devices and keeps the tensors alive.
#include "arguments.h"
#include "bindings.h"

namespace vd = vocabdistil;

using vd::functions::Address;
using vd::functions::at;
using vd::functions::function;
using vd::functions::matrix;
using vd::functions::PyRows;
using vd::functions::Released;
using vd::functions::spans;

namespace {

// One side's layers as Python hands them over: dtype code, addresses, row strides (elements), coefficients.
struct Side {
  int dtype;
  std::vector<Address> data;
  std::vector<int64_t> stride;
  std::vector<double> coef;

  vd::Layers layers(int64_t rows) const {
    return {static_cast<vd::DType>(dtype), static_cast<int64_t>(data.size()),
            reinterpret_cast<const void* const*>(data.data()), stride.data(), coef.data(), rows};
  }
  vd::LayerGrads grads(const std::vector<Address>& out, int64_t rows) const {
    return {static_cast<vd::DType>(dtype), static_cast<int64_t>(out.size()),
            reinterpret_cast<void* const*>(out.data()), coef.data(), rows};
  }
};

void span_mean_fwd(int dtype, std::vector<Address> data, std::vector<int64_t> stride, std::vector<double> coef,
                   int64_t rows, Address start, Address end, int64_t pairs, int64_t dim, bool mean, int out_dtype,
                   Address out, int threads) {
  const Released released;
  const Side x{dtype, std::move(data), std::move(stride), std::move(coef)};
  vd::span_mean_fwd({x.layers(rows), spans(start, end), pairs, dim, mean, static_cast<vd::DType>(out_dtype),
                     at<void>(out), threads});
}

void span_mean_bwd(int grad_dtype, Address grad, int64_t grad_stride, Address start, Address end, int64_t pairs,
                   int64_t dim, bool mean, int dtype, std::vector<Address> out, std::vector<double> coef,
                   int64_t rows, int threads) {
  const Released released;
  const Side x{dtype, {}, {}, std::move(coef)};
  vd::span_mean_bwd({static_cast<vd::DType>(grad_dtype), at<const void>(grad), grad_stride, spans(start, end), pairs,
                     dim, mean, x.grads(out, rows), threads});
}

void span_loss(int s_dtype, std::vector<Address> s_data, std::vector<int64_t> s_stride, std::vector<double> s_coef,
               std::vector<Address> s_grad, int64_t s_rows, int t_dtype, std::vector<Address> t_data,
               std::vector<int64_t> t_stride, std::vector<double> t_coef, std::vector<Address> t_grad, int64_t t_rows,
               Address s_start, Address s_end, Address t_start, Address t_end, int64_t pairs, int64_t dim,
               int divergence, bool mean, double temperature, double beta, Address scale, Address loss, Address total,
               int threads) {
  const Released released;
  const Side s{s_dtype, std::move(s_data), std::move(s_stride), std::move(s_coef)};
  const Side t{t_dtype, std::move(t_data), std::move(t_stride), std::move(t_coef)};
  vd::span_loss({s.layers(s_rows), t.layers(t_rows), spans(s_start, s_end), spans(t_start, t_end), pairs, dim,
                 static_cast<vd::Divergence>(divergence), mean, temperature, beta, at<const void>(scale),
                 at<void>(loss), at<void>(total), s.grads(s_grad, s_rows), t.grads(t_grad, t_rows), threads});
}

void matched_kl(const PyRows& student, const PyRows& teacher, Address s_start, Address s_end, Address t_start,
                Address t_end, Address s_ids, Address t_ids, int64_t matched, int64_t pairs, int unmatched, bool mean,
                double temperature, Address scale, Address loss, Address total, Address grad, int threads) {
  const Released released;
  vd::matched_kl({matrix(student), matrix(teacher), spans(s_start, s_end), spans(t_start, t_end),
                  at<const int32_t>(s_ids), at<const int32_t>(t_ids), matched, pairs,
                  static_cast<vd::Unmatched>(unmatched), mean, temperature, at<const void>(scale), at<void>(loss),
                  at<void>(total), at<void>(grad), threads});
}

// hidden, weight, and the addresses of bias, lengths and ids.
using PyLinearSide = std::tuple<PyRows, PyRows, Address, Address, Address>;

vd::LinearSide linear_side(const PyLinearSide& x) {
  return {matrix(std::get<0>(x)), matrix(std::get<1>(x)), at<const void>(std::get<2>(x)),
          at<const void>(std::get<3>(x)), at<const int32_t>(std::get<4>(x))};
}

void linear_matched_kl(const PyLinearSide& student, const PyLinearSide& teacher, int64_t matched, int unmatched,
                       double temperature, int64_t budget, Address scale, Address loss, Address total,
                       Address grad_hidden, Address grad_weight, Address grad_bias, int threads) {
  const Released released;
  vd::linear_matched_kl({linear_side(student), linear_side(teacher), matched, static_cast<vd::Unmatched>(unmatched),
                         temperature, budget, at<const void>(scale), at<void>(loss), at<void>(total),
                         at<void>(grad_hidden), at<void>(grad_weight), at<void>(grad_bias), threads});
}

// Addresses of the ids and of which of them are needed; of the log-probabilities and what the backward pass takes.
using PyTokens = std::tuple<Address, Address>;
using PyOdds = std::tuple<Address, Address, Address>;

vd::Tokens tokens(const PyTokens& x) { return {at<const int64_t>(std::get<0>(x)), at<const uint8_t>(std::get<1>(x))}; }
vd::TokenOddsOut odds(const PyOdds& x) {
  return {at<void>(std::get<0>(x)), at<void>(std::get<1>(x)), at<void>(std::get<2>(x))};
}

void log_prob_fwd(const PyRows& logits, const PyTokens& of, const PyOdds& out, int threads) {
  const Released released;
  vd::log_prob_fwd({matrix(logits), tokens(of), odds(out), threads});
}

void log_prob_bwd(const PyRows& logits, const PyTokens& of, const PyOdds& from, Address grad, Address grad_logits,
                  int threads) {
  const Released released;
  vd::log_prob_bwd({matrix(logits), tokens(of), odds(from), at<const void>(grad), at<void>(grad_logits), threads});
}

void linear_log_prob_fwd(const PyRows& hidden, const PyRows& weight, Address bias, const PyTokens& of,
                         const PyOdds& out, int threads) {
  const Released released;
  vd::linear_log_prob_fwd({{matrix(hidden), matrix(weight), at<const void>(bias), tokens(of)}, odds(out), threads});
}

void linear_log_prob_bwd(const PyRows& hidden, const PyRows& weight, Address bias, const PyTokens& of,
                         const PyOdds& from, Address grad, int64_t budget, Address grad_hidden, Address grad_weight,
                         Address grad_bias, int threads) {
  const Released released;
  vd::linear_log_prob_bwd({{matrix(hidden), matrix(weight), at<const void>(bias), tokens(of)}, odds(from),
                           at<const void>(grad), budget, at<void>(grad_hidden), at<void>(grad_weight),
                           at<void>(grad_bias), threads});
}

// Rows and how many, shapes and how many, ids, the transposed table, and weights of both.
using PyPlan = std::tuple<Address, int64_t, Address, int64_t, Address, Address, Address, Address, Address>;

vd::RemapPlan plan(const PyPlan& x) {
  return {at<const int32_t>(std::get<0>(x)), std::get<1>(x), at<const int32_t>(std::get<2>(x)), std::get<3>(x),
          at<const int32_t>(std::get<4>(x)), at<const int32_t>(std::get<5>(x)), at<const int32_t>(std::get<6>(x)),
          at<const void>(std::get<7>(x)),    at<const void>(std::get<8>(x))};
}

void remapped_kl(const PyRows& student, const PyRows& teacher, Address s_start, Address s_end, Address t_start,
                 Address t_end, const PyPlan& of, int64_t pairs, bool logsumexp, int64_t top_k, int remainder,
                 double temperature, Address scale, Address loss, Address total, Address grad, int threads) {
  const Released released;
  vd::remapped_kl({matrix(student), matrix(teacher), spans(s_start, s_end), spans(t_start, t_end), plan(of), pairs,
                   logsumexp, top_k, static_cast<vd::Unmatched>(remainder), temperature, at<const void>(scale),
                   at<void>(loss), at<void>(total), at<void>(grad), threads});
}

void linear_remapped_kl(const PyLinearSide& student, const PyLinearSide& teacher, const PyPlan& of, int64_t columns,
                        bool logsumexp, int64_t top_k, int remainder, double temperature, int64_t budget,
                        Address scale, Address loss, Address total, Address grad_hidden, Address grad_weight,
                        Address grad_bias, int threads) {
  const Released released;
  vd::linear_remapped_kl({linear_side(student), linear_side(teacher), plan(of), columns, logsumexp, top_k,
                          static_cast<vd::Unmatched>(remainder), temperature, budget, at<const void>(scale),
                          at<void>(loss), at<void>(total), at<void>(grad_hidden), at<void>(grad_weight),
                          at<void>(grad_bias), threads});
}

void relation_loss(int dtype, Address student, Address teacher, int64_t pairs, int64_t student_dim, int64_t teacher_dim,
                   int64_t heads, Address first, Address last, Address scale, Address loss, Address total,
                   Address grad, int threads) {
  const Released released;
  vd::relation_loss({static_cast<vd::DType>(dtype), at<const void>(student), at<const void>(teacher), pairs,
                     student_dim, teacher_dim, heads, at<const int32_t>(first), at<const int32_t>(last),
                     at<const void>(scale), at<void>(loss), at<void>(total), at<void>(grad), threads});
}

PyMethodDef operations[] = {
    function<&vd::active_isa>("active_isa"),
    function<&span_mean_fwd>("span_mean_fwd"),
    function<&span_mean_bwd>("span_mean_bwd"),
    function<&span_loss>("span_loss"),
    function<&matched_kl>("matched_kl"),
    function<&linear_matched_kl>("linear_matched_kl"),
    function<&log_prob_fwd>("log_prob_fwd"),
    function<&log_prob_bwd>("log_prob_bwd"),
    function<&linear_log_prob_fwd>("linear_log_prob_fwd"),
    function<&linear_log_prob_bwd>("linear_log_prob_bwd"),
    function<&remapped_kl>("remapped_kl"),
    function<&linear_remapped_kl>("linear_remapped_kl"),
    function<&relation_loss>("relation_loss"),
    {},
};

}  // namespace

int vd::bind_operations(PyObject* module) { return PyModule_AddFunctions(module, operations); }
