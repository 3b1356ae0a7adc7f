// Where the tokens of one side lie in a text, in bytes. "Ada  É honeysoup" by a WordPiece that lowers and drops accents:
//
//   text    A d a _ _ É É _ h o n e y s o u p     _: white space; É takes two bytes
//   byte    0 1 2 3 4 5 6 7 8 ...      13   17
//
//           [CLS]  ada     e       honey    ##soup   [SEP]    lead = trail = 1
//   spell   -1, 1  [0, 3)  [5, 7)  [8, 13)  [13, 17) -1, 2    e is what the fold of É says; -1 and the kind: template
//   words   -1, 1  [0, 3)  [5, 7)  [8, 17)  [8, 17)  -1, 2    by word every token covers the whole of its word
//   cut     -1, 1  [0, 3)  [5, 7)  [8, 13)           -1, 2    max_length 5: limit = 13, from where on nothing pairs
//
// Where the tokens do not spell the text, and what the tokenizer reports is no help either, locate() says so.
#include <algorithm>

#include "boundary.h"

namespace vocabdistil {
namespace {

// Numbers words: one begins where the text before or after a token's beginning is white space, unless there is
// nothing but white space before it in the word.
void split_at_spaces(std::string_view text, const int32_t* start, const int32_t* end, int64_t size, int32_t* words) {
  int32_t word = 0;
  int64_t before = -1;
  bool blank = true;
  for (int64_t k = 0; k < size; ++k) {
    if (start[k] < end[k]) {
      const int64_t ink = ink_end(text, start[k], end[k]);
      const bool spaced = before >= 0 && (end[before] < start[k] || ink_start(text, start[k], end[k]) > start[k] ||
                                          ink_end(text, start[before], end[before]) < end[before]);
      if (spaced && !blank) ++word, blank = true;
      blank &= ink == start[k];
      before = k;
    }
    words[k] = word;
  }
}

}  // namespace

std::vector<int32_t> ink_before(std::string_view text) {
  const auto size = static_cast<int64_t>(text.size());
  std::vector<int32_t> before(text.size() + 1, 0);
  for (int64_t at = 0; at < size;) {
    const Char c = char_at(text, at);
    const int32_t step = is_space(c.code) ? 0 : 1;
    for (const int64_t next = at + c.size; at < next; ++at) before[at + 1] = before[at] + step;
  }
  return before;
}

void chars_to_bytes(std::string_view text, int32_t* start, int32_t* end, int64_t size) {
  int32_t count = 0;
  for (const char c : text) count += is_char_start(c);
  const auto bytes = static_cast<int32_t>(text.size());
  std::vector<int32_t> byte_of(static_cast<size_t>(count) + 1, bytes);
  int32_t c = 0;
  for (int32_t i = 0; i < bytes; ++i) {
    if (is_char_start(text[i])) byte_of[c++] = i;
  }
  for (int64_t k = 0; k < size; ++k) {
    start[k] = byte_of[std::clamp(start[k], 0, count)];
    end[k] = std::max(start[k], byte_of[std::clamp(end[k], 0, count)]);
  }
}

bool locate(const Surfaces& surfaces, const Rules& rules, Reading& reading, LocatedRow& row) {
  auto total = static_cast<int64_t>(reading.ids.size());
  const int64_t lead = std::min(rules.lead, total);
  const int64_t trail = std::min(rules.trail, total - lead);
  const int64_t size = total - lead - trail;
  const int32_t* ids = reading.ids.data() + lead;
  row.start.assign(static_cast<size_t>(total), -1);
  row.end.assign(static_cast<size_t>(total), 0);
  int32_t* start = row.start.data() + lead;
  int32_t* end = row.end.data() + lead;
  Layout layout(surfaces, reading.text, ids, size, start, end);
  bool found = false;
  if (reading.start.empty() && reading.end.empty()) {
    found = layout.spell();
  } else if (static_cast<int64_t>(reading.start.size()) == total && static_cast<int64_t>(reading.end.size()) == total) {
    std::vector<int32_t> from(reading.start.begin() + lead, reading.start.begin() + lead + size);
    std::vector<int32_t> to(reading.end.begin() + lead, reading.end.begin() + lead + size);
    chars_to_bytes(reading.text, from.data(), to.data(), size);
    found = layout.spell(from.data(), to.data());
  }
  reading.asked = layout.asked();
  if (!found) return false;

  if (rules.words_at_spaces) {
    reading.words.assign(static_cast<size_t>(total), -1);
    split_at_spaces(reading.text, start, end, size, reading.words.data() + lead);
  }
  if (static_cast<int64_t>(reading.words.size()) == total) {
    const int32_t* words = reading.words.data() + lead;
    for (int64_t k = 0; k < size;) {
      int64_t stop = k + 1;
      int32_t from = start[k], to = end[k];
      for (; stop < size && words[k] >= 0 && words[stop] == words[k]; ++stop) {
        if (start[stop] >= end[stop]) continue;
        if (from >= to) from = start[stop];
        to = std::max(to, end[stop]);
      }
      std::fill(start + k, start + stop, from);
      std::fill(end + k, end + stop, to);
      k = stop;
    }
  }

  row.floor = 0;
  row.limit = std::numeric_limits<int32_t>::max();
  if (rules.max_length >= 0 && total > rules.max_length) {
    const int64_t kept = std::max<int64_t>(rules.max_length - lead - trail, 0);
    const int64_t first = rules.keep_last ? 0 : kept, last = rules.keep_last ? size - kept : size;
    for (int64_t k = first; k < last; ++k) {
      if (start[k] >= end[k]) continue;
      if (!rules.keep_last) {
        row.limit = start[k];
        break;
      }
      row.floor = std::max(row.floor, end[k]);
    }
    const auto cut = [&](std::vector<int32_t>& values) {
      values.erase(values.begin() + lead + first, values.begin() + lead + last);
    };
    cut(row.start);
    cut(row.end);
    cut(reading.ids);
    total = lead + kept + trail;
  }
  for (int64_t k = 0; k < total; ++k) {
    if (k == lead) k = total - trail;
    if (k == total) break;
    row.start[k] = -1;
    row.end[k] = 0;
    for (const auto& [id, kind] : rules.kinds) {
      if (id != reading.ids[k]) continue;
      row.end[k] = kind;
      if (k < lead) break;  // one token may open and close: what it does depends on where it stands
    }
  }
  row.ids = std::move(reading.ids);
  row.lead = lead;
  row.trail = trail;
  return true;
}

}  // namespace vocabdistil
