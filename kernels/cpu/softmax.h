// One row of a softmax in base 2. Include the instruction set's vectors first.
#pragma once

#include <cstdint>

#include "exp2.h"

namespace tokenmix::cpu {
namespace {

constexpr float lowest = -0x1.fffffep127f;

// What multiplies logits: nothing, the one number at `factors`, or for each of them its own.
enum class Factors { none, one, each };

template <Factors kind>
Vec factor_of(const float* factors, int64_t i) {
  return kind == Factors::each ? load(factors + i * width) : broadcast(*factors);
}

// Multiplies the logits where they are, and returns the largest, but a finite number if all are
// -inf: their weights are then 0, not NaN. The exponentials need the very products that are
// compared here: one that is rounded otherwise could exceed the maximum by more than 128.
template <Factors kind>
float scale_logits(float* logits, const float* factors, int64_t vectors) {
  const auto at = [&](int64_t i) {
    Vec logit = load(logits + i * width);
    if (kind != Factors::none) {
      logit = logit * factor_of<kind>(factors, i);
      store(logits + i * width, logit);
    }
    return logit;
  };
  // Two chains, since one would be as slow as its latencies.
  Vec even = broadcast(lowest), odd = even;
  int64_t i = 0;
  for (; i + 1 < vectors; i += 2) {
    even = max(at(i), even);
    odd = max(at(i + 1), odd);
  }
  if (i < vectors) even = max(at(i), even);
  return max_of(max(even, odd));
}

// Writes 2**(logit - max) to `weights`, which may lie where the logits do, and returns the sum, of
// weights before they are rounded.
template <class Weight>
float exponentiate(const float* logits, float max, int64_t vectors, Weight* weights) {
  const Vec shift = broadcast(-max);
  const auto at = [&](int64_t i) {
    const Vec weight = exp2(load(logits + i * width) + shift);
    store(weights + i * width, weight);
    return weight;
  };
  Vec even = broadcast(0), odd = even;
  int64_t i = 0;
  for (; i + 1 < vectors; i += 2) {
    even = even + at(i);
    odd = odd + at(i + 1);
  }
  if (i < vectors) even = even + at(i);
  return sum_of(even + odd);
}

}  // namespace
}  // namespace tokenmix::cpu
