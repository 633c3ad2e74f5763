// Useful GFLOP/s of the kernels on one thread, without Python in the way of a profiler:
//
//   attention_benchmark [ISA|all] [FRAMES TOKENS KEYS HEADS HEAD_DIM GAIN STORAGE]
//
// A query frame sees KEYS tokens that all frames share. STORAGE is float32, bfloat16 or float16.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/cpu/tests/sample.h"

namespace tokenmix::cpu::testing {
namespace {

using Clock = std::chrono::steady_clock;

Sample sample_of(int argc, char** argv) {
  const auto number = [&](int i, double otherwise) {
    return argc > i ? std::atof(argv[i]) : otherwise;
  };
  const auto integer = [&](int i, int64_t otherwise) {
    return static_cast<int64_t>(number(i, static_cast<double>(otherwise)));
  };
  Sample sample;
  Problem& p = sample.problem;
  sample.origin = "one video";
  p = {};
  p.batch = p.num_rows = 1;
  p.row_of = RowOf::video;
  p.num_frames = p.num_key_frames = integer(2, 8);
  p.num_queries = p.num_tokens = integer(3, 197);
  p.num_keys = integer(4, p.num_tokens);
  p.num_heads = integer(5, 12);
  p.head_dim = integer(6, 64);
  p.cross_frame_gain = static_cast<float>(number(7, 1.0));
  p.scale = 1 / std::sqrt(static_cast<float>(p.head_dim));
  for (const Storage storage : {Storage::float32, Storage::bfloat16, Storage::float16}) {
    if (argc > 8 && std::strcmp(argv[8], name_of(storage)) == 0) p.storage = storage;
  }
  for (int64_t j = 0; j < p.num_keys; ++j) {
    const int64_t frame = j % p.num_frames;
    sample.key_index.push_back(static_cast<int32_t>(frame * p.num_tokens + j % p.num_tokens));
    sample.key_frame.push_back(static_cast<int32_t>(frame));
  }
  Random random(1);
  sample.draw(random, Layout::packed, Layout::contiguous);
  return sample;
}

// Seconds of the fastest of the calls that fit in one second.
template <typename Call>
double best_of(Call call) {
  double best = 1e9;
  for (const auto start = Clock::now(); Clock::now() - start < std::chrono::seconds(1);) {
    const auto before = Clock::now();
    call();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - before).count());
  }
  return best;
}

void run(const std::string& wanted, Sample sample) {
  const Problem& p = sample.problem;
  const double products = static_cast<double>(p.num_heads * p.num_frames * p.num_queries) *
                          static_cast<double>(p.num_keys * p.head_dim);
  std::printf("%s\n", sample.description().c_str());
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (!is_supported(isa) || (wanted != "all" && wanted != cpu::name_of(isa))) continue;
    const Threads here = {1, [](int64_t num_tasks, void (*body)(int64_t, int64_t, void*),
                                void* context) { body(0, num_tasks, context); }};
    const double forward_time = best_of([&] { forward(sample.forward(), here, isa); });
    const double backward_time = best_of([&] { backward(sample.backward(), here, isa); });
    // Two products in the forward, five in the backward.
    std::printf("%-9s forward %7.1f GFLOP/s, backward %7.1f GFLOP/s\n", cpu::name_of(isa),
                4e-9 * products / forward_time, 10e-9 * products / backward_time);
  }
}

}  // namespace
}  // namespace tokenmix::cpu::testing

int main(int argc, char** argv) {
  using namespace tokenmix::cpu::testing;
  run(argc > 1 ? argv[1] : "all", sample_of(argc, argv));
}
