#include <initializer_list>

#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenmix::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
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

namespace {

// Whether the processor has AMX for bfloat16, and the system lets this process use it.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned avx512_bf16 = 1u << 5, amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;  // of arch_prctl
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & amx_bf16) || !(edx & amx_tile)) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & avx512_bf16)) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace

bool is_supported(Isa isa) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::amx: {
      static const bool amx = has_amx();
      return amx && is_supported(Isa::avx512);
    }
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
    case Isa::amx:
      return amx_kernels;
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
  for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2}) {
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
