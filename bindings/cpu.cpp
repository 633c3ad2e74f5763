// Registers the CPU kernel as the operators tokenmix_ops::cpu_fwd and cpu_bwd, whose schemas
// tokenmix_ops/ops.py defines. Uses the LibTorch stable ABI alone: one binary serves every PyTorch
// from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "kernels/cpu/attention.h"

namespace {

namespace cpu = tokenmix::cpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::array kAllIsas = {cpu::Isa::portable, cpu::Isa::avx2, cpu::Isa::avx512,
                                  cpu::Isa::amx};

// What the next calls use; only tests change it.
std::atomic<cpu::Isa>& isa_in_use() {
  static std::atomic<cpu::Isa> isa{cpu::best()};
  return isa;
}

// A loop's body, and the first exception of any thread, whose type PyTorch would not pass on.
struct Job {
  void (*body)(int64_t begin, int64_t end, void* context);
  void* context;
  std::mutex mutex;
  std::exception_ptr failure;

  void run(int64_t begin, int64_t end) {
    try {
      body(begin, end, context);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  }
};

cpu::Threads threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t num_tasks, void (*body)(int64_t, int64_t, void*), void* context) {
            Job job{body, context, {}, {}};
            const auto run = [](int64_t begin, int64_t end, void* of) {
              static_cast<Job*>(of)->run(begin, end);
            };
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, num_tasks, 1, run, &job));
            if (job.failure) std::rethrow_exception(job.failure);
          }};
}

template <class Call>
void compute(Call call) {
  try {
    call();
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "the CPU kernel ran out of memory for its working buffers");
  }
}

// As in "Float [2, 4, 10, 3, 16]".
std::string described(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  text += " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

cpu::Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cpu::Storage::float32;
    case ScalarType::BFloat16:
      return cpu::Storage::bfloat16;
    case ScalarType::Half:
      return cpu::Storage::float16;
    default:
      STD_TORCH_CHECK(false, "query must be float32, bfloat16 or float16, got ",
                      described(tensor));
  }
}

// Kernels read rows of head_dim numbers that lie side by side.
Tensor with_rows(const Tensor& tensor) {
  const bool has_rows = tensor.stride(-1) == 1 || tensor.size(-1) == 1;
  return has_rows ? tensor : torch::stable::contiguous(tensor);
}

// Keys that arrive selected, [batch, num_keys, num_heads, head_dim], are one frame.
cpu::Strided strided(const Tensor& tensor) {
  const auto strides = tensor.strides();
  const bool has_frames = tensor.dim() == 5;
  return {tensor.data_ptr(), strides[0], has_frames ? strides[1] : 0, strides[has_frames ? 2 : 1],
          strides[has_frames ? 3 : 2]};
}

void check_like(const char* name, const Tensor& tensor, const char* other_name,
                const Tensor& other) {
  bool same = tensor.dim() == other.dim() && tensor.scalar_type() == other.scalar_type();
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == other.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape and dtype of ", other_name, ", ",
                  described(other), ", got ", described(tensor));
}

const int32_t* table(const char* name, const Tensor& tensor, int64_t num_rows, int64_t num_keys) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() &&
                      tensor.dim() == 2 && tensor.size(0) >= num_rows && tensor.size(1) == num_keys,
                  name, " must be contiguous int32 [at least ", num_rows, ", ", num_keys, "], got ",
                  described(tensor), tensor.is_contiguous() ? "" : ", not contiguous");
  return tensor.const_data_ptr<int32_t>();
}

// The kernel reads and writes wherever an index points.
void check_indices(const int32_t* index, int64_t count, int64_t num_tokens) {
  const int32_t* wrong = std::find_if(index, index + count, [&](int32_t token) {
    return token < 0 || token >= num_tokens;
  });
  STD_TORCH_CHECK(wrong == index + count, "key_index must name tokens 0 <= i < ", num_tokens,
                  ", got ", *wrong);
}

