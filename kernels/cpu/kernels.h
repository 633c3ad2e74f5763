// Every kernel of one instruction set. Include its vectors first.
//
// Everything here and in the headers below has internal linkage: were it merged between the
// instruction sets, the linker could keep the build that a processor cannot run.
#pragma once

#include "backward.h"
#include "exp2.h"
#include "float32_products.h"
#include "forward.h"
#include "isa.h"

namespace tokenmix::cpu {
namespace {

inline void exp2_of(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float result[width];
    store(result, exp2(broadcast(from[i])));
    to[i] = result[0];
  }
}

constexpr Kernels kernels{forward_pass<Float32Products>, backward_pass, exp2_of};

}  // namespace
}  // namespace tokenmix::cpu
