// The backward pass. Include the instruction set's vectors first.
//
// Weights are recomputed from the forward pass's lse. With P the weights and dS the gradient of
// the logits of a block of queries, in float32,
//
//   dV += P^T dO     dK += dS^T Q     dQ = dS K     dS = P * (dO V^T - rowsum(dO * O)) * gain
//
// Gradients of a row's key slots are summed in scratch while all its queries pass; each token's
// gradient is then summed over the slots that name it and written once. Where there are few heads,
// a head's queries are cut into chunks whose sums are added in order. The number of chunks depends
// on the problem alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "exp2.h"
#include "pack.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"

namespace tokenmix::cpu {
namespace {

constexpr int64_t backward_block = 48;             // queries
constexpr int64_t backward_key_block = 128;        // of one block of weights; whole panels
constexpr int64_t backward_key_superblock = 1024;  // packed at a time; whole key blocks
constexpr int64_t backward_tasks = 64;             // enough to balance many threads
constexpr int64_t min_chunk_blocks = 4;            // enough to pay for adding a chunk's sums

class BackwardPass {
 public:
  explicit BackwardPass(const Backward& call)
      : call_(call),
        problem_(call.problem),
        padded_dim_(rounded_up(problem_.head_dim, width)),
        num_tokens_(problem_.num_key_frames * problem_.num_tokens),
        num_rows_(num_rows_of(problem_)),
        num_sums_(num_rows_ == 1 ? problem_.num_keys : num_tokens_),
        num_queries_(Row{problem_, 0, 0, 0}.num_queries()),
        num_blocks_((num_queries_ + backward_block - 1) / backward_block) {
    const int64_t heads = num_heads(), blocks = num_rows_ * num_blocks_;
    const int64_t wanted = heads > 0 ? (backward_tasks + heads - 1) / heads : 1;
    num_chunks_ = max(1, min(wanted, blocks / min_chunk_blocks));
  }

  void run(const Threads& threads) {
    if (num_chunks_ == 1) {
      parallel<&BackwardPass::run_heads>(threads, num_heads());
    } else {
      const int64_t size = num_heads() * num_chunks_ * sums_size();
      chunk_sums_ = {scratch(Buffer::chunk_key_grads, size),
                     scratch(Buffer::chunk_value_grads, size)};
      parallel<&BackwardPass::run_chunks>(threads, num_heads() * num_chunks_);
      parallel<&BackwardPass::finish_chunks>(threads, num_heads());
    }
    trim_scratch();
  }

 private:
  // Gradients of keys (in units of 1 / ln 2) and values, [slot or token, padded_dim].
  struct Sums {
    float *keys, *values;
  };

  // What the queries of one row share.
  struct Packed {
    Panels key_columns, value_columns, key_rows;
    Gains gains;
    Sums sums;
    int64_t slot, num_keys;  // of the superblock
  };

  int64_t num_heads() const { return problem_.batch * problem_.num_heads; }
  int64_t sums_size() const { return num_sums_ * padded_dim_; }

  template <void (BackwardPass::*body)(int64_t, int64_t) const>
  void parallel(const Threads& threads, int64_t num_tasks) {
    if (num_tasks == 0) return;
    threads.parallel_for(
        num_tasks,
        [](int64_t begin, int64_t end, void* context) {
          (static_cast<const BackwardPass*>(context)->*body)(begin, end);
          trim_scratch();
        },
        this);
  }

  void run_heads(int64_t begin, int64_t end) const {
    const Sums sums{scratch(Buffer::chunk_key_grads, sums_size()),
                    scratch(Buffer::chunk_value_grads, sums_size())};
    for (int64_t head = begin; head < end; ++head) {
      run_chunk(head, 0, sums);
      finish(head, sums);
    }
  }

  void run_chunks(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      run_chunk(task / num_chunks_, task % num_chunks_, sums_of(task));
    }
  }

  void finish_chunks(int64_t begin, int64_t end) const {
    for (int64_t head = begin; head < end; ++head) {
      const Sums total = sums_of(head * num_chunks_);
      for (int64_t chunk = 1; chunk < num_chunks_; ++chunk) {
        const Sums sums = sums_of(head * num_chunks_ + chunk);
        add(sums.keys, sums_size(), total.keys);
        add(sums.values, sums_size(), total.values);
      }
      finish(head, total);
    }
  }

  Sums sums_of(int64_t task) const {
    return {chunk_sums_.keys + task * sums_size(), chunk_sums_.values + task * sums_size()};
  }

  Row row_of(int64_t head, int64_t row) const {
    return {problem_, head / problem_.num_heads, head % problem_.num_heads, row};
  }

