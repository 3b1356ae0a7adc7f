// What the remap table and the alignments ask of UTF-8 text.
#pragma once

#include <string_view>

namespace vocabdistil {

inline bool starts_with(std::string_view text, std::string_view prefix) {
  return text.size() >= prefix.size() && text.compare(0, prefix.size(), prefix) == 0;
}

inline bool is_char_start(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }

}  // namespace vocabdistil
