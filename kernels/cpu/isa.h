// The kernels of each instruction set. dispatch.cpp chooses; tests may call one directly.
#pragma once

#include <cstddef>

#include "attention.h"

namespace tokenmix::cpu {

struct Kernels {
  void (*forward)(const Forward&, const Threads&);
  void (*backward)(const Backward&, const Threads&);
  // to[i] = 2**from[i], as the softmax computes it; for `count` elements.
  void (*exp2)(const float* from, float* to, int64_t count);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, amx_kernels;

const Kernels& kernels_of(Isa);

}  // namespace tokenmix::cpu
