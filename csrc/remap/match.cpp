#include <algorithm>
#include <numeric>
#include <vector>

#include "../parallel.h"
#include "remap.h"

namespace vocabdistil {
namespace {

// -1 for an id without a slot, and for a slot outside the matched vocabulary.
int32_t slot_of(const int32_t* slots, int64_t size, int64_t matched, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(size)) return -1;
  const int32_t slot = slots[id];
  return slot < matched ? slot : -1;
}

}  // namespace

int64_t match_plan(const MatchArgs& args) {
  const int64_t width = std::min(args.teacher_length, args.student_length);
  parallel_for(args.batch, args.threads, [&](int64_t begin, int64_t end) {
    // For each matched token the student positions that hold it, as a chain that is only ever walked forward: a
    // position at or before the last one taken can never be taken later.
    std::vector<int32_t> head(static_cast<size_t>(args.matched), -1);
    std::vector<int32_t> next(static_cast<size_t>(args.student_length));
    std::vector<int32_t> slots(static_cast<size_t>(args.student_length));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* student = args.student_ids + b * args.student_length;
      const int64_t* teacher = args.teacher_ids + b * args.teacher_length;
      const uint8_t* student_mask = args.student_mask ? args.student_mask + b * args.student_length : nullptr;
      const uint8_t* teacher_mask = args.teacher_mask ? args.teacher_mask + b * args.teacher_length : nullptr;
      for (int64_t j = args.student_length - 1; j >= 0; --j) {
        const bool kept = !student_mask || student_mask[j];
        const int32_t slot = kept ? slot_of(args.student_slot, args.student_slots, args.matched, student[j]) : -1;
        slots[j] = slot;
        if (slot < 0) continue;
        next[j] = head[slot];
        head[slot] = static_cast<int32_t>(j);
      }
      int32_t* found_student = args.found + b * width;
      int32_t* found_teacher = args.found + (args.batch + b) * width;
      int64_t count = 0;
      int32_t taken = -1;
      for (int64_t i = 0; i < args.teacher_length; ++i) {
        if (teacher_mask && !teacher_mask[i]) continue;
        const int32_t slot = slot_of(args.teacher_slot, args.teacher_slots, args.matched, teacher[i]);
        if (slot < 0) continue;
        int32_t j = head[slot];
        while (j >= 0 && j <= taken) j = next[j];
        head[slot] = j;
        if (j < 0) continue;
        taken = j;
        found_student[count] = j;
        found_teacher[count] = static_cast<int32_t>(i);
        ++count;
      }
      args.counts[b] = count;
      for (const int32_t slot : slots) {
        if (slot >= 0) head[slot] = -1;
      }
    }
  });
  return std::accumulate(args.counts, args.counts + args.batch, int64_t{0});
}

void match_write(const MatchArgs& args, int32_t* pairs) {
  const int64_t width = std::min(args.teacher_length, args.student_length);
  std::vector<int64_t> first(static_cast<size_t>(args.batch) + 1, 0);
  for (int64_t b = 0; b < args.batch; ++b) first[b + 1] = first[b] + args.counts[b];
  const int64_t total = first[args.batch];
  parallel_for(args.batch, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int side = 0; side < 2; ++side) {
        const int32_t* found = args.found + (side * args.batch + b) * width;
        const int64_t base = b * (side == 0 ? args.student_length : args.teacher_length);
        int32_t* start = pairs + 2 * side * total + first[b];
        int32_t* stop = start + total;
        for (int64_t k = 0; k < args.counts[b]; ++k) {
          start[k] = static_cast<int32_t>(base + found[k]);
          stop[k] = static_cast<int32_t>(base + found[k] + 1);
        }
      }
    }
  });
}

}  // namespace vocabdistil
