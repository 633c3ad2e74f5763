#include "kernels/cpu/tests/tolerance.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>

#include "kernels/cpu/tests/oracle.h"

namespace tokenmix::cpu::testing {
namespace {

constexpr double unit = 0x1p-24;
constexpr double mean_square = 0.18;
// An exponential below the smallest normal number may be flushed to zero.
constexpr double flushed = 0x1p-125;
const double ln2 = std::log(2.0);

double square(double x) { return x * x; }
double growth(double terms) { return std::min(terms, 6 * std::sqrt(terms)); }
// Mean square of `count` roundings of a number of that size.
double roundings(double count, double size) { return mean_square * count * square(unit * size); }

// A sum of products whose first factors have errors, in float32.
struct Sum {
  double exact = 0, magnitude = 0, squares = 0, limit = 0, variance = 0;

  void add(const Tracked& x, double y) {
    const double product = x.exact * y, error = x.limit * std::fabs(y);
    exact += product;
    squares += product * product;
    magnitude += std::fabs(product) + error;
    limit += error;
    variance += x.variance * y * y;
  }

  // Each term is there `copies` times on average: adding it again tends to err alike.
  Tracked rounded(double terms, double copies = 1) const {
    const double walk = squares / 2 + exact * exact / 3;
    return {exact, limit + unit * (growth(terms) * std::sqrt(copies) + 1) * magnitude,
            variance + mean_square * unit * unit * (terms + 1) * copies * walk};
  }
};

Sum dot(const double* x, const double* y, int64_t size) {
  Sum sum;
  for (int64_t d = 0; d < size; ++d) sum.add({x[d], 0, 0}, y[d]);
  return sum;
}

Tracked stored(const Tracked& x, Format format) {
  if (x.exact == 0 && x.limit == 0) return x;
  const double roundoff = format.roundoff(), underflow = format.underflow();
  return {x.exact, x.limit + roundoff * (std::fabs(x.exact) + x.limit) + underflow,
          x.variance + mean_square * square(roundoff * x.exact) + square(underflow) / 3};
}

// The errors of one query's computation: of all logits, in natural units, then of its results.
struct Errors {
  const Query& q;
  Format format;
  int64_t num_keys, size;
  // In how many slots a slot's token is: these err alike, so their deviations add up, not
  // variances.
  std::vector<double> copies;
  double mean_copies = 0;
  // The same of the weights in their own sum, where all that the sum's unit does not tell apart
  // agree.
  double like_weights = 0;
  std::vector<Tracked> logit;
  // In natural units. An exponential's errors may all have one sign.
  Tracked lse;
  std::vector<Tracked> output;

  Errors(const Query& query, Format storage, int64_t head_dim)
      : q(query), format(storage), num_keys(query.token.size()), size(head_dim) {
    std::map<int64_t, double> uses;
    for (const int64_t token : q.token) ++uses[token];
    for (const int64_t token : q.token) copies.push_back(uses[token]);
    for (const double number : copies) mean_copies += number / num_keys;
    std::vector<double> sorted = q.weight;
    std::sort(sorted.begin(), sorted.end());
    for (auto low = sorted.begin(), high = low; const double weight : sorted) {
      while (*low < weight - 2 * unit) ++low;
      while (high != sorted.end() && *high <= weight + 2 * unit) ++high;
      like_weights += static_cast<double>(high - low) / num_keys;
    }
    forward();
  }

