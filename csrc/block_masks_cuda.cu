// Masks on a CUDA device: one warp each. Three launches: draw, find where each starts, pack.
//
// No header of torch: nvcc compiles this file beside any build of it.
#undef NDEBUG  // the assertion below is the only way to report tokens that do not fit
#include <cassert>
#include <cuda_runtime.h>

#include "backends.h"

namespace ijepa {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kSegments = 32;  // warps of the one block that finds the starts of context or targets
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

class Warp {
 public:
  __device__ Warp() : lane_(static_cast<int>(threadIdx.x) % kWarp) {}
  __device__ int lane() const { return lane_; }
  __device__ static constexpr int size() { return kWarp; }
  __device__ static int sum(int x) { return __reduce_add_sync(kAllLanes, x); }
  __device__ static int least(int x) { return __reduce_min_sync(kAllLanes, x); }
  __device__ static void sync() { __syncwarp(); }

  __device__ int sum_before(int x) const {
    int inclusive = x;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (lane_ >= distance) inclusive += below;
    }
    return inclusive - x;
  }

  template <class Predicate>
  __device__ uint32_t ballot(int count, Predicate predicate) const {
    return __ballot_sync(kAllLanes, lane_ < count && predicate(lane_));
  }

  template <class Visit>
  __device__ void for_each_bit(uint32_t word, Visit visit) const {
    if (word >> lane_ & 1) visit(lane_, __popc(word & ((1u << lane_) - 1)));
  }

 private:
  int lane_;
};

// Four blocks to a multiprocessor: enough for 2,048 masks at once on 132 of them, and registers to spare.
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock, 4)
    draw_kernel(Batch batch, const int64_t* seed, const int64_t* step, Workspace workspace, uint32_t* scratch) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (b >= batch.num_masks) return;
  Warp warp;
  const RandomSource source = random_source(*seed, *step);
  const StepSizes sizes = step_sizes(batch.plan, source);
  draw_mask(warp, batch.plan, source, sizes, workspace, b, static_cast<uint32_t>(batch.first_image),
             scratch + b * batch.plan.scratch_words);
}

// Block 0 finds the starts of the contexts, block 1 those of the targets; a segment of the masks per warp.
__global__ void __launch_bounds__(kWarp * kSegments) starts_kernel(Batch batch, Workspace workspace, Rows rows) {
  __shared__ int32_t sums[kSegments];
  Warp warp;
  const int own = static_cast<int>(threadIdx.x) / kWarp;
  const bool context = blockIdx.x == 0;
  if (context && batch.plan.context == ContextMode::batch_min) {
    for (int64_t g = own; g * batch.plan.group_size < batch.num_masks; g += kSegments) {
      truncate_group(warp, batch.plan, workspace, g);
    }
    __syncthreads();
  }
  int32_t* const starts = context ? workspace.context_starts : workspace.target_starts;
  const Segment segment = segment_of(batch.num_masks, own, kSegments);
  const int sum = segment_sum(warp, starts, segment);
  if (warp.lane() == 0) sums[own] = sum;
  __syncthreads();
  const int end = segment_starts(warp, starts, segment, sum_of_segments_before(warp, sums, own));
  if (own == kSegments - 1 && warp.lane() == 0) {
    starts[batch.num_masks] = end;
    assert(end <= (context ? rows.context : rows.targets) && "mask tokens do not fit the capacity");
  }
}

__device__ void pad(int32_t* tokens, int64_t used, int64_t rows) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = used + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < rows; t += threads) {
    tokens[t] = -1;
  }
}

__global__ void __launch_bounds__(kWarp * kWarpsPerBlock)
    pack_kernel(Batch batch, Workspace workspace, Packed packed, Rows rows) {
  const int64_t masks = batch.num_masks;
  const int32_t context_tokens = workspace.context_starts[masks], target_tokens = workspace.target_starts[masks];
  pad(packed.context, context_tokens, rows.context);
  pad(packed.targets, target_tokens, rows.targets);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    packed.context_cu_seqlens[masks * batch.plan.num_contexts] = context_tokens;
    packed.target_cu_seqlens[masks * batch.plan.num_targets] = target_tokens;
  }
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (b >= masks) return;
  Warp warp;
  pack_mask(warp, batch.plan, workspace, b, packed);
}

}  // namespace

const char* launch_on_cuda(const Batch& batch, const int64_t* seed, const int64_t* step, const Workspace& workspace,
                           uint32_t* scratch, const Packed& packed, const Rows& rows, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>((batch.num_masks + kWarpsPerBlock - 1) / kWarpsPerBlock);
  constexpr int kThreads = kWarp * kWarpsPerBlock;
  draw_kernel<<<blocks, kThreads, 0, on>>>(batch, seed, step, workspace, scratch);
  starts_kernel<<<2, kWarp * kSegments, 0, on>>>(batch, workspace, rows);
  pack_kernel<<<blocks, kThreads, 0, on>>>(batch, workspace, packed, rows);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ijepa
