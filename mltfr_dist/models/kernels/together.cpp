// Sums and maxima of numbers of several processes of one machine, through memory that they share.
//
// Nobody has to be woken by a message: each process looks whether the others have come, and sees it
// within a fraction of a microsecond. Only where one lets the others wait for long do they sleep, a
// little at a time. A network's threads take one to several milliseconds on a busy machine.

#include <fcntl.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <type_traits>

#include "common.h"

namespace {

// How a process waits: it looks, then lets others have the core, then sleeps. In nanoseconds:
constexpr int64_t LOOKS = 1 << 10;  // a number of them
constexpr int64_t YIELDING = 1'000'000, SOON = 20'000'000;      // until it sleeps, until for longer
constexpr int64_t SHORT_SLEEP = 50'000, LONG_SLEEP = 500'000;
constexpr int64_t ASKED_EVERY = 100'000'000;  // from one look for the dead to the next
constexpr int64_t DONE = -1, OUT_OF_STEP = -2;

// What a process tells the others, in a cache line of its own.
struct alignas(64) Told {
  std::atomic<int64_t> arrived;  // how often it has
  int64_t message;               // what it adds: all must add the same
};

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

void rest(int64_t nanoseconds) {
  const timespec time{0, nanoseconds};
  nanosleep(&time, nullptr);
}

// Each process holds the lock of a byte of ``file``; the system takes it back where one ends.
bool has_ended(int64_t file, int64_t process) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = process;
  lock.l_len = 1;
  return fcntl(static_cast<int>(file), F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

struct Group {
  Told* told;         // [processes]
  char* slots;        // [processes, capacity] bytes, and after them [capacity] of results
  int64_t capacity;   // of bytes
  int64_t process, processes, file;
  int64_t& arrivals;  // of this process

  char* slot(int64_t of) const { return slots + of * capacity; }

  // DONE once all have come as often as this process; or who has ended before.
  int64_t meet() {
    told[process].arrived.store(++arrivals, std::memory_order_release);
    for (int64_t other = 0; other < processes; ++other) {
      if (!comes(other)) return other;
    }
    return DONE;
  }

  bool has_come(int64_t other) const {
    return told[other].arrived.load(std::memory_order_acquire) >= arrivals;
  }

  bool comes(int64_t other) const {
    for (int64_t look = 0; look < LOOKS; ++look) {
      if (has_come(other)) return true;
      __builtin_ia32_pause();
    }
    const int64_t start = now();
    int64_t asked = start;
    while (!has_come(other)) {
      const int64_t time = now();
      if (time - asked > ASKED_EVERY) {
        if (has_ended(file, other)) return has_come(other);  // it may have come, and then ended
        asked = time;
      }
      if (time - start < YIELDING) sched_yield();
      else rest(time - start < SOON ? SHORT_SLEEP : LONG_SLEEP);
    }
    return true;
  }
};

// Goes through tensors as if they stood one behind the other.
template <typename T>
struct Cursor {
  T* const* tensors;
  const int64_t* counts;
  int64_t tensor = 0, offset = 0;

  // Calls ``work(numbers, first, n)`` for the next ``count``: n of them stand at ``numbers``.
  template <typename Work>
  void next(int64_t count, Work work) {
    for (int64_t first = 0; first < count;) {
      const int64_t n = std::min(count - first, counts[tensor] - offset);
      work(tensors[tensor] + offset, first, n);
      first += n;
      offset += n;
      if (offset == counts[tensor]) ++tensor, offset = 0;
    }
  }
};

// Every number is reduced by one process, in the processes' order: all get the same bits.
template <typename T, bool LARGEST>
int64_t reduce(Group& group, T* const* tensors, const int64_t* counts, int64_t number,
               double scale) {
  int64_t left = 0;
  for (int64_t i = 0; i < number; ++i) left += counts[i];
  Cursor<T> from{tensors, counts}, to{tensors, counts};
  const int64_t room = group.capacity / static_cast<int64_t>(sizeof(T));
  T* const own = reinterpret_cast<T*>(group.slot(group.process));
  T* const results = reinterpret_cast<T*>(group.slot(group.processes));
  const T factor = static_cast<T>(scale);
  const int64_t message =
      (left << 8) + static_cast<int64_t>(sizeof(T)) * 4 + std::is_integral<T>() * 2 + LARGEST;
  group.told[group.process].message = message;
  while (left > 0) {
    const int64_t count = std::min(left, room);
    from.next(count, [&](const T* numbers, int64_t first, int64_t n) {
      std::memcpy(own + first, numbers, n * sizeof(T));
    });
    if (const int64_t ended = group.meet(); ended != DONE) return ended;
    for (int64_t other = 0; other < group.processes; ++other) {
      if (group.told[other].message != message) return OUT_OF_STEP;
    }
    const int64_t begin = count * group.process / group.processes;
    const int64_t end = count * (group.process + 1) / group.processes;
    const T* first = reinterpret_cast<const T*>(group.slot(0));
    std::memcpy(results + begin, first + begin, (end - begin) * sizeof(T));
    for (int64_t other = 1; other < group.processes; ++other) {
      const T* numbers = reinterpret_cast<const T*>(group.slot(other));
      for (int64_t i = begin; i < end; ++i) {
        if (!LARGEST) results[i] += numbers[i];
        else if (!(results[i] >= numbers[i]) && results[i] == results[i]) results[i] = numbers[i];
      }
    }
    if (factor != T(1)) {
      for (int64_t i = begin; i < end; ++i) results[i] *= factor;
    }
    if (const int64_t ended = group.meet(); ended != DONE) return ended;
    to.next(count, [&](T* numbers, int64_t first, int64_t n) {
      std::memcpy(numbers, results + first, n * sizeof(T));
    });
    left -= count;
  }
  return DONE;
}

template <typename T>
int64_t reduce(Group& group, void* const* tensors, const int64_t* counts, int64_t number,
               int64_t largest, double scale) {
  T* const* typed = reinterpret_cast<T* const*>(tensors);
  return largest ? reduce<T, true>(group, typed, counts, number, scale)
                 : reduce<T, false>(group, typed, counts, number, scale);
}

}  // namespace

extern "C" {

// Bytes before the slots.
int64_t bytes_told(int64_t processes) { return processes * static_cast<int64_t>(sizeof(Told)); }

// Every number of ``tensors`` becomes the sum over all processes times ``scale``, or the maximum.
// ``type`` 0: float, 1: double, 2: int64. Returns -1; -2 where the processes' messages differ; or
// which process has ended. ``memory`` begins with zeros and is shared by all.
int64_t reduce_together(void* const* tensors, const int64_t* counts, int64_t number, int64_t type,
                        int64_t largest, double scale, char* memory, int64_t capacity,
                        int64_t process, int64_t processes, int64_t file, int64_t* arrivals) {
  Group group{reinterpret_cast<Told*>(memory), memory + bytes_told(processes), capacity, process,
              processes, file, *arrivals};
  switch (type) {
    case 0: return reduce<float>(group, tensors, counts, number, largest, scale);
    case 1: return reduce<double>(group, tensors, counts, number, largest, scale);
    default: return reduce<int64_t>(group, tensors, counts, number, largest, scale);
  }
}
}
