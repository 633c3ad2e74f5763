#include "kernels/cpu/tests/tensor.h"

#include <algorithm>
#include <array>
#include <map>

namespace tokenmix::cpu::testing {
namespace {

// All bits set: a NaN in every format.
constexpr std::byte poisoned{0xFF};

// AddressSanitizer has guards of its own, which also notice a read, but only at a block's very end.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t guard = 0;
#else
constexpr int64_t guard = 64;
#endif

struct Strides {
  std::array<int64_t, 4> of;  // of batch, frame, token, head
  int64_t extent;             // elements from the first to behind the last
};

Strides strides_of(Random& random, Layout layout, const Shape& shape, int64_t num_packed) {
  const std::array<int64_t, 4> sizes = {shape.batch, shape.frame, shape.token, shape.head};
  std::array<int, 4> inner_first = {3, 2, 1, 0};
  Strides strides{{}, shape.head_dim};
  if (layout == Layout::spread || layout == Layout::broadcast) {
    std::shuffle(inner_first.begin(), inner_first.end(), random);
  }
  int64_t stride = shape.head_dim;
  for (const int i : inner_first) {
    if (layout == Layout::spread || layout == Layout::broadcast) stride += uniform(random, 0, 5);
    // Not the dimensions that sums run over: equal terms would have equal errors.
    const bool repeats = layout == Layout::broadcast && (i == 0 || i == 3) && uniform(random, 0, 1);
    strides.of[i] = repeats ? 0 : stride;
    if (repeats) continue;
    strides.extent += (sizes[i] - 1) * stride;
    stride *= std::max<int64_t>(sizes[i], 1);
    if (i == 3) stride *= num_packed;
  }
  if (num_packed > 1) strides.extent += (num_packed - 1) * shape.head * shape.head_dim;
  return strides;
}

}  // namespace

int64_t uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

std::vector<Tensor> make_tensors(Random& random, Format format, Layout layout,
                                 const std::vector<Shape>& shapes) {
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape& shape = shapes[i];
    if (layout == Layout::packed && i > 0 && shape == shapes[i - 1]) {
      tensors.push_back(tensors.back());
      auto& data = reinterpret_cast<std::byte*&>(tensors.back().strided.data);
      data += shape.head * shape.head_dim * format.size();
      continue;
    }
    const auto other = std::find_if(shapes.begin() + i, shapes.end(),
                                    [&](const Shape& next) { return next != shape; });
    const int64_t num_packed = layout == Layout::packed ? other - shapes.begin() - i : 1;
    const Strides strides = strides_of(random, layout, shape, num_packed);
    const int64_t misalignment = uniform(random, 0, 15) * format.size();
    const int64_t extent = shape.size() > 0 ? strides.extent * format.size() : 0;
    auto memory =
        std::make_shared<std::vector<std::byte>>(misalignment + extent + 2 * guard, poisoned);
    std::byte* data = memory->data() + guard + misalignment;
    tensors.push_back({shape,
                       format,
                       {data, strides.of[0], strides.of[1], strides.of[2], strides.of[3]},
                       std::move(memory)});
  }
  return tensors;
}

void Tensor::fill(const std::vector<double>& values) {
  const double* next = values.data();
  for_each_row([&](int64_t offset) {
    for (int64_t d = 0; d < shape.head_dim; ++d) store(format, strided.data, offset + d, *next++);
  });
}

std::vector<double> Tensor::dense() const {
  std::vector<double> values;
  values.reserve(static_cast<size_t>(shape.size()));
  for_each_row([&](int64_t offset) {
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      values.push_back(load(format, strided.data, offset + d));
    }
  });
  return values;
}

void poison(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    std::fill(tensor.memory->begin(), tensor.memory->end(), poisoned);
  }
}

bool surroundings_untouched(const std::vector<Tensor>& tensors) {
  std::map<const std::vector<std::byte>*, std::vector<std::byte>> copies;
  for (const Tensor& tensor : tensors) {
    std::vector<std::byte>& copy =
        copies.try_emplace(tensor.memory.get(), *tensor.memory).first->second;
    const int64_t start = static_cast<std::byte*>(tensor.strided.data) - tensor.memory->data();
    const int64_t row = tensor.shape.head_dim * tensor.format.size();
    tensor.for_each_row([&](int64_t offset) {
      std::fill_n(copy.begin() + start + offset * tensor.format.size(), row, poisoned);
    });
  }
  return std::all_of(copies.begin(), copies.end(), [](const auto& entry) {
    return std::all_of(entry.second.begin(), entry.second.end(),
                       [](std::byte byte) { return byte == poisoned; });
  });
}

std::vector<std::byte> bytes_of(const std::vector<Tensor>& tensors) {
  std::vector<std::byte> bytes;
  for (const Tensor& tensor : tensors) {
    tensor.for_each_row([&](int64_t offset) {
      const auto* row =
          static_cast<const std::byte*>(tensor.strided.data) + offset * tensor.format.size();
      bytes.insert(bytes.end(), row, row + tensor.shape.head_dim * tensor.format.size());
    });
  }
  return bytes;
}

}  // namespace tokenmix::cpu::testing
