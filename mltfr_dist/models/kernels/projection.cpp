// Rows mapped to the space of the queries, and the largest product of each with any query.
//
// S rows of E numbers, mapped to D numbers; G queries of D numbers.

#include "panels.h"

namespace {

constexpr float SHORTEST = 1e-12f;  // as torch's normalize

float product(const float* a, const float* b, int64_t count) {
  Floats products{};
  int64_t c = 0;
  for (; c + WIDTH <= count; c += WIDTH) products += load(a + c) * load(b + c);
  float total = sum(products);
  for (; c < count; ++c) total += a[c] * b[c];
  return total;
}

// row [D] becomes a unit vector; returns what it was divided by.
float normalise(float* row, int64_t dim) {
  const float length = std::max(std::sqrt(product(row, row, dim)), SHORTEST);
  int64_t c = 0;
  for (; c + WIDTH <= dim; c += WIDTH) store(row + c, load(row + c) / length);
  for (; c < dim; ++c) row[c] /= length;
  return length;
}

struct Projection {
  const float *rows, *bias;
  float *unit, *lengths;
  int64_t count, width, dim;  // width: E
  const Panels& weight;

  // The rows of a block from ``first`` on, the last of which may come again.
  void map(int64_t first) const {
    const float* read[USERS];
    for (int64_t r = 0; r < USERS; ++r) read[r] = rows + std::min(first + r, count - 1) * width;
    const int64_t some = std::min(USERS, count - first);
    prefetch(first + USERS);
    // `put` gets a copy: what it indexes by a number stands in memory, not in registers.
    for (int64_t p = 0; p < weight.size(); ++p)
      put(products(read, weight[p], width).copy(), unit + first * dim + p * PANEL, p, some);
    for (int64_t r = first; r < first + some; ++r) lengths[r] = normalise(unit + r * dim, dim);
  }

  // The block from ``first`` on: a table leaves the cache from one step to the next.
  void prefetch(int64_t first) const {
    const float* end = rows + std::min(first + USERS, count) * width;
    for (const float* at = rows + first * width; at < end; at += LINE) __builtin_prefetch(at);
  }

  void put(const Scores& scores, float* to, int64_t panel, int64_t some) const {
    const int64_t left = dim - panel * PANEL;
    float numbers[PANEL], added[PANEL] = {};
    std::copy_n(bias + panel * PANEL, std::min(PANEL, left), added);
    const Register lower = ON_REGISTERS(loadu_ps)(added);
    const Register upper = ON_REGISTERS(loadu_ps)(added + LANES);
    for (int64_t r = 0; r < some; ++r, to += dim) {
      const Register sums[2] = {ON_REGISTERS(add_ps)(scores.of[r][0], lower),
                                ON_REGISTERS(add_ps)(scores.of[r][1], upper)};
      if (left >= PANEL) {
        store_panel(to, sums);
      } else {
        store_panel(numbers, sums);
        std::copy_n(numbers, left, to);
      }
    }
  }
};

}  // namespace

extern "C" {

// rows [S, E], weight [D, E], bias [D] -> unit [S, D], unit vectors, and lengths [S], what they
// were divided by.
void map_rows(const float* rows, const float* weight, const float* bias, float* unit,
              float* lengths, int64_t count, int64_t width, int64_t dim, int64_t threads) {
  Panels panels(dim, width);
  panels.fill(weight, dim, threads);
  const Projection projection{rows, bias, unit, lengths, count, width, dim, panels};
  divided((count + USERS - 1) / USERS, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) projection.map(block * USERS);
  });
}

// rows [S, D] -> unit [S, D] and lengths [S], as ``map_rows``.
void unit_vectors(const float* rows, float* unit, float* lengths, int64_t count, int64_t dim,
                  int64_t threads) {
  divided(count, threads, [&](int64_t begin, int64_t end) {
    std::memcpy(unit + begin * dim, rows + begin * dim, (end - begin) * dim * sizeof(float));
    for (int64_t r = begin; r < end; ++r) lengths[r] = normalise(unit + r * dim, dim);
  });
}

// Gradient [S, D] by unit vectors -> made [S, D], that by what they were made of.
void unit_backward(const float* gradient, const float* unit, const float* lengths, float* made,
                   int64_t count, int64_t dim, int64_t threads) {
  divided(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *g = gradient + r * dim, *u = unit + r * dim;
      float* to = made + r * dim;
      const float along = product(g, u, dim);
      int64_t c = 0;
      for (; c + WIDTH <= dim; c += WIDTH)
        store(to + c, (load(g + c) - load(u + c) * along) / lengths[r]);
      for (; c < dim; ++c) to[c] = (g[c] - u[c] * along) / lengths[r];
    }
  });
}

// rows [S, D] and G > 0 queries [G, D] -> maxima [S].
void row_maxima(const float* queries, const float* rows, float* maxima, int64_t groups,
                int64_t count, int64_t dim, int64_t threads) {
  Panels panels(count, dim);
  panels.fill(rows, count, threads);
  divided(panels.size(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Register best[2];
      best[0] = best[1] = ON_REGISTERS(set1_ps)(-INFINITY);
      for (int64_t g = 0; g < groups; g += USERS) {
        const float* read[USERS];
        for (int64_t j = 0; j < USERS; ++j) read[j] = queries + std::min(g + j, groups - 1) * dim;
        const Scores scores = products(read, panels[p], dim);
        for (int64_t j = 0; j < USERS; ++j)
          for (int64_t half = 0; half < 2; ++half)
            best[half] = ON_REGISTERS(max_ps)(best[half], scores.of[j][half]);
      }
      float numbers[PANEL];
      store_panel(numbers, best);
      std::copy_n(numbers, std::min(PANEL, count - p * PANEL), maxima + p * PANEL);
    }
  });
}
}
