// Matrix products by AMX: 16 rows of 64 bytes in a tile register, bfloat16 in, float32 sums.
// Include the vectors of AVX-512 first.
//
// The right factor lies in tiles of 16 rows, each of 16 columns, of pairs of the elements that are
// summed over: 32 terms of 16 sums. The processor treats subnormals as zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tokenmix::cpu {
namespace {

constexpr int64_t tile_side = 16;                      // rows, and columns of sums
constexpr int64_t tile_depth = 32;                     // terms of a sum
constexpr int64_t tile_size = tile_side * tile_depth;  // elements

// While one exists, this thread may use tiles.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = tile_side;
    }
    // GCC 12's intrinsic names eight bytes alone as read.
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// A right factor: tile (step, column) at data + (column * steps + step) * tile_size.
struct TiledFactor {
  const Bfloat16* data;
  int64_t steps;
};

// to (+)= left * right for row_tiles * 16 rows and column_tiles * 16 columns, both 1 or 2.
template <bool add, int row_tiles, int column_tiles>
void tile_product(int64_t steps, const Bfloat16* left, int64_t left_stride, const Bfloat16* right,
                  int64_t right_stride, float* to, int64_t to_stride) {
  const int64_t left_bytes = left_stride * 2, to_bytes = to_stride * 4;
  float* lower = to + tile_side * to_stride;
  const Bfloat16* lower_left = left + tile_side * left_stride;
  // GCC 12 assumes that tile loads do not read memory.
  asm volatile("" ::: "memory");
  // Tiles 0 to 3 hold the sums, 4 and 5 the left factor, 6 and 7 the right one.
  if constexpr (add) {
    _tile_loadd(0, to, to_bytes);
    if constexpr (column_tiles > 1) _tile_loadd(1, to + tile_side, to_bytes);
    if constexpr (row_tiles > 1) _tile_loadd(2, lower, to_bytes);
    if constexpr (row_tiles > 1 && column_tiles > 1) _tile_loadd(3, lower + tile_side, to_bytes);
  } else {
    _tile_zero(0);
    if constexpr (column_tiles > 1) _tile_zero(1);
    if constexpr (row_tiles > 1) _tile_zero(2);
    if constexpr (row_tiles > 1 && column_tiles > 1) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, left + step * tile_depth, left_bytes);
    _tile_loadd(6, right + step * tile_size, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (column_tiles > 1) {
      _tile_loadd(7, right + right_stride + step * tile_size, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (row_tiles > 1) {
      _tile_loadd(5, lower_left + step * tile_depth, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (column_tiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, to_bytes);
  if constexpr (column_tiles > 1) _tile_stored(1, to + tile_side, to_bytes);
  if constexpr (row_tiles > 1) _tile_stored(2, lower, to_bytes);
  if constexpr (row_tiles > 1 && column_tiles > 1) _tile_stored(3, lower + tile_side, to_bytes);
}

// to (+)= left * right: whole tiles of rows, `columns` tiles of columns, right.steps in each sum.
template <bool add>
void tile_product(int64_t rows, int64_t columns, int64_t steps, const Bfloat16* left,
                  int64_t left_stride, TiledFactor right, float* to, int64_t to_stride) {
  const int64_t right_stride = right.steps * tile_size;
  for (int64_t row = 0; row < rows; row += 2 * tile_side) {
    const Bfloat16* from = left + row * left_stride;
    for (int64_t column = 0; column < columns; column += 2) {
      const Bfloat16* tiles = right.data + column * right_stride;
      float* corner = to + row * to_stride + column * tile_side;
      const auto call = [&](auto product) {
        product(steps, from, left_stride, tiles, right_stride, corner, to_stride);
      };
      const bool two_rows = row + tile_side < rows, two_columns = column + 1 < columns;
      if (two_rows && two_columns) {
        call(tile_product<add, 2, 2>);
      } else if (two_rows) {
        call(tile_product<add, 2, 1>);
      } else if (two_columns) {
        call(tile_product<add, 1, 2>);
      } else {
        call(tile_product<add, 1, 1>);
      }
    }
  }
}

}  // namespace
}  // namespace tokenmix::cpu
