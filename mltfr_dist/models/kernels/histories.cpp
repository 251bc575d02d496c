// Self-attention within histories that stand one behind another, without padding between them.
//
// N positions of B histories, H heads of d numbers (D = H d); ``starts`` [B + 1] says where each
// history begins. A history and a head are one piece of work; pieces go to threads in turn, and
// write nothing of another's, so no result depends on the number of threads.

#include "attended.h"

namespace {

struct Histories {
  const int64_t* starts;
  int64_t count, heads, dim, causal;
  int64_t width() const { return heads * dim; }
  int64_t longest() const {
    int64_t most = 1;
    for (int64_t b = 0; b < count; ++b) most = std::max(most, starts[b + 1] - starts[b]);
    return most;
  }
};

// work(first position, positions, head, keys, values) for each piece, with rows of its own.
template <typename Work>
void in_turn(const Histories& s, const float* qkv, int64_t threads, const Work& work) {
  const int64_t pieces = s.count * s.heads, most = s.longest(), step = 3 * s.width();
  divided(threads, threads, [&](int64_t begin, int64_t end) {
    Rows<Floats> key(s.dim, most), value(s.dim, most);
    std::vector<int64_t> ids(most);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t piece = t; piece < pieces; piece += threads) {
        const int64_t b = piece / s.heads, h = piece % s.heads, first = s.starts[b];
        const int64_t length = s.starts[b + 1] - first;
        if (!length) continue;
        for (int64_t k = 0; k < length; ++k) ids[k] = first + k;
        key.read(length);
        value.read(length);
        key.at(qkv + s.width() + h * s.dim, step, ids.data());
        value.at(qkv + 2 * s.width() + h * s.dim, step, ids.data());
        key.transpose();
        work(first, length, h, key, value, ids.data());
      }
  });
}

}  // namespace

extern "C" {

// qkv [N, 3, H, d] -> mixed [N, H, d], and log_sums [N, H] of the exponentials.
void attend_histories(const float* qkv, const int64_t* starts, float* mixed, float* log_sums,
                      int64_t count, int64_t heads, int64_t dim, int64_t causal,
                      int64_t threads) {
  const Histories s{starts, count, heads, dim, causal};
  const float scale = 1.0f / std::sqrt((float)dim);
  in_turn(s, qkv, threads, [&](int64_t start, int64_t length, int64_t h, Rows<Floats>& key,
                               Rows<Floats>& value, const int64_t*) {
    std::vector<float> rows(TOGETHER * key.stride);
    in_fours(length, [&](int64_t first, auto together) {
      constexpr int64_t P = decltype(together)::value;
      const int64_t seen = causal ? first + P : length;
      key.read(seen);
      value.read(seen);
      key.products<P>(qkv + (start + first) * 3 * s.width() + h * dim, 3 * s.width(), rows.data());
      for (int64_t i = 0; i < P; ++i) {
        float* row = &rows[i * key.stride];
        for (int64_t k = 0; k < key.num_padded; k += WIDTH) store(row + k, load(row + k) * scale);
        log_sums[(start + first + i) * heads + h] =
            softmax<Floats>(row, causal ? first + i + 1 : length, key.num_padded);
      }
      value.mixed<P>(rows.data(), mixed + (start + first) * s.width() + h * dim, s.width());
    });
  });
}

// Gradient by qkv, which begins as zeros.
void attend_histories_backward(const float* gradient, const float* qkv, const int64_t* starts,
                               const float* log_sums, float* of_qkv, int64_t count, int64_t heads,
                               int64_t dim, int64_t causal, int64_t threads) {
  const Histories s{starts, count, heads, dim, causal};
  const float scale = 1.0f / std::sqrt((float)dim);
  const int64_t width = s.width(), step = 3 * width;
  in_turn(s, qkv, threads, [&](int64_t start, int64_t length, int64_t h, Rows<Floats>& key,
                               Rows<Floats>& value, const int64_t* ids) {
    value.transpose();
    std::vector<float> weights(TOGETHER * key.stride), rows(TOGETHER * key.stride);
    in_fours(length, [&](int64_t first, auto together) {
      constexpr int64_t P = decltype(together)::value;
      const int64_t seen = causal ? first + P : length, at = start + first;
      const float* query = qkv + at * step + h * dim;
      const float* given = gradient + at * width + h * dim;
      key.read(seen);
      value.read(seen);
      key.products<P>(query, step, weights.data());
      value.products<P>(given, width, rows.data());
      for (int64_t i = 0; i < P; ++i) {
        float *w = &weights[i * key.stride], *row = &rows[i * key.stride];
        const int64_t kept = causal ? first + i + 1 : length;
        const float log_sum = log_sums[(at + i) * heads + h];
        for (int64_t k = kept; k < key.num_padded; ++k) w[k] = -INFINITY;
        Floats total{};
        for (int64_t k = 0; k < key.num_padded; k += WIDTH) {
          const Floats weight = exponential(load(w + k) * scale - log_sum);
          store(w + k, weight);
          total += weight * load(row + k);
        }
        const float inner = sum(total);
        for (int64_t k = 0; k < key.num_padded; k += WIDTH)
          store(row + k, load(w + k) * (load(row + k) - inner) * scale);
      }
      float* made = of_qkv + h * dim;
      value.spread<P>(weights.data(), given, width, made + 2 * width, step, ids);
      key.spread<P>(rows.data(), query, step, made + width, step, ids);
      key.mixed<P>(rows.data(), made + at * step, step);
    });
  });
}
}
