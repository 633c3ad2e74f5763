// The exponential of the softmax against the C library's in double.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/tests/main.h"
#include "kernels/cpu/tests/tolerance.h"

namespace tokenmix::cpu::testing {
namespace {

constexpr double smallest_normal = 0x1p-126;

float value_of(uint32_t bits) { return std::bit_cast<float>(bits); }

struct Worst {
  double error = 0;
  float at = 0;
};

// Largest error for the floats whose bits are in [first, last], every `step`-th of them: relative,
// or below the normal numbers as a multiple of the smallest.
Worst worst_error(const Kernels& kernels, uint32_t first, uint32_t last, int64_t step) {
  Worst worst;
  std::vector<float> from, to(4096);
  for (int64_t bits = first; bits <= last;) {
    from.clear();
    for (; bits <= last && from.size() < to.size(); bits += step) {
      from.push_back(value_of(static_cast<uint32_t>(bits)));
    }
    kernels.exp2(from.data(), to.data(), static_cast<int64_t>(from.size()));
    for (size_t i = 0; i < from.size(); ++i) {
      const double exact = std::exp2(double{from[i]});
      const double size = std::max(exact, smallest_normal / exponential_error);
      const double error = std::fabs(to[i] - exact) / (exact < smallest_normal ? size : exact);
      if (!(error <= worst.error)) worst = {std::isnan(error) ? INFINITY : error, from[i]};
    }
  }
  return worst;
}

int run(Isa isa, const Numbers& numbers) {
  const int64_t step = numbers[0];
  const Kernels& kernels = kernels_of(isa);
  Failures failures;
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  struct Range {
    const char* name;
    float first, last;  // in the order of their bits
    int64_t step;
  };
  const Range ranges[] = {
      {"one octave of fractions, every float", 0.5f, 1.0f, 1},
      {"the same, negative", -0.5f, -1.0f, 1},
      {"from 0 to the largest result", 0.0f, 127.99999f, step},
      {"from 0 to where nothing is left", -0.0f, -152.0f, step},
  };
  for (const Range& range : ranges) {
    const Worst worst = worst_error(kernels, bits(range.first), bits(range.last), range.step);
    std::printf("%s: %s: largest relative error %.4g (%.3f ulp), at %.9g\n", cpu::name_of(isa),
                range.name, worst.error, worst.error * 0x1p23, worst.at);
    failures.expect(worst.error <= exponential_error, range.name);
  }

  const float special[] = {NAN, INFINITY, -INFINITY, 128.5f, 3e38f, -200.0f, -3e38f, 0.0f, -0.0f};
  float results[std::size(special)];
  kernels.exp2(special, results, std::size(special));
  failures.expect(std::isnan(results[0]), "2**nan is nan");
  for (const uint32_t nan : {0x7f800001u, 0x7fc00001u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    const float from = value_of(nan);
    float to;
    kernels.exp2(&from, &to, 1);
    failures.expect(std::isnan(to), "2**nan is nan, whatever its payload");
  }
  failures.expect(results[1] == INFINITY, "2**inf is inf");
  failures.expect(results[2] == 0, "2**-inf is 0");
  failures.expect(results[3] == INFINITY && results[4] == INFINITY, "overflow is inf");
  failures.expect(results[5] == 0 && results[6] == 0, "underflow is 0");
  for (int exponent = -126; exponent <= 127; ++exponent) {
    const float from = static_cast<float>(exponent);
    float to;
    kernels.exp2(&from, &to, 1);
    failures.expect(to == std::ldexp(1.0f, exponent), "whole powers are exact");
  }
  return failures.exit_status();
}

}  // namespace
}  // namespace tokenmix::cpu::testing

// exp2_test ISA [STEP]: tries every STEP-th float, outside of one octave.
int main(int argc, char** argv) {
  using namespace tokenmix::cpu::testing;
  return run_for_isa(argc, argv, {61}, run);
}
