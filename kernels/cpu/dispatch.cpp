#include <initializer_list>

#include "isa.h"

namespace tokenmix::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      break;
  }
  return "portable";
}

#if defined(__x86_64__)

bool is_supported(Isa isa) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
      return avx2;
    case Isa::portable:
      break;
  }
  return true;
}

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return avx512_kernels;
    case Isa::avx2:
      return avx2_kernels;
    case Isa::portable:
      break;
  }
  return portable_kernels;
}

#else

bool is_supported(Isa isa) { return isa == Isa::portable; }

const Kernels& kernels_of(Isa) { return portable_kernels; }

#endif

Isa best() {
  for (Isa isa : {Isa::avx512, Isa::avx2}) {
    if (is_supported(isa)) return isa;
  }
  return Isa::portable;
}

void forward(const Forward& call, const Threads& threads, Isa isa) {
  kernels_of(isa).forward(call, threads);
}

void backward(const Backward& call, const Threads& threads, Isa isa) {
  kernels_of(isa).backward(call, threads);
}

}  // namespace tokenmix::cpu
