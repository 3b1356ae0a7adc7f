#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace vocabdistil {

#if defined(__unix__) || defined(__APPLE__)
// A child that was forked has none of its parent's threads, but an OpenMP runtime that waits for them.
static const pid_t kLoadedBy = getpid();
static bool forked() { return getpid() != kLoadedBy; }
#endif

void run_parts(int parts, void (*part)(const void* data, int i), const void* data) {
#if defined(__unix__) || defined(__APPLE__)
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using ThreadNum = int (*)();
  static const auto gomp_parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto thread_num = reinterpret_cast<ThreadNum>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto num_threads = reinterpret_cast<ThreadNum>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (gomp_parallel && thread_num && num_threads && !forked()) {
    struct Job {
      int parts;
      void (*part)(const void*, int);
      const void* data;
    } job{parts, part, data};
    gomp_parallel(
        [](void* data) {  // the runtime may grant fewer threads than asked for
          const auto* job = static_cast<const Job*>(data);
          for (int i = thread_num(); i < job->parts; i += num_threads()) job->part(job->data, i);
        },
        &job, static_cast<unsigned>(parts), 0);
    return;
  }
#endif
  std::vector<std::thread> workers;
  for (int i = 1; i < parts; ++i) workers.emplace_back(part, data, i);
  part(data, 0);
  for (auto& worker : workers) worker.join();
}

}  // namespace vocabdistil
