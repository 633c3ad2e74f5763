#include "isa.h"
#include "simd_avx2.h"
// The vectors come first.
#include "kernels.h"

namespace tokenmix::cpu {

const Kernels avx2_kernels = kernels;

}  // namespace tokenmix::cpu
