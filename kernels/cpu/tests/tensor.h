// Strided tensors in guarded memory.
#pragma once

#include <cstddef>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/tests/formats.h"

namespace tokenmix::cpu::testing {

using Random = std::mt19937_64;

int64_t uniform(Random&, int64_t low, int64_t high);  // both ends included

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[uniform(random, 0, static_cast<int64_t>(choices.size()) - 1)];
}

struct Shape {
  int64_t batch, frame, token, head, head_dim;

  int64_t size() const { return batch * frame * token * head * head_dim; }
  bool operator==(const Shape&) const = default;
};

// Packed: views of one projection, as in [batch, frame, token, 3, head, head_dim]. Spread:
// dimensions in any order in memory, with gaps. Broadcast: spread, where batch and head may have a
// stride of zero; for inputs alone.
enum class Layout { contiguous, packed, spread, broadcast };

struct Tensor {
  Shape shape;
  Format format;
  Strided strided;
  std::shared_ptr<std::vector<std::byte>> memory;

  int64_t offset(int64_t b, int64_t f, int64_t t, int64_t h) const {
    return b * strided.batch + f * strided.frame + t * strided.token + h * strided.head;
  }
  // Calls visit(offset) of each [head_dim] in the order [batch, head, frame, token].
  template <typename Visit>
  void for_each_row(Visit visit) const {
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t h = 0; h < shape.head; ++h) {
        for (int64_t f = 0; f < shape.frame; ++f) {
          for (int64_t t = 0; t < shape.token; ++t) visit(offset(b, f, t, h));
        }
      }
    }
  }
  void fill(const std::vector<double>& values);  // [batch, head, frame, token, head_dim]
  std::vector<double> dense() const;             // the same
};

// Tensors whose memory is all NaN, at any alignment. Neighbours of one shape are packed together.
std::vector<Tensor> make_tensors(Random&, Format, Layout, const std::vector<Shape>&);

// Overwrites all memory of the tensors with NaN.
void poison(const std::vector<Tensor>&);

// Whether all memory around the elements of these tensors is still as `poison` left it.
bool surroundings_untouched(const std::vector<Tensor>&);

// The bytes of the elements, in one order whatever the strides.
std::vector<std::byte> bytes_of(const std::vector<Tensor>&);

}  // namespace tokenmix::cpu::testing
