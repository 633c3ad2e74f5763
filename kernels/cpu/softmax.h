// One row of a softmax in base 2. Include the instruction set's vectors first.
//
// A gain multiplies each logit if `gained`; `gains` is unused otherwise.
#pragma once

#include <cstdint>

#include "exp2.h"

namespace tokenmix::cpu {
namespace {

constexpr float lowest = -0x1.fffffep127f;

// The largest logit, but finite if all are -inf: their weights are then 0, not NaN.
template <bool gained>
float max_logit(const float* logits, const float* gains, int64_t vectors) {
  const auto at = [&](int64_t i) {
    const Vec logit = load(logits + i * width);
    return gained ? logit * load(gains + i * width) : logit;
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

// Replaces logits by 2**(gain * logit - max) and returns their sum.
template <bool gained>
float exponentiate(float* logits, const float* gains, float max, int64_t vectors) {
  const Vec shift = broadcast(-max);
  const auto at = [&](int64_t i) {
    const Vec logit = load(logits + i * width);
    const Vec weight = exp2(gained ? fma(logit, load(gains + i * width), shift) : logit + shift);
    store(logits + i * width, weight);
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
