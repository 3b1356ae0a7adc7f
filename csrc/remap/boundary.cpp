#include "boundary.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <unordered_map>

#include "../parallel.h"

namespace vocabdistil {
namespace {

// Walks over the units of one side: runs of tokens that no boundary separates, almost always single tokens.
struct Cursor {
  const TokenSpans& side;
  int64_t i, stop;           // the first token after the unit; the first token after the text
  int64_t first = 0, last = 0;
  int32_t from = 0, to = 0;  // bytes of the unit
  int32_t next = 0;          // where the unit after it begins

  Cursor(const TokenSpans& spans, int64_t begin, int64_t end) : side(spans), i(begin), stop(end) { skip_empty(); }

  int32_t start(int64_t k) const { return side.start[k * side.stride]; }
  int32_t end(int64_t k) const { return side.end[k * side.stride]; }

  void skip_empty() {
    while (i < stop && (start(i) < 0 || start(i) >= end(i))) ++i;
  }

  bool advance() {
    if (i >= stop) return false;
    first = i;
    from = start(i);
    to = end(i);
    last = ++i;
    for (skip_empty(); i < stop && start(i) < to; skip_empty()) {
      to = std::max(to, end(i));
      last = ++i;
    }
    next = i < stop ? start(i) : side.limit;
    return true;
  }
};

struct Writer {
  int32_t* const* out;
  int32_t teacher_base, student_base;
  int64_t count = 0;

