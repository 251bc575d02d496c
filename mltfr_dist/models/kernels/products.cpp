// Products of queries with the rows that each keeps, read where they stand.
//
// G queries and S rows of D numbers, K kept rows a query. Sums over queries are divided over threads
// by columns, so no result depends on the number of threads.

#include "common.h"

extern "C" {

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
        float product = sum(total);
        for (; c < width; ++c) product += q[c] * row[c];
        scores[g * count + k] = product;
      }
    }
  });
}

// Gradients of ``kept_products``; both begin as zeros.
void kept_products_backward(const float* gradient, const float* query, const float* rows,
                            const int64_t* kept, float* of_query, float* of_rows, int64_t groups,
                            int64_t width, int64_t count, int64_t threads) {
  constexpr int64_t SOME = 16;  // columns: a line of the cache
  divided((width + SOME - 1) / SOME, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * SOME, last = std::min(width, end * SOME);
    const int64_t whole = first + (last - first) / WIDTH * WIDTH;
    for (int64_t g = 0; g < groups; ++g) {
      const float* q = query + g * width;
      float* of_q = of_query + g * width;
      for (int64_t k = 0; k < count; ++k) {
        const float* row = rows + kept[g * count + k] * width;
        float* of_row = of_rows + kept[g * count + k] * width;
        const float factor = gradient[g * count + k];
        int64_t c = first;
        for (; c < whole; c += WIDTH) {
          store(of_q + c, load(of_q + c) + factor * load(row + c));
          store(of_row + c, load(of_row + c) + factor * load(q + c));
        }
        for (; c < last; ++c) {
          of_q[c] += factor * row[c];
          of_row[c] += factor * q[c];
        }
      }
    }
  });
}
}
