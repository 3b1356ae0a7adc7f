// Feeds csrc/remap with random tables, ids, masks, offsets, vocabularies and texts, valid and not, for the given
// seconds; meant to be built with the address and undefined behaviour sanitizers. Checks what must hold of the results.
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzz.h"
#include "remap/boundary.h"
#include "remap/remap.h"
#include "remap/words.h"

using namespace vocabdistil;

namespace {

// Mostly within [0, size), sometimes far outside.
int64_t some_id(int64_t size) {
  switch (pick(0, 60)) {
    case 0: return -1;
    case 1: return size;
    case 2: return std::numeric_limits<int64_t>::max();
    case 3: return std::numeric_limits<int64_t>::min();
    default: return size > 0 ? pick(0, size - 1) : 0;
  }
}

std::string some_text(int64_t longest, bool valid) {
  static const std::vector<std::string> chars = {"a", "b", "B", " ", "  ", "\n", "é", "e\xCC\x81", "語", "😀", "▁",
                                                 "#", "\xE2\x80\x8D", "ﬁ", "\xC2\xA0", "İ", std::string(1, '\0'),
                                                 "'", "S", "ſ", "e", "L", "7", "/", "\r"};
  std::string text;
  for (int64_t n = pick(0, longest); n > 0; --n) {
    if (!valid && pick(0, 9) == 0) {
      text.push_back(static_cast<char>(pick(0, 255)));
    } else {
      text += chars[static_cast<size_t>(pick(0, static_cast<int64_t>(chars.size()) - 1))];
    }
  }
  return text;
}

void check_pairs(const int32_t* const* pairs, int64_t count) {
  for (int side = 0; side < 4; side += 2) {
    for (int64_t p = 0; p < count; ++p) {
      require(pairs[side][p] <= pairs[side + 1][p], "a span does not end before it starts");
      require(p == 0 || pairs[side + 1][p - 1] <= pairs[side][p], "spans are ascending and disjoint");
    }
  }
}

void fuzz_table() {
  const int64_t student_size = pick(1, 2) == 1 ? pick(1, 50) : (int64_t{1} << pick(19, 30));
  Csr csr;
  const int64_t rows = pick(0, 20);
  csr.indptr.push_back(pick(0, 50) == 0 ? 1 : 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = pick(0, 60) == 0 ? pick(0, 70000) : pick(0, 5); n > 0; --n) {
      csr.ids.push_back(static_cast<int32_t>(pick(0, 2000000) == 0 ? -1 : pick(0, student_size - 1)));
    }
    csr.indptr.push_back(static_cast<int32_t>(csr.ids.size()) + (pick(0, 200) == 0 ? 1 : 0));
  }
  try {
    const RemapIndex index(csr, student_size);
    const int64_t batch = pick(0, 4), length = pick(0, 30), stride = length + pick(0, 3);
    std::vector<int64_t> ids(static_cast<size_t>(batch * stride));
    for (auto& id : ids) id = pick(0, 20) && rows ? pick(0, rows - 1) : some_id(rows);
    std::vector<int32_t> narrow(ids.begin(), ids.end());
    std::vector<int8_t> mask(static_cast<size_t>(batch * stride));
    for (auto& m : mask) m = static_cast<int8_t>(pick(0, 3) ? 1 : 0);
    const BatchView id_view = pick(0, 1) ? BatchView{ids.data(), 8, stride} : BatchView{narrow.data(), 4, stride};
    const BatchView mask_view = pick(0, 1) ? BatchView{mask.data(), 1, stride} : BatchView{nullptr, 8, 0};
    std::vector<RowPlan> plan(static_cast<size_t>(batch));
    const int threads = static_cast<int>(pick(1, 3));
    const BatchPlan total =
        index.plan(id_view, mask_view, batch, length, pick(-1, 40), plan.data(), threads);
    if (total.bad_row >= 0) return;
    std::vector<int64_t> out(static_cast<size_t>(batch * total.length)), attention(out.size());
    std::vector<int32_t> pairs(static_cast<size_t>(4 * total.pairs));
    index.write(id_view, mask_view, batch, length, plan.data(), total.length, 0, out.data(), attention.data(),
                pairs.data(), threads);
    const int32_t* sides[4];
    for (int k = 0; k < 4; ++k) sides[k] = pairs.data() + k * total.pairs;
    check_pairs(sides, total.pairs);
    for (const int64_t id : out) require(id >= 0 && id < student_size, "remapped ids are the student's");
  } catch (const std::invalid_argument&) {
  }
}

