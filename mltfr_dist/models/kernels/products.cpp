// Products of queries with the rows that each keeps, read where they stand.
//
// G queries and S rows of D numbers, K kept rows a query. Sums over queries are divided over threads
// by columns, so no result depends on the number of threads.

#include "registers.h"

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

// Gradients of ``kept_products``; ``of_rows`` begins as zeros.
void kept_products_backward(const float* gradient, const float* query, const float* rows,
                            const int64_t* kept, float* of_query, float* of_rows, int64_t groups,
                            int64_t width, int64_t count, int64_t threads) {
  constexpr int64_t SOME = 2 * WIDTH;  // columns: a line of the cache
  divided((width + SOME - 1) / SOME, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = begin * SOME; c < std::min(width, end * SOME); c += SOME) {
        const float* q = query + g * width + c;
        const auto through = [&](const auto& some) {
          const Floats first = some.left(q), second = some.right(q);
          Floats left{}, right{};
          for (int64_t k = 0; k < count; ++k) {
            const int64_t at = kept[g * count + k] * width + c;
            const float factor = gradient[g * count + k];
            left += factor * some.left(rows + at);
            right += factor * some.right(rows + at);
            float* of_row = of_rows + at;
            some.put(of_row, some.left(of_row) + factor * first, some.right(of_row) + factor * second);
          }
          some.put(of_query + g * width + c, left, right);
        };
        if (c + SOME <= width) through(All());
        else through(Some(width - c));
      }
  });
}
}
