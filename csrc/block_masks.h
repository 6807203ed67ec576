// One mask of an image, drawn by a team of lanes (team.h), to the bit as ijepa_fast/masks/sampling.py defines it. Choices
// depend on integers only.
//
// Legend: B masks, H x W patch grid, N = H * W patches, C context and M target blocks per mask. A set of patches is
// held as words of 32 columns: word row * words_per_row + s has the columns from 32 * s on.
//
// Loops over words give each to one lane (for_own_words), always the same one, which can read without a sync what it
// wrote; or take all lanes to one word after the other (for_all_words).
#pragma once

#include "mask_plan.h"
#include "team.h"

namespace ijepa {

constexpr int kAttemptsPerLevel = 20;
constexpr int kBlockShift = 16;  // a block's number stands above this many bits of a draw, attempt or patch below

// ---- Sets of patches

// The columns [begin, end) as bits of the word whose first column is `first`.
IJEPA_FN uint32_t column_bits(int begin, int end, int first) {
  const int low = begin <= first ? 0 : begin - first >= 32 ? 32 : begin - first;
  const int high = end <= first ? 0 : end - first >= 32 ? 32 : end - first;
  return static_cast<uint32_t>((uint64_t{1} << high) - (uint64_t{1} << low));
}

IJEPA_FN uint32_t block_bits(const Block& block, int row, int first) {
  const bool in_rows = static_cast<uint32_t>(row - block.top) < static_cast<uint32_t>(block.height);
  return in_rows ? column_bits(block.left, block.left + block.width, first) : 0;
}

// The `count` lowest set bits.
IJEPA_FN uint32_t lowest_bits(uint32_t word, int count) {
  uint32_t lowest = 0;
  for (; word != 0 && count > 0; --count) {
    lowest |= word & (~word + 1);
    word &= word - 1;
  }
  return lowest;
}

// visit(word, row, first column) for the words of this lane.
template <class Team, class Visit>
IJEPA_FN void for_own_words(const Team& team, const Plan& plan, Visit visit) {
  const int row_step = team.size() / plan.words_per_row, step = team.size() % plan.words_per_row;
  int row = team.lane() / plan.words_per_row, s = team.lane() % plan.words_per_row;
  for (int word = team.lane(); word < plan.num_words; word += team.size()) {
    visit(word, row, 32 * s);
    row += row_step;
    s += step;
    if (s >= plan.words_per_row) {
      s -= plan.words_per_row;
      ++row;
    }
  }
}

// visit(word, first patch, columns) for all words, all lanes at the same one.
template <class Visit>
IJEPA_FN void for_all_words(const Plan& plan, Visit visit) {
  int word = 0;
  for (int row = 0; row < plan.height; ++row) {
    for (int first = 0; first < plan.width; first += 32) {
      visit(word++, row * plan.width + first, plan.width - first < 32 ? plan.width - first : 32);
    }
  }
}

// ---- Sizes and places

// isqrt(numerator // denominator), for a quotient below 2^26. No division: root^2 <= n // d where root^2 * d <= n.
IJEPA_FN int sqrt_of_quotient(uint64_t numerator, uint32_t denominator) {
  const int quotient_bits = bit_length(numerator | 1) - bit_length(denominator) + 1;  // at most
  uint32_t root = 0;
  for (uint32_t bit = 1u << (quotient_bits > 0 ? quotient_bits / 2 : 0); bit != 0; bit >>= 1) {
    const uint32_t larger = root | bit;
    if (static_cast<uint64_t>(larger * larger) * denominator <= numerator) root = larger;
  }
  return static_cast<int>(root);
}

struct Size {
  int area;  // before rounding to sides
  int height, width;
};

IJEPA_FN Size size_from_words(const Plan& plan, const SizeRule& rule, const Words& words) {
  const uint32_t scale = rule.scale_low + below(words.w0, rule.scale_span);
  const uint32_t aspect = rule.aspect_low + below(plan.shared_scale_aspect ? words.w0 : words.w1, rule.aspect_span);
  const uint64_t area = static_cast<uint64_t>(plan.num_patches) * scale >> 24;
  const int height = (sqrt_of_quotient(4 * area * aspect, 1u << 24) + 1) >> 1;
  const int width = (sqrt_of_quotient(4 * area << 24, aspect) + 1) >> 1;
  return {static_cast<int>(area), height < plan.max_height ? height : plan.max_height,
          width < plan.max_width ? width : plan.max_width};
}

// The sizes that all images of a step share, if sizes are drawn per step.
struct StepSizes {
  Size target, context;
};

IJEPA_FN StepSizes step_sizes(const Plan& plan, const RandomSource& source) {
  if (plan.size_per != SizePer::step) return {};
  return {size_from_words(plan, plan.target_rule, random_words(source, Stream::mask_size, 0, 0)),
          size_from_words(plan, plan.context_rule, random_words(source, Stream::mask_context_size, 0, 0))};
}

IJEPA_FN Size target_size(const Plan& plan, const RandomSource& source, const StepSizes& step, uint32_t index, int m) {
  if (plan.size_per == SizePer::step) return step.target;
  const uint32_t draw = plan.size_per == SizePer::block ? m : 0;
  return size_from_words(plan, plan.target_rule, random_words(source, Stream::mask_size, index, draw));
}

IJEPA_FN Size context_size(const Plan& plan, const RandomSource& source, const StepSizes& step, uint32_t index, int c) {
  if (plan.size_per == SizePer::step) return step.context;
  const uint32_t draw = plan.size_per == SizePer::block ? c : 0;
  return size_from_words(plan, plan.context_rule, random_words(source, Stream::mask_context_size, index, draw));
}

IJEPA_FN Block place(const Plan& plan, const Size& size, const Words& words) {
  return {static_cast<int>(below(words.w0, plan.max_height + 1 - size.height)),
          static_cast<int>(below(words.w1, plan.max_width + 1 - size.width)), size.height, size.width};
}

// ---- One mask

// Where one mask goes: its part of a Workspace, and scratch.
struct Mask {
  uint32_t index;  // of its image in the global batch
  Block* targets;
  int32_t* context_lengths;
  int32_t* target_lengths;
  uint32_t* context_words;
  uint32_t* target_words;
  uint32_t* scratch;  // [plan.scratch_words]: hidden patches, then keys

