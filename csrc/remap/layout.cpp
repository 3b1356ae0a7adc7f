#include "layout.h"

#include <algorithm>

namespace vocabdistil {
namespace {

constexpr uint32_t kCharacters = 0x110000;
const Folds::Char kItself;

size_t shared_prefix(std::string_view a, std::string_view b) {
  const size_t most = std::min(a.size(), b.size());
  return static_cast<size_t>(std::mismatch(a.begin(), a.begin() + static_cast<int64_t>(most), b.begin()).first -
                             a.begin());
}

// What stands between parts of words in ASCII.
bool is_ascii_punctuation(uint32_t c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

size_t count_spaces(std::string_view surface) { return std::min(surface.find_first_not_of(' '), surface.size()); }

// Where the character begins that has the byte at text[at], at < text.size().
int64_t start_of(std::string_view text, int64_t at) { return start_of_last(text, at + 1); }

}  // namespace

bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

int64_t ink_start(std::string_view text, int64_t from, int64_t to) {
  for (int64_t at = from; at < to;) {
    const int64_t start = start_of(text, at);
    const Char c = char_at(text, start);
    if (!is_space(c.code)) return at;
    at = std::max(at + 1, start + c.size);
  }
  return to;
}

int64_t ink_end(std::string_view text, int64_t from, int64_t to) {
  int64_t end = from;
  for (int64_t at = from; at < to;) {
    const int64_t start = start_of(text, at);
    const Char c = char_at(text, start);
    at = std::max(at + 1, start + c.size);
    if (!is_space(c.code)) end = std::min(at, to);
  }
  return end;
}

Folds::~Folds() {
  for (auto& page : pages_) delete page.load();
}

void Folds::add(uint32_t page, Page chars) {
  if (page >= pages_.size()) return;
  const Page* none = nullptr;
  const auto* added = new Page(std::move(chars));
  if (!pages_[page].compare_exchange_strong(none, added, std::memory_order_acq_rel)) delete added;
}

const Folds::Char* Folds::find(uint32_t c) const {
  if (c >= kCharacters) return &kItself;
  const Page* page = pages_[c / kPage].load(std::memory_order_acquire);
  return page ? &(*page)[c % kPage] : nullptr;
}

Surfaces::Surfaces(const std::vector<std::string_view>& surfaces, const std::vector<uint8_t>& kinds, Habits habits)
    : bounds_{0}, kinds_(kinds), chars_(0x200000), habits_(std::move(habits)) {
  kinds_.resize(surfaces.size(), kUnknown);
  bounds_.reserve(surfaces.size() + 1);
  byte_level_ = habits_.bytes;
  own_.resize(byte_level_ ? 256 : 0x200000);
  for (size_t i = 0; i < surfaces.size(); ++i) {
    const std::string_view surface = surfaces[i];
    bytes_.append(surface);
    bounds_.push_back(static_cast<int64_t>(bytes_.size()));
    if (kinds_[i] == kUnknown) continue;
    const auto size = static_cast<int64_t>(surface.size());
    for (int64_t at = 0; at < size; at += char_at(surface, at).size) chars_[char_at(surface, at).code] = true;
    if (byte_level_ && size == 1) own_[static_cast<uint8_t>(surface[0])] = true;
    if (!byte_level_ && size > 0 && char_at(surface, 0).size == size) own_[char_at(surface, 0).code] = true;
  }
  for (const auto& [code, became] : habits_.spaces) {
    if (code < ascii_.size()) ascii_[code] = became.empty() ? kGone : kPlain;
  }
}

Surfaces::Space Surfaces::space(uint32_t c) const {
  if (c < ascii_.size()) return ascii_[c];
  for (const auto& [code, became] : habits_.spaces) {
    if (code == c) return became.empty() ? kGone : kPlain;
  }
  return kItself;
}

void Layout::go_to(const Place& place) {
  at_ = place.at;
  rest_ = place.rest;
  run_end_ = place.run_end;
  lacking_ = place.lacking;
}

void Layout::ask(uint32_t c) {
  if (std::find(asked_.begin(), asked_.end(), c / Folds::kPage) == asked_.end()) asked_.push_back(c / Folds::kPage);
}

const Folds::Char* Layout::fold(uint32_t c) {
  if (!surfaces_.habits_.folds) return &kItself;
  if (const Folds::Char* known = surfaces_.folds_.find(c)) return known;
  ask(c);
  // What else will be needed, most likely.
  for (int64_t at = at_; at < length();) {
    const Char next = char_at(text_, at);
    at += next.size;
    if (!surfaces_.chars_[next.code] && !is_space(next.code) && !surfaces_.folds_.find(next.code)) ask(next.code);
  }
  return nullptr;
}

int64_t Layout::skip_gone(int64_t at) const {
  while (at < length()) {
    const Char c = char_at(text_, at);
    if (!is_space(c.code) || surfaces_.space(c.code) != Surfaces::kGone) break;
    at += c.size;
  }
  return at;
}

// Whether the model has nothing for the character at text[at], and so drops it.
bool Layout::has_none(int64_t at, const Folds::Char& fold) const {
  if (!surfaces_.habits_.drops_unknown) return false;
  const Char c = char_at(text_, at);
  std::string_view became = text_.substr(static_cast<size_t>(at), static_cast<size_t>(c.size));
  if (!fold.becomes.empty()) became = fold.becomes.front();
  while (!became.empty()) {
    const Char part = char_at(became, 0);
    if (surfaces_.own_[surfaces_.byte_level_ ? static_cast<uint8_t>(became[0]) : part.code]) return false;
    became.remove_prefix(surfaces_.byte_level_ ? 1 : static_cast<size_t>(part.size));
  }
  return true;
}

// Whether text[from, to) is nothing but white space and what may be dropped; false if it has to be asked for, too.
bool Layout::is_droppable(int64_t from, int64_t to) {
  bool dropped = true;
  while (dropped && from < to) {
    const Char c = char_at(text_, from);
    if (!is_space(c.code)) {
      const Folds::Char* found = fold(c.code);
      dropped = found && (has_none(from, *found) ||
                          std::any_of(found->becomes.begin(), found->becomes.end(),
                                      [](const std::string& became) { return became.empty(); }));
    }
    from += c.size;
  }
  return dropped;
}

// Whether the text goes on with it, and no character that may become another one is cut. Of spaces alone, marks may
// have been put before those of the text.
bool Layout::literal(std::string_view rest) const {
  const auto end = static_cast<size_t>(at_) + rest.size();
  if (!rest.empty() && rest.back() == ' ' && !surfaces_.byte_level_) return false;
  return starts_with(text_.substr(static_cast<size_t>(at_)), rest) &&
         (!surfaces_.habits_.folds || end == text_.size() || is_char_start(text_[end]));
}

// Whether what a character became and what tokens are still to spell go together: spaces aside, one is the beginning
// of the other, or goes on with the next token.
bool Layout::agree(std::string_view became, std::string_view rest, int64_t k) const {
  for (;;) {
    const size_t shared = shared_prefix(became, rest);
    became.remove_prefix(shared);
    rest.remove_prefix(shared);
    if (became.empty()) return true;
    if (rest.empty()) {
      if (k + 1 >= size_ || !surfaces_.known(ids_[k + 1])) return false;
      rest = surfaces_.surface(ids_[++k]);
      if (rest.empty()) return false;
    } else if (became[0] == ' ') {
      became.remove_prefix(1);
    } else if (rest[0] == ' ') {
      rest.remove_prefix(1);
    } else {
      return false;
    }
  }
}

// Of the character at text[at] 1: a space to the model; 0: nothing to it; -1: something else.
int Layout::spaces_of(int64_t at) {
  const Char c = char_at(text_, at);
  if (is_space(c.code)) {
    const Surfaces::Space kind = surfaces_.space(c.code);
    return kind == Surfaces::kGone ? 0 : kind == Surfaces::kPlain || c.code == ' ' ? 1 : -1;
  }
  const Folds::Char* found = fold(c.code);
  if (!found) return -1;
  if (has_none(at, *found)) return 0;
  if (found->becomes.empty()) return -1;
  return found->becomes.front() == " " ? 1 : found->becomes.front().empty() ? 0 : -1;
}

// Takes the spaces that token k begins with: those of a run of white space are the last ones of it.
bool Layout::leading_spaces(int64_t k, std::string_view& rest, int64_t& from, int64_t& to) {
  if (at_ >= run_end_) {
    int64_t spaces = 0, end = at_;
    while (end < length()) {
      const int more = spaces_of(end);
      if (!asked_.empty()) return false;
      if (more < 0) break;
      spaces += more;
      end += char_at(text_, end).size;
    }
    if (!spaces) {  // they were put there
      rest.remove_prefix(count_spaces(rest));
      return true;
    }
    int64_t wanted = 0;
    for (int64_t j = k; j < size_ && surfaces_.known(ids_[j]); ++j) {
      const std::string_view surface = surfaces_.surface(ids_[j]);
      const size_t count = count_spaces(surface);
      wanted += static_cast<int64_t>(count);
      if (count < surface.size()) break;
    }
    run_end_ = end;
    lacking_ = std::max<int64_t>(wanted - spaces, 0);
    for (int64_t skipped = spaces - wanted; skipped > 0;) {
      skipped -= spaces_of(at_);
      at_ += char_at(text_, at_).size;
    }
  }
  for (; !rest.empty() && rest[0] == ' '; rest.remove_prefix(1)) {
    if (lacking_ > 0) {
      --lacking_;
      continue;
    }
    for (bool taken = false; !taken && at_ < run_end_;) {
      const Char c = char_at(text_, at_);
      taken = spaces_of(at_) > 0;
      at_ += c.size;
      if (!taken || (is_space(c.code) && c.code != ' ')) continue;
      if (from < 0) from = at_ - c.size;
      to = at_;
    }
  }
  return true;
}

// Finds the next character that stands for the beginning of `rest`, and passes over what stands for nothing.
bool Layout::next_character(std::string_view& rest, int64_t k) {
  while (at_ < length()) {
    const Char c = char_at(text_, at_);
    const std::string_view bytes = text_.substr(static_cast<size_t>(at_), static_cast<size_t>(c.size));
    const auto take = [&](std::string_view became) {
      rest_ = {became, at_, at_ + c.size, became.data() == bytes.data()};
      at_ += c.size;
      return true;
    };
    if (starts_with(rest, bytes)) return take(bytes);
    if (is_space(c.code)) {
      const Surfaces::Space kind = surfaces_.space(c.code);
      if (kind == Surfaces::kItself) return starts_with(bytes, rest) && take(bytes);
      if (kind == Surfaces::kPlain && rest[0] == ' ') return take(" ");
      at_ += c.size;
      continue;
    }
    const Folds::Char* found = fold(c.code);
    if (!found) return false;
    bool dropped = false;
    for (const std::string& became : found->becomes) {
      dropped |= became.empty();
      if (!became.empty() && agree(became, rest, k)) return take(became == bytes ? bytes : std::string_view(became));
    }
    if (found->becomes.empty() && starts_with(bytes, rest)) return take(bytes);
    const Char wanted = char_at(rest, 0);
    if (surfaces_.habits_.folds && wanted.code >= 0x80) {
      const Folds::Char* composed = fold(wanted.code);
      if (!composed) return false;
      const std::string_view first = found->becomes.empty() ? bytes : std::string_view(found->becomes.front());
      if (!first.empty() && starts_with(composed->apart, first)) {
        std::string apart = composed->apart;
        apart.append(rest.substr(static_cast<size_t>(wanted.size)));
        apart_.swap(apart);
        rest = apart_;
        return take(first);
      }
    }
    if (!dropped && !has_none(at_, *found)) {
      if (!surfaces_.habits_.drops_unknown || !surfaces_.byte_level_) return false;
      // Some of its bytes.
      std::string_view left = bytes;
      while (!surfaces_.own_[static_cast<uint8_t>(left[0])]) left.remove_prefix(1);
      if (left.size() == bytes.size() || !(starts_with(left, rest) || starts_with(rest, left))) return false;
      rest_ = {left, at_ + static_cast<int64_t>(bytes.size() - left.size()), at_ + c.size, true};
      at_ += c.size;
      return true;
    }
    at_ += c.size;
  }
  return false;
}

// Whether token k is what the text goes on with: mostly it is.
bool Layout::plain_token(int64_t k) {
  if (!rest_.left.empty()) return false;
  const std::string_view rest = surfaces_.surface(ids_[k]);
  if (!literal(rest)) {
    at_ = skip_gone(at_);
    if (!literal(rest)) return false;
  }
  start_[k] = static_cast<int32_t>(at_);
  at_ += static_cast<int64_t>(rest.size());
  end_[k] = static_cast<int32_t>(at_);
  return true;
}

bool Layout::token(int64_t k) {
  if (plain_token(k)) return true;
  std::string_view rest = surfaces_.surface(ids_[k]);
  int64_t from = -1, to = -1;
  if (rest_.left.empty() && !rest.empty() && rest[0] == ' ' && !leading_spaces(k, rest, from, to)) return false;
  while (!rest.empty()) {
    if (rest_.left.empty() && !next_character(rest, k)) {
      if (!asked_.empty() || count_spaces(rest) < rest.size()) return false;
      break;  // spaces that were put there
    }
    const size_t shared = shared_prefix(rest, rest_.left);
    if (shared) {
      if (rest_.exact || !is_space(char_at(text_, rest_.from).code)) {
        if (from < 0) from = rest_.from;
        to = rest_.exact ? rest_.from + static_cast<int64_t>(shared) : rest_.to;
      }
    } else if (rest_.left[0] == ' ' && !rest_.exact) {
      rest_.left.remove_prefix(1);
      continue;
    } else if (rest[0] == ' ') {
      rest.remove_prefix(1);
      continue;
    } else if (surfaces_.habits_.drops_unknown) {
      const Char c = char_at(rest_.left, 0);
      const size_t size = surfaces_.byte_level_ ? 1 : static_cast<size_t>(c.size);
      if (surfaces_.byte_level_ ? surfaces_.own_[static_cast<uint8_t>(rest_.left[0])] : surfaces_.own_[c.code]) {
        return false;
      }
      rest_.left.remove_prefix(size);
      if (rest_.exact) rest_.from += static_cast<int64_t>(size);
      continue;
    } else {
      return false;
    }
    rest.remove_prefix(shared);
    rest_.left.remove_prefix(shared);
    if (rest_.exact) rest_.from += static_cast<int64_t>(shared);
  }
  start_[k] = static_cast<int32_t>(from < 0 ? at_ : from);
  end_[k] = static_cast<int32_t>(from < 0 ? at_ : to);
  return true;
}

// Whether no token has any of what the character became; `dropped`: whether that may be nothing.
bool Layout::is_unknown(const Char& c, bool& dropped) {
  if (is_space(c.code)) return surfaces_.space(c.code) == Surfaces::kItself && !surfaces_.chars_[c.code];
  const Folds::Char* found = fold(c.code);
  if (!found) return false;
  if (found->becomes.empty()) return !surfaces_.chars_[c.code];
  bool unknown = false;
  for (const std::string& became : found->becomes) {
    dropped |= became.empty();
    for (int64_t at = 0; at < static_cast<int64_t>(became.size()); at += char_at(became, at).size) {
      if (surfaces_.chars_[char_at(became, at).code]) return false;
      unknown = true;
    }
  }
  return unknown;
}

// Sets the span of token k, without white space around it.
void Layout::put(int64_t k, int64_t from, int64_t to) {
  const int64_t start = ink_start(text_, from, to);
  start_[k] = static_cast<int32_t>(start);
  end_[k] = static_cast<int32_t>(std::max(start, ink_end(text_, start, to)));
}

// Lays `count` unknown tokens in a row out: one over all characters there that no token has, or one on each.
bool Layout::spell_unknown(int64_t k, int64_t count) {
  int64_t at = at_, first = -1, last = -1, chars = 0;
  bool apart = false;
  while (at < length()) {
    const Char c = char_at(text_, at);
    const bool blank = is_space(c.code) && surfaces_.space(c.code) != Surfaces::kItself;
    bool dropped = false;
    const bool unknown = is_unknown(c, dropped);
    if (!asked_.empty()) return false;
    at += c.size;
    if (!unknown) {
      apart |= blank && chars > 0;
      if (dropped || (blank && (chars == 0 || surfaces_.space(c.code) == Surfaces::kGone))) continue;
      break;
    }
    if (apart) return false;  // white space that is gone tells no tokens apart
    if (first < 0) first = at - c.size;
    last = at;
    if (count > 1) {
      if (chars == count) return false;
      put(k + chars, at - c.size, at);
    }
    ++chars;
  }
  if (count == 1 ? chars == 0 : chars != count) return false;
  if (surfaces_.habits_.whole_words && last < length()) {
    const Char next = char_at(text_, last);
    if (!is_space(next.code) && !is_ascii_punctuation(next.code)) return false;
  }
  if (count == 1) put(k, first, last);
  at_ = last;
  return true;
}

// Puts an unknown token where it is said to be, if there is nothing that should be a token's before it.
bool Layout::place_unknown(int64_t k) {
  for (const int64_t shift : {drift(k), int64_t{0}}) {
    const int64_t from = reported_start_[k] + shift, to = reported_end_[k] + shift;
    if (from < at_ || from >= to || to > length() || !is_droppable(at_, from)) {
      if (!asked_.empty()) return false;
      continue;
    }
    put(k, from, to);
    at_ = to;
    // A character that was composed with it is not reported.
    const std::string_view next =
        k + 1 < size_ && surfaces_.known(ids_[k + 1]) ? surfaces_.surface(ids_[k + 1]) : std::string_view();
    while (at_ < length()) {
      const int64_t size = char_at(text_, at_).size;
      const std::string_view bytes = text_.substr(static_cast<size_t>(at_), static_cast<size_t>(size));
      if (is_space(char_at(bytes, 0).code) || starts_with(next, bytes) || !is_droppable(at_, at_ + size)) break;
      at_ += size;
    }
    return asked_.empty();
  }
  return false;
}

// Whether token k fits next; after the last one, whether nothing is left.
bool Layout::goes_on(int64_t k) {
  if (k == size_) return is_droppable(at_, length());
  const Place before = place();
  const bool fits = token(k);
  go_to(before);
  return fits;
}

bool Layout::unknown(int64_t k, int64_t count) {
  if (!rest_.left.empty()) return false;
  const Place before = place();
  if (spell_unknown(k, count) && (!reported_start_ || goes_on(k + count))) return true;
  go_to(before);
  if (!reported_start_ || !asked_.empty()) return false;
  int64_t j = k;
  while (j < k + count && place_unknown(j)) ++j;
  if (j < k + count) go_to(before);
  return j == k + count;
}

// The first token from k on that does not fit; the text is laid out up to it.
int64_t Layout::walk(int64_t k) {
  while (k < size_) {
    int64_t count = 1;
    const bool known = surfaces_.known(ids_[k]);
    bool fits = known && plain_token(k);
    if (fits) {
      ++k;
      continue;
    }
    const Place before = place();
    if (known) {
      fits = token(k);
    } else {
      while (k + count < size_ && !surfaces_.known(ids_[k + count])) ++count;
      fits = unknown(k, count);
    }
    if (!fits) {
      go_to(before);
      return k;
    }
    k += count;
  }
  return k;
}

bool Layout::spell() {
  go_to(0);
  if (walk(0) < size_ || !rest_.left.empty() || !is_droppable(at_, length())) return false;
  share_gaps();
  return true;
}

// How far the tokens before k lie from where they are said to be: some normalizers lose count.
int64_t Layout::drift(int64_t k) const {
  for (int64_t j = k - 1; j >= std::max<int64_t>(k - 8, 0); --j) {
    if (start_[j] >= end_[j] || reported_start_[j] >= reported_end_[j] || !surfaces_.known(ids_[j])) continue;
    const std::string_view surface = surfaces_.surface(ids_[j]);
    const int64_t start = ink_start(text_, start_[j], end_[j]);
    const int64_t reported = ink_start(text_, reported_start_[j], reported_end_[j]);
    // Of parts of characters whole ones are reported.
    const bool whole = end_[j] - start == reported_end_[j] - reported;
    if (count_spaces(surface) < surface.size() && start < end_[j] && whole) return start - reported;
  }
  return 0;
}

// Whether token k fits where it is said to be: then it is put there, with the plain spaces before it that it begins
// with, and the text is laid out up to its end.
bool Layout::anchor(int64_t k, int64_t shift) {
  const std::string_view surface = surfaces_.known(ids_[k]) ? surfaces_.surface(ids_[k]) : std::string_view();
  const size_t spaces = count_spaces(surface);
  if (spaces == surface.size() || !is_char_start(surface[spaces])) return false;
  const int64_t reported = std::clamp<int64_t>(reported_start_[k] + shift, 0, length());
  int64_t at = reported;
  if (is_space(char_at(surface, static_cast<int64_t>(spaces)).code)) {
    while (at < length() && text_[static_cast<size_t>(at)] == ' ') ++at;
  } else {
    at = ink_start(text_, reported, length());
  }
  if (at < at_ || at >= length()) return false;
  const Folds::Char* first = fold(char_at(text_, at).code);
  if (!first || (!first->becomes.empty() && first->becomes.front().empty())) return false;
  const Place before = place();
  go_to(at);
  if (token(k) && start_[k] == at && (rest_.left.empty() || rest_.exact)) {
    for (size_t n = spaces; n > 0 && start_[k] > before.at && text_[static_cast<size_t>(start_[k]) - 1] == ' '; --n) {
      --start_[k];
    }
    return true;
  }
  go_to(before);
  return false;
}

// Lays tokens [first, last) out on text[from, to) by what is reported of them.
void Layout::spread(int64_t first, int64_t last, int64_t from, int64_t to, int64_t shift) {
  int64_t before = from;
  for (int64_t k = first; k < last; ++k) {
    for (const int64_t by : {shift, int64_t{0}}) {
      const int64_t start = std::clamp(reported_start_[k] + by, before, to);
      put(k, start, std::clamp(reported_end_[k] + by, start, to));
      if (start_[k] < end_[k]) break;
    }
    if (reported_start_[k] < reported_end_[k] && surfaces_.known(ids_[k])) {
      const int64_t least = k > first ? std::max<int64_t>(from, end_[k - 1]) : from;
      const std::string_view surface = surfaces_.surface(ids_[k]);
      const size_t spaces = count_spaces(surface);
      for (size_t n = start_[k] < end_[k] || spaces == surface.size() ? spaces : 0; n > 0; --n) {
        if (start_[k] <= least || text_[static_cast<size_t>(start_[k]) - 1] != ' ') break;
        --start_[k];
      }
    }
    before = std::max<int64_t>(before, start_[k]);
  }
  for (int64_t k = first; k < last;) {
    int64_t stop = k + 1;
    int32_t end = end_[k];
    while (stop < last && start_[stop] < end) end = std::max(end, end_[stop++]);
    if (start_[k] < end) {
      for (int64_t j = k + 1; j < stop; ++j) start_[j] = start_[k];
      std::fill(end_ + k, end_ + stop, end);
    }
    k = stop;
  }
}

// Text between tokens that is no white space goes to the token right before it, and after white space to the next one,
// if there is one.
void Layout::share_gaps() {
  int64_t before = -1, covered = 0;  // the last token that covers something, and where it ends
  for (int64_t k = 0; k <= size_; ++k) {
    if (k < size_ && start_[k] >= end_[k]) continue;
    const int64_t next = k < size_ ? start_[k] : length();
    if (covered < next) {
      int64_t gap = covered;
      if (before >= 0) {
        while (gap < next && !is_space(char_at(text_, gap).code)) gap += char_at(text_, gap).size;
        gap = std::min(gap, next);
        for (int64_t j = before; j >= 0 && gap > covered; --j) {
          if (start_[j] >= end_[j]) continue;
          if (end_[j] != covered) break;
          end_[j] = static_cast<int32_t>(gap);
        }
      }
      const int64_t ink = ink_start(text_, gap, next);
      for (int64_t j = k; j < size_ && ink < next && (start_[j] == next || start_[j] >= end_[j]); ++j) {
        if (start_[j] < end_[j]) start_[j] = static_cast<int32_t>(ink);
      }
    }
    if (k < size_) covered = std::max<int64_t>(covered, end_[k]);
    before = k;
  }
}

bool Layout::spell(const int32_t* reported_start, const int32_t* reported_end) {
  reported_start_ = reported_start;
  reported_end_ = reported_end;
  go_to(0);
  for (int64_t k = walk(0); k < size_; k = walk(k)) {
    if (!asked_.empty()) return false;
    const int64_t from = rest_.left.empty() ? at_ : start_of_last(text_, at_);
    const int64_t shift = drift(k);
    int64_t found = k, used = shift;
    for (bool fits = false; found < size_ && !fits; found += !fits) {
      fits = anchor(found, shift);
      if (!fits && shift) fits = anchor(found, used = 0);
      if (!asked_.empty()) return false;
      if (!fits) used = shift;
    }
    spread(k, found, from, found < size_ ? start_[found] : length(), used);
    if (found == size_) break;
    k = found + 1;
  }
  if (!asked_.empty()) return false;
  share_gaps();
  return true;
}

}  // namespace vocabdistil
