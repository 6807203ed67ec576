"""How masks are drawn: the definition, to the bit, for every device and language that draws them.

Legend: K masks per image, B masks in all, H x W patch grid, N = H * W patches (patch n is row n // W, column n % W),
M target blocks and C context blocks per mask.
Strategies: the I-JEPA paper (arXiv 2301.08243), section 3 and its ablation of masking.

**Random words.** `random_words(seed, stream | k << 8, step, index, draw)` of philox.py gives words w0 to w3; b is an
image's number in the global batch, k from 0 to K - 1 the number of its mask, and `below(w, n) = (w * n) >> 32`. So mask
k of an image is the same whatever K is, and K is at most 2^24. All arithmetic is on integers; `>>`, `//` and isqrt
round down.

**Sizes.** Target block m: stream MASK_SIZE, j = m. Context block c: stream MASK_CONTEXT_SIZE, j = c. The (index, draw)
of the one call is (b, j) for size_per=block, (b, 0) for image, and (0, 0) for step, there with 0 in place of k. Ranges
are held in units of 2^-24, as ceil(bound * 2^24): rounding up, so that a bound like 0.15 of 100 patches does not lose
one.

    scale  = scale_low + below(w0, scale_high - scale_low + 1)
    aspect = aspect_low + below(w1, aspect_high - aspect_low + 1)       (w0 in place of w1: shared_scale_aspect)
    area   = (N * scale) >> 24
    height = min((isqrt((4 * area * aspect) >> 24) + 1) >> 1, H')       = round(sqrt(area * aspect))
    width  = min((isqrt((4 * area << 24) // aspect) + 1) >> 1, W')      = round(sqrt(area / aspect))

with (H', W') = (H, W), or (H - 1, W - 1) without draw_last_row_col. Aspect is height over width.

**Target places.** Stream MASK_POSITION, index b, draw m: top = below(w0, H' - height + 1), left = below(w1,
W' - width + 1).

**Context places**, strategy multiblock. Stream MASK_CONTEXT_POSITION, index b, draw c << 16 | a for the attempts
a = 0, 1, ...: top and left likewise. Attempt a has the level a // 20 and sees the patches of its block that lie in none
of the targets 0 to M - 1 - level (with allow_overlap: all patches of its block).

- exact and batch_min: the first attempt that sees more than min_keep patches wins. At level M no target counts any
  more, and every block has more than min_keep patches (checked at construction), so attempt 20 * M is the last.
- fixed, with K = round((1 - mask_ratio) * N): of attempts 0 to 19 the first that sees max(min_keep + 1, K) patches or
  more wins; if none does, the one that sees most, the earliest of equals.

**Other strategies.** block: targets as above; the context is every patch outside all of them. random: target m is the
set of the `area` patches with the smallest (key, n), where the key of patch n is word n % 4 of stream MASK_POSITION,
index b, draw m << 16 | n // 4; the context is again every other patch. rasterized: rows split at H // 2 and columns at
W // 2; quadrant q = 2 * lower + right; the context is quadrant below(w0, 4) of stream MASK_CONTEXT_POSITION, index b,
draw 0; the others are the targets, in order of q.

**Context modes.** exact: every patch seen. fixed: the K patches with the smallest (class, key, n), where the class is 0
if the patch is seen, 2 if it is in a target, else 1 (allow_overlap: 0 or 1), and the key of patch n is word n % 4 of
stream MASK_SUBSET, index b, draw c << 16 | n // 4. batch_min: the first L patches seen, L the smallest number seen by
any context block of masks k of the group_size images of a group (each k has an L of its own).

Within a sequence, patches are in row-major order.

**Colours**, with color_jitter. Stream MASK_COLOR, index b: word 2 * (ch % 2) of draw ch // 2 makes u of channel ch, the
word after it v, both as (w >> 8) / 2^23 - 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ijepa_fast.masks.geometry import Blocks, SizeRule, count_within, place, uncovered
from ijepa_fast.philox import Stream, below, random_words

ATTEMPTS_PER_LEVEL = 20
BLOCK_SHIFT = 16
"""A block's number stands above this many bits of a draw, the attempt or patch below."""
MAX_PATCHES = 1 << BLOCK_SHIFT
KEY_BITS = 32 + BLOCK_SHIFT
"""Bits of a patch key: a random word above the patch number."""
MASK_SHIFT = 8
"""The number of an image's mask stands above this many bits of the stream's word."""
MAX_PER_IMAGE = 1 << (32 - MASK_SHIFT)


