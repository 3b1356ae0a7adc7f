// The remap table (teacher id -> student ids) and the match alignment, over plain data. No torch, no Python.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace vocabdistil {

struct WordPieceRules {
  std::string_view teacher_prefix;  // marks a teacher token that continues a word
  std::string_view student_prefix;
  int64_t max_chars;  // the student's max_input_chars_per_word
  int32_t unk_id;
};

// Rows of student ids in CSR form. A string without data (nullptr) is a hole of the vocabulary: its row is UNK.
struct Csr {
  std::vector<int32_t> indptr;  // [rows + 1]
  std::vector<int32_t> ids;     // [nnz]
};

// `student`: the pieces that a row may consist of, by id. `overrides`: rows given by hand, ascending by teacher id.
Csr build_rows(const std::vector<std::string_view>& teacher, const std::vector<std::string_view>& student,
               const WordPieceRules& rules,
               const std::vector<std::pair<int64_t, std::vector<int32_t>>>& overrides);

// A [batch, length] view of token ids or of a mask: rows `row_stride` elements apart, columns adjacent.
struct BatchView {
  const void* data;  // nullptr: absent (a mask of ones)
  int itemsize;      // ids: 4 or 8 bytes, signed; mask: 1, 4 or 8 bytes
  int64_t row_stride;
};

// What the first pass finds out about one sequence.
struct RowPlan {
  int64_t length;  // student tokens
  int64_t kept;    // teacher tokens kept: the pairs of the sequence
  int64_t used;    // one past the last kept teacher token
};

struct BatchPlan {
  int64_t bad_row;  // the first sequence with an id outside the table, or -1
  int64_t length;   // the longest student sequence
  int64_t pairs;
};

class RemapIndex {
 public:
  // Throws std::invalid_argument if indptr does not describe rows over ids, or an id is not in [0, student_size).
  RemapIndex(Csr csr, int64_t student_size);

  const Csr& csr() const { return csr_; }
  int64_t rows() const { return static_cast<int64_t>(csr_.indptr.size()) - 1; }

  // Checks every kept id before it indexes anything, then fills plan[batch]. max_length < 0: no limit.
  BatchPlan plan(const BatchView& ids, const BatchView& mask, int64_t batch, int64_t length, int64_t max_length,
                 RowPlan* plan, int threads) const;

  // Writes input_ids and attention_mask, both [batch, student_length], and pairs [4, total of plan.kept]:
  // student_start, student_end, teacher_start, teacher_end. Returns how many pairs have student tokens.
  int64_t write(const BatchView& ids, const BatchView& mask, int64_t batch, int64_t length, const RowPlan* plan,
                int64_t student_length, int64_t pad_id, int64_t* input_ids, int64_t* attention_mask, int32_t* pairs,
                int threads) const;

 private:
  template <class Id, class Mask>
  bool plan_row(const Id* ids, const Mask* mask, int64_t length, int64_t max_length, RowPlan& plan) const;
  template <class Id, class Mask>
  void write_row(const Id* ids, const Mask* mask, const RowPlan& plan, int64_t width, int64_t student_base,
                 int64_t teacher_base, int64_t pad_id, int64_t* out, int64_t* attention,
                 int32_t* const* pairs) const;
  int64_t put_row(int64_t teacher_id, int64_t* out) const;

  Csr csr_;
  std::vector<uint16_t> counts_;  // pieces of each row: small, so that the first pass stays in cache
  std::vector<uint64_t> packed_;  // count in 4 bits and three ids of 20, or kLong
  bool has_empty_rows_ = false;
};

struct MatchArgs {
  const int64_t* teacher_ids;   // [batch, teacher_length], contiguous
  const int64_t* student_ids;   // [batch, student_length], contiguous
  const uint8_t* teacher_mask;  // the same shapes, or nullptr
  const uint8_t* student_mask;
  int64_t batch, teacher_length, student_length;
  const int32_t* teacher_slot;  // [teacher_slots]: id -> index into the matched vocabulary, or -1
  const int32_t* student_slot;  // [student_slots]
  int64_t teacher_slots, student_slots, matched;
  int32_t* found;   // [2, batch, min(teacher_length, student_length)] scratch: student and teacher positions
  int64_t* counts;  // [batch]
  int threads;
};

// Greedy left-to-right matching of equal tokens; returns the number of pairs. Linear in the number of tokens.
int64_t match_plan(const MatchArgs& args);
// pairs: [4, total of counts].
void match_write(const MatchArgs& args, int32_t* pairs);

}  // namespace vocabdistil