cpu::Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& key_index, const Tensor& key_frame,
                        std::optional<int64_t> row_dim, int64_t num_tokens, double cross_frame_gain,
                        double scale) {
  const bool selected = key.dim() == 4;
  STD_TORCH_CHECK(query.dim() == 5 && (selected || key.dim() == 5),
                  "query must have 5 dimensions, key and value 5 or 4, got query ",
                  described(query), " and key ", described(key));
  check_like("value", value, "key", key);
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && key.size(0) == query.size(0) &&
                      key.size(-2) == query.size(3) && key.size(-1) == query.size(4),
                  "key must have the dtype, batch, num_heads and head_dim of query, ",
                  described(query), ", got ", described(key));
  STD_TORCH_CHECK(!row_dim || *row_dim == 1 || *row_dim == 2, "row_dim must be None, 1 or 2, got ",
                  row_dim.value_or(0));
  STD_TORCH_CHECK(query.size(4) >= 1 && query.size(4) <= cpu::max_head_dim,
                  "head_dim must be 1 to ", cpu::max_head_dim, ", got ", query.size(4));
  STD_TORCH_CHECK(key_index.dim() == 2 && key_index.size(1) >= 1,
                  "key_index must have two dimensions and at least one key slot, got ",
                  described(key_index));

  cpu::Problem problem{};
  problem.storage = storage_of(query);
  problem.batch = query.size(0);
  problem.num_frames = query.size(1);
  problem.num_queries = query.size(2);
  problem.num_heads = query.size(3);
  problem.head_dim = query.size(4);
  problem.row_of = !row_dim         ? cpu::RowOf::video
                   : *row_dim == 1 ? cpu::RowOf::frame
                                   : cpu::RowOf::token;
  // The tables may have more: those of queries that are not there.
  problem.num_rows = row_dim ? query.size(*row_dim) : 1;
  problem.num_keys = key_index.size(1);
  const int32_t* index = table("key_index", key_index, problem.num_rows, problem.num_keys);
  const int32_t* frame = table("key_frame", key_frame, problem.num_rows, problem.num_keys);
  problem.key_frame = cross_frame_gain == 1.0 ? nullptr : frame;
  if (selected) {
    STD_TORCH_CHECK(!row_dim && key.size(1) == problem.num_keys,
                    "selected keys must be those of the one row of key_index, ", problem.num_keys,
                    ", got ", key.size(1));
    problem.num_tokens = problem.num_keys;
    problem.num_key_frames = 1;
  } else {
    STD_TORCH_CHECK(key.size(2) == num_tokens, "key must have num_tokens tokens a frame, ",
                    num_tokens, ", got ", key.size(2));
    check_indices(index, problem.num_rows * problem.num_keys, key.size(1) * num_tokens);
    problem.num_tokens = num_tokens;
    problem.num_key_frames = key.size(1);
    problem.key_index = index;
  }
  problem.cross_frame_gain = static_cast<float>(cross_frame_gain);
  problem.scale = static_cast<float>(scale);
  return problem;
}

// Allocates a contiguous tensor, much faster than the stable ABI's `new_empty`, which looks its
// operator up by name.
Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 5> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(std::data(sizes)[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), std::data(sizes), strides.data(), dtype,
      aoti_torch_device_type_cpu(), /*device_index=*/0, &handle));
  return Tensor(handle);
}

// Contiguous, of the shape and dtype of query.
Tensor empty_like_query(const Tensor& query) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(query.get(), &dtype));
  const auto sizes = query.sizes();
  return empty({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}, dtype);
}

