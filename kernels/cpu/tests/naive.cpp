#include "kernels/cpu/tests/naive.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/tests/formats.h"

namespace tokenmix::cpu::testing {
namespace {

// The float32 numbers of one query.
struct Query {
  std::vector<int64_t> frame, token;  // of each slot
  std::vector<float> factor, logit;   // base 2
};

std::vector<float> read(const Problem& p, const Strided& x, int64_t b, int64_t f, int64_t t,
                        int64_t h) {
  std::vector<float> row;
  const int64_t offset = b * x.batch + f * x.frame + t * x.token + h * x.head;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    row.push_back(static_cast<float>(load(format_of(p.storage), x.data, offset + d)));
  }
  return row;
}

void write(const Problem& p, const Strided& x, int64_t b, int64_t f, int64_t t, int64_t h,
           const float* row, int64_t size) {
  const int64_t offset = b * x.batch + f * x.frame + t * x.token + h * x.head;
  for (int64_t d = 0; d < size; ++d) store(format_of(p.storage), x.data, offset + d, row[d]);
}

float dot(const std::vector<float>& x, const std::vector<float>& y) {
  float sum = 0;
  for (size_t d = 0; d < x.size(); ++d) sum += x[d] * y[d];
  return sum;
}

float round_to(int bits, float x) {
  int exponent;
  const float fraction = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}

float exponential(float x, Fault fault) {
  const bool off = fault == Fault::exponential_off_everywhere ||
                   (fault == Fault::exponential_off_at_half && x - std::floor(x) > 0.5f);
  return static_cast<float>(std::exp2(double{x}) * (off ? 1 + 1e-5 : 1));
}

Query logits(const Problem& p, const Strided& key, const std::vector<float>& query, int64_t b,
             int64_t h, int64_t t, int64_t s, Fault fault) {
  Query q;
  const int64_t r = p.row_of == RowOf::video ? 0 : p.row_of == RowOf::frame ? t : s;
  for (int64_t j = 0; j < p.num_keys; ++j) {
    const int64_t slot = r * p.num_keys + j;
    int64_t index = p.key_index ? p.key_index[slot] : j;
    if (fault == Fault::wrong_key && j == p.num_keys / 2) {
      index = (index + 1) % (p.num_tokens * p.num_key_frames);
    }
    q.frame.push_back(index / p.num_tokens);
    q.token.push_back(index % p.num_tokens);
    const int64_t of = p.key_frame ? p.key_frame[slot] : -1;
    const bool cross =
        p.key_frame && of != t && (of != -1 || fault == Fault::gain_on_unscaled_keys);
    const float gain = cross && fault != Fault::missing_gain ? p.cross_frame_gain : 1;
    q.factor.push_back(p.scale * gain);
    float score = dot(query, read(p, key, b, q.frame[j], q.token[j], h));
    if (fault == Fault::rounded_products) score = round_to(12, score);
    q.logit.push_back(score * q.factor[j] * static_cast<float>(M_LOG2E));
    if (j == p.num_keys / 2 &&
        (fault == Fault::dropped_key || (fault == Fault::dropped_key_of_one_query && s == 3))) {
      q.logit[j] = -INFINITY;
    }
  }
  return q;
}

template <typename Visit>
void for_each_query(const Problem& p, Visit visit) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      for (int64_t t = 0; t < p.num_frames; ++t) {
        for (int64_t s = 0; s < p.num_queries; ++s) visit(b, h, t, s);
      }
    }
  }
}

}  // namespace

const char* name_of(Fault fault) {
  static const char* const names[num_faults] = {
      "none",
      "wrong key",
      "dropped key",
      "dropped key of one query",
      "key counted twice",
      "missing gain",
      "gain on keys that are never scaled",
      "gain missing in gradients",
      "exponential off by 1e-5 at half of its arguments",
      "exponential off by 1e-5",
      "exponential off by 1e-5 in the backward",
      "natural lse",
      "weights rounded to bfloat16",
      "products rounded to 12 bits",
      "delta of the next query",
      "last query missing in gradients",
      "repeated key overwrites",
      "unselected tokens not zeroed",
      "element not written",
      "write past a row",
  };
  return names[static_cast<int>(fault)];
}

