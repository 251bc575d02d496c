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
  if (positions - i == 3) work(i, std::integral_constant<int64_t, 3>());
  if (positions - i == 2) work(i, std::integral_constant<int64_t, 2>());
  if (positions - i == 1) work(i, std::integral_constant<int64_t, 1>());
}

// Rows of one head: where they stand, and a transposed copy. What belongs to several positions
// stands ``stride`` numbers apart, for as many rows as there may be. V: its kind of vectors.
template <typename V>
struct Rows {
  static constexpr int64_t LANES = size_of<V>();
  int64_t dim, stride, kept, num_padded;
  std::vector<const float*> rows;
  std::vector<float> transposed;  // [d, K], zero behind

  static int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

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
    for (int64_t k = 0; k < num_padded; k += LANES)
      for (int64_t c = 0; c < dim; c += LANES) {
        const int64_t columns = std::min(LANES, dim - c), some = std::min(LANES, kept - k);
        V block[LANES];
        if (columns == LANES && some == LANES)
          for (int64_t j = 0; j < LANES; ++j) block[j] = get<V>(rows[k + j] + c);
        else
          for (int64_t j = 0; j < LANES; ++j)
            block[j] = j < some ? get_some<V>(rows[k + j] + c, columns) : V{};
        transpose_block(block);
        for (int64_t j = 0; j < LANES; ++j) put(&transposed[(c + j) * stride + k], block[j]);
      }
  }

  // [P, K] products of the rows with P vectors [d], which stand ``step`` numbers apart.
  template <int64_t P>
  void products(const float* vectors, int64_t step, float* out) const {
    int64_t k = 0;
    for (; k + 2 * LANES <= num_padded; k += 2 * LANES) products<P, 2>(vectors, step, out, k);
    if (k < num_padded) products<P, 1>(vectors, step, out, k);
  }

  template <int64_t P, int64_t R>
  void products(const float* vectors, int64_t step, float* out, int64_t k) const {
    V sums[P][R] = {};
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t r = 0; r < R; ++r) {
        const V column = get<V>(&transposed[c * stride + k + r * LANES]);
        for (int64_t i = 0; i < P; ++i) sums[i][r] += vectors[i * step + c] * column;
      }
    for (int64_t i = 0; i < P; ++i)
      for (int64_t r = 0; r < R; ++r) put(out + i * stride + k + r * LANES, sums[i][r]);
  }

  // P sums [d] of the rows, weighed by ``weights`` [P, K]; they stand ``step`` numbers apart.
  template <int64_t P>
  void mixed(const float* weights, float* out, int64_t step) const {
    in_columns<V>(dim, [&](int64_t c, const auto& columns) {
      constexpr int64_t R = std::decay_t<decltype(columns)>::REGISTERS;
      V sums[P][R] = {};
      for (int64_t k = 0; k < kept; ++k)
        for (int64_t r = 0; r < R; ++r) {
          const V row = columns.get(rows[k] + c, r);
          for (int64_t i = 0; i < P; ++i) sums[i][r] += weights[i * stride + k] * row;
        }
      for (int64_t i = 0; i < P; ++i)
        for (int64_t r = 0; r < R; ++r) columns.put(out + i * step + c, r, sums[i][r]);
    });
  }

  // Adds P vectors [d], weighed by ``weights`` [P, K], to the rows ``ids`` of ``all``.
  template <int64_t P>
  void spread(const float* weights, const float* vectors, int64_t step, float* all, int64_t width,
              const int64_t* ids) const {
    in_columns<V>(dim, [&](int64_t c, const auto& columns) {
      constexpr int64_t R = std::decay_t<decltype(columns)>::REGISTERS;
      V added[P][R];
      for (int64_t i = 0; i < P; ++i)
        for (int64_t r = 0; r < R; ++r) added[i][r] = columns.get(vectors + i * step + c, r);
      for (int64_t k = 0; k < kept; ++k) {
        float* row = all + ids[k] * width + c;
        for (int64_t r = 0; r < R; ++r) {
          V total = columns.get(row, r);
          for (int64_t i = 0; i < P; ++i) total += weights[i * stride + k] * added[i][r];
          columns.put(row, r, total);
        }
      }
    });
  }
};

// Softmax of ``logits`` [K], in place; what is padded gets zero. Returns the logarithm of the sum
// of the exponentials.
template <typename V>
inline float softmax(float* logits, int64_t kept, int64_t num_padded) {
  constexpr int64_t LANES = size_of<V>();
  for (int64_t k = kept; k < num_padded; ++k) logits[k] = -INFINITY;
  V top = get<V>(logits);
  for (int64_t k = LANES; k < num_padded; k += LANES) {
    const V more = get<V>(logits + k);
    top = more > top ? more : top;
  }
  const float highest = largest(top);
  V total{};
  for (int64_t k = 0; k < num_padded; k += LANES) {
    const V e = exponential(get<V>(logits + k) - highest);
    put(logits + k, e);
    total += e;
  }
  const float whole = sum(total), inverse = 1.0f / whole;
  for (int64_t k = 0; k < num_padded; k += LANES) put(logits + k, get<V>(logits + k) * inverse);
  return highest + std::log(whole);
}

}  // namespace
