// Attention from blocks of positions to rows that each block keeps, read where they stand.
//
// G blocks of n positions, H heads of d numbers (D = H d), S rows, K kept rows a block. Sums over
// blocks are divided over threads by columns, so no result depends on the number of threads.

#include <cmath>

#include "exponential.h"
#include "registers.h"

namespace {

struct Shape {
  int64_t groups, positions, heads, dim, kept;
  int64_t places() const { return padded(kept); }
  int64_t width() const { return heads * dim; }
  int64_t row(int64_t g, int64_t i, int64_t h) const {  // where a position's numbers of a head are
    return (g * positions + i) * width() + h * dim;
  }
  int64_t cell(int64_t g, int64_t i, int64_t h) const {  // and its weights
    return ((g * heads + h) * positions + i) * kept;
  }
};

constexpr int64_t TOGETHER = 4;  // positions of a block that share what is read of its rows

// As many positions together as there are: work(first, how many), which is known to the compiler.
template <typename Work>
inline void in_fours(int64_t positions, const Work& work) {
  int64_t i = 0;
  for (; i + TOGETHER <= positions; i += TOGETHER)
    work(i, std::integral_constant<int64_t, TOGETHER>());
  for (; i < positions; ++i) work(i, std::integral_constant<int64_t, 1>());
}

// Columns of a head two registers at a time: work(first, mask), null where all sixteen are there.
template <typename Work>
inline void in_columns(int64_t dim, const Work& work) {
  int64_t c = 0;
  for (; c + 2 * WIDTH <= dim; c += 2 * WIDTH) work(c, All());
  if (c < dim) work(c, Some(dim - c));
}

// The rows of one head that a block keeps: where they stand, and a transposed copy.
struct Kept {
  int64_t dim, kept, places;
  std::vector<const float*> rows;
  std::vector<float> transposed;  // [d, K], zero behind

  explicit Kept(const Shape& s)
      : dim(s.dim), kept(s.kept), places(s.places()), rows(kept),
        transposed(padded(dim) * places) {}

  void at(const float* all, const Shape& s, int64_t head, const int64_t* ids) {
    for (int64_t k = 0; k < kept; ++k) rows[k] = all + ids[k] * s.width() + head * dim;
  }

  void transpose() {
    for (int64_t k = 0; k < places; k += WIDTH)
      for (int64_t c = 0; c < dim; c += WIDTH) {
        const int64_t columns = std::min(WIDTH, dim - c), some = std::min(WIDTH, kept - k);
        Floats block[WIDTH];
        if (columns == WIDTH && some == WIDTH)
          for (int64_t j = 0; j < WIDTH; ++j) block[j] = load(rows[k + j] + c);
        else
          for (int64_t j = 0; j < WIDTH; ++j)
            block[j] = j < some ? load_some(rows[k + j] + c, columns) : Floats{};
        transpose_block(block);
        for (int64_t j = 0; j < WIDTH; ++j) store(&transposed[(c + j) * places + k], block[j]);
      }
  }

  // [P, K] products of the rows with P vectors [d], which stand ``step`` numbers apart.
  template <int64_t P>
  void products(const float* vectors, int64_t step, float* out) const {
    int64_t k = 0;
    for (; k + 2 * WIDTH <= places; k += 2 * WIDTH) products<P, 2>(vectors, step, out, k);
    if (k < places) products<P, 1>(vectors, step, out, k);
  }

  template <int64_t P, int64_t R>
  void products(const float* vectors, int64_t step, float* out, int64_t k) const {
    Floats sums[P][R] = {};
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t r = 0; r < R; ++r) {
        const Floats column = load(&transposed[c * places + k + r * WIDTH]);
        for (int64_t i = 0; i < P; ++i) sums[i][r] += vectors[i * step + c] * column;
      }
    for (int64_t i = 0; i < P; ++i)
      for (int64_t r = 0; r < R; ++r) store(out + i * places + k + r * WIDTH, sums[i][r]);
  }

  // P sums [d] of the rows, weighed by ``weights`` [P, K]; they stand ``step`` numbers apart.
  template <int64_t P>
  void mixed(const float* weights, float* out, int64_t step) const {
    in_columns(dim, [&](int64_t c, const auto& some) {
      Floats sums[P][2] = {};
      for (int64_t k = 0; k < kept; ++k) {
        const Floats left = some.left(rows[k] + c), right = some.right(rows[k] + c);
        for (int64_t i = 0; i < P; ++i) {
          sums[i][0] += weights[i * places + k] * left;
          sums[i][1] += weights[i * places + k] * right;
        }
      }
      for (int64_t i = 0; i < P; ++i) some.put(out + i * step + c, sums[i][0], sums[i][1]);
    });
  }

  // Adds P vectors [d], weighed by ``weights`` [P, K], to the rows ``ids`` of ``all``.
  template <int64_t P>
  void spread(const float* weights, const float* vectors, int64_t step, float* all, int64_t width,
              const int64_t* ids) const {
    in_columns(dim, [&](int64_t c, const auto& some) {
      Floats left[P], right[P];
      for (int64_t i = 0; i < P; ++i) {
        left[i] = some.left(vectors + i * step + c);
        right[i] = some.right(vectors + i * step + c);
      }
      for (int64_t k = 0; k < kept; ++k) {
        float* row = all + ids[k] * width + c;
        Floats first = some.left(row), second = some.right(row);
        for (int64_t i = 0; i < P; ++i) {
          first += weights[i * places + k] * left[i];
          second += weights[i * places + k] * right[i];
        }
        some.put(row, first, second);
      }
    });
  }
};

