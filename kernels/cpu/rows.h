// Which queries share a row of key slots, where they and the keys lie, and their gains.
#pragma once

#include <cstdint>

#include "attention.h"
#include "scratch.h"

namespace tokenmix::cpu {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Of queries, so that logits are in base 2.
inline float log2_factor(float scale) { return static_cast<float>(scale * 1.4426950408889634); }

struct Place {
  int64_t frame, token;
};

// One row of key slots for one head of one video.
struct Row {
  const Problem& problem;
  int64_t video, head, row;

  Row of_head(int64_t other) const { return {problem, video, other, row}; }

  int64_t num_queries() const {
    switch (problem.row_of) {
      case RowOf::video:
        return problem.num_frames * problem.num_queries;
      case RowOf::frame:
        return problem.num_queries;
      case RowOf::token:
        break;
    }
    return problem.num_frames;
  }

  Place query(int64_t i) const {
    switch (problem.row_of) {
      case RowOf::video:
        return {i / problem.num_queries, i % problem.num_queries};
      case RowOf::frame:
        return {row, i};
      case RowOf::token:
        break;
    }
    return {i, row};
  }

  // The place of the query after the one at `place`; cheaper than query().
  Place next(Place place) const {
    if (problem.row_of == RowOf::token) return {place.frame + 1, place.token};
    const bool wraps = problem.row_of == RowOf::video && place.token + 1 == problem.num_queries;
    return wraps ? Place{place.frame + 1, 0} : Place{place.frame, place.token + 1};
  }

  Place key(int64_t slot) const {
    const int64_t token = key_token(slot);
    return {token / problem.num_tokens, token % problem.num_tokens};
  }

  // frame * num_tokens + token.
  int64_t key_token(int64_t slot) const {
    return problem.key_index ? problem.key_index[row * problem.num_keys + slot] : slot;
  }

  int64_t offset(const Strided& tensor, Place place) const {
    return video * tensor.batch + head * tensor.head + place.frame * tensor.frame +
           place.token * tensor.token;
  }

  int64_t lse_offset(Place place) const {
    return ((video * problem.num_heads + head) * problem.num_frames + place.frame) *
               problem.num_queries +
           place.token;
  }

  float gain(int64_t frame, int64_t slot) const {
    const int32_t from = problem.key_frame[row * problem.num_keys + slot];
    return from == frame || from == -1 ? 1.0f : problem.cross_frame_gain;
  }
};

// Rows whose queries exist.
inline int64_t num_rows_of(const Problem& problem) {
  return problem.row_of == RowOf::token ? problem.num_queries : problem.num_rows;
}

// The gain of each (query frame, key slot) of a row, padded with 1.
class Gains {
 public:
  Gains() = default;

  Gains(const Row& row, int64_t stride, float* to)
      : data_(to), stride_(row.problem.row_of == RowOf::frame ? 0 : stride) {
    const bool one_frame = row.problem.row_of == RowOf::frame;
    const int64_t begin = one_frame ? row.row : 0;
    const int64_t end = one_frame ? row.row + 1 : row.problem.num_frames;
    for (int64_t frame = begin; frame < end; ++frame) {
      float* gains = to + frame * stride_;
      for (int64_t j = 0; j < stride; ++j) {
        gains[j] = j < row.problem.num_keys ? row.gain(frame, j) : 1.0f;
      }
    }
  }

  bool exist() const { return data_ != nullptr; }

  // Of the slots from `slot` on.
  const float* of(int64_t frame, int64_t slot) const { return data_ + frame * stride_ + slot; }

 private:
  const float* data_ = nullptr;
  int64_t stride_ = 0;
};

// The slots that name each token, in order of row and slot.
class TokenSlots {
 public:
  struct Slot {
    int64_t row, slot;
  };

  TokenSlots(const Problem& problem, int64_t num_rows)
      : num_tokens_(problem.num_key_frames * problem.num_tokens),
        num_keys_(problem.num_keys),
        begin_(reinterpret_cast<int64_t*>(scratch(Buffer::token_begins, 2 * (num_tokens_ + 2)))),
        slots_(reinterpret_cast<int64_t*>(scratch(Buffer::token_slots, 2 * num_rows * num_keys_))) {
    // A counting sort; begin_ is one ahead until every slot is placed.
    for (int64_t token = 0; token < num_tokens_ + 2; ++token) begin_[token] = 0;
    for (int64_t i = 0; i < num_rows * num_keys_; ++i) ++begin_[token_of(problem, i) + 2];
    for (int64_t token = 2; token < num_tokens_ + 2; ++token) begin_[token] += begin_[token - 1];
    for (int64_t i = 0; i < num_rows * num_keys_; ++i) slots_[begin_[token_of(problem, i) + 1]++] = i;
  }

  int64_t num_tokens() const { return num_tokens_; }

  // Of a token's slots among all.
  int64_t begin(int64_t token) const { return begin_[token]; }

  Slot at(int64_t i) const { return {slots_[i] / num_keys_, slots_[i] % num_keys_}; }

 private:
  int64_t token_of(const Problem& problem, int64_t i) const {
    return problem.key_index ? problem.key_index[i] : i % num_keys_;
  }

  int64_t num_tokens_, num_keys_;
  int64_t *begin_, *slots_;
};

}  // namespace
}  // namespace tokenmix::cpu