  void forward() {
    const double largest = *std::max_element(q.logit.begin(), q.logit.end());
    const double keys = static_cast<double>(num_keys);
    double total = 0, total_variance = 0;
    std::vector<Tracked> weight;  // its error: of the exponential, as a share of the exact sum
    for (int64_t j = 0; j < num_keys; ++j) {
      const Sum products = dot(q.query, q.key[j], size);
      const Tracked score = products.rounded(static_cast<double>(size));
      const double f = std::fabs(q.factor[j]);
      // A factor of three numbers multiplies the sum or each of its terms.
      const double factored = products.squares + square(score.exact);
      logit.push_back({q.logit[j], f * (score.limit + 3 * unit * products.magnitude),
                       square(f) * (score.variance + roundings(3, std::sqrt(factored)))});
      weight.push_back(exponential(j, largest));
      total += weight[j].limit;
      total_variance += weight[j].variance * copies[j];
    }
    if (total > 0.5) throw std::domain_error("logits too large for any float32 computation");

    for (int64_t d = 0; d < size; ++d) {
      const double o = q.output[d];
      Sum products;
      Tracked shift{};  // through the errors of the weights
      for (int64_t j = 0; j < num_keys; ++j) {
        const double v = q.value[j][d];
        products.add({q.weight[j], 0, 0}, v);
        shift.limit += weight[j].limit * std::fabs(v - o);
        shift.variance += weight[j].variance * copies[j] * square(v - o);
      }
      const Tracked sum = products.rounded(keys, mean_copies);
      // The other sum, its reciprocal to 2 units in the last place, and the product.
      output.push_back(
          stored({o,
                  sum.limit + shift.limit / (1 - total) +
                      unit * (growth(keys) * std::sqrt(like_weights) + 5) * std::fabs(o),
                  sum.variance + shift.variance + roundings(like_weights * keys / 3 + 5, o)},
                 format));
    }
    const double sizes = std::fabs(largest) + std::fabs(q.lse * ln2) + std::log(keys) + 1;
    lse = {q.lse * ln2,
           total / (1 - total) + unit * (growth(keys) * std::sqrt(like_weights) + 3 * sizes),
           total_variance + square(exponential_error) / 3 + roundings(like_weights * keys / 3, 1) +
               roundings(3, sizes)};
  }

