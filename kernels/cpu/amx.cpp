#include "isa.h"
#include "simd_avx512.h"
// The vectors come first.
#include "exp2.h"
#include "forward.h"
#include "tile_products.h"

namespace tokenmix::cpu {
namespace {

// Tiles multiply bfloat16 alone; AVX-512 does the rest.
void forward(const Forward& call, const Threads& threads) {
  if (call.problem.storage == Storage::bfloat16) {
    forward_pass<TileProducts>(call, threads);
  } else {
    avx512_kernels.forward(call, threads);
  }
}

void backward(const Backward& call, const Threads& threads) {
  avx512_kernels.backward(call, threads);
}

void exp2_of(const float* from, float* to, int64_t count) { avx512_kernels.exp2(from, to, count); }

}  // namespace

const Kernels amx_kernels{forward, backward, exp2_of};

}  // namespace tokenmix::cpu