// The strides of `tensor` if it is dense, else contiguous: `empty_gradients` of ops.py.
Tensor empty_gradient(const Tensor& tensor) {
  Tensor gradient = torch::stable::empty_like(tensor);
  return gradient.stride(-1) == 1 ? gradient : torch::stable::new_empty(tensor, tensor.sizes());
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Tensor& key_index, const Tensor& key_frame,
                                   std::optional<int64_t> row_dim, int64_t num_tokens,
                                   int64_t /*num_prefix_tokens*/,
                                   std::optional<int64_t> /*num_full_tokens*/,
                                   double cross_frame_gain, double scale) {
  const Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value);
  const cpu::Problem problem =
      problem_of(q, k, v, key_index, key_frame, row_dim, num_tokens, cross_frame_gain, scale);
  Tensor output = empty_like_query(query);
  Tensor lse = empty({problem.batch, problem.num_heads, problem.num_frames, problem.num_queries},
                     aoti_torch_dtype_float32());
  if (problem.batch > 0) {
    compute([&] {
      cpu::forward({problem, strided(q), strided(k), strided(v), strided(output),
                    lse.mutable_data_ptr<float>()},
                   threads(), isa_in_use());
    });
  }
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& output_grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& lse, const Tensor& key_index, const Tensor& key_frame,
    const Tensor& /*token_order*/, const Tensor& /*use_start*/, const Tensor& /*uses*/,
    std::optional<int64_t> row_dim, int64_t num_tokens, int64_t /*num_prefix_tokens*/,
    std::optional<int64_t> /*num_full_tokens*/, double cross_frame_gain, double scale) {
  const Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value);
  const Tensor o = with_rows(output), o_grad = with_rows(output_grad);
  const Tensor sums = lse.is_contiguous() ? lse : torch::stable::contiguous(lse);
  const cpu::Problem problem =
      problem_of(q, k, v, key_index, key_frame, row_dim, num_tokens, cross_frame_gain, scale);
  check_like("output", o, "query", q);
  check_like("output_grad", o_grad, "query", q);
  STD_TORCH_CHECK(sums.numel() == problem.batch * problem.num_heads * problem.num_frames *
                                      problem.num_queries,
                  "lse must be [batch, num_heads, num_frames, num_queries], got ", described(lse));
  Tensor query_grad = empty_like_query(query);
  Tensor key_grad = empty_gradient(key);
  Tensor value_grad = empty_gradient(value);
  if (problem.batch > 0) {
    compute([&] {
      cpu::backward({problem, strided(o_grad), strided(q), strided(k), strided(v), strided(o),
                     sums.const_data_ptr<float>(), strided(query_grad), strided(key_grad),
                     strided(value_grad)},
                    threads(), isa_in_use());
    });
  }
  return {query_grad, key_grad, value_grad};
}

// The instruction set in use, then all that this processor supports, the widest last.
std::string isas() {
  std::string names = cpu::name_of(isa_in_use());
  for (const cpu::Isa isa : kAllIsas) {
    if (cpu::is_supported(isa)) names += std::string(" ") + cpu::name_of(isa);
  }
  return names;
}

std::string torch_of_build() {
  constexpr uint64_t version = TORCH_ABI_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 0xff) + "." +
         std::to_string(version >> 40 & 0xff);
}

void force_isa(const std::string& name) {
  for (const cpu::Isa isa : kAllIsas) {
    if (name == cpu::name_of(isa) && cpu::is_supported(isa)) {
      isa_in_use() = isa;
      return;
    }
  }
  STD_TORCH_CHECK(false, "expected an instruction set that this processor supports, got ", name);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmix_ops, m) {
  m.def("cpu_isas() -> str");
  m.def("cpu_force_isa(str name) -> ()");
  m.def("cpu_torch_of_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmix_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&isas));
  m.impl("cpu_force_isa", TORCH_BOX(&force_isa));
  m.impl("cpu_torch_of_build", TORCH_BOX(&torch_of_build));
}

STABLE_TORCH_LIBRARY_IMPL(tokenmix_ops, CPU, m) {
  m.impl("cpu_fwd", TORCH_BOX(&forward));
  m.impl("cpu_bwd", TORCH_BOX(&backward));
}
