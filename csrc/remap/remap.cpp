#include "remap.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>

#include "../parallel.h"
#include "utf8.h"

namespace vocabdistil {
namespace {

constexpr int kInline = 3;                 // ids inside a packed entry
constexpr int kIdBits = 20;                // vocabularies up to 1,048,576 tokens
constexpr uint64_t kLong = 15;             // count of an entry whose ids are in the CSR rows only
#if defined(__SSE2__)
constexpr int64_t kCache = 1 << 23;  // bytes of results from which on they are stored around the cache
#else
constexpr int64_t kCache = std::numeric_limits<int64_t>::max();
#endif
constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;
constexpr int64_t kMaxPieces = std::numeric_limits<uint16_t>::max();

using Pieces = std::unordered_map<std::string_view, int32_t>;

bool is_unused(std::string_view token) {
  constexpr std::string_view head = "[unused";
  if (!starts_with(token, head) || token.size() < head.size() + 2 || token.back() != ']') return false;
  token.remove_prefix(head.size());
  token.remove_suffix(1);
  return std::all_of(token.begin(), token.end(), [](char c) { return c >= '0' && c <= '9'; });
}

struct Lexicon {
  Pieces first, rest;  // rest: continuation pieces without their prefix
  size_t longest_first = 0, longest_rest = 0;

  Lexicon(const std::vector<std::string_view>& tokens, std::string_view prefix) {
    first.reserve(tokens.size());
    rest.reserve(tokens.size());
    for (size_t id = 0; id < tokens.size(); ++id) {
      const std::string_view token = tokens[id];
      if (token.data() == nullptr || token.empty()) continue;
      first.emplace(token, static_cast<int32_t>(id));
      longest_first = std::max(longest_first, token.size());
      if (token.size() > prefix.size() && starts_with(token, prefix)) {
        rest.emplace(token.substr(prefix.size()), static_cast<int32_t>(id));
        longest_rest = std::max(longest_rest, token.size() - prefix.size());
      }
    }
  }

