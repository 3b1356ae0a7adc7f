// The GPU kernels and their bindings as one module that runs on the host.
#include "../../csrc/cuda/kernels.cu"
#include "../../csrc/cuda/bindings.cpp"

extern "C" __attribute__((visibility("default"))) void launch_with(cuda_on_host::Launcher launcher) {
  cuda_on_host::launcher = launcher;
}

extern "C" __attribute__((visibility("default"))) void stream_is(cudaStream_t stream) { cuda_on_host::stream = stream; }

PyMODINIT_FUNC PyInit__cuda_on_host() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda_on_host", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && vocabdistil::cuda::bind_operations(module)) Py_CLEAR(module);
  return module;
}
