#include "kernels/cpu/tests/oracle.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tokenmix::cpu::testing {

Inputs inputs_of(const Sample& sample) {
  return {sample.query.dense(), sample.key.dense(), sample.value.dense(),
          sample.output_grad.dense()};
}

Query attend(const Sample& sample, const Inputs& inputs, int64_t batch, int64_t head, int64_t frame,
             int64_t query) {
  const Problem& p = sample.problem;
  const int64_t row = sample.row(frame, query), size = p.head_dim;
  const int64_t sequence = batch * p.num_heads + head;
  const int64_t of_query = (sequence * p.num_frames + frame) * p.num_queries + query;
  const auto dot = [size](const double* x, const double* y) {
    return std::inner_product(x, x + size, y, 0.0);
  };

  Query q;
  q.query = inputs.query.data() + of_query * size;
  q.output_grad = inputs.output_grad.data() + of_query * size;
  for (int64_t j = 0; j < p.num_keys; ++j) {
    q.token.push_back(sequence * p.num_key_frames * p.num_tokens + sample.token(row, j));
    q.key.push_back(inputs.key.data() + q.token[j] * size);
    q.value.push_back(inputs.value.data() + q.token[j] * size);
    q.factor.push_back(sample.factor(frame, row, j));
    q.logit.push_back(q.factor[j] * dot(q.query, q.key[j]));
  }

  const double largest = *std::max_element(q.logit.begin(), q.logit.end());
  double total = 0;
  for (const double logit : q.logit) total += q.weight.emplace_back(std::exp(logit - largest));
  for (double& weight : q.weight) weight /= total;
  q.lse = (largest + std::log(total)) / std::log(2.0);

  q.output.assign(static_cast<size_t>(size), 0.0);
  for (int64_t j = 0; j < p.num_keys; ++j) {
    for (int64_t d = 0; d < size; ++d) q.output[d] += q.weight[j] * q.value[j][d];
    q.slope.push_back(dot(q.output_grad, q.value[j]));
  }
  q.mean_slope = dot(q.output_grad, q.output.data());
  for (int64_t j = 0; j < p.num_keys; ++j) {
    q.logit_grad.push_back(q.factor[j] * q.weight[j] * (q.slope[j] - q.mean_slope));
  }
  return q;
}

}  // namespace tokenmix::cpu::testing