  void pair(int64_t student_start, int64_t student_end, int64_t teacher_start, int64_t teacher_end) {
    out[0][count] = student_base + static_cast<int32_t>(student_start);
    out[1][count] = student_base + static_cast<int32_t>(student_end);
    out[2][count] = teacher_base + static_cast<int32_t>(teacher_start);
    out[3][count] = teacher_base + static_cast<int32_t>(teacher_end);
    ++count;
  }
};

// Template tokens of the same kind, in order.
void pair_kinds(const TokenSpans& teacher, int64_t i, int64_t i_end, const TokenSpans& student, int64_t j,
                int64_t j_end, Writer& writer) {
  for (; i < i_end; ++i) {
    const int32_t kind = teacher.end[i * teacher.stride];
    if (kind <= 0) continue;
    for (int64_t k = j; k < j_end; ++k) {
      if (student.end[k * student.stride] != kind) continue;
      writer.pair(k, k + 1, i, i + 1);
      j = k + 1;
      break;
    }
  }
}

// Passes over what lies across the end of the tokens that were cut off at the beginning of either side.
bool leave_floor(Cursor& t, Cursor& s) {
  int32_t reach = std::max(t.side.floor, s.side.floor);
  for (bool more = reach > 0; more;) {
    more = false;
    for (Cursor* side : {&t, &s}) {
      while (side->i < side->stop && side->start(side->i) < reach) {
        side->advance();
        reach = std::max(reach, side->to);
        more = true;
      }
    }
  }
  return t.advance() && s.advance();
}

void pair_text(Cursor t, Cursor s, Writer& writer) {
  if (!leave_floor(t, s)) return;
  // Both cursors stand behind a common boundary here. A boundary is anywhere in the gap between two units, so a unit
  // that lies in a gap of the other side has a common boundary on either end: it is a piece of its own, in no pair.
  for (;;) {
    if (t.to <= s.from) {
      if (!t.advance()) return;
      continue;
    }
    if (s.to <= t.from) {
      if (!s.advance()) return;
      continue;
    }
    const int64_t t_first = t.first, s_first = s.first;
    for (;;) {
      const int32_t reach = std::max(t.to, s.to);
      if (t.next < reach) {
        if (!t.advance()) return;
      } else if (s.next < reach) {
        if (!s.advance()) return;
      } else {
        break;
      }
    }
    writer.pair(s_first, s.last, t_first, t.last);
    if (!t.advance() || !s.advance()) return;
  }
}

}  // namespace

int64_t align_boundaries(const TokenSpans& teacher, const TokenSpans& student, int32_t teacher_base,
                         int32_t student_base, int32_t* const out[4]) {
  const int64_t t_lead = std::min(teacher.lead, teacher.size), s_lead = std::min(student.lead, student.size);
  const int64_t t_stop = std::max(t_lead, teacher.size - teacher.trail);
  const int64_t s_stop = std::max(s_lead, student.size - student.trail);
  Writer writer{out, teacher_base, student_base};
  pair_kinds(teacher, 0, t_lead, student, 0, s_lead, writer);
  pair_text({teacher, t_lead, t_stop}, {student, s_lead, s_stop}, writer);
  pair_kinds(teacher, t_stop, teacher.size, student, s_stop, student.size, writer);
  return writer.count;
}

int64_t BatchPairs::count() const {
  int64_t count = 0;
  for (const Part& part : parts) count += static_cast<int64_t>(part.fields[0].size());
  return count;
}

void BatchPairs::write(int32_t* out) const {
  for (int k = 0; k < 4; ++k) {
    for (const Part& part : parts) out = std::copy(part.fields[k].begin(), part.fields[k].end(), out);
  }
}

BatchPairs align_batch(int64_t batch, int64_t teacher_length, int64_t student_length, int threads,
                       const std::function<RowReader()>& reader) {
  BatchPairs found;
  std::mutex mutex;
  std::exception_ptr failure;  // none may leave a thread
  parallel_for(batch, threads, [&](int64_t begin, int64_t end) {
    try {
      BatchPairs::Part part{begin, {}};
      std::vector<int32_t> room;
      const RowReader read = reader();
      for (int64_t b = begin; b < end; ++b) {
        const auto [teacher, student] = read(b);
        const int64_t most = std::min(teacher.size, student.size);
        if (room.size() < static_cast<size_t>(4 * most)) room.resize(static_cast<size_t>(4 * most));
        int32_t* const out[4] = {room.data(), room.data() + most, room.data() + 2 * most, room.data() + 3 * most};
        const int64_t count = align_boundaries(teacher, student, static_cast<int32_t>(b * teacher_length),
                                               static_cast<int32_t>(b * student_length), out);
        for (int k = 0; k < 4; ++k) part.fields[k].insert(part.fields[k].end(), out[k], out[k] + count);
      }
      const std::lock_guard<std::mutex> lock(mutex);
      found.parts.push_back(std::move(part));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  std::sort(found.parts.begin(), found.parts.end(),
            [](const auto& a, const auto& b) { return a.first_row < b.first_row; });
  return found;
}

SideCoverage cover(const int64_t* ids, const int64_t* mask, int64_t size, const int32_t* start, const int32_t* end,
                   const int32_t* other_start, const int32_t* other_end, int64_t count, int64_t unknown_id,
                   size_t examples) {
  SideCoverage result;
  std::unordered_map<int64_t, int64_t> left_out;
  int64_t i = 0;
  const auto read_to = [&](int64_t stop, bool covered) {
    for (stop = std::min(stop, size); i < stop; ++i) {
      if (mask[i] == 0) continue;
      ++result.tokens;
      result.covered += covered;
      result.unknown += ids[i] == unknown_id;
      if (!covered) ++left_out[ids[i]];
    }
  };
  for (int64_t p = 0; p < count; ++p) {
    if (start[p] >= end[p] || other_start[p] >= other_end[p]) continue;
    ++result.pairs;
    result.singles += end[p] - start[p] == 1 && other_end[p] - other_start[p] == 1;
    read_to(start[p], false);
    read_to(end[p], true);
  }
  read_to(size, false);
  result.left_out.assign(left_out.begin(), left_out.end());
  const auto middle = result.left_out.begin() + static_cast<int64_t>(std::min(examples, left_out.size()));
  std::partial_sort(result.left_out.begin(), middle, result.left_out.end(), [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  });
  result.left_out.erase(middle, result.left_out.end());
  return result;
}

}  // namespace vocabdistil
