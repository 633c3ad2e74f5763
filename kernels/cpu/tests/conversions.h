// The rows that each instruction set reads from tensors and writes to them.
#pragma once

#include "kernels/cpu/attention.h"

namespace tokenmix::cpu::testing {

struct Conversions {
  // `size` elements at an offset, from and to float32. Whole vectors may be written beyond them.
  void (*read)(Storage, const Strided&, int64_t offset, int64_t size, float* to);
  void (*write)(Storage, const float* from, int64_t size, const Strided&, int64_t offset);
};

extern const Conversions portable_conversions, avx2_conversions, avx512_conversions;

}  // namespace tokenmix::cpu::testing
