// What is drawn on one grid: the numbers of ijepa_fast.masks.sampling.Plan, checked, and the memory that drawing needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "philox.h"

namespace ijepa {

enum class Strategy : int32_t { multiblock, block, random, rasterized };
enum class ContextMode : int32_t { exact, fixed, batch_min };
enum class SizePer : int32_t { block, image, step };

// Ranges in units of 2^-24; a span is the number of values.
struct SizeRule {
  uint32_t scale_low, scale_span, aspect_low, aspect_span;
};

struct Plan {
  Strategy strategy;
  ContextMode context;
  SizePer size_per;
  int32_t allow_overlap;
  int32_t num_targets, num_contexts, group_size;
  int32_t height, width;          // of the grid
  int32_t max_height, max_width;  // of the part of it that blocks may reach
  int32_t shared_scale_aspect;
  SizeRule target_rule, context_rule;
  int32_t needed, last_level, fixed_count;
  int32_t per_image;  // masks of every image
  // From here on derived.
  int32_t num_patches;
  int32_t words_per_row, num_words;  // a set of patches: 32 columns of a grid row per word
  int32_t scratch_words;  // what drawing one mask needs: hidden patches, and keys where it chooses single patches
};

// Raised by the numbers below when their meaning changes, so that a library built before is refused.
constexpr int64_t kPlanFormat = 2;
constexpr size_t kPlanNumbers = 25;
constexpr int64_t kMaxPatches = 1 << 16;
constexpr int64_t kMaxPerImage = 1 << 24;

// What Python turns into a ValueError.
[[noreturn]] inline void refuse(const std::string& reason) { throw std::runtime_error("block_masks: " + reason); }

class PlanReader {
 public:
  PlanReader(const int64_t* numbers, size_t count) : next_(numbers) {
    if (count != kPlanNumbers || numbers[0] != kPlanFormat) {
      refuse("this library was built from other sources than the Python package: build it again (make ext)");
    }
    take("format", kPlanFormat, kPlanFormat);
  }

  template <class Number = int32_t>
  Number take(const char* name, int64_t least, int64_t most) {
    const int64_t value = *next_++;
    if (value < least || value > most) {
      refuse(std::string(name) + " must be in [" + std::to_string(least) + ", " + std::to_string(most) + "], got " +
             std::to_string(value));
    }
    return static_cast<Number>(value);
  }

  SizeRule take_rule() {
    const int64_t scale_low = take<int64_t>("scale_low", 1, 1 << 24);
    const int64_t scale_high = take<int64_t>("scale_high", scale_low, 1 << 24);
    const int64_t aspect_low = take<int64_t>("aspect_low", 1 << 18, 1 << 30);
    const int64_t aspect_high = take<int64_t>("aspect_high", aspect_low, 1 << 30);
    return {static_cast<uint32_t>(scale_low), static_cast<uint32_t>(scale_high - scale_low + 1),
            static_cast<uint32_t>(aspect_low), static_cast<uint32_t>(aspect_high - aspect_low + 1)};
  }

