// How far a result may be from the oracle's, derived from the arithmetic alone.
//
// Roundings are followed through the computation that attention.h defines: float32 sums and
// products in any order, one exponential a slot, results rounded once to the storage type. Nothing
// here was measured on a kernel. In units of u = 2^-24, the unit roundoff of float32:
//
//   a sum of n terms   errs by at most growth(n) * (sum of |terms|), growth(n) = min(n, 6 sqrt(n)):
//                      independent roundings exceed six standard deviations once in 10^8
//   its mean square    is 0.18 n (sum of terms^2 / 2 + (sum of terms)^2 / 3): partial sums grow as
//                      a random walk where signs alternate, in proportion where they do not, and
//                      0.18 is that of a rounding to nearest; equal terms tend to err alike
//   the exponential    has a relative error of exponential_error at most, which its test measures
//   a softmax weight   has the absolute error of its logit as a relative one, and that of the
//                      exponential; what all slots share cancels in the quotient of the two sums
//   the backward       computes weights from the forward's lse, and <output_grad, output> from the
//                      stored output, so the errors of both are shared by all slots of a query
//
// Two checks follow. No element may be further off than its limit, the errors' sum. And the root
// mean square of a tensor's errors may be at most twice what the variances predict, with an
// allowance of four standard deviations of that estimate where few rows make it. The first finds a
// wrong element, the second a small error everywhere.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/tests/sample.h"

namespace tokenmix::cpu::testing {

// Largest relative error of the exponential, 2 units in the last place.
constexpr double exponential_error = 0x1p-22;

struct Tracked {
  double exact = 0, limit = 0, variance = 0;
};

// In the order of Tensor::dense.
struct Expected {
  std::vector<Tracked> output, lse, query_grad, key_grad, value_grad;
};

Expected expected(const Sample&);

// What is wrong with a result whose rows have `row_size` elements; empty if nothing is.
std::string fault(const char* name, const std::vector<double>& found,
                  const std::vector<Tracked>& wanted, int64_t row_size);

}  // namespace tokenmix::cpu::testing
