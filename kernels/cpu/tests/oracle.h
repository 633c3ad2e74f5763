// The definition of attention.h in double, one query at a time.
#pragma once

#include <vector>

#include "kernels/cpu/tests/sample.h"

namespace tokenmix::cpu::testing {

// The elements of a sample's inputs: queries [batch, head, frame * query, head_dim], the others
// [batch, head, frame * token, head_dim].
struct Inputs {
  std::vector<double> query, key, value, output_grad;
};

Inputs inputs_of(const Sample&);

// All about one query; slots index the vectors of num_keys, and those of results have head_dim.
struct Query {
  const double *query, *output_grad;
  std::vector<int64_t> token;
  std::vector<const double*> key, value;
  std::vector<double> factor;  // scale * gain
  std::vector<double> logit, weight;
  double lse;  // base 2
  std::vector<double> output;
  // <output_grad, value>, and their mean, <output_grad, output>.
  std::vector<double> slope;
  double mean_slope;
  std::vector<double> logit_grad;  // of <query, key>: the factor is in it
};

Query attend(const Sample&, const Inputs&, int64_t batch, int64_t head, int64_t frame,
             int64_t query);

}  // namespace tokenmix::cpu::testing
