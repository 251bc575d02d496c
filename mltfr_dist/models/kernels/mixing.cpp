// Sums of several outputs, each weighed by position and masked by number.
//
// N positions, D numbers of each, E outputs. A mask may be null, for ones; masks may have rows for
// more positions, and then ``places`` [N] says which are whose.

#include "registers.h"

namespace {

struct Some8 {  // eight numbers from ``c`` on, or what is left of them
  int64_t count;
  Floats get(const float* from) const {
    return count == WIDTH ? load(from) : load_some(from, count);
  }
  void put(float* to, Floats value) const {
    if (count == WIDTH) return store(to, value);
    _mm256_maskstore_ps(to, first(count), (__m256)value);
  }
};

template <typename Work>
inline void in_eights(int64_t dim, const Work& work) {
  for (int64_t c = 0; c < dim; c += WIDTH) work(c, Some8{std::min(WIDTH, dim - c)});
}

}  // namespace

extern "C" {

// outputs and masks: E times [N, D], gate [N, E] -> mixed [N, D].
void mix(const float* const* outputs, const float* const* masks, const int64_t* places,
         const float* gate, float* mixed, int64_t count, int64_t dim, int64_t experts,
         int64_t threads) {
  divided(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      in_eights(dim, [&](int64_t c, const Some8& some) {
        const int64_t at = i * dim + c, of_mask = (places ? places[i] : i) * dim + c;
        Floats total{};
        for (int64_t e = 0; e < experts; ++e) {
          Floats output = some.get(outputs[e] + at);
          if (masks[e]) output *= some.get(masks[e] + of_mask);
          total += gate[i * experts + e] * output;
        }
        some.put(mixed + at, total);
      });
  });
}

// Gradients of ``mix`` by its outputs and its gate.
void mix_backward(const float* gradient, const float* const* outputs, const float* const* masks,
                  const int64_t* places, const float* gate, float* const* of_outputs,
                  float* of_gate, int64_t count, int64_t dim, int64_t experts, int64_t threads) {
  divided(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t e = 0; e < experts; ++e) {
        Floats total{};
        in_eights(dim, [&](int64_t c, const Some8& some) {
          const int64_t at = i * dim + c, of_mask = (places ? places[i] : i) * dim + c;
          const Floats incoming = some.get(gradient + at);
          const Floats seen = masks[e] ? incoming * some.get(masks[e] + of_mask) : incoming;
          total += seen * some.get(outputs[e] + at);
          some.put(of_outputs[e] + at, gate[i * experts + e] * seen);
        });
        of_gate[i * experts + e] = sum(total);
      }
  });
}
}
