// The one matrix product under every kernel. Include the instruction set's vectors first.
#pragma once

#include <cstdint>

#include "attention.h"

namespace tokenmix::cpu {
namespace {

constexpr int panel_width = 2 * width;  // columns of a register tile

// A matrix whose columns are cut into panels: row k of panel p is panel_width floats at
// data + p * panel_stride + k * row_stride.
struct Panels {
  const float* data;
  int64_t row_stride, panel_stride;

  Panels from_row(int64_t row) const { return {data + row * row_stride, row_stride, panel_stride}; }
  // Of a multiple of panel_width.
  Panels from_column(int64_t column) const {
    return {data + column / panel_width * panel_stride, row_stride, panel_stride};
  }
};

// A matrix with contiguous rows.
struct Matrix {
  float* data;
  int64_t row_stride;
};

// How the left factor is read: element (r, k) at [r * stride + k], or, transposed, at
// [k * stride + r].
enum class Left { rows, columns };

// to (+)= left * right, for a tile that fits the registers.
template <Left order, bool add, int rows, int vectors>
void tile(int64_t depth, const float* left, int64_t left_stride, const float* right,
          int64_t right_stride, float* to, int64_t to_stride) {
  Vec sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = add ? load(to + r * to_stride + v * width) : broadcast(0);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load(right + v * width);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec factor = broadcast(left[order == Left::rows ? r * left_stride : r]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
    left += order == Left::rows ? 1 : left_stride;
    right += right_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(to + r * to_stride + v * width, sums[r][v]);
  }
}

template <Left order, bool add, int vectors, int rows = tile_rows>
void tile_of(int num_rows, int64_t depth, const float* left, int64_t left_stride,
             const float* right, int64_t right_stride, float* to, int64_t to_stride) {
  if constexpr (rows > 1) {
    if (num_rows < rows) {
      return tile_of<order, add, vectors, rows - 1>(num_rows, depth, left, left_stride, right,
                                                    right_stride, to, to_stride);
    }
  }
  tile<order, add, rows, vectors>(depth, left, left_stride, right, right_stride, to, to_stride);
}

// to (+)= left * right: `rows` rows, `vectors` vectors of columns, `depth` terms in each sum, which
// are added in order whatever the tiles.
template <Left order, bool add>
void product(int64_t rows, int64_t vectors, int64_t depth, const float* left, int64_t left_stride,
             Panels right, Matrix to) {
  const int64_t num_tiles = (rows + tile_rows - 1) / tile_rows;
  for (int64_t column = 0; column < vectors; column += 2) {
    const float* panel = right.data + column / 2 * right.panel_stride;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t begin = rows * i / num_tiles, end = rows * (i + 1) / num_tiles;
      const float* from = left + begin * (order == Left::rows ? left_stride : 1);
      float* corner = to.data + begin * to.row_stride + column * width;
      const int count = static_cast<int>(end - begin);
      if (column + 1 < vectors) {
        tile_of<order, add, 2>(count, depth, from, left_stride, panel, right.row_stride, corner,
                               to.row_stride);
      } else {
        tile_of<order, add, 1>(count, depth, from, left_stride, panel, right.row_stride, corner,
                               to.row_stride);
      }
    }
  }
}

}  // namespace
}  // namespace tokenmix::cpu
