// The lanes that work on one image together. The sampling in block_masks.h is written for a Team of any size:
//
//   lane(), size()                 which lane this is, of how many
//   sum(x), least(x)               over all lanes, known to every lane
//   sum_before(x)                  over the lanes before this one
//   ballot(count, predicate)       the word whose bit i, for i < count <= 32, is predicate(i)
//   for_each_bit(word, visit)      visit(bit, rank) for every set bit; rank is the number of set bits below it
//   sync()                         what any lane wrote to memory before, every lane may read after
//
// All lanes call these together, with the same count and word. On the GPU a team is a warp (block_masks_cuda.cu), on
// the CPU one lane; the tests run teams of threads, so that what the lanes of a warp do is checked without a GPU.
#pragma once

#include <cstdint>

#include "philox.h"

namespace ijepa {

IJEPA_FN int count_bits(uint32_t word) {
#if defined(__CUDACC__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Of a positive number.
IJEPA_FN int bit_length(uint64_t number) {
#if defined(__CUDACC__)
  return 64 - __clzll(static_cast<long long>(number));
#else
  return 64 - __builtin_clzll(number);
#endif
}

#if !defined(__CUDACC__)
struct SingleLane {
  static constexpr int lane() { return 0; }
  static constexpr int size() { return 1; }
  static int sum(int x) { return x; }
  static int least(int x) { return x; }
  static int sum_before(int) { return 0; }
  static void sync() {}

  template <class Predicate>
  static uint32_t ballot(int count, Predicate predicate) {
    uint32_t word = 0;
    for (int bit = 0; bit < count; ++bit) word |= static_cast<uint32_t>(predicate(bit)) << bit;
    return word;
  }

  template <class Visit>
  static void for_each_bit(uint32_t word, Visit visit) {
    for (int rank = 0; word != 0; ++rank, word &= word - 1) visit(__builtin_ctz(word), rank);
  }
};
#endif

}  // namespace ijepa