// Softmax of ``logits`` [K], in place; what is padded gets zero.
void softmax(float* logits, int64_t kept, int64_t places) {
  for (int64_t k = kept; k < places; ++k) logits[k] = -INFINITY;
  Floats top = load(logits);
  for (int64_t k = WIDTH; k < places; k += WIDTH) {
    const Floats more = load(logits + k);
    top = more > top ? more : top;
  }
  float largest = top[0];
  for (int64_t i = 1; i < WIDTH; ++i) largest = std::max(largest, top[i]);
  Floats total{};
  for (int64_t k = 0; k < places; k += WIDTH) {
    const Floats e = exponential(load(logits + k) - largest);
    store(logits + k, e);
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t k = 0; k < places; k += WIDTH) store(logits + k, load(logits + k) * inverse);
}

void forward(const float* query, const float* keys, const float* values, const int64_t* kept,
             const float* log_weights, const float* mask, float* weights, float* mixed,
             const Shape& s, int64_t threads) {
  const float scale = 1.0f / std::sqrt((float)s.dim);
  const int64_t places = s.places();
  divided(s.groups, threads, [&](int64_t begin, int64_t end) {
    Kept key(s), value(s);
    std::vector<float> rows(TOGETHER * places), logs(places);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t* ids = kept + g * s.kept;
      copy(logs.data(), log_weights + g * s.kept, s.kept);
      for (int64_t h = 0; h < s.heads; ++h) {
        key.at(keys, s, h, ids);
        key.transpose();
        value.at(values, s, h, ids);
        in_fours(s.positions, [&](int64_t first, auto together) {
          constexpr int64_t P = decltype(together)::value;
          const int64_t at = s.row(g, first, h), cell = s.cell(g, first, h);
          key.products<P>(query + at, s.width(), rows.data());
          for (int64_t i = 0; i < P; ++i) {
            float* row = &rows[i * places];
            for (int64_t k = 0; k < places; k += WIDTH)
              store(row + k, load(row + k) * scale + load(&logs[k]));
            softmax(row, s.kept, places);
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
void through_softmax(const float* weights, const float* mask, float* row, float* masked, float* logs,
                     float scale, int64_t kept, int64_t places) {
  copy(masked, weights, kept);
  if (mask) multiply(row, mask, kept);
  Floats total{};
  for (int64_t k = 0; k < places; k += WIDTH) total += load(masked + k) * load(row + k);
  const float inner = sum(total);
  for (int64_t k = 0; k < places; k += WIDTH) {
    const Floats found = load(masked + k) * (load(row + k) - inner);
    store(logs + k, load(logs + k) + found);
    store(row + k, found * scale);
  }
  if (mask) multiply(masked, mask, kept);
}

void backward(const float* gradient, const float* query, const float* keys, const float* values,
              const int64_t* kept, const float* mask, const float* weights, float* of_query,
              float* of_keys, float* of_values, float* of_log_weights, const Shape& s,
              int64_t threads) {
  const float scale = 1.0f / std::sqrt((float)s.dim);
  const int64_t places = s.places(), width = s.width();
  divided(s.heads, threads, [&](int64_t begin, int64_t end) {
    Kept key(s), value(s);
    std::vector<float> rows(TOGETHER * places), masked(TOGETHER * places), logs(places);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t* ids = kept + g * s.kept;
      for (int64_t h = begin; h < end; ++h) {
        key.at(keys, s, h, ids);
        value.at(values, s, h, ids);
        value.transpose();
        std::fill(logs.begin(), logs.end(), 0.0f);
        in_fours(s.positions, [&](int64_t first, auto together) {
          constexpr int64_t P = decltype(together)::value;
          const int64_t at = s.row(g, first, h), cell = s.cell(g, first, h);
          value.products<P>(gradient + at, width, rows.data());
          for (int64_t i = 0; i < P; ++i) {
            const int64_t own = cell + i * s.kept;
            through_softmax(weights + own, mask ? mask + own : nullptr, &rows[i * places],
                            &masked[i * places], logs.data(), scale, s.kept, places);
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

// query [G, n, D], keys and values [S, D], kept [G, K], log_weights [G, K], mask [G, H, n, K] or
// null -> weights [G, H, n, K] (before the mask) and mixed [G, n, D].
void attend(const float* query, const float* keys, const float* values, const int64_t* kept,
            const float* log_weights, const float* mask, float* weights, float* mixed,
            int64_t groups, int64_t positions, int64_t heads, int64_t dim, int64_t count,
            int64_t threads) {
  forward(query, keys, values, kept, log_weights, mask, weights, mixed,
          {groups, positions, heads, dim, count}, threads);
}

// Gradients of ``attend`` by its inputs, ``of_log_weights`` [G, H, K] by head; ``of_keys`` and
// ``of_values`` [S, D] begin as zeros.
void attend_backward(const float* gradient, const float* query, const float* keys,
                     const float* values, const int64_t* kept, const float* mask,
                     const float* weights, float* of_query, float* of_keys, float* of_values,
                     float* of_log_weights, int64_t groups, int64_t positions, int64_t heads,
                     int64_t dim, int64_t count, int64_t threads) {
  backward(gradient, query, keys, values, kept, mask, weights, of_query, of_keys, of_values,
           of_log_weights, {groups, positions, heads, dim, count}, threads);
}
}
