// What the fuzz programs share: random numbers, an end that says why, and cases as long as there is time.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

inline std::mt19937_64 rng;

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

// Arguments: seconds (1), seed (1). one_case: false of input that was refused.
template <class Case>
int run_cases(int argc, char** argv, Case&& one_case) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1;
  rng.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const auto stop = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  long long cases = 0, refused = 0;
  while (std::chrono::steady_clock::now() < stop) {
    refused += !one_case();
    ++cases;
  }
  std::printf("%lld cases, %lld refused\n", cases, refused);
  return 0;
}