  // Appends the greedy longest-match pieces of `word`; false if some character cannot be covered.
  bool segment(std::string_view word, bool continuation, std::vector<int32_t>& out) const {
    while (!word.empty()) {
      const Pieces& pieces = continuation ? rest : first;
      size_t size = std::min(word.size(), continuation ? longest_rest : longest_first);
      auto found = pieces.end();
      for (; size > 0; --size) {
        if (size < word.size() && !is_char_start(word[size])) continue;
        found = pieces.find(word.substr(0, size));
        if (found != pieces.end()) break;
      }
      if (size == 0) return false;
      out.push_back(found->second);
      word.remove_prefix(size);
      continuation = true;
    }
    return true;
  }
};

// Three slots are written whatever the row holds, and the next token overwrites those that were too many: no branch
// depends on the data.
inline int64_t put_short(uint64_t entry, int64_t* out) {
  out[0] = static_cast<int64_t>((entry >> 4) & kIdMask);
  out[1] = static_cast<int64_t>((entry >> (4 + kIdBits)) & kIdMask);
  out[2] = static_cast<int64_t>(entry >> (4 + 2 * kIdBits));
  return static_cast<int64_t>(entry & 15);
}

// Writes the rows of ids[i...] up to the first that is long, or that would start past `safe`: the last slots of a
// sequence are not for scribbling, since they have a neighbour. Returns where it stopped.
template <class Id>
int64_t put_short_rows(const Id* ids, int64_t i, int64_t end, const uint64_t* packed, int64_t safe, int64_t* out,
                       int64_t& at, int32_t* starts, int32_t base) {
  int64_t here = at;
  for (; i < end && here <= safe; ++i) {
    const uint64_t entry = packed[ids[i]];
    if ((entry & 15) == kLong) break;
    starts[i] = base + static_cast<int32_t>(here);
    here += put_short(entry, out + here);
  }
  at = here;
  return i;
}

// Copies whole lines around the cache: results larger than it would only push out the ids, which are read twice.
template <class T>
void copy_past(T* to, const T* from, int64_t count) {
  int64_t k = 0;
#if defined(__SSE2__)
  constexpr int64_t lanes = 16 / sizeof(T), line = 64 / sizeof(T);
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
  for (; k < std::min(count, head); ++k) to[k] = from[k];
  for (const int64_t end = k + (count - k) / line * line; k < end; k += lanes)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
#endif
  std::copy(from + k, from + count, to + k);
}

// A value whose sign bit tells whether the mask is not 0.
template <class U, class Mask>
U mask_bits(Mask value) {
  // A mask wider than the ids must not lose its high half.
  using Wide = std::conditional_t<(sizeof(Mask) > sizeof(U)), std::make_unsigned_t<Mask>, U>;
  const Wide m = static_cast<Wide>(value);
  return static_cast<U>((m | (Wide{0} - m)) >> (8 * (sizeof(Wide) - sizeof(U))));
}

// Calls f(typed ids pointer, typed mask pointer); a missing mask is a null pointer of any type.
template <class F>
void visit(const BatchView& ids, const BatchView& mask, const F& f) {
  auto with_mask = [&](auto* id) {
    switch (mask.itemsize) {
      case 1: f(id, static_cast<const int8_t*>(mask.data)); break;
      case 4: f(id, static_cast<const int32_t*>(mask.data)); break;
      default: f(id, static_cast<const int64_t*>(mask.data)); break;
    }
  };
  if (ids.itemsize == 4) {
    with_mask(static_cast<const int32_t*>(ids.data));
  } else {
    with_mask(static_cast<const int64_t*>(ids.data));
  }
}

}  // namespace

Csr build_rows(const std::vector<std::string_view>& teacher, const std::vector<std::string_view>& student,
               const WordPieceRules& rules,
               const std::vector<std::pair<int64_t, std::vector<int32_t>>>& overrides) {
  const Lexicon lexicon(student, rules.student_prefix);
  Csr csr;
  csr.indptr.reserve(teacher.size() + 1);
  csr.ids.reserve(teacher.size() * 2);
  csr.indptr.push_back(0);
  auto next = overrides.begin();
  for (size_t id = 0; id < teacher.size(); ++id) {
    std::string_view token = teacher[id];
    const size_t start = csr.ids.size();
    if (next != overrides.end() && next->first == static_cast<int64_t>(id)) {
      csr.ids.insert(csr.ids.end(), next->second.begin(), next->second.end());
      ++next;
    } else {
      // A bare prefix has no text after it: it is a word of its own.
      const bool continuation = !rules.teacher_prefix.empty() && token.size() > rules.teacher_prefix.size() &&
                                starts_with(token, rules.teacher_prefix);
      const bool unused = is_unused(token);
      if (continuation) token.remove_prefix(rules.teacher_prefix.size());
      const int64_t chars = std::count_if(token.begin(), token.end(), is_char_start);
      if (token.empty() || unused || chars > rules.max_chars || !lexicon.segment(token, continuation, csr.ids)) {
        csr.ids.resize(start);
        csr.ids.push_back(rules.unk_id);
      }
    }
    if (csr.ids.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
      throw std::invalid_argument("remap table: expected at most 2147483647 pieces in total");
    }
    csr.indptr.push_back(static_cast<int32_t>(csr.ids.size()));
  }
  return csr;
}

RemapIndex::RemapIndex(Csr csr, int64_t student_size) : csr_(std::move(csr)) {
  const auto& indptr = csr_.indptr;
  const auto& ids = csr_.ids;
  if (indptr.empty() || indptr.front() != 0 || indptr.back() != static_cast<int64_t>(ids.size())) {
    throw std::invalid_argument("indptr: expected row bounds from 0 to the number of ids (" +
                                std::to_string(ids.size()) + "), got " +
                                (indptr.empty() ? "nothing"
                                                : std::to_string(indptr.front()) + " to " + std::to_string(indptr.back())));
  }
  for (int64_t row = 0; row < rows(); ++row) {
    const int64_t count = int64_t{indptr[row + 1]} - indptr[row];
    if (count < 0 || count > kMaxPieces || indptr[row + 1] > indptr.back()) {
      throw std::invalid_argument("indptr: expected ascending row bounds at most " + std::to_string(kMaxPieces) +
                                  " apart, got " + std::to_string(indptr[row]) + " and then " +
                                  std::to_string(indptr[row + 1]) + " at row " + std::to_string(row));
    }
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= student_size) {
      throw std::invalid_argument("ids: expected student ids in [0, " + std::to_string(student_size) + "), got " +
                                  std::to_string(ids[i]) + " at " + std::to_string(i));
    }
  }
  // At least one entry: a masked-out id is looked up as 0, also in a table without rows.
  counts_.assign(std::max<int64_t>(rows(), 1), 0);
  packed_.assign(counts_.size(), 0);
  for (int64_t row = 0; row < rows(); ++row) {
    const int32_t* row_ids = ids.data() + indptr[row];
    const int count = indptr[row + 1] - indptr[row];
    counts_[row] = static_cast<uint16_t>(count);
    has_empty_rows_ |= count == 0;
    uint64_t entry = static_cast<uint64_t>(count);
    if (count > kInline || student_size > static_cast<int64_t>(kIdMask)) {
      entry = kLong;
    } else {
      for (int k = 0; k < count; ++k) entry |= static_cast<uint64_t>(row_ids[k]) << (4 + kIdBits * k);
    }
    packed_[row] = entry;
  }
}