  // Sets `sums` to the gradients that the chunk's queries give: of slots if there is one row of
  // them, else of tokens.
  void run_chunk(int64_t head, int64_t chunk, const Sums& sums) const {
    fill_zero(sums.keys, sums_size());
    fill_zero(sums.values, sums_size());
    const int64_t blocks = num_rows_ * num_blocks_;
    const int64_t begin = blocks * chunk / num_chunks_, end = blocks * (chunk + 1) / num_chunks_;
    for (int64_t block = begin; block < end;) {
      const Row row = row_of(head, block / num_blocks_);
      const int64_t first = block % num_blocks_;
      const int64_t count = min(end - block, num_blocks_ - first);
      run_row(row, first, first + count, sums);
      block += count;
    }
  }

  // Blocks begin to end of a row's queries.
  void run_row(const Row& row, int64_t begin, int64_t end, const Sums& sums) const {
    const int64_t dim = problem_.head_dim, num_keys = problem_.num_keys;
    const int64_t size = min(num_keys, backward_key_superblock);
    const int64_t padded_size = rounded_up(size, panel_width) * padded_dim_;
    const int64_t first_query = query_of(begin);
    Packed packed;
    packed.sums = {scratch(Buffer::key_grads, size * padded_dim_),
                   scratch(Buffer::value_grads, size * padded_dim_)};
    if (problem_.cross_frame_gain != 1.0f) {
      const int64_t stride = rounded_up(num_keys, panel_width);
      packed.gains = Gains(row, stride, scratch(Buffer::gains, problem_.num_frames * stride));
    }
    const int64_t grads = num_keys > size ? query_of(end) - first_query : backward_block;
    float* query_grads = scratch(Buffer::query_grads, grads * padded_dim_);
    for (int64_t slot = 0; slot < num_keys; slot += size) {
      packed.slot = slot;
      packed.num_keys = min(size, num_keys - slot);
      const auto reader = [&](const Strided& tensor) {
        return [&, slot](int64_t i, float* to) {
          read_row(problem_.storage, tensor, row.offset(tensor, row.key(slot + i)), dim, 1.0f, to);
        };
      };
      packed.key_columns = pack_columns(packed.num_keys, dim, reader(call_.key),
                                        scratch(Buffer::key_columns, padded_size));
      packed.value_columns = pack_columns(packed.num_keys, dim, reader(call_.value),
                                          scratch(Buffer::value_columns, padded_size));
      packed.key_rows =
          pack_rows(packed.num_keys, dim, reader(call_.key),
                    scratch(Buffer::key_rows, size * rounded_up(dim, panel_width)));
      fill_zero(packed.sums.keys, packed.num_keys * padded_dim_);
      fill_zero(packed.sums.values, packed.num_keys * padded_dim_);
      for (int64_t block = begin; block < end; ++block) {
        float* block_grads =
            num_keys > size ? query_grads + (query_of(block) - first_query) * padded_dim_
                            : query_grads;
        if (packed.gains.exist()) {
          run_block<true>(row, block, packed, block_grads);
        } else {
          run_block<false>(row, block, packed, block_grads);
        }
      }
      for (int64_t i = 0; i < packed.num_keys; ++i) {
        const int64_t to = num_rows_ == 1 ? slot + i : row.key_token(slot + i);
        add(packed.sums.keys + i * padded_dim_, padded_dim_, sums.keys + to * padded_dim_);
        add(packed.sums.values + i * padded_dim_, padded_dim_, sums.values + to * padded_dim_);
      }
    }
  }

  // First query of a block.
  int64_t query_of(int64_t block) const { return num_queries_ * block / num_blocks_; }

  template <bool gained>
  void run_block(const Row& row, int64_t block, const Packed& packed, float* query_grads) const {
    const int64_t dim = problem_.head_dim, dim_vectors = vectors_of(dim);
    const int64_t first = query_of(block), count = query_of(block + 1) - first;
    constexpr int64_t stride = backward_key_block + 16;  // an odd number of cache lines
    float* queries = scratch(Buffer::queries, backward_block * padded_dim_);
    float* output_grads = scratch(Buffer::output_grads, backward_block * padded_dim_);
    float* weights = scratch(Buffer::logits, backward_block * stride);
    float* weight_grads = scratch(Buffer::weight_grads, backward_block * stride);
    float lse[backward_block], means[backward_block];
    for (int64_t i = 0; i < count; ++i) {
      const Place place = row.query(first + i);
      float* grad = output_grads + i * padded_dim_;
      float output[max_head_dim + width];
      read(call_.query, row, place, log2_factor(problem_.scale), queries + i * padded_dim_);
      read(call_.output_grad, row, place, 1.0f, grad);
      read(call_.output, row, place, 1.0f, output);
      lse[i] = call_.lse[row.lse_offset(place)];
      means[i] = dot(grad, output, padded_dim_);
    }
    const Panels query_rows{queries, padded_dim_, panel_width};
    const Panels output_grad_rows{output_grads, padded_dim_, panel_width};
    for (int64_t key = 0; key < packed.num_keys; key += backward_key_block) {
      const int64_t num_keys = min(backward_key_block, packed.num_keys - key);
      const int64_t vectors = vectors_of(num_keys);
      product<Left::rows, false>(count, vectors, dim, queries, padded_dim_,
                                 packed.key_columns.from_column(key), {weights, stride});
      product<Left::rows, false>(count, vectors, dim, output_grads, padded_dim_,
                                 packed.value_columns.from_column(key), {weight_grads, stride});
      for (int64_t i = 0; i < count; ++i) {
        const Place place = row.query(first + i);
        const float* gains = gained ? packed.gains.of(place.frame, packed.slot + key) : nullptr;
        differentiate<gained>(gains, lse[i], means[i], vectors, weights + i * stride,
                              weight_grads + i * stride);
        if (key == 0) prefetch(row, place, first + count + i);
      }
      product<Left::columns, true>(num_keys, dim_vectors, count, weights, stride,
                                   output_grad_rows,
                                   {packed.sums.values + key * padded_dim_, padded_dim_});
      product<Left::columns, true>(num_keys, dim_vectors, count, weight_grads, stride, query_rows,
                                   {packed.sums.keys + key * padded_dim_, padded_dim_});
      const Panels key_rows = packed.key_rows.from_row(key);
      const Matrix to{query_grads, padded_dim_};
      if (packed.slot + key > 0) {
        product<Left::rows, true>(count, dim_vectors, num_keys, weight_grads, stride, key_rows, to);
      } else {
        product<Left::rows, false>(count, dim_vectors, num_keys, weight_grads, stride, key_rows,
                                   to);
      }
    }
    if (packed.slot + packed.num_keys < problem_.num_keys) return;
    for (int64_t i = 0; i < count; ++i) {
      write_row(problem_.storage, query_grads + i * padded_dim_, dim, problem_.scale,
                call_.query_grad, row.offset(call_.query_grad, row.query(first + i)));
    }
  }

