// Philox4x32-10 in the counter layout of ijepa_fast/philox.py, for host and device.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

// One text for both sides: nvcc compiles it for the device, any other compiler for the host.
#if defined(__CUDACC__)
#define IJEPA_FN __device__ __forceinline__
#else
#define IJEPA_FN inline
#endif

namespace ijepa {

// What a random number is for; the values of ijepa_fast.philox.Stream.
enum class Stream : uint32_t {
  mask_size = 0,
  mask_context_size = 1,
  mask_position = 2,
  mask_context_position = 3,
  mask_subset = 4,
};

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Key and counter but for what differs from call to call. `mask`, the number of an image's mask, is 0 for a whole batch.
struct RandomSource {
  uint32_t seed_low, seed_high, step, mask;
};

IJEPA_FN RandomSource random_source(int64_t seed, int64_t step) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step), 0};
}

// The four words of call number `draw` for item `index`.
IJEPA_FN Words random_words(const RandomSource& source, Stream stream, uint32_t index, uint32_t draw) {
  uint32_t c0 = draw, c1 = index, c2 = source.step, c3 = static_cast<uint32_t>(stream) | source.mask << 8;
  uint32_t k0 = source.seed_low, k1 = source.seed_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product_0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// A uniform integer in [0, n) from one word.
IJEPA_FN uint32_t below(uint32_t word, uint32_t n) {
  return static_cast<uint32_t>(static_cast<uint64_t>(word) * n >> 32);
}

}  // namespace ijepa
