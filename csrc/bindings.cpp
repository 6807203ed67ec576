// The operators ijepa_fast::block_masks and ijepa_fast::block_mask_counts, on torch's stable ABI: one build serves every
// torch from 2.10 on, and every Python.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "backends.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Outputs {
  Tensor context, context_cu_seqlens, targets, target_cu_seqlens;

  Outputs(const ijepa::Batch& batch, const ijepa::Rows& rows, const Tensor& like)
      : context(ints(like, rows.context)),
        context_cu_seqlens(ints(like, batch.num_masks * batch.plan.num_contexts + 1)),
        targets(ints(like, rows.targets)),
        target_cu_seqlens(ints(like, batch.num_masks * batch.plan.num_targets + 1)) {}

  ijepa::Packed pointers() const {
    return {context.mutable_data_ptr<int32_t>(), context_cu_seqlens.mutable_data_ptr<int32_t>(),
            targets.mutable_data_ptr<int32_t>(), target_cu_seqlens.mutable_data_ptr<int32_t>()};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> as_tuple() const {
    return {context, context_cu_seqlens, targets, target_cu_seqlens};
  }

 private:
  static Tensor ints(const Tensor& like, int64_t size) {
    return torch::stable::new_empty(like, {size}, ScalarType::Int);
  }
};

void check_scalar(const Tensor& tensor, const char* name) {
  if (tensor.scalar_type() != ScalarType::Long || tensor.numel() != 1) {
    ijepa::refuse(std::string(name) + " must be one int64");
  }
}

ijepa::Batch read_batch(const Tensor& seed, const Tensor& step, int64_t first_image, int64_t num_images,
                        const std::vector<int64_t>& plan) {
  check_scalar(seed, "seed");
  check_scalar(step, "step");
  const ijepa::Plan read = ijepa::read_plan(plan.data(), plan.size());
  ijepa::check_images(read, first_image, num_images);
  return {read, first_image, num_images * read.per_image};
}

// The rows that a device needs to be told, since it cannot be asked.
ijepa::Rows rows_given(std::optional<int64_t> context_rows, std::optional<int64_t> target_rows) {
  if (context_rows.value_or(-1) < 0 || target_rows.value_or(-1) < 0) {
    ijepa::refuse("context_rows and target_rows must be given on this device");
  }
  return {*context_rows, *target_rows};
}

// A batch drawn on the CPU, not yet packed.
struct Drawn {
  ijepa::Workspace workspace;
  Tensor memory;
  ijepa::Rows tokens;

  Drawn(const ijepa::Batch& batch, const Tensor& seed, const Tensor& step)
      : memory(torch::stable::new_empty(seed, {workspace.lay_out(batch.plan, batch.num_masks, 0)}, ScalarType::Byte)) {
    workspace.lay_out(batch.plan, batch.num_masks, reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()));
    ijepa::draw_on_cpu(batch, *seed.const_data_ptr<int64_t>(), *step.const_data_ptr<int64_t>(), workspace);
    tokens = {workspace.context_starts[batch.num_masks], workspace.target_starts[batch.num_masks]};
  }
};

