// parallel_for over the OpenMP runtime that torch has already loaded, so that both share one pool of threads;
// plain std::thread where there is none, and in a forked child. Nothing is linked: a second OpenMP runtime would fight
// the first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace vocabdistil {

#if defined(__unix__) || defined(__APPLE__)
// A child that was forked has none of its parent's threads, but an OpenMP runtime that waits for them.
inline const pid_t kLoadedBy = getpid();
inline bool forked() { return getpid() != kLoadedBy; }
#endif

// Calls body(begin, end) on `threads` contiguous parts of [0, n). The parts depend on `threads`, so a body must
// compute each index from that index alone: then the result is the same for any number of threads.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  const int parts = static_cast<int>(std::min<int64_t>(threads, n));
  if (parts <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  auto part = [&](int i) { body(n * i / parts, n * (i + 1) / parts); };
#if defined(__unix__) || defined(__APPLE__)
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using ThreadNum = int (*)();
  static const auto gomp_parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto thread_num = reinterpret_cast<ThreadNum>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto num_threads = reinterpret_cast<ThreadNum>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (gomp_parallel && thread_num && num_threads && !forked()) {
    struct Job {
      const decltype(part)* run;
      int parts;
      ThreadNum thread_num, num_threads;
    } job{&part, parts, thread_num, num_threads};
    gomp_parallel(
        [](void* data) {  // the runtime may grant fewer threads than asked for
          auto* job = static_cast<Job*>(data);
          for (int i = job->thread_num(); i < job->parts; i += job->num_threads()) (*job->run)(i);
        },
        &job, static_cast<unsigned>(parts), 0);
    return;
  }
#endif
  std::vector<std::thread> workers;
  for (int i = 1; i < parts; ++i) workers.emplace_back(part, i);
  part(0);
  for (auto& worker : workers) worker.join();
}

// Calls task(i) for each i in [0, count), each on whichever thread is free: for tasks of unequal size.
template <class Task>
void parallel_tasks(int64_t count, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, count), threads, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

}  // namespace vocabdistil
