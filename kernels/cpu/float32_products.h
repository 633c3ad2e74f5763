// The products of the forward pass in float32, whatever the tensors hold. Include the instruction
// set's vectors first.
#pragma once

#include <cstdint>

#include "pack.h"
#include "product.h"
#include "rows.h"
#include "softmax.h"

namespace tokenmix::cpu {
namespace {

// Queries carry the scale.
class Float32Products {
 public:
  static constexpr int64_t block = 24;  // queries
  static constexpr int64_t rows = 1;    // of which a multiple is computed
  static constexpr Factors factors = Factors::none;
  using Weight = float;
  struct Packed {
    Panels keys, values;
  };
  // What a thread needs while it computes: nothing.
  struct Thread {};

  explicit Float32Products(const Forward& call)
      : call_(call),
        problem_(call.problem),
        scale_(log2_factor(problem_.scale)),
        padded_dim_(rounded_up(problem_.head_dim, width)) {}

  // In floats.
  int64_t keys_size() const { return rounded_up(problem_.num_keys, panel_width) * padded_dim_; }
  int64_t values_size() const {
    return problem_.num_keys * rounded_up(problem_.head_dim, panel_width);
  }
  int64_t query_size() const { return padded_dim_; }

  float factor() const { return 1; }

  Packed pack(const Row& row, float* keys, float* values) const {
    const auto reader = [&](const Strided& tensor) {
      return [&](int64_t slot, float* to) {
        prefetch_later_key(row, tensor, slot);
        read_row(problem_.storage, tensor, row.offset(tensor, row.key(slot)), problem_.head_dim,
                 1.0f, to);
      };
    };
    return {pack_columns(problem_.num_keys, problem_.head_dim, reader(call_.key), keys),
            pack_rows(problem_.num_keys, problem_.head_dim, reader(call_.value), values)};
  }

  void read_query(int64_t offset, float* to) const {
    read_row(problem_.storage, call_.query, offset, problem_.head_dim, scale_, to);
  }

  void logits(int64_t count, int64_t slot, int64_t num_keys, const float* queries,
              const Packed& packed, float* to, int64_t stride) const {
    product<Left::rows, false>(count, vectors_of(num_keys), problem_.head_dim, queries, padded_dim_,
                               packed.keys.from_column(slot), {to, stride});
  }

  void pad_weights(int64_t, float*) const {}

  template <bool add>
  void outputs(int64_t count, int64_t slot, int64_t num_keys, const float* weights, int64_t stride,
               const Packed& packed, float* to) const {
    product<Left::rows, add>(count, vectors_of(problem_.head_dim), num_keys, weights, stride,
                             packed.values.from_row(slot), {to, padded_dim_});
  }

 private:
  const Forward& call_;
  const Problem& problem_;
  float scale_;
  int64_t padded_dim_;
};

}  // namespace
}  // namespace tokenmix::cpu
