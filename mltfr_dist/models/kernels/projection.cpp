// Rows mapped to the space of the queries, and the largest product of each with any query.
//
// S rows of E numbers, mapped to D numbers; G queries of D numbers.

#include "panels.h"

namespace {

constexpr float SMALLEST_NORM = 1e-12f;  // as torch's normalize

struct Projection {
  const float *rows, *bias;
  float* mapped;
  int64_t count, width, dim;  // width: E
  bool normalised;
  const Panels& weight;

  // The rows of a block from ``first`` on, the last of which may come again.
  void map(int64_t first) const {
    const float* read[USERS];
    for (int64_t r = 0; r < USERS; ++r) read[r] = rows + std::min(first + r, count - 1) * width;
    const int64_t some = std::min(USERS, count - first);
    prefetch(first + USERS);
    // `put` gets a copy: what it indexes by a number stands in memory, not in registers.
    for (int64_t p = 0; p < weight.size(); ++p)
      put(products(read, weight[p], width).copy(), mapped + first * dim + p * PANEL, p, some);
    for (int64_t r = first; normalised && r < first + some; ++r) normalise(mapped + r * dim);
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

  void normalise(float* row) const {
    Floats squares{};
    int64_t c = 0;
    for (; c + WIDTH <= dim; c += WIDTH) squares += load(row + c) * load(row + c);
    float total = sum(squares);
    for (int64_t rest = c; rest < dim; ++rest) total += row[rest] * row[rest];
    const float norm = std::max(std::sqrt(total), SMALLEST_NORM);
    for (c = 0; c + WIDTH <= dim; c += WIDTH) store(row + c, load(row + c) / norm);
    for (; c < dim; ++c) row[c] /= norm;
  }
};

}  // namespace

extern "C" {

// rows [S, E], weight [D, E], bias [D] -> mapped [S, D], unit vectors if ``normalised``.
void map_rows(const float* rows, const float* weight, const float* bias, float* mapped,
             int64_t count, int64_t width, int64_t dim, int64_t normalised, int64_t threads) {
  Panels panels(dim, width);
  panels.fill(weight, dim, threads);
  const Projection projection{rows, bias, mapped, count, width, dim, normalised != 0, panels};
  divided((count + USERS - 1) / USERS, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) projection.map(block * USERS);
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
