// Attention from blocks of positions to rows that each block keeps, read where they stand.
//
// G blocks of n positions, H heads of d numbers (D = H d), S rows, K kept rows a block. Blocks may
// hold fewer positions, which then stand one behind another, N in all; weights have room for n.
// Sums over blocks are divided over threads by columns, so no result depends on their number.

#include "attended.h"

namespace {

struct Shape {
  const int64_t* ends;  // [G] of the blocks among all positions; null where each holds n
  int64_t groups, positions, heads, dim, kept, rows;
  int64_t width() const { return heads * dim; }
  int64_t start(int64_t g) const { return !ends ? g * positions : g ? ends[g - 1] : 0; }
  int64_t size(int64_t g) const { return ends ? ends[g] - start(g) : positions; }
  // Where the numbers of a head are of the block's position ``i``, and its weights.
  int64_t row(int64_t g, int64_t i, int64_t h) const { return (start(g) + i) * width() + h * dim; }
  int64_t cell(int64_t g, int64_t i, int64_t h) const {
    return ((g * heads + h) * positions + i) * kept;
  }
};

inline void multiply(float* by, const float* factors, int64_t count) {
  in_columns<Wide>(count, [&](int64_t k, const auto& columns) {
    for (int64_t r = 0; r < columns.REGISTERS; ++r)
      columns.put(by + k, r, columns.get(by + k, r) * columns.get(factors + k, r));
  });
}

// Numbers are few: a call of memcpy would cost more than the copy.
inline void copy(float* to, const float* from, int64_t count) {
  in_columns<Wide>(count, [&](int64_t k, const auto& columns) {
    for (int64_t r = 0; r < columns.REGISTERS; ++r)
      columns.put(to + k, r, columns.get(from + k, r));
  });
}

void forward(const float* query, const float* keys, const float* values, const int64_t* kept,
             const float* log_weights, const float* mask, float* weights, float* mixed,
             const Shape& s, int64_t threads) {
  const float scale = 1.0f / std::sqrt((float)s.dim);
  const int64_t num_padded = Rows<Wide>::padded(s.kept);
  divided(s.groups, threads, [&](int64_t begin, int64_t end) {
    Rows<Wide> key(s.dim, s.kept), value(s.dim, s.kept);
    std::vector<float> rows(TOGETHER * num_padded), logs(num_padded);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t* ids = kept + g * s.kept;
      copy(logs.data(), log_weights + g * s.kept, s.kept);
      for (int64_t h = 0; h < s.heads; ++h) {
        key.at(keys + h * s.dim, s.width(), ids);
        key.transpose();
        value.at(values + h * s.dim, s.width(), ids);
        in_fours(s.size(g), [&](int64_t first, auto together) {
          constexpr int64_t P = decltype(together)::value;
          const int64_t at = s.row(g, first, h), cell = s.cell(g, first, h);
          key.products<P>(query + at, s.width(), rows.data());
          for (int64_t i = 0; i < P; ++i) {
            float* row = &rows[i * num_padded];
            for (int64_t k = 0; k < num_padded; k += WIDE)
              put(row + k, get<Wide>(row + k) * scale + get<Wide>(&logs[k]));
            softmax<Wide>(row, s.kept, num_padded);
            copy(weights + cell + i * s.kept, row, s.kept);
            if (mask) multiply(row, mask + cell + i * s.kept, s.kept);
          }
          value.mixed<P>(rows.data(), mixed + at, s.width());
        });
      }
    }
  });
}