  // Turns logits into weights, and gradients of the weights into those of the logits. Padded slots
  // give numbers that nothing reads.
  template <bool gained>
  static void differentiate(const float* gains, float lse, float mean, int64_t vectors,
                            float* weights, float* grads) {
    const Vec shift = broadcast(-lse), means = broadcast(mean);
    for (int64_t i = 0; i < vectors * width; i += width) {
      const Vec logit = load(weights + i);
      const Vec gain = gained ? load(gains + i) : broadcast(1);
      const Vec weight = exp2(gained ? fma(logit, gain, shift) : logit + shift);
      const Vec grad = weight * (load(grads + i) - means);
      store(weights + i, weight);
      store(grads + i, gained ? grad * gain : grad);
    }
  }

  void read(const Strided& tensor, const Row& row, Place place, float factor, float* to) const {
    read_row(problem_.storage, tensor, row.offset(tensor, place), problem_.head_dim, factor, to);
  }

  // What is about to be written for one query, and read for a later one.
  void prefetch(const Row& row, Place place, int64_t later) const {
    const Storage storage = problem_.storage;
    const int64_t dim = problem_.head_dim;
    prefetch_row<Access::write>(storage, call_.query_grad, row.offset(call_.query_grad, place), dim);
    if (later >= num_queries_) return;
    const Place next = row.query(later);
    for (const Strided* tensor : {&call_.query, &call_.output_grad, &call_.output}) {
      prefetch_row<Access::read>(storage, *tensor, row.offset(*tensor, next), dim);
    }
  }

  // Writes the gradients of a head's tokens.
  void finish(int64_t head, const Sums& sums) const {
    const Row row = row_of(head, 0);
    Sums tokens = sums;
    if (num_rows_ == 1 && problem_.key_index) {
      const int64_t size = num_tokens_ * padded_dim_;
      tokens = {scratch(Buffer::token_key_grads, size), scratch(Buffer::token_value_grads, size)};
      fill_zero(tokens.keys, size);
      fill_zero(tokens.values, size);
      for (int64_t slot = 0; slot < problem_.num_keys; ++slot) {
        const int64_t token = row.key_token(slot);
        add(sums.keys + slot * padded_dim_, padded_dim_, tokens.keys + token * padded_dim_);
        add(sums.values + slot * padded_dim_, padded_dim_, tokens.values + token * padded_dim_);
      }
    }
    constexpr auto ln_2 = 0.6931471805599453f;
    for (int64_t token = 0; token < num_tokens_; ++token) {
      const Place place{token / problem_.num_tokens, token % problem_.num_tokens};
      write_row(problem_.storage, tokens.keys + token * padded_dim_, problem_.head_dim, ln_2,
                call_.key_grad, row.offset(call_.key_grad, place));
      write_row(problem_.storage, tokens.values + token * padded_dim_, problem_.head_dim, 1.0f,
                call_.value_grad, row.offset(call_.value_grad, place));
    }
  }

  const Backward& call_;
  const Problem& problem_;
  int64_t padded_dim_, num_tokens_, num_rows_, num_sums_, num_queries_, num_blocks_, num_chunks_;
  Sums chunk_sums_{};
};

inline void backward_pass(const Backward& call, const Threads& threads) {
  BackwardPass(call).run(threads);
}

}  // namespace
}  // namespace tokenmix::cpu
