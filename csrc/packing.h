// From single masks to Ragged: where the tokens of each start, and the token indices. As block_masks.h,
// for a team of lanes.
#pragma once

#include "block_masks.h"

namespace ijepa {

// Cuts the contexts of group g, the masks of one number of its images, to the shortest of them.
template <class Team>
IJEPA_FN void truncate_group(Team& team, const Plan& plan, const Workspace& workspace, int64_t g) {
  const int64_t masks = int64_t{plan.group_size} * plan.per_image, step = int64_t{team.size()} * plan.per_image;
  const int64_t begin = g / plan.per_image * masks + g % plan.per_image, end = begin + masks;
  const int64_t own = begin + int64_t{team.lane()} * plan.per_image;
  int shortest = INT32_MAX;
  for (int64_t b = own; b < end; b += step) {
    shortest = workspace.context_limits[b] < shortest ? workspace.context_limits[b] : shortest;
  }
  shortest = team.least(shortest);
  for (int64_t b = own; b < end; b += step) {
    workspace.context_limits[b] = shortest;
    workspace.context_starts[b] = plan.num_contexts * shortest;
  }
}

// The masks [begin, end) of one of several segments of a scan.
struct Segment {
  int64_t begin, end;
};

IJEPA_FN Segment segment_of(int64_t num_masks, int segment, int num_segments) {
  return {num_masks * segment / num_segments, num_masks * (segment + 1) / num_segments};
}

template <class Team>
IJEPA_FN int segment_sum(Team& team, const int32_t* counts, const Segment& segment) {
  int sum = 0;
  for (int64_t b = segment.begin + team.lane(); b < segment.end; b += team.size()) sum += counts[b];
  return team.sum(sum);
}

// Where a segment starts, from the sums of all segments.
template <class Team>
IJEPA_FN int sum_of_segments_before(Team& team, const int32_t* sums, int segment) {
  int sum = 0;
  for (int s = team.lane(); s < segment; s += team.size()) sum += sums[s];
  return team.sum(sum);
}

// Counts become starts, the first of them `start`; what follows the segment.
template <class Team>
IJEPA_FN int segment_starts(Team& team, int32_t* counts, const Segment& segment, int start) {
  for (int64_t tile = segment.begin; tile < segment.end; tile += team.size()) {
    const int64_t b = tile + team.lane();
    const int count = b < segment.end ? counts[b] : 0;
    const int before = team.sum_before(count);
    if (b < segment.end) counts[b] = start + before;
    start += team.sum(count);
  }
  return start;
}

// Context and targets as two Ragged: token indices b * N + n, and prefix sums of the sequence lengths.
struct Packed {
  int32_t *context, *context_cu_seqlens;
  int32_t *targets, *target_cu_seqlens;
};

template <class Team>
IJEPA_FN void pack_words(Team& team, const Plan& plan, const uint32_t* words, int first_token, int limit,
                         int32_t* tokens) {
  int packed = 0;
  for_all_words(plan, [&](int word, int first_patch, int) {
    uint32_t bits = words[word];
    if (packed + count_bits(bits) > limit) bits = lowest_bits(bits, limit - packed);
    team.for_each_bit(bits, [&](int bit, int rank) { tokens[packed + rank] = first_token + first_patch + bit; });
    packed += count_bits(bits);
  });
}

template <class Team>
IJEPA_FN void pack_block(Team& team, const Plan& plan, const Block& block, int first_token, int32_t* tokens) {
  for (int row = 0; row < block.height; ++row) {
    const int first = first_token + (block.top + row) * plan.width + block.left;
    for (int column = team.lane(); column < block.width; column += team.size()) {
      tokens[row * block.width + column] = first + column;
    }
  }
}

// Packs mask b, whose starts are known.
template <class Team>
IJEPA_FN void pack_mask(Team& team, const Plan& plan, const Workspace& workspace, int64_t b, const Packed& packed) {
  const Mask mask = mask_of(plan, workspace, b, 0, nullptr);
  const int first_token = static_cast<int>(b / plan.per_image) * plan.num_patches;
  const int limit = plan.context == ContextMode::batch_min ? workspace.context_limits[b] : plan.num_patches;
  int start = workspace.context_starts[b];
  for (int c = 0; c < plan.num_contexts; ++c) {
    const uint32_t* const words = mask.context_words + static_cast<int64_t>(c) * plan.num_words;
    pack_words(team, plan, words, first_token, limit, packed.context + start);
    if (team.lane() == 0) packed.context_cu_seqlens[b * plan.num_contexts + c] = start;
    start += mask.context_lengths[c] < limit ? mask.context_lengths[c] : limit;
  }
  start = workspace.target_starts[b];
  for (int m = 0; m < plan.num_targets; ++m) {
    int32_t* const tokens = packed.targets + start;
    if (plan.strategy == Strategy::random) {
      const uint32_t* const words = mask.target_words + static_cast<int64_t>(m) * plan.num_words;
      pack_words(team, plan, words, first_token, plan.num_patches, tokens);
    } else {
      pack_block(team, plan, mask.targets[m], first_token, tokens);
    }
    if (team.lane() == 0) packed.target_cu_seqlens[b * plan.num_targets + m] = start;
    start += mask.target_lengths[m];
  }
}

}  // namespace ijepa