int64_t rows_for(int64_t tokens, std::optional<int64_t> rows) {
  if (tokens > rows.value_or(tokens)) {
    ijepa::refuse(std::to_string(tokens) + " tokens do not fit a capacity of " + std::to_string(*rows) + " rows");
  }
  return rows.value_or(tokens);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_masks_cpu(const Tensor& seed, const Tensor& step, int64_t first_image,
                                                           int64_t num_images, const std::vector<int64_t>& plan,
                                                           std::optional<int64_t> context_rows,
                                                           std::optional<int64_t> target_rows) {
  const ijepa::Batch batch = read_batch(seed, step, first_image, num_images, plan);
  const Drawn drawn(batch, seed, step);
  const ijepa::Rows rows{rows_for(drawn.tokens.context, context_rows), rows_for(drawn.tokens.targets, target_rows)};
  const Outputs outputs(batch, rows, seed);
  ijepa::pack_on_cpu(batch, drawn.workspace, outputs.pointers(), rows);
  return outputs.as_tuple();
}

std::tuple<int64_t, int64_t> block_mask_counts_cpu(const Tensor& seed, const Tensor& step, int64_t first_image,
                                                   int64_t num_images, const std::vector<int64_t>& plan) {
  const ijepa::Batch batch = read_batch(seed, step, first_image, num_images, plan);
  const Drawn drawn(batch, seed, step);
  return {drawn.tokens.context, drawn.tokens.targets};
}

// Shapes only, for torch.compile and meta tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_masks_meta(const Tensor& seed, const Tensor& step, int64_t first_image,
                                                            int64_t num_images, const std::vector<int64_t>& plan,
                                                            std::optional<int64_t> context_rows,
                                                            std::optional<int64_t> target_rows) {
  const ijepa::Batch batch = read_batch(seed, step, first_image, num_images, plan);
  return Outputs(batch, rows_given(context_rows, target_rows), seed).as_tuple();
}

#ifdef IJEPA_FAST_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor, Tensor> block_masks_cuda(const Tensor& seed, const Tensor& step, int64_t first_image,
                                                            int64_t num_images, const std::vector<int64_t>& plan,
                                                            std::optional<int64_t> context_rows,
                                                            std::optional<int64_t> target_rows) {
  const ijepa::Batch batch = read_batch(seed, step, first_image, num_images, plan);
  const ijepa::Rows rows = rows_given(context_rows, target_rows);
  const int32_t device = seed.get_device_index();
  if (!step.is_cuda() || step.get_device_index() != device) ijepa::refuse("seed and step must be on one device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  ijepa::Workspace workspace;
  const int64_t drawn_bytes = workspace.lay_out(batch.plan, batch.num_masks, 0);
  const int64_t scratch_bytes = batch.num_masks * batch.plan.scratch_words * static_cast<int64_t>(sizeof(uint32_t));
  const Tensor memory = torch::stable::new_empty(seed, {drawn_bytes + scratch_bytes}, ScalarType::Byte);
  char* const base = static_cast<char*>(memory.mutable_data_ptr());
  workspace.lay_out(batch.plan, batch.num_masks, reinterpret_cast<uintptr_t>(base));

  const Outputs outputs(batch, rows, seed);
  const char* error = ijepa::launch_on_cuda(
      batch, seed.const_data_ptr<int64_t>(), step.const_data_ptr<int64_t>(), workspace,
      reinterpret_cast<uint32_t*>(base + drawn_bytes), outputs.pointers(), rows, stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA kernel launch failed: ", error);
  return outputs.as_tuple();
}
#endif

}  // namespace

// What it computes: ijepa_fast/masks/sampling.py. plan: ijepa_fast.masks.extension.plan_numbers. Gives context indices, context
// cu_seqlens, target indices and target cu_seqlens, as in Ragged. Without rows the CPU gives as many as there are tokens.
STABLE_TORCH_LIBRARY_FRAGMENT(ijepa_fast, library) {
  library.def(
      "block_masks(Tensor seed, Tensor step, int first_image, int num_images, int[] plan, int? context_rows=None, "
      "int? target_rows=None) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "block_mask_counts(Tensor seed, Tensor step, int first_image, int num_images, int[] plan) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  library.impl("block_masks", TORCH_BOX(&block_masks_cpu));
  library.impl("block_mask_counts", TORCH_BOX(&block_mask_counts_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ijepa_fast, Meta, library) { library.impl("block_masks", TORCH_BOX(&block_masks_meta)); }

#ifdef IJEPA_FAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(ijepa_fast, CUDA, library) { library.impl("block_masks", TORCH_BOX(&block_masks_cuda)); }
#endif
