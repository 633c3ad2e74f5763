#include "scratch.h"

#include <cstddef>
#include <memory>
#include <new>

namespace tokenmix::cpu {

namespace {

constexpr std::align_val_t alignment{64};
constexpr int64_t largest_kept = int64_t{8} << 20;  // floats

struct Free {
  void operator()(float* data) const { ::operator delete(data, alignment); }
};

struct Memory {
  std::unique_ptr<float, Free> data;
  int64_t size = 0;
};

thread_local Memory buffers[static_cast<int>(Buffer::count)];

}  // namespace

float* scratch(Buffer buffer, int64_t size) {
  Memory& memory = buffers[static_cast<int>(buffer)];
  if (memory.size < size) {
    memory = {};
    const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
    memory.data.reset(static_cast<float*>(::operator new(bytes, alignment)));
    memory.size = size;
  }
  return memory.data.get();
}

void trim_scratch() {
  for (Memory& memory : buffers) {
    if (memory.size > largest_kept) memory = {};
  }
}

}  // namespace tokenmix::cpu
