// Which tokens make a word, where the tokens themselves tell. Plain data only: no torch, no Python.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "boundary.h"

namespace vocabdistil {

// A regular expression that byte-level tokenizers cut texts into words with. Those of one style differ in their parts
// for contractions and for digits only; vocabdistil/_words.py has them all.
class WordPattern {
 public:
  enum Style : uint8_t { kGpt2, kCl100k, kQwen35, kO200k };
  // Bits of a character's class, one of which is set; none for characters whose class is not known.
  enum Class : uint8_t {
    kUpper = 1,     // Lu, Lt
    kLower = 2,     // Ll
    kCaseless = 4,  // Lm, Lo
    kMark = 8,
    kNumber = 16,
    kSpace = 32,    // white space but for the next
    kNewline = 64,  // \r, \n
    kOther = 128,
  };

  // contractions: 's, 're and the like are words, or the ends of words; of kGpt2 only in lower case. digits: most
  // digits in a word; of kGpt2 any number. classes: one for each of the first characters of Unicode.
  WordPattern(Style style, bool contractions, int64_t digits, std::string_view classes)
      : style_(style), contractions_(contractions), digits_(digits), classes_(classes) {}

  // Where the words of a text end, ascending, in bytes; together they are the text. False if it is no UTF-8 or has
  // characters whose class is not known.
  bool cut(std::string_view text, std::vector<int64_t>& ends) const;

 private:
  Style style_;
  bool contractions_;
  int64_t digits_;
  std::string classes_;
};

// What a token tells of words: it begins one, continues the one before it, is one by itself, does not tell; spells a
// text together with its neighbours, which the pattern cuts into words.
enum Place : char { kBegins, kContinues, kAlone, kUntold, kSpells };

// The word of each token of a text, -1 for those of the template: ascending from one word to the next. False if the
// tokens do not tell. places: one for each id, others begin words; pattern: null where no token spells.
bool number_words(const Surfaces& surfaces, std::string_view places, const WordPattern* pattern, const Rules& rules,
                  const std::vector<int32_t>& ids, std::vector<int32_t>& words);

}  // namespace vocabdistil
