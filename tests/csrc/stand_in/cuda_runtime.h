// Stands for CUDA's header where csrc/block_masks_cuda.cu is compiled for the host: every thread of a block is one of the
// host, warps exchange values as warps do, blocks run one after the other, and each launch is judged and noted. There is
// nothing in it to wait with or to copy by, so a source that does either does not compile.
//
// tests/test_device_functions.py writes `kernel<<<grid, threads, shared, stream>>>(` as `stand_in::launch(...)(`, and a
// kernel's launch bounds as constants.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#define __device__
#define __shared__ static

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the stand-in"; }

namespace stand_in {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostBlocks = 0x7FFFFFFF, kDefaultShared = 48 * 1024;

struct Launch {
  std::string kernel;
  unsigned blocks, threads, shared;
  void* stream;
};
inline std::vector<Launch> launches;

struct Bounds {
  unsigned threads, blocks_per_multiprocessor = 1;
};

// What the lanes of a warp meet at, and the values that they exchange there.
struct Warp {
  Warp() { pthread_barrier_init(&barrier, nullptr, kWarp); }
  ~Warp() { pthread_barrier_destroy(&barrier); }
  pthread_barrier_t barrier;
  int values[kWarp];
};
inline thread_local Warp* warp;
inline pthread_barrier_t block_barrier;

// combine(result, value) over the lanes [0, end).
template <class Combine>
int exchange(int own, unsigned end, int result, Combine combine) {
  warp->values[threadIdx.x % kWarp] = own;
  pthread_barrier_wait(&warp->barrier);
  for (unsigned lane = 0; lane < end; ++lane) result = combine(result, warp->values[lane]);
  pthread_barrier_wait(&warp->barrier);
  return result;
}

inline void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::abort();
}

template <class Kernel>
auto launch(const char* name, Bounds bounds, Kernel kernel, unsigned blocks, unsigned threads, unsigned shared,
            cudaStream_t stream) {
  require(blocks >= 1 && blocks <= kMostBlocks, std::string(name) + ": no grid");
  require(threads % kWarp == 0 && threads <= bounds.threads && threads <= kMostThreads,
          std::string(name) + ": more threads than its launch bounds allow");
  require(shared <= kDefaultShared, std::string(name) + ": more shared memory than was asked for");
  launches.push_back({name, blocks, threads, shared, stream});
  return [=](auto... arguments) {
    std::vector<Warp> warps(threads / kWarp);
    pthread_barrier_init(&block_barrier, nullptr, threads);
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=, &warps] {
        threadIdx = {thread};
        blockDim = {threads};
        gridDim = {blocks};
        warp = &warps[thread / kWarp];
        for (unsigned block = 0; block < blocks; ++block) {
          blockIdx = {block};
          kernel(arguments...);
          pthread_barrier_wait(&block_barrier);
        }
      });
    }
    for (std::thread& thread : running) thread.join();
    pthread_barrier_destroy(&block_barrier);
  };
}

}  // namespace stand_in

inline void __syncwarp() { pthread_barrier_wait(&stand_in::warp->barrier); }
inline void __syncthreads() { pthread_barrier_wait(&stand_in::block_barrier); }
inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __reduce_add_sync(uint32_t, int x) {
  return stand_in::exchange(x, stand_in::kWarp, 0, [](int a, int b) { return a + b; });
}
inline int __reduce_min_sync(uint32_t, int x) {
  return stand_in::exchange(x, stand_in::kWarp, INT32_MAX, [](int a, int b) { return a < b ? a : b; });
}
inline int __shfl_up_sync(uint32_t, int x, int distance) {
  const int lane = static_cast<int>(threadIdx.x % stand_in::kWarp), from = lane < distance ? lane : lane - distance;
  return stand_in::exchange(x, static_cast<unsigned>(from) + 1, 0, [](int, int value) { return value; });
}
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const uint32_t own = static_cast<uint32_t>(predicate) << (threadIdx.x % stand_in::kWarp);
  return static_cast<uint32_t>(
      stand_in::exchange(static_cast<int>(own), stand_in::kWarp, 0, [](int a, int b) { return a | b; }));
}
