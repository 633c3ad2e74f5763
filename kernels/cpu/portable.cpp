#include "isa.h"
#include "simd_portable.h"
// The vectors come first.
#include "kernels.h"

namespace tokenmix::cpu {

const Kernels portable_kernels = kernels;

}  // namespace tokenmix::cpu