  // A slot's weight, when `shift` is subtracted from its logit before the exponential.
  Tracked exponential(int64_t j, double shift) const {
    const double sizes = std::fabs(q.logit[j]) + std::fabs(shift);
    const double limit = logit[j].limit + unit * sizes + exponential_error;
    const double relative = logit[j].variance + roundings(1, sizes) + square(exponential_error) / 3;
    const double w = q.weight[j];
    return {w, w * std::expm1(limit) + flushed, square(w) * relative};
  }
};

struct Gradients {
  std::vector<Sum> key, value;
  std::vector<double> uses, copies;  // summands of a token's gradient, and their sum of copies
};

// Adds a query's part to the keys' and values' gradients, and returns its own.
std::vector<Tracked> backward(const Errors& e, Gradients& gradients) {
  const Query& q = e.q;
  const auto size = static_cast<double>(e.size);
  Tracked mean = dot(q.output_grad, q.output.data(), e.size).rounded(size);
  for (int64_t d = 0; d < e.size; ++d) {
    mean.limit += std::fabs(q.output_grad[d]) * e.output[d].limit;
    mean.variance += square(q.output_grad[d]) * e.output[d].variance;
  }
  std::vector<Sum> sums(static_cast<size_t>(e.size));
  std::vector<double> of_mean(static_cast<size_t>(e.size));
  for (int64_t j = 0; j < e.num_keys; ++j) {
    Tracked weight = e.exponential(j, q.lse * ln2);
    weight.limit = weight.limit * (1 + e.lse.limit) + q.weight[j] * std::expm1(e.lse.limit);

    const Tracked slope = dot(q.output_grad, q.value[j], e.size).rounded(size);
    const double difference = std::fabs(q.slope[j] - q.mean_slope);
    const double sizes = std::fabs(q.slope[j]) + std::fabs(q.mean_slope);
    const double off = slope.limit + mean.limit + unit * sizes;
    const double f = std::fabs(q.factor[j]), w = q.weight[j], ds = q.logit_grad[j];
    const Tracked own{
        ds, f * (weight.limit * (difference + off) + w * off) + 4 * unit * std::fabs(ds),
        e.copies[j] * (square(f) * (weight.variance * square(difference) +
                                    square(w) * (slope.variance + roundings(2, sizes))) +
                       roundings(4, ds))};
    // In the gradient of one key, errors that the slots of a query share are the query's own.
    Tracked with_shared = own;
    with_shared.variance +=
        e.copies[j] * (square(f * w) * mean.variance + square(ds) * e.lse.variance);
    weight.variance = e.copies[j] * (weight.variance + square(w) * e.lse.variance);

    Sum* key = gradients.key.data() + q.token[j] * e.size;
    Sum* value = gradients.value.data() + q.token[j] * e.size;
    for (int64_t d = 0; d < e.size; ++d) {
      sums[d].add(own, q.key[j][d]);
      of_mean[d] += q.factor[j] * w * q.key[j][d];
      key[d].add(with_shared, q.query[d]);
      value[d].add(weight, q.output_grad[d]);
    }
    ++gradients.uses[q.token[j]];
    gradients.copies[q.token[j]] += e.copies[j];
  }
  std::vector<Tracked> query_grad;
  for (int64_t d = 0; d < e.size; ++d) {
    Tracked sum = sums[d].rounded(static_cast<double>(e.num_keys), e.mean_copies);
    sum.variance += square(of_mean[d]) * mean.variance + square(sum.exact) * e.lse.variance;
    query_grad.push_back(stored(sum, e.format));
  }
  return query_grad;
}

}  // namespace

Expected expected(const Sample& sample) {
  const Problem& p = sample.problem;
  const Inputs inputs = inputs_of(sample);
  const Format format = format_of(p.storage);
  const size_t size = inputs.key.size(), num_tokens = size / p.head_dim;
  Gradients gradients{std::vector<Sum>(size), std::vector<Sum>(size),
                      std::vector<double>(num_tokens), std::vector<double>(num_tokens)};
  Expected expected;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      for (int64_t t = 0; t < p.num_frames; ++t) {
        for (int64_t s = 0; s < p.num_queries; ++s) {
          const Query query = attend(sample, inputs, b, h, t, s);
          const Errors errors(query, format, p.head_dim);
          const auto query_grad = backward(errors, gradients);
          expected.output.insert(expected.output.end(), errors.output.begin(), errors.output.end());
          expected.query_grad.insert(expected.query_grad.end(), query_grad.begin(),
                                     query_grad.end());
          const Tracked& lse = errors.lse;
          expected.lse.push_back(stored({query.lse, lse.limit / ln2, lse.variance / square(ln2)},
                                        format_of(Storage::float32)));
        }
      }
    }
  }
  for (size_t i = 0; i < size; ++i) {
    const double uses = gradients.uses[i / p.head_dim];
    const double copies = uses > 0 ? gradients.copies[i / p.head_dim] / uses : 1;
    expected.key_grad.push_back(stored(gradients.key[i].rounded(uses, copies), format));
    expected.value_grad.push_back(stored(gradients.value[i].rounded(uses, copies), format));
  }
  return expected;
}

std::string fault(const char* name, const std::vector<double>& found,
                  const std::vector<Tracked>& wanted, int64_t row_size) {
  char text[200];
  double worst = 0, errors = 0, variances = 0, squared_variances = 0, of_row = 0;
  size_t at = 0, wrong = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::fabs(found[i] - wanted[i].exact);
    if (!(error <= wanted[i].limit)) {
      ++wrong;
      const double times = std::isnan(error) ? INFINITY : error / wanted[i].limit;
      if (times > worst) worst = times, at = i;
    }
    errors += square(error);
    of_row += wanted[i].variance;
    if ((i + 1) % row_size == 0) {
      variances += of_row;
      squared_variances += square(of_row);
      of_row = 0;
    }
  }
  if (wrong > 0) {
    std::snprintf(text, sizeof text,
                  "%s: %zu of %zu elements too far off, the worst (%zu: %.9g, not %.9g) %.3g times "
                  "its limit",
                  name, wrong, wanted.size(), at, found[at], wanted[at].exact, worst);
    return text;
  }
  if (variances == 0) return "";
  const double rows = square(variances) / squared_variances;  // as many as count
  const double allowed = 2 + 4 / std::sqrt(rows), times = std::sqrt(errors / variances);
  if (times <= allowed) return "";
  std::snprintf(text, sizeof text,
                "%s: RMS error %.3g times that of random roundings, allowed %.3g", name, times,
                allowed);
  return text;
}

}  // namespace tokenmix::cpu::testing