  IJEPA_FN uint32_t* hidden() const { return scratch; }
};

IJEPA_FN Mask mask_of(const Plan& plan, const Workspace& workspace, int64_t b, uint32_t first_image,
                      uint32_t* scratch) {
  const int64_t first_block = b * plan.num_targets, first_context = b * plan.num_contexts;
  return {first_image + static_cast<uint32_t>(b / plan.per_image),
          workspace.targets + first_block,
          workspace.context_lengths + first_context,
          workspace.target_lengths + first_block,
          workspace.context_words + first_context * plan.num_words,
          workspace.target_words + first_block * plan.num_words,
          scratch};
}

struct Threshold {
  uint32_t key;
  int ties;  // how many of the keys that equal it belong to the selection
};

// The `count` smallest of N keys are those below the threshold and the first `ties` equal to it.
template <class Team>
IJEPA_FN Threshold find_threshold(Team& team, const uint32_t* keys, int num_keys, int count) {
  uint32_t threshold = 0;
  int before = 0;  // keys below the threshold, never `count` of them
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const uint32_t larger = threshold | bit;
    int smaller = 0;
    for (int n = team.lane(); n < num_keys; n += team.size()) smaller += keys[n] < larger;
    smaller = team.sum(smaller);
    if (smaller == count) return {larger, 0};
    if (smaller < count) {
      threshold = larger;
      before = smaller;
    }
  }
  return {threshold, count - before};
}

// selected = taken, and of the candidates the `count` with the smallest (key, n); taken and candidates give words.
// The keys are the words of draws block << 16 | n / 4. Syncs before it reads words and after it wrote them.
template <class Team, class Candidates, class Taken>
IJEPA_FN void select_smallest(Team& team, const Plan& plan, const RandomSource& source, Stream stream,
                              const Mask& mask, int block, int count, Candidates candidates, Taken taken,
                              uint32_t* selected) {
  uint32_t* const keys = mask.scratch + plan.num_words;
  for (int call = team.lane(); 4 * call < plan.num_patches; call += team.size()) {
    const uint32_t draw = static_cast<uint32_t>(block) << kBlockShift | static_cast<uint32_t>(call);
    const Words words = random_words(source, stream, mask.index, draw);
    const int n = 4 * call, left = plan.num_patches - n;
    keys[n] = words.w0;
    if (left > 1) keys[n + 1] = words.w1;
    if (left > 2) keys[n + 2] = words.w2;
    if (left > 3) keys[n + 3] = words.w3;
  }
  team.sync();
  // The largest key is never below a threshold, so it stands for "no candidate".
  for_all_words(plan, [&](int word, int first_patch, int columns) {
    const uint32_t others = ~candidates(word, columns) & column_bits(0, columns, 0);
    team.for_each_bit(others, [&](int bit, int) { keys[first_patch + bit] = UINT32_MAX; });
  });
  team.sync();
  const Threshold threshold = find_threshold(team, keys, plan.num_patches, count);
  int ties = threshold.ties;
  for_all_words(plan, [&](int word, int first_patch, int columns) {
    const uint32_t less = team.ballot(columns, [&](int bit) { return keys[first_patch + bit] < threshold.key; });
    const uint32_t equal = team.ballot(columns, [&](int bit) { return keys[first_patch + bit] == threshold.key; });
    if (team.lane() == 0) {
      const uint32_t tied = lowest_bits(equal & candidates(word, columns), ties);
      ties -= count_bits(tied);
      selected[word] = taken(word, columns) | less | tied;
    }
  });
  team.sync();
}

