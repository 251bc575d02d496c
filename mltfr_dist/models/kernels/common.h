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
  Floats numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return numbers;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline float sum(Floats v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// The widest vectors that there are.
#ifdef __AVX512F__
typedef float Wide __attribute__((vector_size(64)));

inline float sum(Wide v) {
  Floats halves[2];
  std::memcpy(halves, &v, sizeof v);
  return sum(halves[0] + halves[1]);
}
#else
typedef Floats Wide;
#endif
constexpr int64_t WIDE = sizeof(Wide) / sizeof(float);

// Vectors of either kind.
template <typename V>
constexpr int64_t size_of() { return sizeof(V) / sizeof(float); }

template <typename V>
inline V get(const float* from) {
  V numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return numbers;
}

template <typename V>
inline void put(float* to, V value) { std::memcpy(to, &value, sizeof value); }

// Columns from..to-1 of numbers [rows, width] become zero.
inline void clear(float* numbers, int64_t rows, int64_t width, int64_t from, int64_t to) {
  for (int64_t r = 0; r < rows; ++r)
    std::memset(numbers + r * width + from, 0, (to - from) * sizeof(float));
}

inline bool finite(const float* v, int64_t count) {
  Floats zeros{}, others{};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= count; i += 2 * WIDTH) {
    zeros += load(v + i) * 0.0f;
    others += load(v + i + WIDTH) * 0.0f;
  }
  float rest = 0;
  for (; i < count; ++i) rest += v[i] * 0.0f;
  return sum(zeros + others) + rest == 0;
}

// Of the OpenMP runtime that torch has loaded, where it is the one that is known to have them.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

template <typename Work>
struct Shares {
  int64_t count;
  const Work& work;
  void of(int64_t t, int64_t threads) const {
    work(t * count / threads, (t + 1) * count / threads);
  }
  static void mine(void* shares) {
    ((const Shares*)shares)->of(omp_get_thread_num(), omp_get_num_threads());
  }
};

// work(begin, end) over 0..count-1 in contiguous shares, by torch's own threads: others would have
// to wait for these, which spin for a while after each product. Where torch has other ones, threads
// are begun; where the system gives no further thread, this one does that share too.
template <typename Work>
void divided(int64_t count, int64_t threads, const Work& work) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  Shares<Work> shares{count, work};
  if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
    return GOMP_parallel(shares.mine, &shares, threads, 0);
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) {
    try {
      others.emplace_back([&, t] { shares.of(t, threads); });
    } catch (const std::system_error&) {
      shares.of(t, threads);
    }
  }
  shares.of(0, threads);
  for (auto& other : others) other.join();
}
