// parallel_for over the OpenMP runtime that torch has already loaded, so that both share one pool of threads;
// plain std::thread where there is none, and in a forked child. Nothing is linked: a second OpenMP runtime would fight
// the first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vocabdistil {

// Calls part(data, i) for each i in [0, parts), each on a thread of its own where there are as many.
void run_parts(int parts, void (*part)(const void* data, int i), const void* data);

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
  run_parts(parts, [](const void* data, int i) { (*static_cast<const decltype(part)*>(data))(i); }, &part);
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
