// Random problems with all their tensors.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/tests/tensor.h"

namespace tokenmix::cpu::testing {

struct Sample {
  Problem problem;
  std::vector<int32_t> key_index, key_frame;
  // Standard deviations of the queries' and keys' elements, and the mean of the values'.
  double query_size = 1, value_mean = 0;
  std::string origin;
  Tensor query, key, value, output, output_grad, query_grad, key_grad, value_grad;
  std::vector<float> lse;

  // Draws tensors for a problem whose sizes and tables are set.
  void draw(Random&, Layout inputs, Layout results);

  Forward forward();
  Backward backward();
  std::vector<Tensor> results() const { return {output}; }
  std::vector<Tensor> gradients() const { return {query_grad, key_grad, value_grad}; }
  std::string description() const;

  int64_t row(int64_t frame, int64_t query) const;
  // Which of the tokens of all frames is in a slot, and by what its logit is multiplied.
  int64_t token(int64_t row, int64_t slot) const;
  double factor(int64_t frame, int64_t row, int64_t slot) const;
};

// The problem of a seed: of any kind that the interface allows, of at most about `work` products of
// a query's and a key's element.
Sample random_sample(uint64_t seed, double work);

// Sizes that random problems rarely have or never.
std::vector<Sample> edge_samples();

}  // namespace tokenmix::cpu::testing
