// Masks of dropout from the numbers of SFC64 (Doty-Humphrey 2010), each of which makes two.

#include "common.h"

extern "C" {

// state [4] of the generator -> mask [N]: ``scale`` where 31 bits are below ``threshold``, else 0.
// Of a number the lower 32 bits come first, of which the lowest is left out.
void scaled_mask(const uint64_t* state, float* mask, int64_t count, int64_t threshold,
                 double scale) {
  uint64_t a = state[0], b = state[1], c = state[2], counter = state[3];
  constexpr int64_t SOME = 512;
  uint64_t numbers[SOME];
  int32_t words[2 * SOME];
  const int32_t limit = (int32_t)threshold;
  const float kept = (float)scale;
  for (int64_t first = 0; first < count; first += 2 * SOME) {
    const int64_t some = std::min(2 * SOME, count - first);
    for (int64_t i = 0; i < (some + 1) / 2; ++i) {
      const uint64_t number = a + b + counter++;
      a = b ^ (b >> 11);
      b = c + (c << 3);
      c = (c << 24 | c >> 40) + number;
      numbers[i] = number;
    }
    std::memcpy(words, numbers, sizeof words);
    for (int64_t i = 0; i < some; ++i)
      mask[first + i] = (int32_t)((uint32_t)words[i] >> 1) < limit ? kept : 0.0f;
  }
}
}
