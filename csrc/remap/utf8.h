// What the remap table and the alignments ask of UTF-8 text.
#pragma once

#include <cstdint>
#include <string_view>

namespace vocabdistil {

inline bool starts_with(std::string_view text, std::string_view prefix) {
  return text.size() >= prefix.size() && text.compare(0, prefix.size(), prefix) == 0;
}

inline bool is_char_start(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }

struct Char {
  uint32_t code;
  int64_t size;  // bytes
};

// The character at text[at], at < text.size(). Bytes that are no UTF-8 are characters of their own.
inline Char char_at(std::string_view text, int64_t at) {
  const auto* s = reinterpret_cast<const unsigned char*>(text.data()) + at;
  const int64_t left = static_cast<int64_t>(text.size()) - at;
  if (s[0] < 0x80) return {s[0], 1};
  if (s[0] < 0xE0 && left >= 2) return {(s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu), 2};
  if (s[0] < 0xF0 && left >= 3) return {(s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu), 3};
  if (left >= 4) return {(s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu), 4};
  return {s[0], 1};
}

// Where the last character of text[0, to) begins, to > 0.
inline int64_t start_of_last(std::string_view text, int64_t to) {
  do --to;
  while (to > 0 && !is_char_start(text[static_cast<size_t>(to)]));
  return to;
}

}  // namespace vocabdistil
