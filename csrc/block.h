// Memory for the results of a call, kept for the next one: fresh pages cost several times what fills them. Small blocks,
// which malloc itself keeps, and very large ones are not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace vocabdistil {

class Block {
 public:
  explicit Block(std::size_t size) : size_(size) {
    if (size >= kSmallest) {
      const std::lock_guard<std::mutex> lock(mutex());
      for (auto& spare : spares()) {
        // Not a much larger one: a long-lived small result must not hold it.
        if (spare.second >= size && spare.second <= 2 * size) {
          std::tie(data_, capacity_) = spare;
          spares().erase(spares().begin() + (&spare - spares().data()));
          return;
        }
      }
    }
    const std::size_t page = size >= kSmallest ? 4096 : 64;
    capacity_ = (size + page - 1) / page * page + page;
    data_ = std::aligned_alloc(page, capacity_);
    if (!data_) throw std::bad_alloc();
  }
  ~Block() {
    if (size_ >= kSmallest && capacity_ <= kLargest) {
      const std::lock_guard<std::mutex> lock(mutex());
      spares().emplace_back(data_, capacity_);
      if (spares().size() <= kSpares) return;
      data_ = spares().front().first;  // the oldest makes room: sizes that nobody asks for again must go
      spares().erase(spares().begin());
    }
    std::free(data_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kSpares = 4, kSmallest = std::size_t{1} << 20, kLargest = (std::size_t{1} << 26) + 8192;
  using Spares = std::vector<std::pair<void*, std::size_t>>;

  // Never destroyed: results may outlive everything static.
  static Spares& spares() {
    static auto* list = [] {
      auto* made = new Spares;
      made->reserve(kSpares + 1);  // giving back must not fail
      return made;
    }();
    return *list;
  }
  static std::mutex& mutex() {
    static std::mutex* const one = make_mutex();
    return *one;
  }
  static std::mutex* make_mutex() {
#if defined(__unix__) || defined(__APPLE__)
    // Held while forking, lest a child find it locked by a thread that it does not have.
    pthread_atfork(lock, unlock, unlock);
#endif
    return new std::mutex;
  }
  static void lock() { mutex().lock(); }
  static void unlock() { mutex().unlock(); }

  std::size_t size_, capacity_ = 0;
  void* data_ = nullptr;
};

// One block for several arrays, each of which begins a cache line and is as long as is said.
template <class T>
class Arrays {
 public:
  using Parts = std::initializer_list<std::pair<T**, std::int64_t>>;

  Arrays(Parts parts) : memory_(total(parts) * sizeof(T)) {
    T* at = static_cast<T*>(memory_.data());
    for (const auto& part : parts) {
      *part.first = at;
      at += aligned(part.second);
    }
  }

 private:
  static std::int64_t aligned(std::int64_t size) { return (size + 63) / 64 * 64; }
  static std::int64_t total(Parts parts) {
    std::int64_t sum = 0;
    for (const auto& part : parts) sum += aligned(part.second);
    return sum;
  }

  const Block memory_;
};

}  // namespace vocabdistil