template <class Team>
IJEPA_FN int place_targets(Team& team, const Plan& plan, const RandomSource& source, const StepSizes& sizes,
                           const Mask& mask) {
  int tokens = 0;
  for (int m = team.lane(); m < plan.num_targets; m += team.size()) {
    const Size size = target_size(plan, source, sizes, mask.index, m);
    mask.targets[m] = place(plan, size, random_words(source, Stream::mask_position, mask.index, m));
    mask.target_lengths[m] = size.height * size.width;
    tokens += size.height * size.width;
  }
  team.sync();
  return team.sum(tokens);
}

// The quadrants that are not the context.
template <class Team>
IJEPA_FN int place_quadrants(Team& team, const Plan& plan, const RandomSource& source, const Mask& mask) {
  const int context = below(random_words(source, Stream::mask_context_position, mask.index, 0).w0, 4);
  const int row = plan.height / 2, column = plan.width / 2;
  int tokens = 0;
  for (int m = team.lane(); m < 3; m += team.size()) {
    const int quadrant = m + (m >= context);
    const bool lower = quadrant >= 2, right = quadrant % 2;
    const Block block{lower ? row : 0, right ? column : 0, lower ? plan.height - row : row,
                      right ? plan.width - column : column};
    mask.targets[m] = block;
    mask.target_lengths[m] = block.height * block.width;
    tokens += block.height * block.width;
  }
  team.sync();
  return team.sum(tokens);
}

template <class Team>
IJEPA_FN int scatter_targets(Team& team, const Plan& plan, const RandomSource& source, const StepSizes& sizes,
                             const Mask& mask) {
  int tokens = 0;
  for (int m = 0; m < plan.num_targets; ++m) {
    const int area = target_size(plan, source, sizes, mask.index, m).area;
    select_smallest(
        team, plan, source, Stream::mask_position, mask, m, area, [](int, int) { return UINT32_MAX; },
        [](int, int) { return 0u; }, mask.target_words + static_cast<int64_t>(m) * plan.num_words);
    if (team.lane() == 0) mask.target_lengths[m] = area;
    tokens += area;
  }
  return tokens;
}

// hidden = the patches of the first `counting` targets.
template <class Team>
IJEPA_FN void hide_targets(Team& team, const Plan& plan, const Mask& mask, int counting) {
  for_own_words(team, plan, [&](int word, int row, int first) {
    uint32_t bits = 0;
    for (int m = 0; m < counting; ++m) {
      bits |= plan.strategy == Strategy::random ? mask.target_words[static_cast<int64_t>(m) * plan.num_words + word]
                                                : block_bits(mask.targets[m], row, first);
    }
    mask.hidden()[word] = bits;
  });
}

// seen = the patches of a block that are not hidden; their number.
template <class Team>
IJEPA_FN int look(Team& team, const Plan& plan, const Block& block, const uint32_t* hidden, uint32_t* seen) {
  int count = 0;
  for_own_words(team, plan, [&](int word, int row, int first) {
    const uint32_t bits = block_bits(block, row, first) & (plan.allow_overlap ? UINT32_MAX : ~hidden[word]);
    seen[word] = bits;
    count += count_bits(bits);
  });
  return team.sum(count);
}

// The first acceptable place of context block c, or the best: what is seen from there, and how many patches that is.
template <class Team>
IJEPA_FN int place_context(Team& team, const Plan& plan, const RandomSource& source, const StepSizes& sizes,
                           const Mask& mask, int c, uint32_t* seen) {
  const Size size = context_size(plan, source, sizes, mask.index, c);
  const auto look_from = [&](int attempt) {
    const uint32_t draw = static_cast<uint32_t>(c) << kBlockShift | static_cast<uint32_t>(attempt);
    const Block block = place(plan, size, random_words(source, Stream::mask_context_position, mask.index, draw));
    return look(team, plan, block, mask.hidden(), seen);
  };
  const int last =
      plan.context == ContextMode::fixed ? kAttemptsPerLevel - 1 : kAttemptsPerLevel * plan.last_level;
  int best = 0, most = -1;
  for (int attempt = 0; attempt <= last; ++attempt) {
    if (attempt > 0 && attempt % kAttemptsPerLevel == 0) {
      hide_targets(team, plan, mask, plan.num_targets - attempt / kAttemptsPerLevel);
    }
    const int count = look_from(attempt);
    if (count >= plan.needed) return count;
    if (count > most) {
      most = count;
      best = attempt;
    }
  }
  return look_from(best);
}

