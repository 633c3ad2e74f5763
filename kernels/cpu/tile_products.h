// The products of the forward pass of bfloat16 tensors in tiles. Include the vectors of AVX-512
// first.
#pragma once

#include <cstdint>

#include "pack.h"
#include "rows.h"
#include "softmax.h"
#include "tiles.h"

namespace tokenmix::cpu {
namespace {

// A softmax weight. Subnormal numbers become zero.
struct TileWeight {
  uint16_t bits;
};
inline void store(TileWeight* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// Queries are multiplied as they are, except that the scale's sign is applied to the queries; its
// magnitude multiplies the logits. Weights are rounded to bfloat16 before the second product.
class TileProducts {
 public:
  static constexpr int64_t block = 2 * tile_side;  // queries
  static constexpr int64_t rows = tile_side;       // of which a multiple is computed
  static constexpr Factors factors = Factors::one;
  using Weight = TileWeight;
  struct Packed {
    TiledFactor keys, values;
  };
  using Thread = Tiles;

  explicit TileProducts(const Forward& call)
      : call_(call),
        problem_(call.problem),
        scale_(log2_factor(problem_.scale)),
        dim_steps_(ceil_div(problem_.head_dim, tile_depth)),
        key_steps_(ceil_div(problem_.num_keys, tile_depth)) {}

  // In floats, of two elements each.
  int64_t keys_size() const {
    return ceil_div(problem_.num_keys, tile_side) * dim_steps_ * tile_size / 2;
  }
  int64_t values_size() const {
    return ceil_div(problem_.head_dim, tile_side) * key_steps_ * tile_size / 2;
  }
  int64_t query_size() const { return dim_steps_ * tile_depth / 2; }

  float factor() const { return scale_ == 0 ? 1 : __builtin_fabsf(scale_); }

  Packed pack(const Row& row, float* keys, float* values) const {
    pack_keys(row, keys);
    pack_values(row, reinterpret_cast<Bfloat16*>(values));
    return {{reinterpret_cast<const Bfloat16*>(keys), dim_steps_},
            {reinterpret_cast<const Bfloat16*>(values), key_steps_}};
  }

  void read_query(int64_t offset, float* to) const {
    auto* query = reinterpret_cast<Bfloat16*>(to);
    copy(call_.query, offset, query_size() * 2, query);
    if (scale_ > 0) return;
    for (int64_t d = 0; d < problem_.head_dim; ++d) {
      query[d].bits = scale_ == 0 ? times_zero(query[d].bits) : query[d].bits ^ 0x8000;
    }
  }

  void logits(int64_t count, int64_t slot, int64_t num_keys, const float* queries,
              const Packed& packed, float* to, int64_t stride) const {
    const Bfloat16* keys = packed.keys.data + slot / tile_side * dim_steps_ * tile_size;
    tile_product<false>(count, ceil_div(num_keys, tile_side), dim_steps_,
                        reinterpret_cast<const Bfloat16*>(queries), query_size() * 2,
                        {keys, dim_steps_}, to, stride);
  }

  // A step takes the weights of two vectors.
  void pad_weights(int64_t vectors, TileWeight* weights) const {
    if (vectors % 2 == 1) store(weights + vectors * width, broadcast(0));
  }

  template <bool add>
  void outputs(int64_t count, int64_t slot, int64_t num_keys, const float* weights, int64_t stride,
               const Packed& packed, float* to) const {
    const Bfloat16* values = packed.values.data + slot / tile_depth * tile_size;
    const int64_t columns = ceil_div(problem_.head_dim, tile_side);
    tile_product<add>(count, columns, ceil_div(num_keys, tile_depth),
                      reinterpret_cast<const Bfloat16*>(weights), stride * 2, {values, key_steps_},
                      to, columns * tile_side);
  }

 private:
  // Of NaN and infinity NaN, as in any other arithmetic.
  static uint16_t times_zero(uint16_t bits) {
    return (bits & 0x7f80) == 0x7f80 ? 0x7fc0 : 0;
  }

  // Pads with zeros to `padded` elements.
  void copy(const Strided& from, int64_t offset, int64_t padded, Bfloat16* to) const {
    const auto* row = static_cast<const Bfloat16*>(from.data) + offset;
    __builtin_memcpy(to, row, static_cast<size_t>(problem_.head_dim) * sizeof(Bfloat16));
    for (int64_t d = problem_.head_dim; d < padded; ++d) to[d].bits = 0;
  }

  void copy_key(const Row& row, const Strided& tensor, int64_t slot, int64_t padded,
                Bfloat16* to) const {
    if (slot < problem_.num_keys) {
      prefetch_later_key(row, tensor, slot);
      copy(tensor, row.offset(tensor, row.key(slot)), padded, to);
    } else {
      for (int64_t d = 0; d < padded; ++d) to[d].bits = 0;
    }
  }

  // The terms are those of head_dim: transposes pairs of them.
  void pack_keys(const Row& row, float* to) const {
    float pairs[tile_side * max_head_dim / 2];
    const int64_t size = query_size();
    for (int64_t slot = 0; slot < problem_.num_keys; slot += tile_side) {
      for (int64_t i = 0; i < tile_side; ++i) {
        copy_key(row, call_.key, slot + i, 2 * size,
                 reinterpret_cast<Bfloat16*>(pairs + i * size));
      }
      for (int64_t step = 0; step < dim_steps_; ++step, to += tile_size / 2) {
        transpose(pairs + step * width, size, to, width);
      }
    }
  }

  // The terms are the keys: interleaves the rows of two.
  void pack_values(const Row& row, Bfloat16* to) const {
    const int64_t columns = ceil_div(problem_.head_dim, tile_side), padded = columns * tile_side;
    Bfloat16 pair[2][max_head_dim];
    for (int64_t slot = 0; slot < key_steps_ * tile_depth; slot += 2) {
      for (int64_t i = 0; i < 2; ++i) copy_key(row, call_.value, slot + i, padded, pair[i]);
      const int64_t step = slot / tile_depth, tile_row = slot % tile_depth / 2;
      for (int64_t column = 0; column < columns; ++column) {
        const __m512i even = widened(pair[0] + column * tile_side);
        const __m512i odd = widened(pair[1] + column * tile_side);
        Bfloat16* tile = to + (column * key_steps_ + step) * tile_size;
        _mm512_storeu_si512(tile + tile_row * tile_depth,
                            _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }

  static __m512i widened(const Bfloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  const Forward& call_;
  const Problem& problem_;
  float scale_;
  int64_t dim_steps_, key_steps_;
};

}  // namespace
}  // namespace tokenmix::cpu
