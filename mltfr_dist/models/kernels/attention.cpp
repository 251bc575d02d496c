// Attention from blocks of positions to rows that each block keeps, read where they stand.
//
// G blocks of n positions, H heads of d numbers (D = H d), S rows, K kept rows a block. Sums over
// blocks are divided over threads by columns, so no result depends on the number of threads.

#include <cmath>

#include "common.h"

namespace {

// exp of numbers <= 0 (Cephes' polynomial after reduction by ln 2), to 2 units in the last place.
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
  return (Floats)((Ints)(p * (Floats)exponent) & (x > low));
}

struct Shape {
  int64_t groups, positions, heads, dim, kept;
  int64_t width() const { return heads * dim; }
};

// Rows of one head that a block keeps: as [K, d] and transposed, padded with zeros.
struct Rows {
  int64_t dim, kept, dims, places;
  std::vector<float> rows, columns;

  Rows(int64_t dim, int64_t kept)
      : dim(dim), kept(kept), dims(padded(dim)), places(padded(kept)), rows(places * dims),
        columns(dims * places) {}

  void gather(const float* all, int64_t width, int64_t head, const int64_t* ids, bool transposed) {
    for (int64_t k = 0; k < kept; ++k) {
      const float* row = all + ids[k] * width + head * dim;
      if (transposed)
        for (int64_t c = 0; c < dim; ++c) columns[c * places + k] = row[c];
      else
        std::memcpy(&rows[k * dims], row, dim * sizeof(float));
    }
  }

  // [K] products of the rows with ``vector`` [d].
  void products(const float* vector, float* out) const {
    for (int64_t k = 0; k < places; k += WIDTH) {
      Floats total{};
      for (int64_t c = 0; c < dim; ++c) total += vector[c] * load(&columns[c * places + k]);
      store(out + k, total);
    }
  }

  // [d] mean of the rows, weighed by ``weights`` [K], added to ``out``.
  void mixed(const float* weights, float* out) const {
    for (int64_t c = 0; c < dims; c += WIDTH) {
      Floats total{};
      for (int64_t k = 0; k < kept; ++k) total += weights[k] * load(&rows[k * dims + c]);
      store(out + c, total);
    }
  }
};

// Softmax of ``logits`` [K], in place; what is padded gets zero.
void softmax(float* logits, int64_t kept, int64_t places) {
  float largest = logits[0];
  for (int64_t k = 1; k < kept; ++k) largest = std::max(largest, logits[k]);
  for (int64_t k = kept; k < places; ++k) logits[k] = -INFINITY;
  Floats total{};
  for (int64_t k = 0; k < places; k += WIDTH) {
    const Floats e = exponential(load(logits + k) - largest);
    store(logits + k, e);
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t k = 0; k < places; k += WIDTH) store(logits + k, load(logits + k) * inverse);
}

// to[i] += factor * from[i].
inline void add_scaled(float* __restrict__ to, float factor, const float* __restrict__ from,
                       int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

}  // namespace

extern "C" {

// query [G, n, D], keys and values [S, D], kept [G, K], log_weights [G, K], mask [G, H, n, K] or
// null -> weights [G, H, n, K] (before the mask) and mixed [G, n, D].
void attend(const float* query, const float* keys, const float* values, const int64_t* kept,
            const float* log_weights, const float* mask, float* weights, float* mixed,
            int64_t groups, int64_t positions, int64_t heads, int64_t dim, int64_t count,
            int64_t threads) {
  const Shape s{groups, positions, heads, dim, count};
  const float scale = 1.0f / std::sqrt((float)dim);
  divided(groups, threads, [&](int64_t begin, int64_t end) {
    Rows key(dim, count), value(dim, count);
    std::vector<float> row(key.places), out(key.dims);
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t h = 0; h < heads; ++h) {
        key.gather(keys, s.width(), h, kept + g * count, true);
        value.gather(values, s.width(), h, kept + g * count, false);
        for (int64_t i = 0; i < positions; ++i) {
          const int64_t at = (g * positions + i) * s.width() + h * dim;
          const int64_t cell = ((g * heads + h) * positions + i) * count;
          key.products(query + at, row.data());
          for (int64_t k = 0; k < count; ++k) row[k] = row[k] * scale + log_weights[g * count + k];
          softmax(row.data(), count, key.places);
          std::memcpy(weights + cell, row.data(), count * sizeof(float));
          if (mask)
            for (int64_t k = 0; k < count; ++k) row[k] *= mask[cell + k];
          value.mixed(row.data(), out.data());
          std::memcpy(mixed + at, out.data(), dim * sizeof(float));
        }
      }
    }
  });
}

