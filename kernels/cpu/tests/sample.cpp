#include "kernels/cpu/tests/sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

namespace tokenmix::cpu::testing {
namespace {

std::vector<double> normal(Random& random, const Tensor& tensor, double deviation, double mean) {
  std::normal_distribution<double> distribution;
  std::vector<double> values(static_cast<size_t>(tensor.shape.size()));
  for (double& value : values) value = mean + deviation * distribution(random);
  return values;
}

int64_t random_head_dim(Random& random) {
  if (uniform(random, 0, 1)) {
    return one_of<int64_t>(random, {7, 16, 32, 40, 64, 72, 80, 88, 96, 128, 256});
  }
  return uniform(random, 1, uniform(random, 0, 3) ? 70 : 256);
}

int64_t random_num_keys(Random& random) {
  switch (uniform(random, 0, 9)) {
    case 0:
      return uniform(random, 1, 4);
    case 1:
      return uniform(random, 600, 1400);
    case 2:
      return one_of<int64_t>(random, {197, 204, 208, 577, 640, 641, 648, 1280, 2051});
    default:
      return uniform(random, 1, 260);
  }
}

// A row of slots: a selection without repetition where there are tokens enough, or any.
void draw_row(Random& random, const Problem& problem, bool repeats, int32_t* index) {
  const int64_t num_tokens = problem.num_tokens * problem.num_key_frames;
  if (repeats || num_tokens < problem.num_keys) {
    // Few tokens in many slots, where there are more slots than tokens drawn.
    const int64_t last = uniform(random, 0, num_tokens - 1);
    for (int64_t j = 0; j < problem.num_keys; ++j) {
      index[j] = static_cast<int32_t>(uniform(random, 0, last));
    }
    return;
  }
  std::vector<int32_t> tokens(static_cast<size_t>(num_tokens));
  std::iota(tokens.begin(), tokens.end(), 0);
  if (uniform(random, 0, 1)) std::shuffle(tokens.begin(), tokens.end(), random);
  std::copy_n(tokens.begin(), problem.num_keys, index);
}

void draw_tables(Random& random, Sample& sample, bool selected) {
  const Problem& p = sample.problem;
  const auto size = static_cast<size_t>(p.num_rows * p.num_keys);
  if (!selected) {
    sample.key_index.resize(size);
    const bool repeats = uniform(random, 0, 3) == 0;
    for (int64_t r = 0; r < p.num_rows; ++r) {
      draw_row(random, p, repeats, sample.key_index.data() + r * p.num_keys);
    }
  }
  // A table that a gain of 1 makes needless is allowed.
  if (p.cross_frame_gain == 1 && uniform(random, 0, 3)) return;
  sample.key_frame.resize(size);
  for (size_t i = 0; i < size; ++i) {
    const auto own =
        selected ? uniform(random, 0, p.num_frames - 1) : sample.key_index[i] / p.num_tokens;
    sample.key_frame[i] = static_cast<int32_t>(uniform(random, 0, 4) ? own : -1);
  }
}

}  // namespace

void Sample::draw(Random& random, Layout inputs, Layout results) {
  const Problem& p = problem;
  const Format format = format_of(p.storage);
  const Shape queries = {p.batch, p.num_frames, p.num_queries, p.num_heads, p.head_dim};
  const Shape keys = {p.batch, p.num_key_frames, p.num_tokens, p.num_heads, p.head_dim};
  const auto read = make_tensors(random, format, inputs, {queries, keys, keys, queries});
  const auto written = make_tensors(random, format, results, {queries, keys, keys});
  query = read[0], key = read[1], value = read[2], output_grad = read[3];
  query_grad = written[0], key_grad = written[1], value_grad = written[2];
  output = make_tensors(random, format, results, {queries})[0];
  query.fill(normal(random, query, query_size, 0));
  key.fill(normal(random, key, query_size, 0));
  value.fill(normal(random, value, 1, value_mean));
  output_grad.fill(normal(random, output_grad, 1, 0));
  lse.assign(static_cast<size_t>(p.batch * p.num_heads * p.num_frames * p.num_queries), NAN);
}

Forward Sample::forward() {
  problem.key_index = key_index.empty() ? nullptr : key_index.data();
  problem.key_frame = key_frame.empty() ? nullptr : key_frame.data();
  return {problem, query.strided, key.strided, value.strided, output.strided, lse.data()};
}

Backward Sample::backward() {
  const Problem p = forward().problem;
  return {p,
          output_grad.strided,
          query.strided,
          key.strided,
          value.strided,
          output.strided,
          lse.data(),
          query_grad.strided,
          key_grad.strided,
          value_grad.strided};
}

int64_t Sample::row(int64_t frame, int64_t query) const {
  return problem.row_of == RowOf::video ? 0 : problem.row_of == RowOf::frame ? frame : query;
}

int64_t Sample::token(int64_t row, int64_t slot) const {
  return key_index.empty() ? slot : key_index[row * problem.num_keys + slot];
}

double Sample::factor(int64_t frame, int64_t row, int64_t slot) const {
  const int64_t of = key_frame.empty() ? -1 : key_frame[row * problem.num_keys + slot];
  const bool cross = of != -1 && of != frame;
  return cross ? double{problem.scale} * problem.cross_frame_gain : problem.scale;
}

std::string Sample::description() const {
  const Problem& p = problem;
  const char* rows = p.row_of == RowOf::video   ? "video"
                     : p.row_of == RowOf::frame ? "frame"
                                                : "token";
  std::ostringstream text;
  text << origin << ": " << testing::name_of(p.storage) << " batch " << p.batch << ", frames "
       << p.num_frames << ", queries " << p.num_queries << ", heads " << p.num_heads
       << ", head_dim " << p.head_dim << "; keys " << p.num_keys
       << (key_index.empty() ? " selected" : "") << " of " << p.num_key_frames << " x "
       << p.num_tokens << " tokens, rows by " << rows << ", gain " << p.cross_frame_gain
       << (key_frame.empty() ? " (no table)" : "") << ", scale " << p.scale << ", size "
       << query_size << ", mean " << value_mean;
  return text.str();
}

Sample random_sample(uint64_t seed, double work) {
  Random random(seed);
  Sample sample;
  sample.origin = "seed " + std::to_string(seed);
  Problem& p = sample.problem;
  p = {};
  p.storage = one_of(random, {Storage::float32, Storage::bfloat16, Storage::float16});
  p.row_of = one_of(random, {RowOf::video, RowOf::video, RowOf::frame, RowOf::token});
  const bool selected = p.row_of == RowOf::video && uniform(random, 0, 2) == 0;
  p.head_dim = random_head_dim(random);
  p.num_keys = random_num_keys(random);
  p.num_frames = one_of<int64_t>(random, {1, 2, 3, 4, 8, 16});
  p.batch = uniform(random, 0, 40) ? uniform(random, 1, 3) : 0;
  p.num_heads = uniform(random, 1, 4);
  if (p.row_of == RowOf::token) p.num_keys = std::min<int64_t>(p.num_keys, 60);
  if (selected) {
    p.num_key_frames = 1;
    p.num_tokens = p.num_keys;
    p.num_queries = uniform(random, 1, 210);
  } else {
    p.num_key_frames = uniform(random, 0, 3) ? p.num_frames : uniform(random, 1, 5);
    // From many slots of few tokens to few slots of many.
    const double tokens = p.num_keys * std::pow(2.0, uniform(random, -2, 2));
    p.num_tokens = std::max<int64_t>(1, std::lround(tokens / p.num_key_frames));
    p.num_queries = uniform(random, 0, 1) ? p.num_tokens : uniform(random, 1, p.num_tokens);
  }
  const auto products = [&] {
    return double(p.batch * p.num_heads * p.num_frames) * p.num_queries * p.num_keys * p.head_dim;
  };
  while (products() > work && p.num_heads > 1) --p.num_heads;
  while (products() > work && p.batch > 1) --p.batch;
  if (products() > work) {
    p.num_queries = std::max<int64_t>(1, std::llround(p.num_queries * work / products()));
  }
  p.num_rows = p.row_of == RowOf::video   ? 1
               : p.row_of == RowOf::frame ? p.num_frames
                                          : p.num_tokens;
  p.cross_frame_gain = one_of(random, {1.0f, 1.0f, 1.0f, 0.0f, 0.8f, 1.5f, -0.7f});
  p.scale = one_of(random, {1.0f, 1.0f, 0.25f, -0.5f}) / std::sqrt(static_cast<float>(p.head_dim));
  sample.query_size = one_of(random, {1.0, 1.0, 1.0, 0.0, 0.01, 3.0, 10.0});
  sample.value_mean = one_of(random, {0.0, 0.0, 0.0, 50.0});
  draw_tables(random, sample, selected);
  const auto inputs =
      one_of(random, {Layout::contiguous, Layout::packed, Layout::spread, Layout::broadcast});
  sample.draw(random, inputs, one_of(random, {Layout::contiguous, Layout::packed, Layout::spread}));
  return sample;
}

std::vector<Sample> edge_samples() {
  std::vector<Sample> samples(4);
  // Many queries and keys; so many tokens that the gradients of some queries alone fill megabytes;
  // no video; the largest head_dim and the longest clip.
  samples[0].problem = {Storage::bfloat16, 1, 4,    90,      1,       5,    700, 4,
                        RowOf::video,      1, 2100, nullptr, nullptr, 0.8f, 0.4f};
  samples[1].problem = {Storage::float32, 1, 8, 1300,    1,       16,   1300, 8,
                        RowOf::frame,     8, 3, nullptr, nullptr, 1.0f, 0.2f};
  samples[2].problem = {Storage::float32, 0, 2, 5,       3,       16,   5,   2,
                        RowOf::video,     1, 6, nullptr, nullptr, 0.8f, 0.3f};
  samples[3].problem = {Storage::float16, 1,  16, 7,       2,       256,  7,    16,
                        RowOf::frame,     16, 21, nullptr, nullptr, 1.5f, 0.06f};
  for (Sample& sample : samples) {
    Random random(1);
    sample.origin = "edge " + std::to_string(&sample - samples.data());
    draw_tables(random, sample, false);
    sample.draw(random, Layout::packed, Layout::packed);
  }
  return samples;
}

}  // namespace tokenmix::cpu::testing
