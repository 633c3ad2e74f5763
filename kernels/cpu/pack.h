// Between tensors in memory and float32 scratch. Include the instruction set's vectors first.
#pragma once

#include <cstdint>

#include "product.h"
#include "storage.h"

namespace tokenmix::cpu {
namespace {

constexpr int64_t cache_line = 64;  // bytes

constexpr int64_t rounded_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

constexpr int64_t vectors_of(int64_t size) { return (size + width - 1) / width; }

// to = factor * from, padded with zeros to whole vectors.
template <class Element>
void read_row(const Element* from, int64_t size, float factor, float* to) {
  const Vec factors = broadcast(factor);
  int64_t i = 0;
  for (; i + width <= size; i += width) store(to + i, load(from + i) * factors);
  if (i < size) {
    Element last[width] = {};
    __builtin_memcpy(last, from + i, static_cast<size_t>(size - i) * sizeof(Element));
    store(to + i, load(last) * factors);
  }
}

// to = factor * from, rounded to the type of `to`.
template <class Element>
void write_row(const float* from, int64_t size, float factor, Element* to) {
  const Vec factors = broadcast(factor);
  int64_t i = 0;
  for (; i + width <= size; i += width) store(to + i, load(from + i) * factors);
  if (i < size) {
    Element last[width];
    store(last, load(from + i) * factors);
    __builtin_memcpy(to + i, last, static_cast<size_t>(size - i) * sizeof(Element));
  }
}

inline void fill_zero(float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += width) store(to + i, broadcast(0));
}

// Sizes are whole vectors.
inline void add(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += width) store(to + i, load(to + i) + load(from + i));
}

inline void scale_row(float factor, int64_t size, float* row) {
  const Vec factors = broadcast(factor);
  for (int64_t i = 0; i < size; i += width) store(row + i, load(row + i) * factors);
}

inline float dot(const float* a, const float* b, int64_t size) {
  Vec sum = broadcast(0);
  for (int64_t i = 0; i < size; i += width) sum = fma(load(a + i), load(b + i), sum);
  return sum_of(sum);
}

// Row `offset` (in elements) of a tensor.
inline void read_row(Storage storage, const Strided& from, int64_t offset, int64_t size,
                     float factor, float* to) {
  switch (storage) {
    case Storage::float32:
      return read_row(static_cast<const float*>(from.data) + offset, size, factor, to);
    case Storage::bfloat16:
      return read_row(static_cast<const Bfloat16*>(from.data) + offset, size, factor, to);
    case Storage::float16:
      return read_row(static_cast<const Float16*>(from.data) + offset, size, factor, to);
  }
}

inline void write_row(Storage storage, const float* from, int64_t size, float factor,
                      const Strided& to, int64_t offset) {
  switch (storage) {
    case Storage::float32:
      return write_row(from, size, factor, static_cast<float*>(to.data) + offset);
    case Storage::bfloat16:
      return write_row(from, size, factor, static_cast<Bfloat16*>(to.data) + offset);
    case Storage::float16:
      return write_row(from, size, factor, static_cast<Float16*>(to.data) + offset);
  }
}

enum class Access { read, write };

// Asks the second-level cache for a row early: rows of one head lie too far apart for the processor
// to guess the next.
template <Access access>
void prefetch_row(Storage storage, const Strided& tensor, int64_t offset, int64_t size) {
  const uintptr_t element = storage == Storage::float32 ? 4 : 2;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data) + offset * element;
  const uintptr_t end = begin + size * element;
  for (uintptr_t line = begin / cache_line * cache_line; line < end; line += cache_line) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), access == Access::write, 2);
  }
  // GCC considers a function that only prefetches to have no effect and drops calls to it.
  asm volatile("");
}

// Transposes the square whose rows start at from + i * from_stride.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec rows[width];
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) rows[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int distance = 1; distance < width; distance *= 2) {
    Vec zipped[width];
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + width / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + width / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = zipped[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) store(to + i * to_stride, rows[i]);
}

// Packs a right factor whose rows are rows of a tensor. read(i, to) writes row i, in whole vectors.
template <class Read>
Panels pack_rows(int64_t count, int64_t size, Read read, float* to) {
  float row[max_head_dim + panel_width];
  const int64_t vectors = vectors_of(size);
  for (int64_t i = 0; i < count; ++i) {
    read(i, row);
    for (int64_t v = 0; v < vectors; ++v) {
      store(to + (v / 2 * count + i) * panel_width + v % 2 * width, load(row + v * width));
    }
  }
  return {to, panel_width, count * panel_width};
}

// Packs a right factor whose columns are rows of a tensor, with zeros up to a whole vector of them.
template <class Read>
Panels pack_columns(int64_t count, int64_t size, Read read, float* to) {
  float rows[width * (max_head_dim + panel_width)];
  const int64_t padded = rounded_up(size, width);
  for (int64_t begin = 0; begin < count; begin += width) {
    for (int64_t i = 0; i < width; ++i) {
      float* row = rows + i * padded;
      if (begin + i < count) {
        read(begin + i, row);
      } else {
        for (int64_t d = 0; d < padded; d += width) store(row + d, broadcast(0));
      }
    }
    float* panel = to + begin / panel_width * padded * panel_width + begin % panel_width;
    for (int64_t d = 0; d < padded; d += width) {
      transpose(rows + d, padded, panel + d * panel_width, panel_width);
    }
  }
  return {to, panel_width, padded * panel_width};
}

}  // namespace
}  // namespace tokenmix::cpu