void fuzz_rows() {
  std::vector<std::string> words[2];
  std::vector<std::string_view> views[2];
  for (int side = 0; side < 2; ++side) {
    for (int64_t n = pick(0, 20); n > 0; --n) words[side].push_back((pick(0, 1) ? "##" : "") + some_text(6, false));
    for (const auto& word : words[side]) views[side].push_back(pick(0, 20) ? std::string_view(word) : std::string_view());
  }
  const Csr csr = build_rows(views[0], views[1], {pick(0, 4) ? "##" : "", pick(0, 4) ? "##" : "", pick(0, 8), 0}, {});
  require(csr.indptr.size() == views[0].size() + 1, "one row per token");
}

void fuzz_match() {
  const int64_t batch = pick(0, 3), lengths[2] = {pick(0, 20), pick(0, 20)};
  const int64_t matched = pick(0, 6);
  std::vector<int64_t> ids[2];
  std::vector<uint8_t> masks[2];
  std::vector<int32_t> slots[2];
  for (int side = 0; side < 2; ++side) {
    slots[side].assign(static_cast<size_t>(pick(0, 10)), -1);
    for (auto& slot : slots[side]) slot = static_cast<int32_t>(pick(-1, matched - 1));
    for (int64_t n = batch * lengths[side]; n > 0; --n) {
      ids[side].push_back(some_id(static_cast<int64_t>(slots[side].size())));
      masks[side].push_back(static_cast<uint8_t>(pick(0, 3) > 0));
    }
  }
  std::vector<int32_t> found(static_cast<size_t>(2 * batch * std::min(lengths[0], lengths[1])));
  std::vector<int64_t> counts(static_cast<size_t>(batch));
  const MatchArgs args{ids[0].data(), ids[1].data(), pick(0, 1) ? masks[0].data() : nullptr,
                       pick(0, 1) ? masks[1].data() : nullptr, batch, lengths[0], lengths[1], slots[0].data(),
                       slots[1].data(), static_cast<int64_t>(slots[0].size()), static_cast<int64_t>(slots[1].size()),
                       matched, found.data(), counts.data(), static_cast<int>(pick(1, 3))};
  const int64_t count = match_plan(args);
  std::vector<int32_t> pairs(static_cast<size_t>(4 * count));
  match_write(args, pairs.data());
  const int32_t* sides[4];
  for (int k = 0; k < 4; ++k) sides[k] = pairs.data() + k * count;
  check_pairs(sides, count);
}