 private:
  const int64_t* next_;
};

// The order of ijepa_fast.masks.extension.plan_numbers. Whatever passes here can be drawn without leaving any buffer.
inline Plan read_plan(const int64_t* numbers, size_t count) {
  PlanReader reader(numbers, count);
  Plan plan{};
  plan.strategy = reader.take<Strategy>("strategy", 0, 3);
  plan.context = reader.take<ContextMode>("context", 0, 2);
  plan.size_per = reader.take<SizePer>("size_per", 0, 2);
  plan.allow_overlap = reader.take("allow_overlap", 0, 1);
  const bool rasterized = plan.strategy == Strategy::rasterized;
  plan.num_targets = reader.take("num_targets", rasterized ? 3 : 1, rasterized ? 3 : kMaxPatches - 1);
  plan.num_contexts = reader.take("num_contexts", 1, plan.strategy == Strategy::multiblock ? kMaxPatches - 1 : 1);
  plan.group_size = reader.take("group_size", 1, INT32_MAX);
  plan.height = reader.take("height", 1, kMaxPatches);
  plan.width = reader.take("width", 1, kMaxPatches / plan.height);
  plan.max_height = reader.take("max_height", 1, plan.height);
  plan.max_width = reader.take("max_width", 1, plan.width);
  plan.shared_scale_aspect = reader.take("shared_scale_aspect", 0, 1);
  plan.target_rule = reader.take_rule();
  plan.context_rule = reader.take_rule();
  plan.num_patches = plan.height * plan.width;
  plan.needed = reader.take("needed", 1, plan.num_patches);
  plan.last_level = reader.take("last_level", 0, plan.num_targets);
  plan.fixed_count = reader.take("fixed_count", 0, plan.num_patches);
  plan.per_image = reader.take("per_image", 1, kMaxPerImage);
  plan.words_per_row = (plan.width + 31) / 32;
  plan.num_words = plan.height * plan.words_per_row;
  const bool keys = plan.strategy == Strategy::random || plan.context == ContextMode::fixed;
  plan.scratch_words = plan.num_words + (keys ? plan.num_patches : 0);
  return plan;
}

inline void check_images(const Plan& plan, int64_t first_image, int64_t num_images) {
  const int64_t blocks = plan.num_targets > plan.num_contexts ? plan.num_targets : plan.num_contexts;
  if (num_images < 1 || num_images > INT32_MAX / (blocks * plan.num_patches * plan.per_image)) {
    refuse(std::to_string(num_images) + " images do not fit 32-bit token indices, or are none");
  }
  if (first_image < 0 || first_image > UINT32_MAX) {
    refuse("first_image must be in [0, 2^32), got " + std::to_string(first_image));
  }
  if (plan.context == ContextMode::batch_min && num_images % plan.group_size != 0) {
    refuse(std::to_string(num_images) + " images are not whole groups of " + std::to_string(plan.group_size));
  }
}

// A rectangle of patches. Four ints in 16 bytes, which a lane reads at once.
struct alignas(16) Block {
  int32_t top, left, height, width;
};

// B masks between drawing and packing: all those of the first image, then of the next. C contexts and M targets each.
struct Workspace {
  Block* targets;          // [B, M]; not for strategy random
  int32_t* context_starts; // [B + 1] tokens of each mask, then their prefix sums
  int32_t* target_starts;  // [B + 1] likewise
  int32_t* context_limits; // [B] the shortest context of the mask, for batch_min then of its group
  int32_t* context_lengths;  // [B, C]
  int32_t* target_lengths;   // [B, M]
  uint32_t* context_words;   // [B, C, num_words]
  uint32_t* target_words;    // [B, M, num_words]; only for strategy random

  // Lays the arrays out from `base` on (16-byte aligned); the number of bytes.
  int64_t lay_out(const Plan& plan, int64_t num_masks, uintptr_t base) {
    int64_t used = 0;
    const auto carve = [&](auto*& array, int64_t count) {
      using Element = std::remove_reference_t<decltype(*array)>;
      array = reinterpret_cast<Element*>(base + used);  // an integer: no memory may be there yet
      used += (count * static_cast<int64_t>(sizeof(Element)) + 15) / 16 * 16;
    };
    const bool scattered = plan.strategy == Strategy::random;
    const int64_t contexts = num_masks * plan.num_contexts, blocks = num_masks * plan.num_targets;
    carve(targets, scattered ? 0 : blocks);
    carve(context_starts, num_masks + 1);
    carve(target_starts, num_masks + 1);
    carve(context_limits, num_masks);
    carve(context_lengths, contexts);
    carve(target_lengths, blocks);
    carve(context_words, contexts * plan.num_words);
    carve(target_words, scattered ? blocks * plan.num_words : 0);
    return used;
  }
};

}  // namespace ijepa
