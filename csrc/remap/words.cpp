#include "words.h"

#include <algorithm>

#include "utf8.h"

namespace vocabdistil {
namespace {

constexpr int kLetter = WordPattern::kUpper | WordPattern::kLower | WordPattern::kCaseless;
constexpr int kBlank = WordPattern::kSpace | WordPattern::kNewline;
constexpr int kInk = WordPattern::kMark | WordPattern::kOther;       // [^\s\p{L}\p{N}]
constexpr int kPrefix = WordPattern::kSpace | kInk;                  // [^\r\n\p{L}\p{N}]
constexpr int kNoCase = WordPattern::kCaseless | WordPattern::kMark;
constexpr int kHead = WordPattern::kUpper | kNoCase;                 // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
constexpr int kTail = WordPattern::kLower | kNoCase;                 // [\p{Ll}\p{Lm}\p{Lo}\p{M}]

// The class of each byte's character, and 0 after the last; false if one is not known.
bool classify(std::string_view text, std::string_view classes, std::vector<uint8_t>& kinds) {
  const size_t size = text.size();
  kinds.resize(size + 1);
  kinds[size] = 0;
  for (size_t at = 0; at < size;) {
    const Char c = char_at(text, static_cast<int64_t>(at));
    const uint8_t kind = c.code < classes.size() ? static_cast<uint8_t>(classes[c.code]) : 0;
    if (kind == 0 || !is_char_start(text[at])) return false;
    kinds[at++] = kind;
    for (int64_t k = 1; k < c.size; ++k, ++at) {
      if (is_char_start(text[at])) return false;
      kinds[at] = kind;
    }
  }
  return true;
}

// Finds words of a text, in bytes. Each function takes a place in the text or its end, and gives where the match ends
// that begins there: the same place if there is none.
struct Matcher {
  std::string_view text;
  const uint8_t* kinds;  // [size + 1], the last one 0
  WordPattern::Style style;
  bool contractions;
  int64_t most_digits;

  int64_t size() const { return static_cast<int64_t>(text.size()); }
  char byte(int64_t at) const { return at < size() ? text[static_cast<size_t>(at)] : '\0'; }
  bool is(int64_t at, int classes) const { return (kinds[at] & classes) != 0; }

  int64_t next(int64_t at) const {
    do ++at;
    while (at < size() && !is_char_start(text[static_cast<size_t>(at)]));
    return at;
  }

  int64_t run(int64_t at, int classes) const {
    while (is(at, classes)) ++at;
    return at;
  }