@dataclass(frozen=True)
class Plan:
    """A checked configuration on one grid, in the numbers that drawing needs.

    Attributes:
        strategy, context, size_per, allow_overlap, num_targets, num_contexts, group_size, per_image: as in
            `MaskConfig`.
        grid: (H, W).
        extent: (H', W'), the part of the grid that blocks may reach.
        target_rule, context_rule: block sizes.
        needed: visible patches that make a context place acceptable.
        last_level: the level at which a first attempt is sure to be acceptable (exact, batch_min), or 0 (fixed).
        first_always_succeeds: attempt 0 is sure to be acceptable, whatever is drawn.
        fixed_count: K, or None unless the context mode is fixed.
    """

    strategy: str
    context: str
    size_per: str
    allow_overlap: bool
    num_targets: int
    num_contexts: int
    group_size: int | None
    per_image: int
    grid: tuple[int, int]
    extent: tuple[int, int]
    target_rule: SizeRule
    context_rule: SizeRule
    needed: int
    last_level: int
    first_always_succeeds: bool
    fixed_count: int | None

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def attempt_stages(self) -> list[tuple[int, int, int]]:
        """(level, first attempt, number of attempts) to evaluate together.

        The first attempt, which nearly always succeeds, stands alone: where that can be seen without waiting for a
        device, the others are not computed.
        """
        if self.first_always_succeeds:
            return [(0, 0, 1)]
        stages = [(0, 0, 1), (0, 1, ATTEMPTS_PER_LEVEL - 1)]
        for level in range(1, self.last_level + 1):
            stages.append((level, level * ATTEMPTS_PER_LEVEL, 1 if level == self.last_level else ATTEMPTS_PER_LEVEL))
        return stages


