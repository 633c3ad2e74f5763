// The elements of tensors in memory.
#pragma once

#include <cstdint>

#include "attention.h"

namespace tokenmix::cpu {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace tokenmix::cpu
