// What the tests' main functions share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/attention.h"

namespace tokenmix::cpu::testing {

// The exit status by which a test says that this machine cannot run it.
constexpr int skipped = 77;

class Failures {
 public:
  // Prints what failed, but of many failures only the first ones.
  void expect(bool holds, const std::string& what) {
    if (holds) return;
    if (++count_ <= 20) std::printf("\nFAILED: %s\n", what.c_str());
  }
  int exit_status() const {
    if (count_ > 0) std::printf("\n%d failures\n", count_);
    return count_ > 0;
  }

 private:
  int count_ = 0;
};

using Numbers = std::vector<int64_t>;

// Runs a test of the instruction set that the first argument names; numbers may follow.
inline int run_for_isa(int argc, char** argv, Numbers numbers, int (*run)(Isa, const Numbers&)) {
  for (size_t i = 0; i < numbers.size() && i + 2 < static_cast<size_t>(argc); ++i) {
    numbers[i] = std::atoll(argv[i + 2]);
  }
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (argc < 2 || std::strcmp(argv[1], cpu::name_of(isa)) != 0) continue;
    if (is_supported(isa)) return run(isa, numbers);
    std::printf("SKIPPED: this processor or this build has no %s\n", argv[1]);
    return skipped;
  }
  std::fprintf(stderr, "usage: %s portable|avx2|avx512 [NUMBER ...]\n", argv[0]);
  return 2;
}

}  // namespace tokenmix::cpu::testing