// Offsets in any order, of any size.
void fuzz_boundaries() {
  const int64_t batch = pick(0, 3), lengths[2] = {pick(0, 15), pick(0, 15)};
  const bool sane = pick(0, 3) > 0;
  std::vector<int32_t> offsets[2];
  std::vector<TokenSpans> rows[2];
  for (int side = 0; side < 2; ++side) {
    for (int64_t b = 0; b < batch; ++b) {
      int32_t at = 0;
      for (int64_t k = 0; k < lengths[side]; ++k) {
        const auto start = static_cast<int32_t>(sane ? at + pick(0, 1) : some_id(30));
        at = static_cast<int32_t>(sane ? start + pick(0, 4) : some_id(30));
        offsets[side].insert(offsets[side].end(), {start, at});
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      const int32_t* row = offsets[side].data() + 2 * b * lengths[side];
      rows[side].push_back({row, row + 1, 2, lengths[side], pick(0, 3), pick(0, 3),
                            static_cast<int32_t>(pick(0, 60)), static_cast<int32_t>(pick(0, 1) * pick(0, 30))});
    }
  }
  const BatchPairs aligned = align_batch(static_cast<int64_t>(rows[0].size()), lengths[0], lengths[1],
                                       static_cast<int>(pick(1, 3)), [&]() -> RowReader {
                                         return [&](int64_t b) { return std::pair(rows[0][b], rows[1][b]); };
                                       });
  std::vector<int32_t> pairs(static_cast<size_t>(4 * aligned.count()));
  aligned.write(pairs.data());
  const auto count = static_cast<int64_t>(pairs.size() / 4);
  const int32_t* sides[4];
  for (int k = 0; k < 4; ++k) sides[k] = pairs.data() + k * count;
  check_pairs(sides, count);
  std::vector<int64_t> ids(static_cast<size_t>(batch * lengths[0])), mask(ids);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = pick(0, 5), mask[i] = pick(0, 2);
  const SideCoverage found = cover(ids.data(), mask.data(), static_cast<int64_t>(ids.size()), sides[2], sides[3],
                                   sides[0], sides[1], count, 3, 4);
  require(found.pairs == count && found.covered <= found.tokens && found.left_out.size() <= 4, "coverage counts");
  for (int64_t p = 0; p < count; ++p) {
    require(sides[0][p] >= 0 && sides[1][p] <= batch * lengths[1], "student spans are within the batch");
    require(sides[2][p] >= 0 && sides[3][p] <= batch * lengths[0], "teacher spans are within the batch");
  }
}

Folds::Page some_folds(uint32_t page) {
  const std::pair<uint32_t, Folds::Char> known[] = {
      {'B', {{"b"}, ""}},           {0xE9, {{"e"}, "e\xCC\x81"}}, {0x130, {{"i\xCC\x87", "i"}, ""}},
      {0x301, {{"\xCC\x81", ""}, ""}}, {0xFB01, {{"fi"}, ""}},      {'_', {{" "}, ""}},
      {0x200B, {{""}, ""}},         {0xB4, {{" \xCC\x81"}, ""}}};
  Folds::Page chars;
  for (const auto& [code, becomes] : known) {
    if (code / Folds::kPage == page && pick(0, 3)) chars[code % Folds::kPage] = becomes;
  }
  return chars;
}

void fuzz_locate() {
  std::vector<std::string> tokens;
  std::vector<uint8_t> kinds;
  for (int64_t n = pick(1, 12); n > 0; --n) {
    kinds.push_back(static_cast<uint8_t>(pick(0, 2)));
    tokens.push_back(some_text(3, kinds.back() != Surfaces::kBytes));
  }
  const std::vector<std::string_view> views(tokens.begin(), tokens.end());
  const Surfaces::Habits habits{
      pick(0, 1) ? std::vector<std::pair<uint32_t, std::string>>{{' ', pick(0, 1) ? "" : " "}, {'\n', " "}, {0x3000, ""}}
                 : std::vector<std::pair<uint32_t, std::string>>{},
      pick(0, 2) == 0, pick(0, 1) == 1, pick(0, 2) == 0, pick(0, 2) == 0};
  Surfaces surfaces(views, kinds, habits);
  Reading reading;
  std::string text;
  const bool spelled = pick(0, 1) == 1;
  for (int64_t n = pick(0, 12); n > 0; --n) {
    const int64_t id = pick(0, 30) ? pick(0, static_cast<int64_t>(tokens.size()) - 1) : some_id(20);
    reading.ids.push_back(static_cast<int32_t>(id));
    if (spelled && id >= 0 && id < static_cast<int64_t>(tokens.size())) text += tokens[static_cast<size_t>(id)];
  }
  if (!spelled) text = some_text(12, pick(0, 3) > 0);
  reading.text = text;
  const size_t size = reading.ids.size();
  if (pick(0, 3)) {
    for (size_t k = 0; k < size; ++k) {
      reading.start.push_back(static_cast<int32_t>(pick(0, 9) ? static_cast<int64_t>(k) + pick(-1, 1) : some_id(20)));
      reading.end.push_back(static_cast<int32_t>(pick(0, 9) ? reading.start.back() + pick(0, 3) : some_id(20)));
    }
  }
  if (pick(0, 2) == 0) {
    for (size_t k = 0; k < size; ++k) reading.words.push_back(static_cast<int32_t>(pick(-1, 3)));
  }
  const Rules rules{pick(0, 2), pick(0, 2), {{0, 1}, {1, 2}}, pick(-1, 12), pick(0, 2) == 0, pick(0, 1) == 1};
  LocatedRow row;
  while (!locate(surfaces, rules, reading, row)) {
    require(reading.ids.size() == size, "what was not found can be read again");
    if (reading.asked.empty()) return;
    for (const uint32_t page : reading.asked) surfaces.folds().add(page, some_folds(page));
    reading.asked.clear();
  }
  require(row.floor >= 0 && row.floor <= static_cast<int32_t>(text.size()), "what was cut off lies in the text");
  require(row.ids.size() == row.start.size() && row.ids.size() == row.end.size(), "one span per token");
  for (size_t k = 0; k < row.ids.size(); ++k) {
    if (row.start[k] < 0) continue;
    require(row.start[k] <= row.end[k], "a token does not end before it starts");
    require(row.end[k] <= static_cast<int32_t>(text.size()), "tokens lie within their text");
  }
}

// Classes of characters as they are, at random, or of a few characters only.
std::string some_classes() {
  std::string classes(static_cast<size_t>(pick(0, 3) ? 0x20000 : pick(0, 0x200)), '\0');
  const bool any = pick(0, 3) == 0;
  for (size_t c = 0; c < classes.size(); ++c) {
    const bool upper = c >= 'A' && c <= 'Z', lower = c >= 'a' && c <= 'z', digit = c >= '0' && c <= '9';
    const int kind = any                      ? (pick(0, 30) ? 1 << pick(0, 7) : static_cast<int>(pick(0, 255)))
                     : upper || c == 0x130    ? WordPattern::kUpper
                     : lower || c == 0xE9     ? WordPattern::kLower
                     : digit                  ? WordPattern::kNumber
                     : c == 0x8A9E            ? WordPattern::kCaseless
                     : c == 0x301             ? WordPattern::kMark
                     : c == 10 || c == 13     ? WordPattern::kNewline
                     : c == 0x20 || c == 0xA0 ? WordPattern::kSpace
                                              : WordPattern::kOther;
    classes[c] = static_cast<char>(kind);
  }
  return classes;
}

void fuzz_words() {
  static std::vector<std::string> tables;  // they are large
  if (tables.size() < 50) tables.push_back(some_classes());
  const WordPattern pattern(static_cast<WordPattern::Style>(pick(0, 3)), pick(0, 1) == 1, pick(-1, 3),
                            tables[static_cast<size_t>(pick(0, static_cast<int64_t>(tables.size()) - 1))]);
  for (int round = 0; round < 20; ++round) {
    const std::string text = some_text(12, pick(0, 2) > 0);
    std::vector<int64_t> ends;
    if (pattern.cut(text, ends)) {
      require(text.empty() ? ends.empty() : ends.back() == static_cast<int64_t>(text.size()), "words are the text");
      for (size_t k = 0; k < ends.size(); ++k) require(ends[k] > (k ? ends[k - 1] : 0), "no word is empty");
    }

    std::vector<std::string> tokens;
    std::vector<uint8_t> kinds;
    std::string places;
    for (int64_t n = pick(1, 12); n > 0; --n) {
      tokens.push_back(some_text(3, pick(0, 2) > 0));
      kinds.push_back(static_cast<uint8_t>(pick(0, 5) ? 2 : pick(0, 2)));
      if (pick(0, 40)) places.push_back(static_cast<char>(pick(0, 3) ? int64_t{kSpells} : pick(-1, 5)));
    }
    const Surfaces surfaces(std::vector<std::string_view>(tokens.begin(), tokens.end()), kinds, {});
    std::vector<int32_t> ids, words;
    for (int64_t n = pick(0, 12); n > 0; --n) {
      ids.push_back(static_cast<int32_t>(some_id(static_cast<int64_t>(tokens.size()))));
    }
    const Rules rules{pick(-1, 3), pick(-1, 3), {}, -1, false};
    if (!number_words(surfaces, places, pick(0, 9) ? &pattern : nullptr, rules, ids, words)) continue;
    require(words.size() == ids.size(), "one word per token");
    int32_t before = 0;
    for (const int32_t word : words) {
      require(word == -1 || (word >= before && word <= before + 1), "words ascend");
      before = std::max(before, word);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, [] {
    fuzz_table();
    fuzz_rows();
    fuzz_match();
    fuzz_boundaries();
    fuzz_locate();
    fuzz_words();
    return true;
  });
}