// Of one position: what its output's gradient makes of ``row`` [K], its products with the values,
// the gradient of the logits; their own sum goes to ``logs``.
void through_softmax(const float* weights, const float* mask, float* row, float* masked,
                     float* logs, float scale, int64_t kept, int64_t num_padded) {
  copy(masked, weights, kept);
  if (mask) multiply(row, mask, kept);
  Wide total{};
  for (int64_t k = 0; k < num_padded; k += WIDE)
    total += get<Wide>(masked + k) * get<Wide>(row + k);
  const float inner = sum(total);
  for (int64_t k = 0; k < num_padded; k += WIDE) {
    const Wide of_logits = get<Wide>(masked + k) * (get<Wide>(row + k) - inner);
    put(logs + k, get<Wide>(logs + k) + of_logits);
    put(row + k, of_logits * scale);
  }
  if (mask) multiply(masked, mask, kept);
}

void backward(const float* gradient, const float* query, const float* keys, const float* values,
              const int64_t* kept, const float* mask, const float* weights, float* of_query,
              float* of_keys, float* of_values, float* of_log_weights, const Shape& s,
              int64_t threads) {
  const float scale = 1.0f / std::sqrt((float)s.dim);
  const int64_t num_padded = Rows<Wide>::padded(s.kept), width = s.width();
  divided(s.heads, threads, [&](int64_t begin, int64_t end) {
    for (float* of_rows : {of_keys, of_values})
      clear(of_rows, s.rows, width, begin * s.dim, end * s.dim);
    Rows<Wide> key(s.dim, s.kept), value(s.dim, s.kept);
    std::vector<float> rows(TOGETHER * num_padded), masked(TOGETHER * num_padded), logs(num_padded);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t* ids = kept + g * s.kept;
      for (int64_t h = begin; h < end; ++h) {
        key.at(keys + h * s.dim, s.width(), ids);
        value.at(values + h * s.dim, s.width(), ids);
        value.transpose();
        std::fill(logs.begin(), logs.end(), 0.0f);
        in_fours(s.size(g), [&](int64_t first, auto together) {
          constexpr int64_t P = decltype(together)::value;
          const int64_t at = s.row(g, first, h), cell = s.cell(g, first, h);
          value.products<P>(gradient + at, width, rows.data());
          for (int64_t i = 0; i < P; ++i) {
            const int64_t own = cell + i * s.kept;
            through_softmax(weights + own, mask ? mask + own : nullptr, &rows[i * num_padded],
                            &masked[i * num_padded], logs.data(), scale, s.kept, num_padded);
          }
          value.spread<P>(masked.data(), gradient + at, width, of_values + h * s.dim, width, ids);
          key.spread<P>(rows.data(), query + at, width, of_keys + h * s.dim, width, ids);
          key.mixed<P>(rows.data(), of_query + at, width);
        });
        copy(of_log_weights + (g * s.heads + h) * s.kept, logs.data(), s.kept);
      }
    }
  });
}

}  // namespace

extern "C" {

// query [N, D], ends [G] or null (N = G n), keys and values [S, D], kept [G, K], log_weights
// [G, K], mask [G, H, n, K] or null -> weights [G, H, n, K] (before the mask; of positions that
// there are) and mixed [N, D].
void attend(const float* query, const int64_t* ends, const float* keys, const float* values,
            const int64_t* kept, const float* log_weights, const float* mask, float* weights,
            float* mixed, int64_t groups, int64_t positions, int64_t heads, int64_t dim,
            int64_t count, int64_t rows, int64_t threads) {
  forward(query, keys, values, kept, log_weights, mask, weights, mixed,
          {ends, groups, positions, heads, dim, count, rows}, threads);
}

// Gradients of ``attend`` by its inputs, ``of_log_weights`` [G, H, K] by head.
void attend_backward(const float* gradient, const float* query, const int64_t* ends,
                     const float* keys, const float* values, const int64_t* kept,
                     const float* mask, const float* weights, float* of_query, float* of_keys,
                     float* of_values, float* of_log_weights, int64_t groups, int64_t positions,
                     int64_t heads, int64_t dim, int64_t count, int64_t rows, int64_t threads) {
  backward(gradient, query, keys, values, kept, mask, weights, of_query, of_keys, of_values,
           of_log_weights, {ends, groups, positions, heads, dim, count, rows}, threads);
}
}