int64_t RemapIndex::put_row(int64_t teacher_id, int64_t* out) const {
  const int32_t* from = csr_.ids.data() + csr_.indptr[teacher_id];
  const int64_t count = counts_[teacher_id];
  for (int64_t k = 0; k < count; ++k) out[k] = from[k];
  return count;
}

// False if a kept id is outside the table.
template <class Id, class Mask>
bool RemapIndex::plan_row(const Id* ids, const Mask* mask, int64_t length, int64_t max_length, RowPlan& plan) const {
  const Id last = static_cast<Id>(rows() - 1);
  using U = std::make_unsigned_t<Id>;
  // The sign bit of v | (last - v) is set exactly where v < 0 or v > last, that of m | -m where m is not 0: both
  // are plain vector operations on any machine, which 64-bit comparisons are not.
  constexpr int kSign = 8 * sizeof(U) - 1;
  U bad = 0;
  int64_t kept = length, used = length;
  if (mask) {
    U seen = 0;
    for (int64_t i = 0; i < length; ++i) {
      const U v = static_cast<U>(ids[i]);
      const U m = mask_bits<U>(mask[i]);
      bad |= (v | (static_cast<U>(last) - v)) & m;
      seen += m >> kSign;
    }
    kept = static_cast<int64_t>(seen);
    while (used > 0 && mask[used - 1] == 0) --used;
  } else {
    for (int64_t i = 0; i < length; ++i) {
      const U v = static_cast<U>(ids[i]);
      bad |= v | (static_cast<U>(last) - v);
    }
  }
  if (static_cast<Id>(bad) < 0) return false;

  const uint16_t* counts = counts_.data();
  const bool masked = kept != used;
  int64_t total = 0;
  if (!masked) {
    int64_t sums[4] = {0, 0, 0, 0}, i = 0;  // several, so that no addition waits for the one before it
    for (; i + 4 <= used; i += 4) {
      for (int k = 0; k < 4; ++k) sums[k] += counts[ids[i + k]];
    }
    for (; i < used; ++i) sums[0] += counts[ids[i]];
    total = sums[0] + sums[1] + sums[2] + sums[3];
  } else {
    for (int64_t i = 0; i < used; ++i) total += mask[i] != 0 ? counts[ids[i]] : 0;
  }
  if (max_length >= 0 && total > max_length) {
    total = kept = 0;
    int64_t end = 0;
    for (int64_t i = 0; i < used; ++i) {
      if (masked && mask[i] == 0) continue;
      const int64_t count = counts[ids[i]];
      if (total + count > max_length) break;
      total += count;
      ++kept;
      end = i + 1;
    }
    used = end;
  }
  plan = {total, kept, used};
  return true;
}

BatchPlan RemapIndex::plan(const BatchView& ids, const BatchView& mask, int64_t batch, int64_t length,
                           int64_t max_length, RowPlan* plan, int threads) const {
  std::atomic<int64_t> bad_row{batch};
  visit(ids, mask, [&](auto* id, auto* m) {
    parallel_for(batch, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (plan_row(id + b * ids.row_stride, m ? m + b * mask.row_stride : m, length, max_length, plan[b])) continue;
        int64_t seen = bad_row.load();
        while (b < seen && !bad_row.compare_exchange_weak(seen, b)) {
        }
        return;
      }
    });
  });
  if (bad_row.load() < batch) return {bad_row.load(), 0, 0};
  BatchPlan total{-1, 0, 0};
  for (int64_t b = 0; b < batch; ++b) {
    total.length = std::max(total.length, plan[b].length);
    total.pairs += plan[b].kept;
  }
  return total;
}

