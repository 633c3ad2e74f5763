#include "isa.h"
#include "simd_avx512.h"
// The vectors come first.
#include "kernels.h"

namespace tokenmix::cpu {

const Kernels avx512_kernels = kernels;

}  // namespace tokenmix::cpu