// context = fixed_count patches, chosen by (class, key, n): of `count` seen first, then of those neither seen nor
// hidden, then of the hidden.
template <class Team>
IJEPA_FN void choose_subset(Team& team, const Plan& plan, const RandomSource& source, const Mask& mask, int c,
                            int count, uint32_t* context) {
  const auto hidden_in = [&](int word) { return plan.allow_overlap ? 0u : mask.hidden()[word]; };
  int others = 0;
  for_own_words(team, plan, [&](int word, int, int first) {
    others += count_bits(~(context[word] | hidden_in(word)) & column_bits(0, plan.width, first));
  });
  others = team.sum(others);
  int wanted = plan.fixed_count, last_class = 0;
  if (wanted > count) {
    wanted -= count;
    last_class = 1;
    if (wanted > others) {
      wanted -= others;
      last_class = 2;
    }
  }
  // Classes before the last are taken whole; the last one has the candidates.
  const auto candidates = [&](int word, int columns) {
    const uint32_t seen = context[word], hidden = hidden_in(word);
    const uint32_t of_class = last_class == 0 ? seen : last_class == 1 ? ~(seen | hidden) : hidden & ~seen;
    return of_class & column_bits(0, columns, 0);
  };
  const auto taken = [&](int word, int columns) {
    const uint32_t seen = context[word], hidden = hidden_in(word);
    const uint32_t before = last_class == 0 ? 0 : last_class == 1 ? seen : seen | ~hidden;
    return before & column_bits(0, columns, 0);
  };
  select_smallest(team, plan, source, Stream::mask_subset, mask, c, wanted, candidates, taken, context);
}

// context = every patch outside all targets; their number.
template <class Team>
IJEPA_FN int see_the_rest(Team& team, const Plan& plan, const Mask& mask, uint32_t* context) {
  int count = 0;
  for_own_words(team, plan, [&](int word, int, int first) {
    const uint32_t bits = ~mask.hidden()[word] & column_bits(0, plan.width, first);
    context[word] = bits;
    count += count_bits(bits);
  });
  return team.sum(count);
}

// Draws mask b: blocks, words and lengths, and into context_starts, target_starts and context_limits its own numbers.
// `batch_source` has 0 for the number of the mask, as `sizes`, which all masks share, were drawn with.
template <class Team>
IJEPA_FN void draw_mask(Team& team, const Plan& plan, const RandomSource& batch_source, const StepSizes& sizes,
                        const Workspace& workspace, int64_t b, uint32_t first_image, uint32_t* scratch) {
  const Mask mask = mask_of(plan, workspace, b, first_image, scratch);
  RandomSource source = batch_source;
  source.mask = static_cast<uint32_t>(b % plan.per_image);
  const int target_tokens = plan.strategy == Strategy::random       ? scatter_targets(team, plan, source, sizes, mask)
                            : plan.strategy == Strategy::rasterized ? place_quadrants(team, plan, source, mask)
                                                                    : place_targets(team, plan, source, sizes, mask);
  int context_tokens = 0, shortest = INT32_MAX;
  for (int c = 0; c < plan.num_contexts; ++c) {
    uint32_t* const context = mask.context_words + static_cast<int64_t>(c) * plan.num_words;
    hide_targets(team, plan, mask, plan.num_targets);
    int count = plan.strategy == Strategy::multiblock ? place_context(team, plan, source, sizes, mask, c, context)
                                                      : see_the_rest(team, plan, mask, context);
    if (plan.context == ContextMode::fixed) {
      choose_subset(team, plan, source, mask, c, count, context);
      count = plan.fixed_count;
    }
    if (team.lane() == 0) mask.context_lengths[c] = count;
    context_tokens += count;
    shortest = count < shortest ? count : shortest;
  }
  if (team.lane() == 0) {
    workspace.context_starts[b] = context_tokens;
    workspace.target_starts[b] = target_tokens;
    workspace.context_limits[b] = shortest;
  }
}

}  // namespace ijepa
