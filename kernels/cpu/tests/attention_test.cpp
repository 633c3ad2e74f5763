// The kernels against the oracle on random problems, whatever the threads, the memory's former
// contents, and the inputs that no query sees.
#include <cmath>
#include <cstdio>

#include "kernels/cpu/tests/check.h"
#include "kernels/cpu/tests/main.h"
#include "kernels/cpu/tests/threads.h"

namespace tokenmix::cpu::testing {
namespace {

constexpr double work = 2e6;

Kernel kernel_of(Isa isa, Threads threads) {
  return {[=](const Forward& call) { forward(call, threads, isa); },
          [=](const Backward& call) { backward(call, threads, isa); }};
}

// On the calling thread, which keeps its working memory from call to call.
Kernel kernel_of(Isa isa) { return kernel_of(isa, backwards<1>()); }

void run(Sample& sample, const Kernel& kernel) {
  poison(sample.results());
  poison(sample.gradients());
  kernel.forward(sample.forward());
  kernel.backward(sample.backward());
}

// Everything that a run returned, bit for bit.
std::vector<std::byte> bytes_of(const Sample& sample) {
  std::vector<std::byte> bytes = bytes_of(sample.results());
  for (const std::byte byte : bytes_of(sample.gradients())) bytes.push_back(byte);
  const auto* lse = reinterpret_cast<const std::byte*>(sample.lse.data());
  bytes.insert(bytes.end(), lse, lse + sample.lse.size() * sizeof(float));
  return bytes;
}

// Leaves NaN in the working memory that the sample's own run will reuse.
void run_on_nan(Sample& sample, const Kernel& kernel) {
  const std::vector<Tensor> inputs = {sample.query, sample.key, sample.value, sample.output_grad};
  std::vector<std::vector<std::byte>> memory;
  for (const Tensor& tensor : inputs) memory.push_back(*tensor.memory);
  poison(inputs);
  run(sample, kernel);
  for (size_t i = 0; i < inputs.size(); ++i) *inputs[i].memory = memory[i];
}

void test_sample(Isa isa, Sample sample, Failures& failures) {
  // So that the output of a crash ends with its cause.
  std::printf("%s; ", sample.origin.c_str());
  std::fflush(stdout);
  const std::string text = sample.description();
  run_on_nan(sample, kernel_of(isa));
  const std::string fault = check(sample, kernel_of(isa), expected(sample, isa));
  failures.expect(fault.empty(), text + ": " + fault);
  const auto bytes = bytes_of(sample);
  const Threads ways[] = {threads<1>(), threads<2>(), threads<3>(), threads<4>(), backwards<3>()};
  for (const Threads& way : ways) {
    run(sample, kernel_of(isa, way));
    failures.expect(bytes == bytes_of(sample),
                    text + ": other bits with " + std::to_string(way.count) + " threads");
  }
}

// One video of one head, in which a token's number tells by which queries it is seen.
Sample small_sample(Storage storage, RowOf row_of, std::vector<int32_t> key_index,
                    int64_t num_rows, float scale = 0.2f) {
  Random random(7);
  Sample sample;
  sample.origin = "small";
  const auto num_keys = static_cast<int64_t>(key_index.size()) / num_rows;
  sample.problem = {storage, 1,        2,        5,       1,       20, 40,   2,
                    row_of,  num_rows, num_keys, nullptr, nullptr, 1,  scale};
  sample.key_index = std::move(key_index);
  sample.draw(random, Layout::contiguous, Layout::contiguous);
  return sample;
}

void set(Tensor& tensor, int64_t frame, int64_t token, double x) {
  for (int64_t d = 0; d < tensor.shape.head_dim; ++d) {
    store(tensor.format, tensor.strided.data, tensor.offset(0, frame, token, 0) + d, x);
  }
}

// Whether all elements of one token are so.
template <typename Predicate>
bool all(const Tensor& tensor, int64_t frame, int64_t token, Predicate is) {
  for (int64_t d = 0; d < tensor.shape.head_dim; ++d) {
    const int64_t offset = tensor.offset(0, frame, token, 0) + d;
    if (!is(load(tensor.format, tensor.strided.data, offset))) return false;
  }
  return true;
}
bool is_nan(double x) { return std::isnan(x); }
bool is_finite(double x) { return std::isfinite(x); }
bool is_zero(double x) { return x == 0; }

// A token that no slot names may hold anything, and its gradient is exactly zero.
void test_unselected_tokens(Isa isa, Storage storage, Failures& failures) {
  const auto is_selected = [](int64_t i) { return i == 0 || i == 41 || i == 2 || i == 7; };
  for (const double x : {double{NAN}, double{INFINITY}, 1e30}) {
    Sample sample = small_sample(storage, RowOf::video, {0, 41, 2, 7, 41}, 1);
    run(sample, kernel_of(isa));
    const auto bytes = bytes_of(sample);
    const std::string text = "unselected tokens of " + std::to_string(x);
    for (int64_t i = 0; i < 80; ++i) {
      if (is_selected(i)) continue;
      set(sample.key, i / 40, i % 40, x);
      set(sample.value, i / 40, i % 40, x);
    }
    run(sample, kernel_of(isa));
    failures.expect(bytes == bytes_of(sample), text + " change results");
    for (int64_t i = 0; i < 80; ++i) {
      if (is_selected(i)) continue;
      failures.expect(all(sample.key_grad, i / 40, i % 40, is_zero) &&
                          all(sample.value_grad, i / 40, i % 40, is_zero),
                      text + " get a gradient");
    }
  }
}

// NaN reaches what depends on it by the definition, and nothing else.
void test_nan(Isa isa, Storage storage, Failures& failures) {
  // Query frame 0 sees tokens 0, 1 and 2 of frame 0; query frame 1 sees 3, 4 and 5.
  const auto fresh = [&] { return small_sample(storage, RowOf::frame, {0, 1, 2, 3, 4, 5}, 2); };
  const auto expect_only = [&](const Sample& sample, const Tensor& tensor, int64_t num_tokens,
                               auto depends, const std::string& what) {
    for (int64_t f = 0; f < 2; ++f) {
      for (int64_t s = 0; s < num_tokens; ++s) {
        failures.expect(all(tensor, f, s, depends(f, s) ? is_nan : is_finite),
                        what + " at frame " + std::to_string(f) + ", token " + std::to_string(s) +
                            (depends(f, s) ? " is not NaN" : " is not finite") + "; " +
                            sample.description());
      }
    }
  };
  const auto of_frame_0 = [](int64_t f, int64_t) { return f == 0; };
  const auto of_query = [](int64_t f, int64_t s) { return f == 0 && s == 3; };
  const auto of_keys = [](int64_t f, int64_t s) { return f == 0 && s < 3; };
  const auto of_nothing = [](int64_t, int64_t) { return false; };

  Sample sample = fresh();
  set(sample.query, 0, 3, NAN);
  run(sample, kernel_of(isa));
  expect_only(sample, sample.output, 5, of_query, "a NaN query's output");
  expect_only(sample, sample.query_grad, 5, of_query, "a NaN query's gradient");
  expect_only(sample, sample.key_grad, 40, of_keys, "a NaN query's key gradient");
  expect_only(sample, sample.value_grad, 40, of_keys, "a NaN query's value gradient");
  for (size_t i = 0; i < sample.lse.size(); ++i) {
    failures.expect(std::isnan(sample.lse[i]) == (i == 3), "lse of a NaN query");
  }

  sample = fresh();
  set(sample.key, 0, 1, NAN);
  run(sample, kernel_of(isa));
  expect_only(sample, sample.output, 5, of_frame_0, "the output of a NaN key");

  sample = fresh();
  set(sample.value, 0, 1, NAN);
  run(sample, kernel_of(isa));
  expect_only(sample, sample.output, 5, of_frame_0, "the output of a NaN value");
  for (const float lse : sample.lse) {
    failures.expect(std::isfinite(lse), "lse depends on a NaN value");
  }

  sample = fresh();
  set(sample.output_grad, 0, 3, NAN);
  run(sample, kernel_of(isa));
  expect_only(sample, sample.output, 5, of_nothing, "the output before a NaN gradient");
  expect_only(sample, sample.query_grad, 5, of_query, "the query gradient of a NaN gradient");
  expect_only(sample, sample.key_grad, 40, of_keys, "the key gradient of a NaN gradient");
  expect_only(sample, sample.value_grad, 40, of_keys, "the value gradient of a NaN gradient");
}

// The product of a scale of zero with what is not finite is NaN.
void test_scale_of_zero(Isa isa, Storage storage, Failures& failures) {
  for (const double x : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
    Sample sample = small_sample(storage, RowOf::video, {0, 1, 2, 3}, 1, 0.0f);
    set(sample.query, 0, 3, x);
    run(sample, kernel_of(isa));
    for (int64_t i = 0; i < 10; ++i) {
      failures.expect(i == 3 ? all(sample.output, 0, 3, is_nan)
                             : all(sample.output, i / 5, i % 5, is_finite),
                      "the output of a scale of zero and a query of " + std::to_string(x) +
                          " at " + std::to_string(i));
    }
  }
}

// A logit of -inf is a weight of exactly zero.
void test_infinite_key(Isa isa, Storage storage, Failures& failures) {
  // Last, since tiles add terms in pairs.
  Sample with = small_sample(storage, RowOf::video, {0, 1, 3, 2}, 1);
  const std::vector<double> positive(static_cast<size_t>(with.query.shape.size()), 0.5);
  with.query.fill(positive);
  Sample without = small_sample(storage, RowOf::video, {0, 1, 3}, 1);
  without.query.fill(positive);
  set(with.key, 0, 2, -INFINITY);
  run(with, kernel_of(isa));
  run(without, kernel_of(isa));
  failures.expect(
      bytes_of(with.results()) == bytes_of(without.results()) && with.lse == without.lse,
      "a key of -inf is not without weight");
}

int run_all(Isa isa, const Numbers& numbers) {
  const int64_t count = numbers[0], first_seed = numbers[1];
  Failures failures;
  for (int64_t seed = first_seed; seed < first_seed + count; ++seed) {
    test_sample(isa, random_sample(static_cast<uint64_t>(seed), work), failures);
  }
  for (const Sample& sample : edge_samples()) test_sample(isa, sample, failures);
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    test_unselected_tokens(isa, storage, failures);
    test_nan(isa, storage, failures);
    test_scale_of_zero(isa, storage, failures);
    test_infinite_key(isa, storage, failures);
  }
  return failures.exit_status();
}

}  // namespace
}  // namespace tokenmix::cpu::testing

// attention_test ISA [COUNT [FIRST_SEED]]
int main(int argc, char** argv) {
  using namespace tokenmix::cpu::testing;
  return run_for_isa(argc, argv, {150, 1}, run_all);
}
