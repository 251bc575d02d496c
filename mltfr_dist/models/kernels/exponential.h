#pragma once

#include "common.h"

// exp of numbers <= 0 (Cephes' polynomial after reduction by ln 2), to 2 units in the last place;
// NaN of NaN, so that a broken number is seen in the loss.
template <typename Numbers>
inline Numbers exponential(Numbers x) {
  typedef decltype(x > x) Ints;
  const Numbers low = Numbers{} - 87.0f;
  const Numbers inside = x > low ? x : low;
  const Numbers magic = Numbers{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Numbers power = (inside * 1.44269504f + magic) - magic;
  const Numbers r = (inside - power * 0.693359375f) + power * 2.12194440e-4f;
  Numbers p = Numbers{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = (__builtin_convertvector(power, Ints) + 127) << 23;
  return x > low ? p * (Numbers)exponent : (x != x ? x : Numbers{});
}
