// Rows of keys or values of one head, which several positions read together.
//
// P positions that are treated together, K rows, d numbers of a head.
#pragma once

#include <cmath>

#include "exponential.h"
#include "registers.h"

namespace {

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

// Rows of one head: where they stand, and a transposed copy. What belongs to several positions
// stands ``stride`` numbers apart, for as many rows as there may be.
struct Rows {
  int64_t dim, stride, kept, num_padded;
  std::vector<const float*> rows;
  std::vector<float> transposed;  // [d, K], zero behind

  Rows(int64_t dim, int64_t most)
      : dim(dim), stride(padded(most)), rows(most), transposed(padded(dim) * stride) {
    read(most);
  }

  // The first ``count`` rows are read from now on.
  void read(int64_t count) {
    kept = count;
    num_padded = padded(count);
  }

  // Row ids[k] of ``all``, whose rows are ``width`` numbers long; ``all`` begins with the head's.
  void at(const float* all, int64_t width, const int64_t* ids) {
    for (int64_t k = 0; k < kept; ++k) rows[k] = all + ids[k] * width;
  }

  void transpose() {
    for (int64_t k = 0; k < num_padded; k += WIDTH)
      for (int64_t c = 0; c < dim; c += WIDTH) {
        const int64_t columns = std::min(WIDTH, dim - c), some = std::min(WIDTH, kept - k);
        Floats block[WIDTH];
        if (columns == WIDTH && some == WIDTH)
          for (int64_t j = 0; j < WIDTH; ++j) block[j] = load(rows[k + j] + c);
        else
          for (int64_t j = 0; j < WIDTH; ++j)
            block[j] = j < some ? load_some(rows[k + j] + c, columns) : Floats{};
        transpose_block(block);
        for (int64_t j = 0; j < WIDTH; ++j) store(&transposed[(c + j) * stride + k], block[j]);
      }
  }

  // [P, K] products of the rows with P vectors [d], which stand ``step`` numbers apart.
  template <int64_t P>
  void products(const float* vectors, int64_t step, float* out) const {
    int64_t k = 0;
    for (; k + 2 * WIDTH <= num_padded; k += 2 * WIDTH) products<P, 2>(vectors, step, out, k);
    if (k < num_padded) products<P, 1>(vectors, step, out, k);
  }

  template <int64_t P, int64_t R>
  void products(const float* vectors, int64_t step, float* out, int64_t k) const {
    Floats sums[P][R] = {};
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t r = 0; r < R; ++r) {
        const Floats column = load(&transposed[c * stride + k + r * WIDTH]);
        for (int64_t i = 0; i < P; ++i) sums[i][r] += vectors[i * step + c] * column;
      }
    for (int64_t i = 0; i < P; ++i)
      for (int64_t r = 0; r < R; ++r) store(out + i * stride + k + r * WIDTH, sums[i][r]);
  }

  // P sums [d] of the rows, weighed by ``weights`` [P, K]; they stand ``step`` numbers apart.
  template <int64_t P>
  void mixed(const float* weights, float* out, int64_t step) const {
    in_columns(dim, [&](int64_t c, const auto& some) {
      Floats sums[P][2] = {};
      for (int64_t k = 0; k < kept; ++k) {
        const Floats left = some.left(rows[k] + c), right = some.right(rows[k] + c);
        for (int64_t i = 0; i < P; ++i) {
          sums[i][0] += weights[i * stride + k] * left;
          sums[i][1] += weights[i * stride + k] * right;
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
          first += weights[i * stride + k] * left[i];
          second += weights[i * stride + k] * right[i];
        }
        some.put(row, first, second);
      }
    });
  }
};

// Softmax of ``logits`` [K], in place; what is padded gets zero. Returns the logarithm of the sum
// of the exponentials.
inline float softmax(float* logits, int64_t kept, int64_t num_padded) {
  for (int64_t k = kept; k < num_padded; ++k) logits[k] = -INFINITY;
  Floats top = load(logits);
  for (int64_t k = WIDTH; k < num_padded; k += WIDTH) {
    const Floats more = load(logits + k);
    top = more > top ? more : top;
  }
  float largest = top[0];
  for (int64_t i = 1; i < WIDTH; ++i) largest = std::max(largest, top[i]);
  Floats total{};
  for (int64_t k = 0; k < num_padded; k += WIDTH) {
    const Floats e = exponential(load(logits + k) - largest);
    store(logits + k, e);
    total += e;
  }
  const float whole = sum(total), inverse = 1.0f / whole;
  for (int64_t k = 0; k < num_padded; k += WIDTH) store(logits + k, load(logits + k) * inverse);
  return largest + std::log(whole);
}

}  // namespace
