// What bindings.cpp asks of the CPU and of CUDA. No torch here: nvcc reads this beside any build of torch.
#pragma once

#include "packing.h"

namespace ijepa {

struct Batch {
  Plan plan;
  int64_t first_image, num_masks;  // masks: plan.per_image of every image
};

struct Rows {
  int64_t context, targets;
};

// Draws the batch into the workspace and finds every mask's starts.
void draw_on_cpu(const Batch& batch, int64_t seed, int64_t step, const Workspace& workspace);

// Writes tokens and prefix sums; the tokens drawn must fit the rows, of which the rest become -1.
void pack_on_cpu(const Batch& batch, const Workspace& workspace, const Packed& packed, const Rows& rows);

// Both, as three launches on `stream` that never wait; seed and step are read from device memory. `scratch` holds
// scratch_words words per mask. Null, or what CUDA says is wrong.
const char* launch_on_cuda(const Batch& batch, const int64_t* seed, const int64_t* step, const Workspace& workspace,
                           uint32_t* scratch, const Packed& packed, const Rows& rows, void* stream);

}  // namespace ijepa
