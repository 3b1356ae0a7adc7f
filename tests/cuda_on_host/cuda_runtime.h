// As much of the CUDA runtime as csrc/cuda asks for, on the host: the threads of a block are fibers that run in turn from
// one shuffle or barrier to the next. Blocks run one after the other, so __shared__ is static.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __fdividef(float a, float b) { return a / b; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
constexpr cudaError_t kElsewhere = 1;
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == kElsewhere ? "not launched on the stream of the tensors' device" : "no such error";
}
namespace cuda_on_host {

// The current stream of the device that is current, while one is: where all launches have to go.
inline cudaStream_t stream = nullptr;

inline bool elsewhere(cudaStream_t given) { return !stream || given != stream; }

}  // namespace cuda_on_host
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // A small grid, so that blocks loop, and little shared memory, so that what it does not hold is read again.
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 2 * (1024 + 2048 + 8192);
  return cudaSuccess;
}
template <class Args>
cudaError_t cudaFuncSetAttribute(void (*)(Args), cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Args>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Args), int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Args)) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t stream) {
  if (cuda_on_host::elsewhere(stream)) return kElsewhere;
  std::memset(data, value, size);
  return cudaSuccess;
}

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

enum class Wait { none, shuffle, barrier, done };
inline std::function<void()> body;
inline ucontext_t scheduler;
inline std::vector<ucontext_t> fibers;
inline std::vector<Wait> waits;
inline std::vector<uint64_t> exchanged;
inline std::vector<float4> shared;  // of the size that a launch asks for
inline float* shared_floats() { return reinterpret_cast<float*>(shared.data()); }
inline unsigned current;

inline void wait(Wait kind) {
  waits[current] = kind;
  swapcontext(&fibers[current], &scheduler);
}
inline void run_fiber() {
  body();
  waits[current] = Wait::done;
}

// What undefined behaviour would be on a GPU: part of a warp at a shuffle, or of a block at a barrier.
inline void check_convergence(bool at_barrier) {
  for (unsigned i = 0; i < waits.size(); ++i) {
    if (waits[i] != waits[i / 32 * 32] || (at_barrier && waits[i] != Wait::barrier)) {
      std::fprintf(stderr, "cuda_on_host: thread %u waits where its neighbours do not\n", i);
      std::abort();
    }
  }
}

inline void run_block() {
  constexpr size_t kStack = 1 << 16;
  const unsigned count = blockDim.x * blockDim.y;
  static std::vector<char> stacks;
  stacks.resize(count * kStack);
  fibers.resize(count);
  exchanged.resize(count);
  waits.assign(count, Wait::none);
  for (unsigned i = 0; i < count; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks.data() + i * kStack;
    fibers[i].uc_stack.ss_size = kStack;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], run_fiber, 0);
  }
  for (;;) {
    bool ran = false;
    for (current = 0; current < count; ++current) {
      if (waits[current] == Wait::done || waits[current] == Wait::barrier) continue;
      threadIdx = dim3(current % blockDim.x, current / blockDim.x);
      swapcontext(&scheduler, &fibers[current]);
      ran = true;
    }
    if (ran) {
      check_convergence(false);
      continue;
    }
    // No warp can go on but from a barrier, at which all must be.
    if (std::find(waits.begin(), waits.end(), Wait::barrier) == waits.end()) return;
    check_convergence(true);
    waits.assign(count, Wait::none);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Wait::barrier); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  using namespace cuda_on_host;
  std::memcpy(&exchanged[current], &value, sizeof(T));
  wait(Wait::shuffle);
  T other;
  std::memcpy(&other, &exchanged[current / 32 * 32 + lane % 32], sizeof(T));
  wait(Wait::shuffle);
  return other;
}
template <class T>
T __shfl_xor_sync(unsigned all, T value, int mask) {
  return __shfl_sync(all, value, cuda_on_host::current % 32 ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned all, T value, int step) {
  const int lane = cuda_on_host::current % 32;
  return __shfl_sync(all, value, lane < step ? lane : lane - step);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __ballot_sync(unsigned, bool value) {
  using namespace cuda_on_host;
  exchanged[current] = value;
  wait(Wait::shuffle);
  unsigned all = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (exchanged[current / 32 * 32 + lane] != 0) all |= 1u << lane;
  wait(Wait::shuffle);
  return all;
}

namespace cuda_on_host {

// What runs a kernel in place of the fibers, if anything does: its address, the sizes of grid and block, its arguments.
using Launcher = cudaError_t (*)(const void* kernel, const unsigned* sizes, size_t shared, const void* args, size_t size);
inline Launcher launcher = nullptr;

}  // namespace cuda_on_host

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  if (cuda_on_host::elsewhere(config->stream)) return kElsewhere;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (cuda_on_host::launcher) {
    const unsigned sizes[] = {gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z};
    return cuda_on_host::launcher(reinterpret_cast<const void*>(kernel), sizes, config->dynamicSmemBytes, &args,
                                  sizeof(args));
  }
  cuda_on_host::shared.assign(config->dynamicSmemBytes / sizeof(float4) + 1, float4{NAN, NAN, NAN, NAN});
  cuda_on_host::body = [&] { kernel(args); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) cuda_on_host::run_block();
  return cudaSuccess;
}
