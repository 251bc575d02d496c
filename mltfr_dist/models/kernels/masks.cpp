// Masks of dropout from the numbers of SFC64 (Doty-Humphrey 2010), each of which makes two; seeded
// as NumPy does it (O'Neill's seed sequence).
//
// A mask takes the numbers of STREAMS generators in turn, which one register goes on with at once.

#include "common.h"

namespace {

constexpr int64_t STREAMS = 8;
constexpr int64_t EACH = 64;  // numbers of each stream, drawn before they are looked at
typedef uint64_t Words __attribute__((vector_size(8 * STREAMS)));

// What the generator of ``seed`` begins with: three words.
void begin(uint64_t seed, uint64_t* state) {
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
      const uint32_t mixed = 0xca01f9dd * pool[to] - 0x4973f715 * hashed(pool[from], 0x931e8875);
      pool[to] = mixed ^ mixed >> 16;
    }
  constant = 0x8b51f9dd;
  for (int i = 0; i < 6; ++i) words[i] = hashed(pool[i % 4], 0x58f38ded);
  std::memcpy(state, words, sizeof words);
}

// Generators of the seeds from ``seed`` on.
struct Generators {
  Words a, b, c;
  uint64_t counter = 1;

  explicit Generators(uint64_t seed) {
    for (int64_t s = 0; s < STREAMS; ++s) {
      uint64_t state[3];
      begin(seed + s, state);
      a[s] = state[0];
      b[s] = state[1];
      c[s] = state[2];
    }
    for (int i = 0; i < 12; ++i) next();
  }

  Words next() {
    const Words numbers = a + b + counter++;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = (c << 24 | c >> 40) + numbers;
    return numbers;
  }
};

// ``kept`` where 31 bits are below ``limit``, else 0. Of a number the lower 32 bits come first, of
// which the lowest is left out.
void draw(uint64_t seed, float* mask, int64_t count, int32_t limit, float kept) {
  constexpr int64_t SOME = 2 * STREAMS * EACH;
  Generators generators(seed);
  for (int64_t drawn = 0; drawn < count; drawn += SOME) {
    Words numbers[EACH];
    for (Words& some : numbers) some = generators.next();
    int32_t words[SOME];
    std::memcpy(words, numbers, sizeof words);
    const int64_t some = std::min(SOME, count - drawn);
    for (int64_t i = 0; i < some; ++i)
      mask[drawn + i] = (int32_t)((uint32_t)words[i] >> 1) < limit ? kept : 0.0f;
  }
}

}  // namespace

extern "C" {

// seeds, counts, limits and kept [M] -> masks, M times [count].
void draw_masks(const uint64_t* seeds, float* const* masks, const int64_t* counts,
                const int64_t* limits, const double* kept, int64_t number, int64_t threads) {
  divided(number, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      draw(seeds[m], masks[m], counts[m], (int32_t)limits[m], (float)kept[m]);
  });
}
}
