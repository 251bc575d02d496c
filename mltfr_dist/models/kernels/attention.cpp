// Attention from blocks of positions to rows that each block keeps, read where they stand.
//
// G blocks of n positions, H heads of d numbers (D = H d), S rows, K kept rows a block. Sums over
// blocks are divided over threads by columns, so no result depends on the number of threads.

#include <cmath>

#include "common.h"

namespace {

// exp of numbers <= 0 (Cephes' polynomial after reduction by ln 2), to 2 units in the last place;
// NaN of NaN, so that a broken number is seen in the loss.
inline Floats exponential(Floats x) {
  typedef int32_t Ints __attribute__((vector_size(32)));
  const Floats low = Floats{} - 87.0f;
  const Floats inside = (Floats)(((Ints)x & (x > low)) | ((Ints)low & ~(x > low)));
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats power = (inside * 1.44269504f + magic) - magic;
  const Floats r = (inside - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = (__builtin_convertvector(power, Ints) + 127) << 23;
  return (Floats)(((Ints)(p * (Floats)exponent) & (x > low)) | ((Ints)x & (x != x)));
}

struct Shape {
  int64_t groups, positions, heads, dim, kept;
  int64_t width() const { return heads * dim; }
  int64_t row(int64_t g, int64_t i, int64_t h) const {  // where a position's numbers of a head are
    return (g * positions + i) * width() + h * dim;
  }
  int64_t cell(int64_t g, int64_t i, int64_t h) const {  // and its weights
    return ((g * heads + h) * positions + i) * kept;
  }
};

// Numbers are few: a call of memcpy would cost more than the copy.
inline void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// Numbers behind whose ``count`` zeros follow, to whole registers.
struct Padded : std::vector<float> {
  explicit Padded(int64_t count) : std::vector<float>(padded(count)) {}
  const float* filled(const float* from, int64_t count) {
    float* to = data();
    copy(to, from, count);
    return to;
  }
};

// to += factor * from, of whole registers.
template <int64_t FIXED>
inline void add_scaled(float* to, float factor, const float* from, int64_t count) {
  const int64_t end = FIXED ? FIXED : count;
  for (int64_t i = 0; i < end; i += WIDTH) store(to + i, load(to + i) + factor * load(from + i));
}

// Rows of one head that a block keeps, as [K, d] or transposed, padded with zeros. DIMS: d where it
// is known beforehand, else 0.
template <int64_t DIMS>
struct Rows {
  int64_t dim, kept, padded_dim, places;
  std::vector<float> numbers;

  Rows(const Shape& s)
      : dim(s.dim), kept(s.kept), padded_dim(padded(dim)), places(padded(kept)),
        numbers(places * padded_dim) {}

  int64_t dims() const { return DIMS ? DIMS : padded_dim; }

  void gather(const float* all, const Shape& s, int64_t head, const int64_t* ids) {
    for (int64_t k = 0; k < kept; ++k)
      copy(&numbers[k * dims()], all + ids[k] * s.width() + head * dim, DIMS ? DIMS : dim);
  }

  void gather_transposed(const float* all, const Shape& s, int64_t head, const int64_t* ids) {
    float* to = numbers.data();
    const int64_t step = places, end = DIMS ? DIMS : dim;
    for (int64_t k = 0; k < kept; ++k) {
      const float* row = all + ids[k] * s.width() + head * dim;
      for (int64_t c = 0; c < end; ++c) to[c * step + k] = row[c];
    }
  }

  // [K] products of the rows, which stand transposed, with ``vector`` [d].
  void products(const float* vector, float* out) const {
    const float* from = numbers.data();
    const int64_t step = places, end = dims();
    for (int64_t k = 0; k < step; k += WIDTH) {
      Floats even{}, odd{};
      for (int64_t c = 0; c < end; c += 2) {
        even += vector[c] * load(from + c * step + k);
        odd += vector[c + 1] * load(from + (c + 1) * step + k);
      }
      store(out + k, even + odd);
    }
  }

  // [d] sum of the rows, weighed by ``weights`` [K].
  void mixed(const float* weights, float* out) const {
    const float* from = numbers.data();
    const int64_t end = dims(), count = kept;
    for (int64_t c = 0; c < end; c += WIDTH) {
      Floats total{};
      for (int64_t k = 0; k < count; ++k) total += weights[k] * load(from + k * end + c);
      store(out + c, total);
    }
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

template <int64_t DIMS>
void forward(const float* query, const float* keys, const float* values, const int64_t* kept,
             const float* log_weights, const float* mask, float* weights, float* mixed,
             const Shape& s, int64_t threads) {
  const float scale = 1.0f / std::sqrt((float)s.dim);
  divided(s.groups, threads, [&](int64_t begin, int64_t end) {
    Rows<DIMS> key(s), value(s);
    Padded row(s.kept), logs(s.kept), dropped(s.kept), vector(s.dim), out(s.dim);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t* ids = kept + g * s.kept;
      logs.filled(log_weights + g * s.kept, s.kept);
      for (int64_t h = 0; h < s.heads; ++h) {
        key.gather_transposed(keys, s, h, ids);
        value.gather(values, s, h, ids);
        for (int64_t i = 0; i < s.positions; ++i) {
          const int64_t cell = s.cell(g, i, h);
          key.products(vector.filled(query + s.row(g, i, h), s.dim), row.data());
          for (int64_t k = 0; k < key.places; k += WIDTH)
            store(&row[k], load(&row[k]) * scale + load(&logs[k]));
          softmax(row.data(), s.kept, key.places);
          copy(weights + cell, row.data(), s.kept);
          if (mask) {
            dropped.filled(mask + cell, s.kept);
            for (int64_t k = 0; k < key.places; k += WIDTH)
              store(&row[k], load(&row[k]) * load(&dropped[k]));
          }
          value.mixed(row.data(), out.data());
          copy(mixed + s.row(g, i, h), out.data(), s.dim);
        }
      }
    }
  });
}

// What one block and head adds to the gradients of its rows, and of its logarithms of weights.
template <int64_t DIMS>
struct BlockGradient {
  const Shape& s;
  Rows<DIMS> key, value;
  Padded weight, masked, row, incoming, vector, out, logs;
  std::vector<float> of_keys, of_values;

  explicit BlockGradient(const Shape& s)
      : s(s), key(s), value(s), weight(s.kept), masked(s.kept), row(s.kept), incoming(s.dim),
        vector(s.dim), out(s.dim), logs(s.kept), of_keys(s.kept * key.dims()),
        of_values(s.kept * key.dims()) {}

  void begin() {
    std::fill(of_keys.begin(), of_keys.end(), 0.0f);
    std::fill(of_values.begin(), of_values.end(), 0.0f);
    std::fill(logs.begin(), logs.end(), 0.0f);
  }

  // Of one position: its gradient, query, weights and mask (or null) -> gradient of its query.
  void position(const float* gradient, const float* query, const float* weights, const float* mask,
                float* of_query) {
    const float scale = 1.0f / std::sqrt((float)s.dim);
    incoming.filled(gradient, s.dim);
    vector.filled(query, s.dim);
    weight.filled(weights, s.kept);
    value.products(incoming.data(), row.data());
    masked.filled(weights, s.kept);
    if (mask) {
      for (int64_t k = 0; k < s.kept; ++k) {
        masked[k] *= mask[k];
        row[k] *= mask[k];
      }
    }
    Floats total{};
    for (int64_t k = 0; k < key.places; k += WIDTH) total += load(&weight[k]) * load(&row[k]);
    const float inner = sum(total);
    for (int64_t k = 0; k < key.places; k += WIDTH) {
      const Floats found = load(&weight[k]) * (load(&row[k]) - inner);
      store(&logs[k], load(&logs[k]) + found);
      store(&row[k], found * scale);
    }
    float *to_values = of_values.data(), *to_keys = of_keys.data();
    const float *kept_weights = masked.data(), *kept_logits = row.data();
    const float *g = incoming.data(), *q = vector.data();
    const int64_t step = key.dims(), count = s.kept;
    for (int64_t k = 0; k < count; ++k) {
      add_scaled<DIMS>(to_values + k * step, kept_weights[k], g, step);
      add_scaled<DIMS>(to_keys + k * step, kept_logits[k], q, step);
    }
    key.mixed(row.data(), out.data());
    copy(of_query, out.data(), s.dim);
  }
};

template <int64_t DIMS>
void backward(const float* gradient, const float* query, const float* keys, const float* values,
              const int64_t* kept, const float* mask, const float* weights, float* of_query,
              float* of_keys, float* of_values, float* of_log_weights, const Shape& s,
              int64_t threads) {
  divided(s.heads, threads, [&](int64_t begin, int64_t end) {
    BlockGradient<DIMS> block(s);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t* ids = kept + g * s.kept;
        block.key.gather(keys, s, h, ids);
        block.value.gather_transposed(values, s, h, ids);
        block.begin();
        for (int64_t i = 0; i < s.positions; ++i) {
          const int64_t row = s.row(g, i, h), cell = s.cell(g, i, h);
          block.position(gradient + row, query + row, weights + cell, mask ? mask + cell : nullptr,
                         of_query + row);
        }
        copy(of_log_weights + (g * s.heads + h) * s.kept, block.logs.data(), s.kept);
        for (int64_t k = 0; k < s.kept; ++k) {
          float *to_key = of_keys + ids[k] * s.width() + h * s.dim,
                *to_value = of_values + ids[k] * s.width() + h * s.dim;
          for (int64_t c = 0; c < s.dim; ++c) {
            to_key[c] += block.of_keys[k * block.key.dims() + c];
            to_value[c] += block.of_values[k * block.key.dims() + c];
          }
        }
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
  const auto run = dim == 16 ? forward<16> : dim == 32 ? forward<32> : forward<0>;
  run(query, keys, values, kept, log_weights, mask, weights, mixed,
      {groups, positions, heads, dim, count}, threads);
}

// Gradients of ``attend`` by its inputs, ``of_log_weights`` [G, H, K] by head; ``of_keys`` and
// ``of_values`` [S, D] begin as zeros.
void attend_backward(const float* gradient, const float* query, const float* keys,
                     const float* values, const int64_t* kept, const float* mask,
                     const float* weights, float* of_query, float* of_keys, float* of_values,
                     float* of_log_weights, int64_t groups, int64_t positions, int64_t heads,
                     int64_t dim, int64_t count, int64_t threads) {
  const auto run = dim == 16 ? backward<16> : dim == 32 ? backward<32> : backward<0>;
  run(gradient, query, keys, values, kept, mask, weights, of_query, of_keys, of_values,
      of_log_weights, {groups, positions, heads, dim, count}, threads);
}
}
