// Packed histories in blocks of n positions, with a mean of the past for each.
//
// B histories, ``lengths`` [B] positions of D numbers each, one behind the other [N, D]; G blocks
// that hold a position, history by history, of which a history's last may hold fewer.

#include "common.h"

namespace {

struct Shape {
  int64_t rows, dim, block, offset;  // offset: in a block, where its mean is taken
  int64_t blocks(int64_t real) const { return (real + block - 1) / block; }
};

// work(length, first position, first block) for every history.
template <typename Work>
void each(const int64_t* lengths, const Shape& s, int64_t threads, const Work& work) {
  std::vector<int64_t> position(s.rows + 1, 0), block(s.rows + 1, 0);
  for (int64_t b = 0; b < s.rows; ++b) {
    position[b + 1] = position[b] + lengths[b];
    block[b + 1] = block[b] + s.blocks(lengths[b]);
  }
  divided(s.rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) work(lengths[b], position[b], block[b]);
  });
}

}  // namespace

extern "C" {

// x [N, D] -> means [G, D] of the positions of the history up to ``offset`` of each block, summed
// in float64; ends [G] of the blocks among all positions; places [N] of the positions among G n.
void block_means(const float* x, const int64_t* lengths, float* means, int64_t* ends,
                 int64_t* places, int64_t rows, int64_t dim, int64_t block, int64_t offset,
                 int64_t threads) {
  const Shape s{rows, dim, block, offset};
  each(lengths, s, threads, [&](int64_t length, int64_t position, int64_t first) {
    const float* from = x + position * dim;
    std::vector<double> total(dim, 0.0);
    for (int64_t t = 0; t < s.blocks(length) * block; ++t) {
      const int64_t g = first + t / block;
      if (t < length) {
        for (int64_t c = 0; c < dim; ++c) total[c] += from[t * dim + c];
        places[position + t] = first * block + t;
        ends[g] = position + t + 1;
      }
      if (t % block != offset) continue;
      const float count = (float)std::min(t + 1, length);
      for (int64_t c = 0; c < dim; ++c) means[g * dim + c] = (float)total[c] / count;
    }
  });
}

// The gradient by x of ``block_means``.
void block_means_backward(const float* of_means, const int64_t* lengths, float* of_x, int64_t rows,
                          int64_t dim, int64_t block, int64_t offset, int64_t threads) {
  const Shape s{rows, dim, block, offset};
  each(lengths, s, threads, [&](int64_t length, int64_t position, int64_t first) {
    float* to = of_x + position * dim;
    std::vector<double> later(dim, 0.0);
    for (int64_t t = s.blocks(length) * block - 1; t >= 0; --t) {
      if (t % block == offset) {
        const float* mean = of_means + (first + t / block) * dim;
        const float count = (float)std::min(t + 1, length);
        for (int64_t c = 0; c < dim; ++c) later[c] += mean[c] / count;
      }
      if (t < length)
        for (int64_t c = 0; c < dim; ++c) to[t * dim + c] = (float)later[c];
    }
  });
}
}