  // 's|'t|'re|'ve|'m|'ll|'d, but for kGpt2 in any case.
  int64_t contraction(int64_t at) const {
    if (!contractions || byte(at) != '\'') return at;
    const bool any_case = style != WordPattern::kGpt2;
    const auto letter = [&](int64_t k) {
      const char c = byte(k);
      return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
    };
    const char first = letter(at + 1), second = letter(at + 2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
    if ((first == 'r' || first == 'v') && second == 'e') return at + 3;
    if (first == 'l' && second == 'l') return at + 3;
    // The long s is another case of s.
    if (any_case && starts_with(text.substr(static_cast<size_t>(at) + 1), "\xC5\xBF")) return at + 3;
    return at;
  }

  // [^\r\n\p{L}\p{N}]?\p{L}+, of kQwen35 [^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+
  int64_t letters(int64_t at) const {
    const int classes = style == WordPattern::kQwen35 ? kLetter | WordPattern::kMark : kLetter;
    const int64_t after = is(at, kPrefix) ? next(at) : at;
    for (const int64_t from : {after, at}) {
      if (is(from, classes)) return run(from, classes);
    }
    return at;
  }

  // [kHead]*[kTail]+
  int64_t head_and_tail(int64_t at) const {
    const int64_t end = run(at, kHead);
    if (is(end, kTail)) return run(end, kTail);
    int64_t back = end;  // to the last character that is both
    while (back > at && !is(back - 1, kNoCase)) --back;
    return back;
  }

  // [^\r\n\p{L}\p{N}]?[kHead]*[kTail]+|[^\r\n\p{L}\p{N}]?[kHead]+[kTail]*
  int64_t cased_letters(int64_t at) const {
    const int64_t after = is(at, kPrefix) ? next(at) : at;
    for (const int64_t from : {after, at}) {
      if (const int64_t end = head_and_tail(from); end > from) return end;
    }
    for (const int64_t from : {after, at}) {
      if (const int64_t end = run(from, kHead); end > from) return end;  // a tail would have been found above
    }
    return at;
  }

  // \p{N}{1,most_digits}
  int64_t digits(int64_t at) const {
    for (int64_t n = 0; n < most_digits && is(at, WordPattern::kNumber); ++n) at = next(at);
    return at;
  }

  // \s+(?!\S)|\s+, before that of all but kGpt2 \s*[\r\n]+
  int64_t blank(int64_t at) const {
    const int64_t end = run(at, kBlank);
    for (int64_t k = end; style != WordPattern::kGpt2 && k > at; --k) {
      if (is(k - 1, WordPattern::kNewline)) return k;
    }
    if (end == at || end == size()) return end;
    const int64_t last = start_of_last(text, end);
    return last > at ? last : end;
  }

  int64_t gpt2(int64_t at) const {
    if (const int64_t end = contraction(at); end > at) return end;
    const int64_t from = at + (byte(at) == ' ');
    for (const int classes : {kLetter, int{WordPattern::kNumber}, kInk}) {
      if (is(from, classes)) return run(from, classes);
    }
    return blank(at);
  }

  int64_t later(int64_t at) const {
    if (style == WordPattern::kO200k) {
      if (const int64_t end = cased_letters(at); end > at) return contraction(end);
    } else {
      if (const int64_t end = contraction(at); end > at) return end;
      if (const int64_t end = letters(at); end > at) return end;
    }
    if (const int64_t end = digits(at); end > at) return end;
    const int ink = style == WordPattern::kQwen35 ? int{WordPattern::kOther} : kInk;
    const int64_t from = at + (byte(at) == ' ');
    if (!is(from, ink)) return blank(at);
    int64_t end = run(from, ink);
    while (is(end, WordPattern::kNewline) || (style == WordPattern::kO200k && byte(end) == '/')) ++end;
    return end;
  }
};

}  // namespace

bool WordPattern::cut(std::string_view text, std::vector<int64_t>& ends) const {
  ends.clear();
  std::vector<uint8_t> kinds;
  if (!classify(text, classes_, kinds)) return false;
  const Matcher matcher{text, kinds.data(), style_, contractions_, digits_};
  for (int64_t at = 0; at < matcher.size(); ends.push_back(at)) {
    const int64_t end = style_ == kGpt2 ? matcher.gpt2(at) : matcher.later(at);
    if (end <= at) return false;
    at = end;
  }
  return true;
}

bool number_words(const Surfaces& surfaces, std::string_view places, const WordPattern* pattern, const Rules& rules,
                  const std::vector<int32_t>& ids, std::vector<int32_t>& words) {
  const size_t lead = std::min(static_cast<size_t>(std::max<int64_t>(rules.lead, 0)), ids.size());
  const size_t stop = ids.size() - std::min(static_cast<size_t>(std::max<int64_t>(rules.trail, 0)), ids.size() - lead);
  words.assign(ids.size(), -1);
  const auto place_of = [&](size_t k) {
    const auto id = static_cast<size_t>(ids[k]);
    return id < places.size() ? static_cast<Place>(places[id]) : kBegins;
  };
  int32_t word = 0;
  bool alone = false;
  std::string spelled;
  std::vector<int64_t> ends;
  for (size_t k = lead; k < stop;) {
    const Place place = place_of(k);
    if (place == kUntold) return false;
    if (place != kSpells) {
      word += alone || place != kContinues;
      alone = place == kAlone;
      words[k++] = word;
      continue;
    }
    // Between two that spell nothing: a text that was cut by itself.
    size_t last = k;
    spelled.clear();
    for (; last < stop && place_of(last) == kSpells; ++last) {
      if (!surfaces.known(ids[last])) return false;
      spelled += surfaces.surface(ids[last]);
    }
    if (!pattern || !pattern->cut(spelled, ends)) return false;
    ++word;
    auto end = ends.begin();
    for (int64_t at = 0; k < last; ++k) {
      if (end != ends.end() && *end == at) ++word, ++end;
      words[k] = word;
      at += static_cast<int64_t>(surfaces.surface(ids[k]).size());
      // No token reaches from one word into the next.
      if (end != ends.end() && *end < at) return false;
    }
    alone = true;
  }
  return true;
}

}  // namespace vocabdistil
