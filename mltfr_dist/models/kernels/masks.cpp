// Masks of dropout from the numbers of SFC64 (Doty-Humphrey 2010), each of which makes two; seeded
// as NumPy does it (O'Neill's seed sequence).

#include "common.h"

namespace {

constexpr int64_t SOME = 512;  // numbers drawn before they are looked at

struct Generator {
  uint64_t a, b, c, counter;

  explicit Generator(uint64_t seed) {
    uint32_t pool[4], words[6], constant = 0x43b0d7e5;
    const auto hashed = [&](uint32_t value, uint32_t factor) {
      value ^= constant;
      constant *= factor;
      value *= constant;
      return value ^ value >> 16;
    };
    for (int i = 0; i < 4; ++i)
      pool[i] = hashed(i < 2 ? (uint32_t)(seed >> 32 * i) : 0, 0x931e8875);
    for (int from = 0; from < 4; ++from)
      for (int to = 0; to < 4; ++to) {
        if (from == to) continue;
        const uint32_t mixed =
            0xca01f9dd * pool[to] - 0x4973f715 * hashed(pool[from], 0x931e8875);
        pool[to] = mixed ^ mixed >> 16;
      }
    constant = 0x8b51f9dd;
    for (int i = 0; i < 6; ++i) words[i] = hashed(pool[i % 4], 0x58f38ded);
    std::memcpy(&a, words, sizeof a);
    std::memcpy(&b, words + 2, sizeof b);
    std::memcpy(&c, words + 4, sizeof c);
    counter = 1;
    for (int i = 0; i < 12; ++i) next();
  }

  uint64_t next() {
    const uint64_t number = a + b + counter++;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = (c << 24 | c >> 40) + number;
    return number;
  }
};

// A mask that is drawn: ``kept`` where 31 bits are below ``limit``, else 0.
struct Mask {
  Generator generator;
  float* numbers;
  int64_t count, drawn = 0;
  int32_t limit;
  float kept;

  int64_t left() const { return count - drawn; }

  // Of a number the lower 32 bits come first, of which the lowest is left out.
  void put(const uint64_t* some) {
    int32_t words[2 * SOME];
    std::memcpy(words, some, sizeof words);
    const int64_t number = std::min(2 * SOME, left());
    for (int64_t i = 0; i < number; ++i)
      numbers[drawn + i] = (int32_t)((uint32_t)words[i] >> 1) < limit ? kept : 0.0f;
    drawn += number;
  }
};

// The masks side by side as long as all have numbers left: each waits for its own last number.
template <int M>
void draw(Mask* masks) {
  uint64_t some[M][SOME];
  const auto goes_on = [&] {
    bool all = true;
    for (int m = 0; m < M; ++m) all &= masks[m].left() > 0;
    return all;
  };
  while (goes_on()) {
    Generator generators[M] = {masks[0].generator, masks[M - 1].generator};
    for (int64_t i = 0; i < SOME; ++i)
      for (int m = 0; m < M; ++m) some[m][i] = generators[m].next();
    for (int m = 0; m < M; ++m) {
      masks[m].generator = generators[m];
      masks[m].put(some[m]);
    }
  }
}

template <>
void draw<1>(Mask* mask) {
  uint64_t some[SOME];
  while (mask->left() > 0) {
    for (int64_t i = 0; i < SOME; ++i) some[i] = mask->generator.next();
    mask->put(some);
  }
}

}  // namespace

extern "C" {

// seeds, counts, limits and kept [M] -> masks, M times [count].
void draw_masks(const uint64_t* seeds, float* const* masks, const int64_t* counts,
                const int64_t* limits, const double* kept, int64_t number, int64_t threads) {
  const int64_t together = number > threads ? 2 : 1;
  divided((number + together - 1) / together, threads, [&](int64_t begin, int64_t end) {
    std::vector<Mask> mine;
    for (int64_t m = begin * together; m < std::min(number, end * together); ++m)
      mine.push_back(
          {Generator(seeds[m]), masks[m], counts[m], 0, (int32_t)limits[m], (float)kept[m]});
    for (size_t m = 0; together == 2 && m + 1 < mine.size(); m += 2) draw<2>(&mine[m]);
    for (Mask& mask : mine) draw<1>(&mask);
  });
}
}
