// The tolerance lets plain float32 arithmetic pass, and notices every planted fault.
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "kernels/cpu/tests/check.h"
#include "kernels/cpu/tests/naive.h"

namespace tokenmix::cpu::testing {
namespace {

Kernel naive(Fault fault) {
  return {[fault](const Forward& f) { naive_forward(f, fault); },
          [fault](const Backward& g) { naive_backward(g, fault); }};
}

// Large enough that one key is a small part of the output, with all that faults are about: a gain,
// keys that it spares, neighbours that are the same token, tokens that no slot names.
Sample work(Storage storage) {
  Random random(1);
  Sample sample;
  sample.origin = "work";
  Problem& p = sample.problem;
  p = {storage, 1, 4, 50, 2, 32, 50, 4, RowOf::video, 1, 60, nullptr, nullptr, 0.8f, 0.177f};
  for (int32_t j = 0; j < 60; ++j) {
    sample.key_index.push_back(j == 21 ? 60 : 3 * j);
    sample.key_frame.push_back(j < 4 ? -1 : sample.key_index[j] / 50);
  }
  sample.draw(random, Layout::packed, Layout::spread);
  return sample;
}

int run(int64_t num_samples) {
  int failures = 0;
  const auto expect = [&](bool holds, const char* what, const Sample& sample,
                          const std::string& why) {
    if (holds) return;
    ++failures;
    std::printf("FAILED: %s: %s: %s\n", what, sample.description().c_str(), why.c_str());
  };
  for (int64_t seed = 0; seed < num_samples; ++seed) {
    Sample sample = random_sample(static_cast<uint64_t>(seed), 2e6);
    const std::string fault = check(sample, naive(Fault::none), expected(sample));
    expect(fault.empty(), "plain float32 passes", sample, fault);
  }
  for (const Storage storage : {Storage::float32, Storage::bfloat16, Storage::float16}) {
    Sample sample = work(storage);
    const Expected wanted = expected(sample);
    for (int i = 0; i < num_faults; ++i) {
      const auto planted = static_cast<Fault>(i);
      const std::string fault = check(sample, naive(planted), wanted);
      std::printf("%-9s %-50s %s\n", testing::name_of(storage), name_of(planted), fault.c_str());
      // Rounding the gradients to 16 bits is an error a hundred times as large.
      if (planted == Fault::exponential_off_in_backward && storage != Storage::float32) continue;
      expect(fault.empty() == (planted == Fault::none), name_of(planted), sample,
             fault.empty() ? "not noticed" : fault);
    }
  }
  return failures > 0;
}

}  // namespace
}  // namespace tokenmix::cpu::testing

int main(int argc, char** argv) {
  return tokenmix::cpu::testing::run(argc > 1 ? std::atoll(argv[1]) : 100);
}
