// Chooses the instruction set of the CPU kernels once, by what this CPU has. VOCABDISTIL_ISA overrides it downwards.
#include <cstdlib>
#include <cstring>

#include "../ops.h"

namespace vocabdistil {

#define VD_DECLARE(isa)                                  \
  namespace isa {                                        \
  void span_mean_fwd(const SpanMeanArgs&);               \
  void span_mean_bwd(const SpanMeanBwdArgs&);            \
  void span_loss(const SpanLossArgs&);                   \
  void matched_kl(const MatchedKlArgs&);                 \
  void linear_matched_kl(const LinearMatchedKlArgs&);    \
  void log_prob_fwd(const LogProbArgs&);                 \
  void log_prob_bwd(const LogProbBwdArgs&);              \
  void linear_log_prob_fwd(const LinearLogProbArgs&);    \
  void linear_log_prob_bwd(const LinearLogProbBwdArgs&); \
  void remapped_kl(const RemappedKlArgs&);               \
  void linear_remapped_kl(const LinearRemappedKlArgs&);  \
  void relation_loss(const RelationLossArgs&);           \
  }
VD_DECLARE(baseline)
#if defined(__x86_64__)
VD_DECLARE(avx2)
VD_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  const char* isa;
  void (*span_mean_fwd)(const SpanMeanArgs&);
  void (*span_mean_bwd)(const SpanMeanBwdArgs&);
  void (*span_loss)(const SpanLossArgs&);
  void (*matched_kl)(const MatchedKlArgs&);
  void (*linear_matched_kl)(const LinearMatchedKlArgs&);
  void (*log_prob_fwd)(const LogProbArgs&);
  void (*log_prob_bwd)(const LogProbBwdArgs&);
  void (*linear_log_prob_fwd)(const LinearLogProbArgs&);
  void (*linear_log_prob_bwd)(const LinearLogProbBwdArgs&);
  void (*remapped_kl)(const RemappedKlArgs&);
  void (*linear_remapped_kl)(const LinearRemappedKlArgs&);
  void (*relation_loss)(const RelationLossArgs&);
};
#define VD_KERNELS(isa) \
  Kernels{#isa, isa::span_mean_fwd, isa::span_mean_bwd, isa::span_loss, isa::matched_kl, isa::linear_matched_kl, \
          isa::log_prob_fwd, isa::log_prob_bwd, isa::linear_log_prob_fwd, isa::linear_log_prob_bwd, \
          isa::remapped_kl, isa::linear_remapped_kl, isa::relation_loss}

Kernels choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("VOCABDISTIL_ISA");
  auto allowed = [&](const char* isa) { return !limit || !std::strcmp(limit, isa); };
  const bool no_limit_below_avx512 = !limit || !std::strcmp(limit, "avx512");
  __builtin_cpu_init();
  if (no_limit_below_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return VD_KERNELS(avx512);
  }
  if ((no_limit_below_avx512 || allowed("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return VD_KERNELS(avx2);
  }
#endif
  return VD_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void span_mean_fwd(const SpanMeanArgs& args) { kernels().span_mean_fwd(args); }
void span_mean_bwd(const SpanMeanBwdArgs& args) { kernels().span_mean_bwd(args); }
void span_loss(const SpanLossArgs& args) { kernels().span_loss(args); }
void matched_kl(const MatchedKlArgs& args) { kernels().matched_kl(args); }
void linear_matched_kl(const LinearMatchedKlArgs& args) { kernels().linear_matched_kl(args); }
void log_prob_fwd(const LogProbArgs& args) { kernels().log_prob_fwd(args); }
void log_prob_bwd(const LogProbBwdArgs& args) { kernels().log_prob_bwd(args); }
void linear_log_prob_fwd(const LinearLogProbArgs& args) { kernels().linear_log_prob_fwd(args); }
void linear_log_prob_bwd(const LinearLogProbBwdArgs& args) { kernels().linear_log_prob_bwd(args); }
void remapped_kl(const RemappedKlArgs& args) { kernels().remapped_kl(args); }
void linear_remapped_kl(const LinearRemappedKlArgs& args) { kernels().linear_remapped_kl(args); }
void relation_loss(const RelationLossArgs& args) { kernels().relation_loss(args); }
const char* active_isa() { return kernels().isa; }

}  // namespace vocabdistil
