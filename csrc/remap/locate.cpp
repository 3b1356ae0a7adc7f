#include <algorithm>

#include "boundary.h"
#include "utf8.h"

namespace vocabdistil {
namespace {

// Unicode's White_Space.
bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool space_at(std::string_view text, int64_t at) { return is_space(char_at(text, at).code); }

// Whether all white space is U+0020.
bool spaces_are_plain(std::string_view text) {
  for (int64_t at = 0; at < static_cast<int64_t>(text.size()); at += char_at(text, at).size) {
    if (text[static_cast<size_t>(at)] != ' ' && space_at(text, at)) return false;
  }
  return true;
}

// Whether the bytes are whole characters.
bool whole_characters(std::string_view bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  int64_t at = 0;
  while (at < size) {
    const auto lead = static_cast<unsigned char>(bytes[static_cast<size_t>(at)]);
    const int64_t step = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (!step) return false;
    for (int64_t k = at + 1; k < std::min(at + step, size); ++k) {
      if (is_char_start(bytes[static_cast<size_t>(k)])) return false;
    }
    at += step;
  }
  return at == size;
}

// The end of the last character of text[from, to) that is not white space, or `from`.
int64_t ink_end(std::string_view text, int64_t from, int64_t to) {
  int64_t end = from;
  while (from < to) {
    const Char c = char_at(text, from);
    from += c.size;
    if (!is_space(c.code)) end = std::min(from, to);
  }
  return end;
}

// The beginning of the first character of text[from, to) that is not white space, or `to`.
int64_t ink_start(std::string_view text, int64_t from, int64_t to) {
  while (from < to && space_at(text, from)) from += char_at(text, from).size;
  return std::min(from, to);
}

// Numbers words: one begins where the text before or after a token's beginning is white space, unless there is
// nothing but white space before it in the word.
void split_at_spaces(std::string_view text, const int32_t* start, const int32_t* end, int64_t size, int32_t* words) {
  int32_t word = 0;
  int64_t before = -1;
  bool blank = true;
  for (int64_t k = 0; k < size; ++k) {
    if (start[k] < end[k]) {
      const int64_t ink = ink_end(text, start[k], end[k]);
      const bool spaced = before >= 0 && (end[before] < start[k] || space_at(text, start[k]) ||
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

Folds::Folds(const std::vector<std::pair<uint32_t, std::vector<std::string>>>& folds) : first_(0x10001, 0) {
  uint32_t next = 0;
  for (const auto& [code, alternatives] : folds) {  // ascending
    if (code >= 0x10000) break;
    for (; next <= code; ++next) first_[next] = static_cast<uint32_t>(list_.size());
    list_.insert(list_.end(), alternatives.begin(), alternatives.end());
  }
  for (; next <= 0x10000; ++next) first_[next] = static_cast<uint32_t>(list_.size());
}

Surfaces::Surfaces(const std::vector<std::string_view>& surfaces, const std::vector<uint8_t>& kinds, bool skips,
                   Folds folds, std::string_view mark)
    : bounds_{0}, kinds_(kinds), chars_(0x200000), skips_(skips), marked_(!mark.empty()), folds_(std::move(folds)) {
  kinds_.resize(surfaces.size(), kUnknown);
  bounds_.reserve(surfaces.size() + 1);
  const auto add_chars = [&](std::string_view text) {
    for (int64_t at = 0; at < static_cast<int64_t>(text.size()); at += char_at(text, at).size) {
      chars_[char_at(text, at).code] = true;
    }
  };
  for (const std::string_view surface : surfaces) {
    bytes_.append(surface);
    bounds_.push_back(static_cast<int64_t>(bytes_.size()));
    add_chars(surface);
  }
  add_chars(mark);
}

bool Surfaces::puts_space(std::string_view text, int64_t at, const int32_t* ids, int64_t k) const {
  if (skips_ || k == 0 || !known(ids[k]) || kinds_[ids[k]] != kBytes) return false;
  if (known(ids[k - 1]) && kinds_[ids[k - 1]] == kBytes) return false;
  return starts_with(surface(ids[k]), " ") && !starts_with(text.substr(static_cast<size_t>(at)), " ");
}

bool Surfaces::spell_unknown(std::string_view text, int64_t at, int64_t count, int32_t* start, int32_t* end) const {
  int64_t chars = 0;
  for (auto to = static_cast<int64_t>(text.size()), stop = at; stop < to; ++chars) {
    const Char c = char_at(text, stop);
    if ((skips_ && is_space(c.code)) || chars_[c.code] || folds_.begin(c.code) != folds_.end(c.code)) break;
    const int64_t k = count == 1 ? 0 : chars;
    if (k == count) return false;
    if (k == chars) start[k] = static_cast<int32_t>(stop);
    stop += c.size;
    end[k] = static_cast<int32_t>(stop);
  }
  return count == 1 ? chars > 0 : chars == count;
}

bool Surfaces::spell(std::string_view text, int64_t from, int64_t to, const int32_t* ids, int64_t size, bool inserted,
                     int32_t* start, int32_t* end) const {
  text = text.substr(0, static_cast<size_t>(to));
  int64_t at = from;
  // White space that the model does not know and white space that never reached it look the same.
  const auto is_known = [this](int32_t id) { return known(id); };
  if (skips_ && marked_ && !std::all_of(ids, ids + size, is_known) && !spaces_are_plain(text)) return false;
  std::string_view pending;  // what is left for the next tokens of what the character before `at` has become
  for (int64_t k = 0; k < size; ++k) {
    if (!known(ids[k])) {
      if (!pending.empty() || (k == 0 && inserted)) return false;
      int64_t count = 1;
      while (k + count < size && !known(ids[k + count])) ++count;
      if (skips_) at = ink_start(text, at, to);
      if (!spell_unknown(text, at, count, start + k, end + k)) return false;
      at = end[k + count - 1];
      k += count - 1;
      continue;
    }
    std::string_view rest = surface(ids[k]);
    int64_t begin = -1;
    if (!pending.empty()) {
      const size_t shared = std::min(pending.size(), rest.size());
      if (!starts_with(rest, pending.substr(0, shared))) return false;
      begin = start_of_last(text, at);
      pending.remove_prefix(shared);
      rest.remove_prefix(shared);
    } else if (k == 0 && inserted) {
      if (rest.empty() || rest[0] != ' ') return false;
      rest.remove_prefix(1);
    } else if (puts_space(text, at, ids, k)) {
      rest.remove_prefix(1);
    }
    if (skips_ && !rest.empty() && rest[0] != ' ' && !starts_with(text.substr(at), rest)) at = ink_start(text, at, to);
    if (starts_with(text.substr(at), rest)) {
      start[k] = static_cast<int32_t>(begin < 0 ? at : begin);
      at += static_cast<int64_t>(rest.size());
      end[k] = static_cast<int32_t>(at);
      continue;
    }
    // Parts of characters stand for themselves; whole ones may be what a character of the text has become.
    if (kinds_[ids[k]] == kBytes && (folds_.empty() || !whole_characters(rest))) return false;
    while (!rest.empty()) {
      if (at >= to) return false;
      const Char c = char_at(text, at);
      const Char wanted = char_at(rest, 0);
      size_t taken = 0;
      bool dropped = false;
      if (c.code == wanted.code) {
        taken = static_cast<size_t>(wanted.size);
      } else if (is_space(c.code)) {
        if (rest[0] == ' ' && (skips_ || !folds_.empty())) {
          taken = 1;
        } else if (!skips_) {
          return false;
        }
      } else {
        for (const std::string* fold = folds_.begin(c.code); fold != folds_.end(c.code); ++fold) {
          dropped |= fold->empty();
          if (fold->empty()) continue;
          if (starts_with(rest, *fold)) {
            taken = fold->size();
            break;
          }
          if (k + 1 < size && known(ids[k + 1]) && starts_with(*fold, rest)) {
            const std::string_view left = std::string_view(*fold).substr(rest.size()), next = surface(ids[k + 1]);
            const size_t shared = std::min(left.size(), next.size());
            if (!shared || left.substr(0, shared) != next.substr(0, shared)) continue;
            taken = rest.size();
            pending = left;
            break;
          }
        }
        if (!taken && !dropped) return false;
      }
      if (taken && begin < 0) begin = at;
      at += c.size;
      rest.remove_prefix(taken);
      if (!taken && dropped && begin < 0) {
        // It belongs to the token before it, if there is one.
        if (k > 0 && start[k - 1] < end[k - 1]) {
          end[k - 1] = static_cast<int32_t>(at);
        } else {
          begin = at - c.size;
        }
      }
    }
    start[k] = static_cast<int32_t>(begin < 0 ? at : begin);
    end[k] = static_cast<int32_t>(at);
  }
  if (!pending.empty()) return false;
  while (at < to) {
    const Char c = char_at(text, at);
    const bool dropped =
        std::any_of(folds_.begin(c.code), folds_.end(c.code), [](const std::string& fold) { return fold.empty(); });
    if (is_space(c.code) ? !skips_ : !dropped || size == 0) return false;
    at += c.size;
    if (!is_space(c.code)) end[size - 1] = static_cast<int32_t>(at);
  }
  return true;
}

void Surfaces::refine(std::string_view text, const int32_t* ids, int64_t size, int32_t* start, int32_t* end) const {
  const auto length = static_cast<int32_t>(text.size());
  int32_t seen = 0, last_start = 0;
  for (int64_t k = 0; k < size; ++k) {
    int32_t& s = start[k];
    int32_t& e = end[k];
    s = std::clamp(s, last_start, length);
    e = std::clamp(e, s, length);
    if (known(ids[k])) {
      const std::string_view own = surface(ids[k]);
      if (k > 0 && puts_space(text, end[k - 1], ids, k)) {
        // Trimmed offsets count the space that was put there as a character of the text.
        s = std::clamp(end[k - 1], last_start, length);
        e = std::max(e, s);
      }
      const size_t ink = own.find_first_not_of(" \t\n\r\v\f");
      const bool blank = ink == std::string_view::npos;
      const size_t spaces = blank ? own.size() : ink;
      if (blank && s < e && !space_at(text, s) && k + 1 < size && start[k + 1] < e) {
        e = s;  // a space that was put there: what it seems to cover is the next token's
      } else if (spaces && !(s < e && text[s] == own[0])) {
        // Trimmed offsets: the white space before them is the token's.
        size_t j = spaces;
        while (j > 0 && s > seen && text[s - 1] == own[j - 1]) --s, --j;
      }
    }
    last_start = s;
    seen = std::max(seen, e);
  }

  for (int64_t k = 0; k < size;) {
    if (start[k] >= end[k]) {
      ++k;
      continue;
    }
    const int32_t from = start[k];
    int32_t to = end[k];
    int64_t stop = k + 1;
    while (stop < size && start[stop] < to) to = std::max(to, end[stop++]);
    const int64_t count = stop - k;
    if (count > 1 && !spell(text, from, to, ids + k, count, false, start + k, end + k) &&
        !spell(text, from, to, ids + k, count, true, start + k, end + k)) {
      std::fill(start + k, start + stop, from);
      std::fill(end + k, end + stop, to);
    }
    k = stop;
  }

  int64_t before = -1;  // the last token that covers something
  for (int64_t k = 0; k <= size; ++k) {
    if (k < size && start[k] >= end[k]) continue;
    const int32_t gap = before < 0 ? 0 : end[before];
    const int32_t next = k < size ? start[k] : length;
    if (gap < next) {
      if (before >= 0) {
        const auto grown = static_cast<int32_t>(ink_end(text, gap, next));
        for (int64_t j = before; grown > gap && j >= 0; --j) {
          if (start[j] >= end[j]) continue;
          if (end[j] != gap) break;
          end[j] = grown;
        }
      } else if (k < size) {
        const auto grown = static_cast<int32_t>(ink_start(text, 0, next));
        for (int64_t j = k; grown < next && j < size && start[j] == next; ++j) {
          if (start[j] < end[j]) start[j] = grown;
        }
      }
    }
    before = k;
  }
}

void chars_to_bytes(std::string_view text, int32_t* start, int32_t* end, int64_t size) {
  int32_t count = 0;
  for (const char c : text) count += is_char_start(c);
  const auto bytes = static_cast<int32_t>(text.size());
  if (count == bytes) return;
  std::vector<int32_t> byte_of(static_cast<size_t>(count) + 1, bytes);
  int32_t c = 0;
  for (int32_t i = 0; i < bytes; ++i) {
    if (is_char_start(text[i])) byte_of[c++] = i;
  }
  for (int64_t k = 0; k < size; ++k) {
    start[k] = byte_of[std::clamp(start[k], 0, count)];
    end[k] = byte_of[std::clamp(end[k], 0, count)];
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
  const auto length = static_cast<int64_t>(reading.text.size());
  if (!surfaces.spell(reading.text, 0, length, ids, size, false, start, end) &&
      !surfaces.spell(reading.text, 0, length, ids, size, true, start, end)) {
    if (static_cast<int64_t>(reading.start.size()) != total || static_cast<int64_t>(reading.end.size()) != total) {
      return false;
    }
    std::copy_n(reading.start.data() + lead, size, start);
    std::copy_n(reading.end.data() + lead, size, end);
    chars_to_bytes(reading.text, start, end, size);
    surfaces.refine(reading.text, ids, size, start, end);
  }

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

  row.limit = std::numeric_limits<int32_t>::max();
  if (rules.max_length >= 0 && total > rules.max_length) {
    const int64_t kept = std::max<int64_t>(rules.max_length - lead - trail, 0);
    for (int64_t k = kept; k < size; ++k) {
      if (start[k] >= end[k]) continue;
      row.limit = start[k];
      break;
    }
    const auto cut = [&](std::vector<int32_t>& values) {
      values.erase(values.begin() + lead + kept, values.begin() + lead + size);
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
