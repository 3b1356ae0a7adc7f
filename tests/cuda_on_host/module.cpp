// The GPU kernels and their bindings as one module that runs on the host.
#include "../../csrc/cuda/kernels.cu"
#include "../../csrc/cuda/bindings.cpp"

PYBIND11_MODULE(_cuda_on_host, m) { vocabdistil::cuda::bind(m); }
