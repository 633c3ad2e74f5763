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
  Vec largest = broadcast(lowest);
  for (int64_t i = 0; i < vectors * width; i += width) {
    const Vec logit = load(logits + i);
    largest = max(gained ? logit * load(gains + i) : logit, largest);
  }
  return max_of(largest);
}

// Replaces logits by 2**(gain * logit - max) and returns their sum.
template <bool gained>
float exponentiate(float* logits, const float* gains, float max, int64_t vectors) {
  const Vec shift = broadcast(-max);
  Vec sum = broadcast(0);
  for (int64_t i = 0; i < vectors * width; i += width) {
    const Vec logit = load(logits + i);
    const Vec weight = exp2(gained ? fma(logit, load(gains + i), shift) : logit + shift);
    store(logits + i, weight);
    sum = sum + weight;
  }
  return sum_of(sum);
}

}  // namespace
}  // namespace tokenmix::cpu