template <class Id, class Mask>
void RemapIndex::write_row(const Id* ids, const Mask* mask, const RowPlan& plan, int64_t width, int64_t student_base,
                           int64_t teacher_base, int64_t pad_id, int64_t* out, int64_t* attention,
                           int32_t* const* pairs) const {
  const uint64_t* packed = packed_.data();
  int32_t* starts = pairs[0];
  int32_t* ends = pairs[1];
  int64_t at = 0, pair = 0, i = 0;
  const bool masked = plan.kept != plan.used;
  const int32_t base = static_cast<int32_t>(student_base);
  const int64_t safe = width - kInline;
  if (!masked) {
    while (i < plan.used) {
      i = put_short_rows(ids, i, plan.used, packed, safe, out, at, starts, base);
      if (i == plan.used) break;
      starts[i] = base + static_cast<int32_t>(at);
      at += put_row(ids[i++], out + at);
    }
    std::iota(pairs[2], pairs[2] + plan.kept, static_cast<int32_t>(teacher_base));
    std::iota(pairs[3], pairs[3] + plan.kept, static_cast<int32_t>(teacher_base + 1));
  } else {
    for (; i < plan.used; ++i) {
      if (mask[i] == 0) continue;
      starts[pair] = base + static_cast<int32_t>(at);
      pairs[2][pair] = static_cast<int32_t>(teacher_base + i);
      pairs[3][pair] = static_cast<int32_t>(teacher_base + i + 1);
      ++pair;
      const uint64_t entry = packed[ids[i]];
      at += (entry & 15) != kLong && at <= safe ? put_short(entry, out + at) : put_row(ids[i], out + at);
    }
  }
  if (plan.kept > 0) {
    std::memcpy(ends, starts + 1, static_cast<size_t>(plan.kept - 1) * sizeof(int32_t));
    ends[plan.kept - 1] = base + static_cast<int32_t>(at);
  }
  std::fill(out + at, out + width, pad_id);
  std::fill(attention, attention + at, 1);
  std::fill(attention + at, attention + width, 0);
}

int64_t RemapIndex::write(const BatchView& ids, const BatchView& mask, int64_t batch, int64_t length,
                          const RowPlan* plan, int64_t student_length, int64_t pad_id, int64_t* input_ids,
                          int64_t* attention_mask, int32_t* pairs, int threads) const {
  std::vector<int64_t> first(static_cast<size_t>(batch) + 1, 0);  // the first pair of each sequence
  for (int64_t b = 0; b < batch; ++b) first[b + 1] = first[b] + plan[b].kept;
  const int64_t total = first[batch];
  std::atomic<int64_t> nonempty{total};
  const int64_t row_bytes = 16 * (student_length + length);  // made in the cache and copied from there
  const bool past = 16 * (batch * student_length + total) > kCache && row_bytes < kCache / 32;
  visit(ids, mask, [&](auto* id, auto* m) {
    parallel_for(batch, threads, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> row(past ? static_cast<size_t>(2 * student_length) : 0);
      std::vector<int32_t> row_spans(past ? static_cast<size_t>(4 * length) : 0);
      for (int64_t b = begin; b < end; ++b) {
        int64_t* const to[2] = {input_ids + b * student_length, attention_mask + b * student_length};
        int32_t *spans[4], *row_pairs[4];
        for (int k = 0; k < 4; ++k) spans[k] = row_pairs[k] = pairs + k * total + first[b];
        for (int k = 0; past && k < 4; ++k) row_pairs[k] = row_spans.data() + k * length;
        int64_t* const ids_row = past ? row.data() : to[0];
        int64_t* const mask_row = past ? row.data() + student_length : to[1];
        write_row(id + b * ids.row_stride, m ? m + b * mask.row_stride : m, plan[b], student_length,
                  b * student_length, b * length, pad_id, ids_row, mask_row, row_pairs);
        if (past) {
          copy_past(to[0], ids_row, student_length);
          copy_past(to[1], mask_row, student_length);
          for (int k = 0; k < 4; ++k) copy_past(spans[k], row_pairs[k], plan[b].kept);
        }
        if (!has_empty_rows_) continue;
        int64_t empty = 0;
        for (int64_t k = 0; k < plan[b].kept; ++k) empty += row_pairs[0][k] == row_pairs[1][k];
        nonempty -= empty;
      }
#if defined(__SSE2__)
      if (past) _mm_sfence();  // such stores are ordered by nothing else
#endif
    });
  });
  return nonempty;
}

}  // namespace vocabdistil
