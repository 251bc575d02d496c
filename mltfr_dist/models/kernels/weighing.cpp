// How much each row that a query keeps weighs, from rows read where they stand.
//
// G queries and S rows of D numbers, K kept rows a query. Sums over queries are divided over
// threads by columns, so no result depends on the number of threads.

#include "attended.h"

namespace {

// Products of a query with ``count`` <= 8 of its rows.
Floats products(const float* query, const float* rows, const int64_t* kept, int64_t count,
                int64_t width) {
  Floats sums[WIDTH] = {};
  const float* read[WIDTH];
  for (int64_t k = 0; k < WIDTH; ++k) read[k] = rows + kept[std::min(k, count - 1)] * width;
  int64_t c = 0;
  for (; c + WIDTH <= width; c += WIDTH) {
    const Floats numbers = load(query + c);
    for (int64_t k = 0; k < WIDTH; ++k) sums[k] += numbers * load(read[k] + c);
  }
  if (c < width) {
    const Floats numbers = load_some(query + c, width - c);
    for (int64_t k = 0; k < WIDTH; ++k) sums[k] += numbers * load_some(read[k] + c, width - c);
  }
  transpose_block(sums);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// From the gradient of one query's log-weights [K] that of its products; returns that of the
// temperature. Scores enter it but for a number that all share, and their gradients sum to zero.
float through_softmax(const float* gradient, const float* log_weights, float temperature,
                      float* of_products, int64_t count) {
  const float inverse = 1.0f / temperature;
  const auto eights = [&](const auto& work) {
    int64_t k = 0;
    for (; k + WIDTH <= count; k += WIDTH) work(k, Columns<Floats, 1, true>{WIDTH});
    if (k < count) work(k, Columns<Floats, 1, false>{count - k});
  };
  Floats total{}, of_temperature{};
  eights([&](int64_t k, const auto& some) { total += some.get(gradient + k, 0); });
  const float whole = sum(total);
  eights([&](int64_t k, const auto& some) {
    const Floats logs = some.get(log_weights + k, 0);
    const Floats made = (some.get(gradient + k, 0) - exponential(logs) * whole) * inverse;
    some.put(of_products + k, 0, made);
    of_temperature -= made * logs;  // behind the last one logs are zero
  });
  return sum(of_temperature);
}

// Gradients of the products, ``factors`` [G, K].
void through_products(const float* factors, const float* query, const float* rows,
                      const int64_t* kept, float* of_query, float* of_rows, int64_t groups,
                      int64_t width, int64_t count, int64_t num_rows, int64_t threads) {
  constexpr int64_t SOME = 16;  // columns: a line of the cache
  divided((width + SOME - 1) / SOME, threads, [&](int64_t begin, int64_t end) {
    clear(of_rows, num_rows, width, begin * SOME, std::min(width, end * SOME));
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t from = begin * SOME; from < std::min(width, end * SOME); from += SOME)
        in_columns<Wide>(std::min(SOME, width - from), [&](int64_t column, const auto& columns) {
          constexpr int64_t R = std::decay_t<decltype(columns)>::REGISTERS;
          const int64_t c = from + column;
          Wide own[R], sums[R] = {};
          for (int64_t r = 0; r < R; ++r) own[r] = columns.get(query + g * width + c, r);
          for (int64_t k = 0; k < count; ++k) {
            const int64_t at = kept[g * count + k] * width + c;
            const float factor = factors[g * count + k];
            for (int64_t r = 0; r < R; ++r) {
              sums[r] += factor * columns.get(rows + at, r);
              columns.put(of_rows + at, r, columns.get(of_rows + at, r) + factor * own[r]);
            }
          }
          for (int64_t r = 0; r < R; ++r) columns.put(of_query + g * width + c, r, sums[r]);
        });
  });
}

}  // namespace

extern "C" {

// Whether all of indices [N] are numbers of ``count`` rows.
int inside(const int64_t* indices, int64_t number, int64_t count, int64_t) {
  bool all = true;
  for (int64_t i = 0; i < number; ++i) all &= (uint64_t)indices[i] < (uint64_t)count;
  return all;
}

// kept [N], numbers of ``count`` rows -> used [min(N, S)], those that are there, ascending, and
// renumbered [N], kept as places among them; returns how many they are, -1 where there is no such
// row. ``places`` [S] is on the way.
int64_t used_rows(const int64_t* kept, int64_t* places, int64_t* used, int64_t* renumbered,
                  int64_t number, int64_t count, int64_t) {
  std::fill_n(places, count, -1);
  for (int64_t i = 0; i < number; ++i) {
    if (kept[i] < 0 || kept[i] >= count) return -1;
    places[kept[i]] = 0;
  }
  int64_t found = 0;
  for (int64_t r = 0; r < count; ++r)
    if (places[r] == 0) {
      used[found] = r;
      places[r] = found++;
    }
  for (int64_t i = 0; i < number; ++i) renumbered[i] = places[kept[i]];
  return found;
}

// query [G, D], rows [S, D], kept [G, K], noise [G, K] or null, temperature [1] -> log_weights
// [G, K], the log-softmax over K of (products + noise) / temperature.
void weigh_kept(const float* query, const float* rows, const int64_t* kept, const float* noise,
                const float* temperature, float* log_weights, int64_t groups, int64_t width,
                int64_t count, int64_t, int64_t threads) {
  divided(groups, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(padded(count)), weights(padded(count));
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * count;
      for (int64_t k = 0; k < count; k += WIDTH)
        store(&scores[k], products(query + g * width, rows, kept + first + k,
                                   std::min(WIDTH, count - k), width));
      for (int64_t k = 0; noise && k < count; ++k) scores[k] += noise[first + k];
      for (int64_t k = 0; k < count; ++k) weights[k] = scores[k] /= *temperature;
      const float log_sum = softmax<Floats>(weights.data(), count, padded(count));
      for (int64_t k = 0; k < count; ++k) log_weights[first + k] = scores[k] - log_sum;
    }
  });
}

// Gradients of ``weigh_kept``; ``of_products`` [G, K] are on the way.
void weigh_kept_backward(const float* gradient, const float* query, const float* rows,
                         const int64_t* kept, const float* temperature, const float* log_weights,
                         float* of_products, float* of_query, float* of_rows,
                         float* of_temperature, int64_t groups, int64_t width, int64_t count,
                         int64_t num_rows, int64_t threads) {
  std::vector<float> of_each(groups);
  divided(groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      of_each[g] = through_softmax(gradient + g * count, log_weights + g * count, *temperature,
                                   of_products + g * count, count);
  });
  double total = 0;
  for (const float one : of_each) total += one;
  *of_temperature = (float)total;
  through_products(of_products, query, rows, kept, of_query, of_rows, groups, width, count,
                   num_rows, threads);
}
}
