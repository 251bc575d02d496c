// What the kernels share: vectors of eight numbers, and work divided over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

typedef float Floats __attribute__((vector_size(32)));
constexpr int64_t WIDTH = 8;

inline int64_t padded(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

inline Floats load(const float* from) {
  Floats found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline float sum(Floats v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// work(begin, end) over 0..count-1 in contiguous shares. Where the system gives no further thread,
// this one does that share too.
template <typename Work>
void divided(int64_t count, int64_t threads, const Work& work) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) {
    const int64_t begin = t * count / threads, end = (t + 1) * count / threads;
    try {
      others.emplace_back(work, begin, end);
    } catch (const std::system_error&) {
      work(begin, end);
    }
  }
  work(0, count / threads);
  for (auto& other : others) other.join();
}
