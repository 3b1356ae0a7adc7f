// Where tokens lie in their text, told by what they stand for. Plain data only: no torch, no Python.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "utf8.h"

namespace vocabdistil {

// Unicode's White_Space.
bool is_space(uint32_t c);

// The beginning of the first character of text[from, to) that is not white space, or `to`; and the end of the last one,
// or `from`. A character that is cut counts as it is in the text.
int64_t ink_start(std::string_view text, int64_t from, int64_t to);
int64_t ink_end(std::string_view text, int64_t from, int64_t to);

// What a tokenizer makes of single characters before its model sees them. It is asked for 256 of them at a time, when
// a text has one that is not a token's own; threads may read while another one adds.
class Folds {
 public:
  static constexpr uint32_t kPage = 256;
  struct Char {
    // Alternatives in UTF-8, tried in order; "" is a character that may be dropped; none: the character itself.
    std::vector<std::string> becomes;
    std::string apart;  // its canonical decomposition, or empty
  };
  using Page = std::array<Char, kPage>;

  Folds() = default;
  ~Folds();
  Folds(const Folds&) = delete;
  Folds& operator=(const Folds&) = delete;

  void add(uint32_t page, Page chars);
  // nullptr: its page is not known yet.
  const Char* find(uint32_t c) const;

 private:
  std::array<std::atomic<const Page*>, 0x110000 / kPage> pages_{};
};

// The text that each token of a vocabulary stands for.
class Surfaces {
 public:
  enum Kind : uint8_t {
    kUnknown,  // stands for text that its string does not tell (UNK, a hole of the vocabulary)
    kText,     // whole characters
    kBytes,    // bytes, maybe parts of characters
  };

  // What the tokenizer does with characters.
  struct Habits {
    // White space that is not itself to the model: "" where it is gone, " " where it becomes a plain space.
    std::vector<std::pair<uint32_t, std::string>> spaces;
    bool bytes = false;          // it spells bytes
    bool folds = false;          // characters may become others
    bool drops_unknown = false;  // what has no token of its own is dropped
    bool whole_words = false;    // an unknown token stands for a whole word, its known characters too
  };

  Surfaces(const std::vector<std::string_view>& surfaces, const std::vector<uint8_t>& kinds, Habits habits);

  bool known(int32_t id) const {
    return static_cast<uint32_t>(id) < kinds_.size() && kinds_[static_cast<uint32_t>(id)] != kUnknown;
  }
  // Of a known token.
  std::string_view surface(int32_t id) const {
    return {bytes_.data() + bounds_[id], static_cast<size_t>(bounds_[id + 1] - bounds_[id])};
  }

  Folds& folds() { return folds_; }

 private:
  friend class Layout;
  enum Space : uint8_t { kItself, kGone, kPlain };
  Space space(uint32_t c) const;  // of white space

  std::string bytes_;
  std::vector<int64_t> bounds_;
  std::vector<uint8_t> kinds_;
  std::vector<bool> chars_;  // those that any token has
  std::vector<bool> own_;    // those that have a token of their own; of byte-level tokens, bytes
  bool byte_level_ = false;
  std::array<Space, 128> ascii_{};
  Habits habits_;
  Folds folds_;
};

// Lays the tokens ids[0...size) out on a text. Each token covers the characters that became what it stands for: the
// bytes of them that it has itself, if they stayed what they are. Of white space it covers only plain spaces that it
// begins with. Characters that were dropped belong to the token right before them, or, after white space, to the next
// one, if there is one.
class Layout {
 public:
  Layout(const Surfaces& surfaces, std::string_view text, const int32_t* ids, int64_t size, int32_t* start,
         int32_t* end)
      : surfaces_(surfaces), text_(text), ids_(ids), size_(size), start_(start), end_(end) {}

  // Without offsets: false unless the tokens spell all of the text, in which case there is one way to lay them out.
  bool spell();

  // With what a tokenizer reports, in bytes: where a token does not fit behind the one before it, goes on at the next
  // one that fits where it is said to be. Those between them get what is reported of them, as far as it can be true;
  // those that share a character get equal spans. False only if characters must be asked for.
  bool spell(const int32_t* reported_start, const int32_t* reported_end);

  // Pages of Folds to be added before the text can be laid out.
  const std::vector<uint32_t>& asked() const { return asked_; }

 private:
  // The part of a character that tokens are still to take.
  struct Rest {
    std::string_view left;
    int64_t from = 0, to = 0;  // the character in the text
    bool exact = false;        // it stayed what it is: `from` is where `left` begins
  };
  struct Place {
    int64_t at;
    Rest rest;
    int64_t run_end, lacking;
  };

  int64_t length() const { return static_cast<int64_t>(text_.size()); }
  Place place() const { return {at_, rest_, run_end_, lacking_}; }
  void go_to(const Place& place);
  void go_to(int64_t at) { go_to(Place{at, {}, at, 0}); }

  const Folds::Char* fold(uint32_t c);
  void ask(uint32_t c);
  int64_t skip_gone(int64_t at) const;
  bool has_none(int64_t at, const Folds::Char& fold) const;
  bool is_droppable(int64_t from, int64_t to);
  int spaces_of(int64_t at);
  bool literal(std::string_view rest) const;
  bool agree(std::string_view became, std::string_view rest, int64_t k) const;
  bool leading_spaces(int64_t k, std::string_view& rest, int64_t& from, int64_t& to);
  bool next_character(std::string_view& rest, int64_t k);
  bool plain_token(int64_t k);
  bool token(int64_t k);
  bool is_unknown(const Char& c, bool& dropped);
  bool spell_unknown(int64_t k, int64_t count);
  bool place_unknown(int64_t k);
  bool goes_on(int64_t k);
  bool unknown(int64_t k, int64_t count);
  int64_t walk(int64_t k);
  int64_t drift(int64_t k) const;
  bool anchor(int64_t k, int64_t shift);
  void put(int64_t k, int64_t from, int64_t to);
  void spread(int64_t first, int64_t last, int64_t from, int64_t to, int64_t shift);
  void share_gaps();

  const Surfaces& surfaces_;
  std::string_view text_;
  const int32_t* ids_;
  int64_t size_;
  int32_t* start_;
  int32_t* end_;
  const int32_t* reported_start_ = nullptr;
  const int32_t* reported_end_ = nullptr;
  int64_t at_ = 0;  // what is laid out, but for rest_
  Rest rest_;
  int64_t run_end_ = 0, lacking_ = 0;  // of the white space at at_: its end, spaces of tokens that it has not
  std::string apart_;
  std::vector<uint32_t> asked_;
};

}  // namespace vocabdistil
