// All kernels at once: what the compiler does for a file, over the headers and for every architecture, it does once.
#include "span_mean.cu"
#include "span_loss.cu"
#include "matched_kl.cu"
#include "remap.cu"