void naive_forward(const Forward& f, Fault fault) {
  const Problem& p = f.problem;
  float* lse = f.lse;
  for_each_query(p, [&](int64_t b, int64_t h, int64_t t, int64_t s) {
    const Query q = logits(p, f.key, read(p, f.query, b, t, s, h), b, h, t, s, fault);
    const float largest = *std::max_element(q.logit.begin(), q.logit.end());
    std::vector<float> output(static_cast<size_t>(p.head_dim + 1), 0.0f);
    float total = 0;
    for (int64_t j = 0; j < p.num_keys; ++j) {
      float weight = exponential(q.logit[j] - largest, fault);
      if (fault == Fault::key_counted_twice && j == p.num_keys / 2) weight *= 2;
      total += weight;
      if (fault == Fault::rounded_weights) weight = round_to(8, weight);
      const auto value = read(p, f.value, b, q.frame[j], q.token[j], h);
      for (int64_t d = 0; d < p.head_dim; ++d) output[d] += weight * value[d];
    }
    for (float& o : output) o /= total;
    const bool last = s == p.num_queries - 1 && t == p.num_frames - 1;
    const int64_t size = p.head_dim + (last && fault == Fault::write_past_row) -
                         (last && fault == Fault::element_not_written);
    write(p, f.output, b, t, s, h, output.data(), size);
    *lse++ = (largest + std::log2(total)) * (fault == Fault::natural_lse ? float(M_LN2) : 1);
  });
}

void naive_backward(const Backward& g, Fault fault) {
  const Problem& p = g.problem;
  const int64_t num_tokens = p.num_key_frames * p.num_tokens;
  const auto size = static_cast<size_t>(p.batch * p.num_heads * num_tokens * p.head_dim);
  std::vector<float> key_grad(size), value_grad(size);
  const float* lse = g.lse;
  for_each_query(p, [&](int64_t b, int64_t h, int64_t t, int64_t s) {
    const auto query = read(p, g.query, b, t, s, h), grad = read(p, g.output_grad, b, t, s, h);
    const int64_t of = fault == Fault::delta_of_next_query ? (s + 1) % p.num_queries : s;
    const float delta = dot(read(p, g.output_grad, b, t, of, h), read(p, g.output, b, t, of, h));
    const Query q = logits(p, g.key, query, b, h, t, s, fault);
    const bool last = s == p.num_queries - 1 && fault == Fault::last_query_missing_in_gradients;
    std::vector<float> query_grad(query.size());
    for (int64_t j = 0; j < p.num_keys; ++j) {
      float weight = exponential(q.logit[j] - *lse, fault);
      if (fault == Fault::exponential_off_in_backward) weight *= 1 + 1e-5f;
      const auto key = read(p, g.key, b, q.frame[j], q.token[j], h);
      const auto value = read(p, g.value, b, q.frame[j], q.token[j], h);
      const float factor = fault == Fault::gain_missing_in_gradients ? p.scale : q.factor[j];
      const float ds = weight * (dot(grad, value) - delta) * factor;
      const int64_t token =
          (b * p.num_heads + h) * num_tokens + q.frame[j] * p.num_tokens + q.token[j];
      const bool overwrites = fault == Fault::repeated_key_overwrites && j > 0 &&
                              q.token[j] == q.token[j - 1] && q.frame[j] == q.frame[j - 1];
      for (int64_t d = 0; d < p.head_dim; ++d) {
        query_grad[d] += ds * key[d];
        if (last || overwrites) continue;
        key_grad[token * p.head_dim + d] += ds * query[d];
        value_grad[token * p.head_dim + d] += weight * grad[d];
      }
    }
    write(p, g.query_grad, b, t, s, h, query_grad.data(), p.head_dim);
    ++lse;
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      for (int64_t i = 0; i < num_tokens; ++i) {
        const int64_t token = (b * p.num_heads + h) * num_tokens + i;
        const int64_t frame = i / p.num_tokens, of = i % p.num_tokens;
        if (fault == Fault::unselected_not_zeroed && p.key_index &&
            std::count(p.key_index, p.key_index + p.num_rows * p.num_keys, i) == 0) {
          continue;
        }
        write(p, g.key_grad, b, frame, of, h, &key_grad[token * p.head_dim], p.head_dim);
        write(p, g.value_grad, b, frame, of, h, &value_grad[token * p.head_dim], p.head_dim);
      }
    }
  }
}

}  // namespace tokenmix::cpu::testing