class Counter(NamedTuple):
    """Where random words come from.

    Attributes:
        seed, step: ints or 0-dim int64 tensors.
        images_B: int64, every mask's image in the global batch.
        k_B: int64, its number among the masks of that image; 0 for all.
    """

    seed: int | Tensor
    step: int | Tensor
    images_B: Tensor
    k_B: Tensor | int

    @classmethod
    def of(cls, seed: int | Tensor, step: int | Tensor, first_image: int, images: int, per_image: int, device):
        """Words for `per_image` masks of each of these images, image-major."""
        images_B = torch.arange(first_image, first_image + images, device=device)
        if per_image == 1:
            return cls(seed, step, images_B, 0)
        images_B = images_B.repeat_interleave(per_image, output_size=images * per_image)
        return cls(seed, step, images_B, torch.arange(per_image, device=device).repeat(images))

    def words(self, stream: Stream, draws: Tensor) -> tuple[Tensor, ...]:
        """Four int64 tensors [B, *draws.shape]."""
        index, k = (x.view(-1, *[1] * draws.dim()) if isinstance(x, Tensor) else x for x in (self.images_B, self.k_B))
        return random_words(self.seed, stream + (k << MASK_SHIFT), self.step, index, draws)

    def numbers(self, count: int, first: int = 0) -> Tensor:
        return torch.arange(first, first + count, device=self.images_B.device)

    def patch_keys(self, stream: Stream, num_blocks: int, num_patches: int) -> Tensor:
        """int64 [B, num_blocks, N] distinct keys: 32 random bits above the patch number's 16."""
        calls = self.numbers((num_patches + 3) // 4)
        draws = (self.numbers(num_blocks)[:, None] << BLOCK_SHIFT) | calls
        words = torch.stack(self.words(stream, draws), dim=-1).flatten(-2)[..., :num_patches]
        return (words << BLOCK_SHIFT) | self.numbers(num_patches)


class Drawn(NamedTuple):
    """The B masks that were drawn: targets are rectangles [B, M], or bool [B, M, N] if their patches are scattered."""

    context_BCN: Tensor
    context_lengths_BC: Tensor
    targets: Blocks | Tensor
    target_lengths_BM: Tensor


def draw(plan: Plan, counter: Counter) -> Drawn:
    """Context and targets of the counter's masks, as the module's docstring defines them."""
    device_type = counter.images_B.device.type
    if not torch.amp.is_autocast_available(device_type):
        return _draw(plan, counter)
    with torch.autocast(device_type, enabled=False):  # matmuls count patches, so they must not be rounded
        return _draw(plan, counter)


def _draw(plan: Plan, counter: Counter) -> Drawn:
    if plan.strategy == "rasterized":
        targets, context_BCN = _quadrants(plan, counter)
    elif plan.strategy == "random":
        targets, context_BCN = _scattered(plan, counter)
    else:
        targets = _place_targets(plan, counter)
        if plan.strategy == "block":
            context_BCN = uncovered(targets, plan.grid).flatten(1)[:, None]
        else:
            context_BCN = _place_contexts(plan, counter, targets)
    target_lengths_BM = targets.area if isinstance(targets, Blocks) else targets.sum(-1)
    if plan.context == "fixed":
        context_BCN = _random_subset(plan, counter, context_BCN, targets)
        lengths_BC = torch.full(context_BCN.shape[:2], plan.fixed_count, device=context_BCN.device)
    else:
        lengths_BC = context_BCN.sum(-1)
    if plan.context == "batch_min":
        context_BCN, lengths_BC = _truncate_to_group_minimum(context_BCN, lengths_BC, plan)
    return Drawn(context_BCN, lengths_BC, targets, target_lengths_BM)


def _size_words(plan: Plan, counter: Counter, stream: Stream, num_blocks: int):
    """The words of the size calls: [B, 1 or num_blocks], or one of each for the step (ints if seed and step are)."""
    if plan.size_per == "step":
        return random_words(counter.seed, stream, counter.step, 0, 0)
    return counter.words(stream, counter.numbers(num_blocks if plan.size_per == "block" else 1))


def _place_targets(plan: Plan, counter: Counter) -> Blocks:
    height, width = plan.target_rule.draw(_size_words(plan, counter, Stream.MASK_SIZE, plan.num_targets))
    words = counter.words(Stream.MASK_POSITION, counter.numbers(plan.num_targets))
    return place(words, height, width, plan.extent)


def _place_contexts(plan: Plan, counter: Counter, targets_BM: Blocks) -> Tensor:
    """bool [B, C, N]: what each context block sees from its first acceptable place, or from the best."""
    sides = plan.context_rule.draw(_size_words(plan, counter, Stream.MASK_CONTEXT_SIZE, plan.num_contexts))
    height, width = (side[..., None] if isinstance(side, Tensor) else side for side in sides)
    score_BC = context_BCN = None
    for level, first, number in plan.attempt_stages():
        attempts_A = counter.numbers(number, first)
        draws_CA = (counter.numbers(plan.num_contexts)[:, None] << BLOCK_SHIFT) | attempts_A
        words_BCA = counter.words(Stream.MASK_CONTEXT_POSITION, draws_CA)
        blocks_BCA = place(words_BCA, height, width, plan.extent)
        visible_BHW = _visible(plan, targets_BM, level)
        blocks_BC = _best_attempt(blocks_BCA, visible_BHW, plan.needed)
        new_context_BCN = (blocks_BC.mask(plan.grid) & visible_BHW[:, None]).flatten(2)
        new_score_BC = new_context_BCN.sum(-1).clamp(max=plan.needed)
        if score_BC is None:
            score_BC, context_BCN = new_score_BC, new_context_BCN
        else:  # an acceptable place is never replaced: no score is above `needed`
            better_BC = new_score_BC > score_BC
            score_BC = torch.where(better_BC, new_score_BC, score_BC)
            context_BCN = torch.where(better_BC[..., None], new_context_BCN, context_BCN)
        if score_BC.device.type == "cpu" and bool((score_BC == plan.needed).all()):
            break
    return context_BCN


def _visible(plan: Plan, targets_BM: Blocks, level: int) -> Tensor:
    """bool [B, H, W]: patches outside the targets that still count at a level."""
    counting = 0 if plan.allow_overlap else plan.num_targets - level
    return uncovered(Blocks(*(side[:, :counting] for side in targets_BM)), plan.grid)


def _best_attempt(blocks_BCA: Blocks, visible_BHW: Tensor, needed: int) -> Blocks:
    """The first of A attempts that sees `needed` patches or more, or else the one that sees most: blocks [B, C]."""
    num_attempts = blocks_BCA.top.shape[-1]
    if num_attempts == 1:
        return Blocks(*(side[..., 0] for side in blocks_BCA))
    seen = count_within(visible_BHW, Blocks(*(side.flatten(1) for side in blocks_BCA)))
    score_BCA = seen.view(blocks_BCA.top.shape).clamp(max=needed)
    # Distinct ranks, so that the earliest of equal scores wins on every device.
    rank_BCA = score_BCA * num_attempts - torch.arange(num_attempts, device=score_BCA.device)
    best_BC1 = rank_BCA.argmax(dim=-1, keepdim=True)
    return Blocks(*(side.gather(-1, best_BC1)[..., 0] for side in blocks_BCA))


def _scattered(plan: Plan, counter: Counter) -> tuple[Tensor, Tensor]:
    """Random patches as targets, bool [B, M, N], and all others as the context, bool [B, 1, N]."""
    keys_BMN = counter.patch_keys(Stream.MASK_POSITION, plan.num_targets, plan.num_patches)
    smallest, largest = plan.target_rule.area_range()
    if smallest == largest:
        targets_BMN = _select_smallest(keys_BMN, smallest)
    else:
        counts = plan.target_rule.area(_size_words(plan, counter, Stream.MASK_SIZE, plan.num_targets)[0])
        if isinstance(counts, Tensor):
            counts = counts.expand(keys_BMN.shape[:2])
        targets_BMN = _select_smallest(keys_BMN, counts)
    return targets_BMN, ~targets_BMN.any(dim=1, keepdim=True)


def _quadrants(plan: Plan, counter: Counter) -> tuple[Blocks, Tensor]:
    """Three quadrants as targets [B, 3], the fourth as the context, bool [B, 1, N]."""
    context_B1 = below(counter.words(Stream.MASK_CONTEXT_POSITION, counter.numbers(1))[0], 4)
    others_B3 = counter.numbers(3)
    others_B3 = others_B3 + (others_B3 >= context_B1)
    height, width = plan.grid
    context, targets = (_quadrant(q, height // 2, width // 2, height, width) for q in (context_B1, others_B3))
    return targets, context.mask(plan.grid).flatten(2)


def _quadrant(q: Tensor, row: int, column: int, height: int, width: int) -> Blocks:
    lower, right = q >> 1, q & 1
    return Blocks(lower * row, right * column, row + lower * (height - 2 * row), column + right * (width - 2 * column))


def _random_subset(plan: Plan, counter: Counter, seen_BCN: Tensor, targets: Blocks | Tensor) -> Tensor:
    """bool [B, C, N]: K patches each, from those seen, then from the other non-targets, then from the targets."""
    keys_BCN = counter.patch_keys(Stream.MASK_SUBSET, plan.num_contexts, plan.num_patches)
    if plan.allow_overlap:
        class_BCN = (~seen_BCN).long()
    else:
        if isinstance(targets, Blocks):
            target_B1N = ~uncovered(targets, plan.grid).flatten(1)[:, None]
        else:
            target_B1N = targets.any(dim=1, keepdim=True)
        class_BCN = (~seen_BCN).long() + target_B1N.long()  # a patch that is seen is in no target
    return _select_smallest((class_BCN << KEY_BITS) | keys_BCN, plan.fixed_count)


def _select_smallest(keys: Tensor, counts: Tensor | int) -> Tensor:
    """bool, the shape of keys [..., N]: the `counts` [...] smallest of each row of distinct keys (1 <= counts <= N)."""
    if isinstance(counts, int):
        return keys <= keys.topk(counts, dim=-1, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)
    return keys <= keys.sort(dim=-1).values.gather(-1, counts[..., None] - 1)


def _truncate_to_group_minimum(mask_BCN: Tensor, lengths_BC: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The first L patches of every row, L the shortest row of masks k of each group; the new mask and lengths."""
    groups = lengths_BC.view(-1, plan.group_size, plan.per_image, lengths_BC.shape[1])
    shortest_B = groups.amin(dim=(1, 3), keepdim=True).expand(-1, plan.group_size, -1, -1).flatten()
    rank_BCN = mask_BCN.cumsum(dim=-1, dtype=torch.int32)
    return mask_BCN & (rank_BCN <= shortest_B[:, None, None]), shortest_B[:, None].expand_as(lengths_BC)


def draw_colors(counter: Counter, channels: int, jitter: float) -> Tensor:
    """fp32 [B, 2, channels]: what each mask multiplies the channels of its context with, and what it adds."""
    words = torch.stack(counter.words(Stream.MASK_COLOR, counter.numbers((channels + 1) // 2)), dim=-1)
    uniform = (words.flatten(1) >> 8).float() / 2**23 - 1  # 24 bits, which fp32 holds exactly
    gain, shift = uniform[:, : 2 * channels].unflatten(1, (channels, 2)).unbind(2)
    return torch.stack([1 + jitter * gain, jitter * shift], dim=1)
