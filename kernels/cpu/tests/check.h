// What every run of a kernel has to satisfy.
#pragma once

#include <functional>
#include <string>

#include "kernels/cpu/tests/sample.h"
#include "kernels/cpu/tests/tolerance.h"

namespace tokenmix::cpu::testing {

struct Kernel {
  std::function<void(const Forward&)> forward;
  std::function<void(const Backward&)> backward;
};

// Runs forward and backward over poisoned results. Returns what is wrong with them, or an empty
// text.
inline std::string check(Sample& sample, const Kernel& kernel, const Expected& expected) {
  const Problem& p = sample.problem;
  const std::vector<Tensor> inputs = {sample.query, sample.key, sample.value, sample.output_grad};
  const auto memory = [](const std::vector<Tensor>& tensors) {
    std::vector<std::vector<std::byte>> copies;
    for (const Tensor& tensor : tensors) copies.push_back(*tensor.memory);
    return copies;
  };
  const auto inputs_before = memory(inputs);
  poison(sample.results());
  poison(sample.gradients());
  sample.lse.assign(sample.lse.size(), NAN);

  kernel.forward(sample.forward());
  const std::vector<double> lse(sample.lse.begin(), sample.lse.end());
  std::string fault;
  const auto compare = [&](const char* name, const std::vector<double>& found,
                           const std::vector<Tracked>& wanted, int64_t row_size) {
    if (fault.empty()) fault = testing::fault(name, found, wanted, row_size);
  };
  compare("output", sample.output.dense(), expected.output, p.head_dim);
  compare("lse", lse, expected.lse, 1);
  if (!surroundings_untouched(sample.results())) return "the forward wrote around its output";
  if (!fault.empty()) return fault;

  const auto results_before = bytes_of(sample.results());
  kernel.backward(sample.backward());
  compare("query gradient", sample.query_grad.dense(), expected.query_grad, p.head_dim);
  compare("key gradient", sample.key_grad.dense(), expected.key_grad, p.head_dim);
  compare("value gradient", sample.value_grad.dense(), expected.value_grad, p.head_dim);
  if (!surroundings_untouched(sample.gradients())) return "the backward wrote around its results";
  if (inputs_before != memory(inputs)) return "an input was written";
  if (results_before != bytes_of(sample.results()) ||
      lse != std::vector<double>(sample.lse.begin(), sample.lse.end())) {
    return "the backward wrote what the forward returned";
  }
  return fault;
}

}  // namespace tokenmix::cpu::testing
