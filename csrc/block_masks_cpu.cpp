// Masks on the CPU: in parallel, one lane each.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "backends.h"

namespace ijepa {
namespace {

constexpr int64_t kMasksPerThread = 256;  // at least; about 100 microseconds of work
constexpr int32_t kPadding = -1;

}  // namespace

void draw_on_cpu(const Batch& batch, int64_t seed, int64_t step, const Workspace& workspace) {
  const Plan& plan = batch.plan;
  const RandomSource source = random_source(seed, step);
  const StepSizes sizes = step_sizes(plan, source);
  torch::stable::parallel_for(0, batch.num_masks, kMasksPerThread, [&](int64_t begin, int64_t end) {
    SingleLane lane;
    std::vector<uint32_t> scratch(plan.scratch_words);
    for (int64_t b = begin; b < end; ++b) {
      draw_mask(lane, plan, source, sizes, workspace, b, static_cast<uint32_t>(batch.first_image), scratch.data());
    }
  });
  SingleLane lane;
  if (plan.context == ContextMode::batch_min) {
    const int64_t groups = batch.num_masks / plan.group_size;
    for (int64_t g = 0; g < groups; ++g) truncate_group(lane, plan, workspace, g);
  }
  const Segment all = segment_of(batch.num_masks, 0, 1);
  for (int32_t* starts : {workspace.context_starts, workspace.target_starts}) {
    starts[batch.num_masks] = segment_starts(lane, starts, all, 0);
  }
}

void pack_on_cpu(const Batch& batch, const Workspace& workspace, const Packed& packed, const Rows& rows) {
  const Plan& plan = batch.plan;
  torch::stable::parallel_for(0, batch.num_masks, kMasksPerThread, [&](int64_t begin, int64_t end) {
    SingleLane lane;
    for (int64_t b = begin; b < end; ++b) pack_mask(lane, plan, workspace, b, packed);
  });
  const int32_t context_tokens = workspace.context_starts[batch.num_masks];
  const int32_t target_tokens = workspace.target_starts[batch.num_masks];
  packed.context_cu_seqlens[batch.num_masks * plan.num_contexts] = context_tokens;
  packed.target_cu_seqlens[batch.num_masks * plan.num_targets] = target_tokens;
  std::fill(packed.context + context_tokens, packed.context + rows.context, kPadding);
  std::fill(packed.targets + target_tokens, packed.targets + rows.targets, kPadding);
}

}  // namespace ijepa
