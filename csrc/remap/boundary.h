// The boundary alignment: where each token lies in its text, and the finest common refinement of two tokenizations.
// Plain data only: no torch, no Python. Positions are bytes of the UTF-8 text.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "layout.h"

namespace vocabdistil {

// The tokens of one sequence. A token of the template (CLS, SEP, ...) has start -1 and its kind as its end: two
// tokens of one kind > 0 belong together. A token with start >= end covers nothing. Tokens that share a character
// have overlapping spans, and no boundary lies between them.
struct TokenSpans {
  const int32_t* start;
  const int32_t* end;
  int64_t stride;  // items from one token to the next, in start and in end
  int64_t size;
  int64_t lead, trail;  // template tokens before and after the text
  int32_t limit = std::numeric_limits<int32_t>::max();  // where the first token begins that was cut off at the end
  int32_t floor = 0;                                    // where the last one ends that was cut off at the beginning
};

// Pairs of one text, at most min(teacher.size, student.size): student_start, student_end, teacher_start, teacher_end
// as positions in the sequences plus the two bases. Returns how many. Linear in the number of tokens.
int64_t align_boundaries(const TokenSpans& teacher, const TokenSpans& student, int32_t teacher_base,
                         int32_t student_base, int32_t* const out[4]);

// The pairs of a batch, in order, as they were found: each thread has those of the rows that it read.
struct BatchPairs {
  struct Part {
    int64_t first_row = 0;
    std::vector<int32_t> fields[4];
  };
  std::vector<Part> parts;

  int64_t count() const;
  void write(int32_t* out) const;  // [4, count]
};

// The tokens of row b of the teacher and of the student, valid until the next call.
using RowReader = std::function<std::pair<TokenSpans, TokenSpans>(int64_t b)>;

// Pairs of a batch: row b of the padded [batch, teacher_length] and [batch, student_length] has the bases
// b * teacher_length and b * student_length. Each thread reads with a reader of its own.
BatchPairs align_batch(int64_t batch, int64_t teacher_length, int64_t student_length, int threads,
                       const std::function<RowReader()>& reader);

// For each position of the text and its end: how many bytes before it belong to characters that are not white space.
std::vector<int32_t> ink_before(std::string_view text);

// What the pairs of a batch make of one side.
struct SideCoverage {
  int64_t pairs = 0, singles = 0;  // pairs with both spans non-empty, and with one token on each side
  int64_t tokens = 0, covered = 0, unknown = 0;
  std::vector<std::pair<int64_t, int64_t>> left_out;  // (id, count) of the tokens in no pair, the most frequent first
};

// ids and mask: [size]; start and end: the spans of this side, other_start and other_end: those of the other one.
SideCoverage cover(const int64_t* ids, const int64_t* mask, int64_t size, const int32_t* start, const int32_t* end,
                   const int32_t* other_start, const int32_t* other_end, int64_t count, int64_t unknown_id,
                   size_t examples);

// Character offsets of `text` -> byte offsets, in place: within the text, none ending before it starts.
void chars_to_bytes(std::string_view text, int32_t* start, int32_t* end, int64_t size);

// One side of a batch: token ids and where they lie in the texts.
struct LocatedRow {
  std::vector<int32_t> ids, start, end;
  int64_t lead = 0, trail = 0;
  int32_t limit = std::numeric_limits<int32_t>::max();
  int32_t floor = 0;
};

// A tokenizer's report on one text, template tokens included.
struct Reading {
  std::string_view text;
  std::vector<int32_t> ids;
  std::vector<int32_t> start, end;  // in characters, or empty: the tokens must spell the text
  std::vector<int32_t> words;       // the word of each token, or empty: every token by itself; -1: no word
  std::vector<uint32_t> asked;      // pages of Folds that have to be there first
};

// How the texts of a batch are read.
struct Rules {
  int64_t lead, trail;  // template tokens before and after each text
  // Template token -> kind > 0, the others have kind 0. Of several the first holds before a text, the last after it.
  std::vector<std::pair<int32_t, int32_t>> kinds;
  int64_t max_length;    // < 0: no limit
  bool words_at_spaces;  // the tokens between two white spaces are one word
  bool keep_last = false;  // of what is too long, not the beginning
};

// False, and ids and offsets are as they were, if the tokens do not spell the text and no offsets are given, or if
// characters have to be asked for; else the reading is used up.
bool locate(const Surfaces& surfaces, const Rules& rules, Reading& reading, LocatedRow& row);

}  // namespace vocabdistil