// Gradients of ``attend`` by its inputs, ``of_log_weights`` [G, H, K] by head; ``of_keys`` and
// ``of_values`` [S, D] begin as zeros.
void attend_backward(const float* gradient, const float* query, const float* keys,
                     const float* values, const int64_t* kept, const float* mask,
                     const float* weights, float* of_query, float* of_keys, float* of_values,
                     float* of_log_weights, int64_t groups, int64_t positions, int64_t heads,
                     int64_t dim, int64_t count, int64_t threads) {
  const Shape s{groups, positions, heads, dim, count};
  const float scale = 1.0f / std::sqrt((float)dim);
  divided(heads, threads, [&](int64_t begin, int64_t end) {
    Rows key(dim, count), value(dim, count);
    std::vector<float> row(key.places), out(key.dims), key_sum(count * dim), value_sum(count * dim);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t* ids = kept + g * count;
        key.gather(keys, s.width(), h, ids, false);
        value.gather(values, s.width(), h, ids, true);
        std::fill(key_sum.begin(), key_sum.end(), 0.0f);
        std::fill(value_sum.begin(), value_sum.end(), 0.0f);
        float* of_logs = of_log_weights + (g * heads + h) * count;
        std::fill(of_logs, of_logs + count, 0.0f);
        for (int64_t i = 0; i < positions; ++i) {
          const int64_t at = (g * positions + i) * s.width() + h * dim;
          const int64_t cell = ((g * heads + h) * positions + i) * count;
          const float *w = weights + cell, *m = mask ? mask + cell : nullptr;
          value.products(gradient + at, row.data());
          float inner = 0;
          for (int64_t k = 0; k < count; ++k) {
            const float dropped = m ? m[k] : 1.0f;
            row[k] *= dropped;
            inner += w[k] * row[k];
            add_scaled(&value_sum[k * dim], w[k] * dropped, gradient + at, dim);
          }
          for (int64_t k = 0; k < count; ++k) {
            row[k] = w[k] * (row[k] - inner);
            of_logs[k] += row[k];
            row[k] *= scale;
            add_scaled(&key_sum[k * dim], row[k], query + at, dim);
          }
          key.mixed(row.data(), out.data());
          std::memcpy(of_query + at, out.data(), dim * sizeof(float));
        }
        for (int64_t k = 0; k < count; ++k) {
          const int64_t to = ids[k] * s.width() + h * dim;
          add_scaled(of_keys + to, 1.0f, &key_sum[k * dim], dim);
          add_scaled(of_values + to, 1.0f, &value_sum[k * dim], dim);
        }
      }
    }
  });
}

// query [G, D], rows [S, D], kept [G, K] -> scores [G, K], their products.
void kept_products(const float* query, const float* rows, const int64_t* kept, float* scores,
                   int64_t groups, int64_t width, int64_t count, int64_t threads) {
  divided(groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const float* q = query + g * width;
      for (int64_t k = 0; k < count; ++k) {
        const float* row = rows + kept[g * count + k] * width;
        Floats total{};
        int64_t c = 0;
        for (; c + WIDTH <= width; c += WIDTH) total += load(q + c) * load(row + c);
        float found = sum(total);
        for (; c < width; ++c) found += q[c] * row[c];
        scores[g * count + k] = found;
      }
    }
  });
}

// Gradients of ``kept_products``; both begin as zeros.
void kept_products_backward(const float* gradient, const float* query, const float* rows,
                            const int64_t* kept, float* of_query, float* of_rows, int64_t groups,
                            int64_t width, int64_t count, int64_t threads) {
  divided((width + 15) / 16, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 16, some = std::min(width, end * 16) - first;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t k = 0; k < count; ++k) {
        const int64_t at = kept[g * count + k] * width + first;
        const float factor = gradient[g * count + k];
        add_scaled(of_query + g * width + first, factor, rows + at, some);
        add_scaled(of_rows + at, factor, query + g * width + first, some);
      }
    }
  });
}
}
