"""The sampler of masks.

`MaskSampler(config, grid).sample(batch_size, seed=..., step=...)` gives `Masks`, a pure function of the configuration,
the seed, the step and the image's number in the global batch. sampling.py defines every draw to the bit.

Legend: B images, K masks per image, H x W patch grid, N = H * W patches, M target blocks and C context blocks per mask.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ijepa_fast.masks import extension
from ijepa_fast.masks.config import MaskConfig
from ijepa_fast.masks.geometry import Blocks, SizeRule, each_once, pack_blocks, pack_mask
from ijepa_fast.masks.sampling import MAX_PATCHES, Counter, Drawn, Plan, draw, draw_colors
from ijepa_fast.ragged import Ragged

ROUND_ROWS = 128
"""Away from the CPU rows are rounded up to a multiple of this: few different shapes for the allocator and for compiled
code, and whole tiles for matrix products."""
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Masks:
    """Context and target patches of a batch, as token indices b * N + n into the flattened [B * N] patch grid.

    Attributes:
        context: sequence (b * K + k) * C + c is context block c of mask k of image b.
        targets: sequence (b * K + k) * M + m is target block m of mask k of image b.
        num_contexts: C.
        per_image: K.
        tokens: numbers of context and of target tokens, rows of no token left out. None where the host does not know
            them: with a capacity, and in masks that no sampler drew.
        read: sequence b has every patch of image b that is in some target, once. With several masks per image, whose
            targets overlap; None with one.
        colors: fp32 [B * K, 2, channels], factors and then shifts that mask k of image b applies to the normalised
            pixels of its context. None: none.
    """

    context: Ragged
    targets: Ragged
    num_contexts: int = 1
    per_image: int = 1
    tokens: tuple[int, int] | None = None
    read: Ragged | None = None
    colors: Tensor | None = None

    @property
    def num_images(self) -> int:
        return self.context.num_sequences // (self.num_contexts * self.per_image)

    @property
    def num_targets(self) -> int:
        """M."""
        return self.targets.num_sequences // (self.num_images * self.per_image)

    @property
    def device(self) -> torch.device:
        return self.context.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Masks":
        sets = {name: getattr(self, name) for name in ("context", "targets", "read", "colors")}
        moved = {
            name: tokens.to(device, non_blocking=non_blocking) for name, tokens in sets.items() if tokens is not None
        }
        return replace(self, **moved)


class MaskSampler:
    """Draws masks for one patch grid; everything that can go wrong does so here, not while training.

    Args:
        config: what to draw.
        grid: patches per column and per row, (H, W).
        implementation: torch (vectorised, on every device), extension (the C++/CUDA library of csrc/) or auto (the
            extension on devices that it is built for). All draw the same masks, to the bit.
        channels: of the images, for `color_jitter`.

    Attributes:
        config: the configuration, resolved.
        num_targets, num_contexts, per_image: M, C and K.
        max_target, max_context: static upper bounds of the sequence lengths.
        plan: the checked numbers that drawing reads.

    Raises:
        ValueError: the grid is empty or beyond 65,536 patches, blocks can have min_keep patches or fewer, or a fixed
            context has a size that no draw can give.
    """

    def __init__(
        self,
        config: MaskConfig,
        grid: tuple[int, int],
        implementation: Literal["auto", "torch", "extension"] = "auto",
        channels: int = 3,
    ) -> None:
        if implementation not in ("auto", "torch", "extension"):
            raise ValueError(f"implementation must be auto, torch or extension, got {implementation!r}")
        self.implementation, self.channels = implementation, channels
        height, width = grid
        if height < 1 or width < 1 or height * width > MAX_PATCHES:
            raise ValueError(f"grid must have 1 to {MAX_PATCHES} patches, got {height} x {width}")
        margin = 0 if config.draw_last_row_col else 1
        extent = (height - margin, width - margin)
        if min(extent) < 1:
            raise ValueError(f"a {height} x {width} grid has no room for blocks without its last row and column")
        self.config = config = config.resolved()
        self.grid = (height, width)
        self.num_patches = height * width
        self.num_targets = config.num_targets
        self.num_contexts = config.num_contexts
        self.per_image = config.per_image

        def rule(scale: tuple[float, float], aspect: tuple[float, float]) -> SizeRule:
            return SizeRule.from_ranges(self.num_patches, extent, scale, aspect, config.shared_scale_aspect)

        target_rule = rule(config.target_scale, config.target_aspect)
        context_rule = rule(config.context_scale, config.context_aspect)
        min_target, self.max_target = self._target_range(target_rule)
        min_context, self.max_context = self._context_range(context_rule, min_target)
        whole = config.strategy != "multiblock" or config.allow_overlap  # no context loses patches to targets
        self._constant_target = min_target == self.max_target
        self._constant_context = config.context == "fixed" or (whole and min_context == self.max_context)
        visible = self._least_visible(min_context)
        needed = config.min_keep + 1
        last_level = next(level for level, least in enumerate(visible) if least >= needed)
        if self._some_target_counts(last_level):
            self.max_context = min(self.max_context, self.num_patches - min_target)
        fixed_count = None
        if config.context == "fixed":
            self.max_context = fixed_count = self._fixed_count(min_context)
            needed, last_level = max(needed, fixed_count), 0
        self.plan = Plan(
            strategy=config.strategy,
            context=config.context,
            size_per=config.size_per,
            allow_overlap=config.allow_overlap,
            num_targets=config.num_targets,
            num_contexts=config.num_contexts,
            group_size=config.group_size,
            per_image=config.per_image,
            grid=self.grid,
            extent=extent,
            target_rule=target_rule,
            context_rule=context_rule,
            needed=needed,
            last_level=last_level,
            first_always_succeeds=visible[0] >= needed,
            fixed_count=fixed_count,
        )
        self._plan_numbers = extension.plan_numbers(self.plan)

    def _target_range(self, rule: SizeRule) -> tuple[int, int]:
        """Fewest and most patches of a target."""
        if self.config.strategy == "rasterized":
            (height, width) = self.grid
            smallest, largest = (height // 2) * (width // 2), (height - height // 2) * (width - width // 2)
        elif self.config.strategy == "random":
            smallest, largest = rule.area_range()
        else:
            smallest, largest = rule.block_range()
        self._require_more_than_min_keep("a target", smallest, "target_scale")
        return smallest, largest

    def _context_range(self, rule: SizeRule, min_target: int) -> tuple[int, int]:
        """Fewest and most patches of a context block, target patches included where there is a block to speak of."""
        if self.config.strategy == "multiblock":
            smallest, largest = rule.block_range()
            self._require_more_than_min_keep("a context block", smallest, "context_scale")
            return smallest, largest
        if self.config.strategy == "rasterized":
            return min_target, self.max_target
        smallest = self.num_patches - self.num_targets * self.max_target
        what = f"the context beside num_targets={self.num_targets} targets of up to {self.max_target} patches"
        self._require_more_than_min_keep(what, smallest, "1 - target_scale")
        return smallest, self.num_patches - min_target

    def _require_more_than_min_keep(self, what: str, patches: int, remedy: str) -> None:
        if patches <= self.config.min_keep:
            height, width = self.grid
            raise ValueError(
                f"on a {height} x {width} grid {what} can have as few as {max(patches, 0)} patches, "
                f"but must have more than min_keep={self.config.min_keep}: lower min_keep or raise {remedy}"
            )

    def _least_visible(self, min_context: int) -> list[int]:
        """The fewest patches that a context can see at each level, when M, M - 1, ..., 0 targets count."""
        if self.config.strategy != "multiblock" or self.config.allow_overlap:
            return [min_context]
        return [min_context - counting * self.max_target for counting in range(self.num_targets, -1, -1)]

    def _some_target_counts(self, last_level: int) -> bool:
        """Whether every context block is kept clear of at least one target."""
        multiblock = self.config.strategy == "multiblock" and not self.config.allow_overlap
        return multiblock and (self.config.context == "fixed" or last_level < self.num_targets)

    def _fixed_count(self, min_context: int) -> int:
        """K, checked."""
        ratio = self.config.mask_ratio
        count = round((1 - ratio) * self.num_patches)
        # Elsewhere a short context is filled up with hidden patches; beside quadrants there are none.
        most = min_context if self.config.strategy == "rasterized" else self.max_context
        if not 1 <= count <= most:
            raise ValueError(
                f"mask_ratio={ratio} asks for a context of {count} of {self.num_patches} patches, but it can have "
                f"1 to {most} with these settings"
            )
        return count

    def sample(
        self,
        batch_size: int,
        *,
        seed: int | Tensor,
        step: int | Tensor,
        first_image: int = 0,
        device: torch.device | str = "cpu",
        round_rows: int | None = None,
        capacity: tuple[int, ...] | None = None,
    ) -> Masks:
        """Masks of images first_image to first_image + batch_size - 1 of the global batch.

        A GPU is never waited for where seed and step are ints: the host finds the numbers of tokens by drawing, too.
        Sets whose lengths are sure to be equal promise so (``Ragged.uniform``): a fixed context, contexts of one
        batch_min group with one mask per image, targets of one size per step. The last two only in exact rows.

        Args:
            batch_size: B.
            seed: 64-bit seed, an int or a 0-dim int64 tensor on `device`.
            step: training step in [0, 2^32), likewise.
            first_image: the first image's number in the global batch.
            device: where to draw; the masks are the same on every device.
            round_rows: round the rows of context and of targets up to a multiple of this, 1 for exact rows. None: 1 on
                the CPU, ``ROUND_ROWS`` elsewhere.
            capacity: rows of context and of targets in place of rounded ones, and of ``Masks.read``, which is None
                without a number for it. So nobody needs to know seed and step on
                the host, and a CUDA graph can draw the masks of another step in each replay.

        Raises:
            ValueError: batch_min and the call does not hold whole groups, a number is out of range, the tokens do not
                fit the capacity (on CUDA a device-side assertion), or implementation is extension and it cannot run.
        """
        device, tokens = torch.device(device), None
        if round_rows is None:
            round_rows = 1 if device.type == "cpu" else ROUND_ROWS
        if round_rows < 1:
            raise ValueError(f"round_rows must be at least 1, got {round_rows}")
        exact = capacity is None and round_rows == 1
        if capacity is None and not (exact and device.type == "cpu"):
            tokens = self.counts(batch_size, seed=int(seed), step=int(step), first_image=first_image)
            capacity = rounded_up(tokens, round_rows)
        context, targets = self._drawn_and_packed(batch_size, seed, step, first_image, device, capacity)
        if capacity is None:
            tokens = context.num_rows, targets.num_rows
        read = None
        if self.per_image > 1 and (capacity is None or len(capacity) > 2):
            read = each_once(targets.indices, batch_size, self.num_patches, None if capacity is None else capacity[2])
        colors = None
        if self.config.color_jitter:
            counter = Counter.of(seed, step, first_image, batch_size, self.per_image, device)
            colors = draw_colors(counter, self.channels, self.config.color_jitter)
        one_group = self.config.context == "batch_min" and batch_size == self.config.group_size and self.per_image == 1
        one_size = self.config.size_per == "step" and self.config.strategy != "rasterized"
        context = _promise(context, self._constant_context, exact and one_group)
        targets = _promise(targets, self._constant_target, exact and one_size)
        return Masks(context, targets, self.num_contexts, self.per_image, tokens and tokens[:2], read, colors)

    def _drawn_and_packed(self, batch_size, seed, step, first_image, device, capacity) -> tuple[Ragged, Ragged]:
        self._check_images(batch_size, first_image)
        if self._takes_extension(device.type):
            context, context_cu, targets, target_cu = extension.block_masks(
                self._plan_numbers, seed, step, first_image, batch_size, device, capacity and capacity[:2]
            )
            return Ragged(context, context_cu, self.max_context), Ragged(targets, target_cu, self.max_target)
        drawn = self._draw(batch_size, seed, step, first_image, device)
        rows, k = capacity or (None, None), self.per_image
        context = pack_mask(drawn.context_BCN, drawn.context_lengths_BC, self.max_context, rows[0], k)
        if isinstance(drawn.targets, Blocks):
            return context, pack_blocks(drawn.targets, self.grid, self.max_target, rows[1], k)
        return context, pack_mask(drawn.targets, drawn.target_lengths_BM, self.max_target, rows[1], k)

    def counts(self, batch_size: int, *, seed: int, step: int, first_image: int = 0) -> tuple[int, ...]:
        """Exact numbers of context and target tokens that `sample` gives, found on the host.

        With several masks per image, the number of patches in ``Masks.read`` too.
        """
        self._check_images(batch_size, first_image)
        if self.per_image > 1:
            masks = self.sample(batch_size, seed=seed, step=step, first_image=first_image, round_rows=1)
            return *masks.tokens, masks.read.num_rows
        if self._takes_extension("cpu"):
            return extension.block_mask_counts(self._plan_numbers, seed, step, first_image, batch_size)
        drawn = self._draw(batch_size, seed, step, first_image, "cpu")
        return int(drawn.context_lengths_BC.sum()), int(drawn.target_lengths_BM.sum())

    def _takes_extension(self, device_type: str) -> bool:
        """Raises ValueError if the extension is asked for and cannot run."""
        if self.implementation == "torch":
            return False
        refusal = extension.reason(device_type)
        if refusal is not None and self.implementation == "extension":
            raise ValueError(f"implementation='extension' cannot draw masks on {device_type}: {refusal}")
        return refusal is None

    def _check_images(self, batch_size: int, first_image: int) -> None:
        if batch_size < 1 or first_image < 0:
            raise ValueError(f"batch_size must be positive and first_image at least 0, got {batch_size}, {first_image}")
        group_size = self.config.group_size
        if self.config.context == "batch_min" and (batch_size % group_size or first_image % group_size):
            raise ValueError(
                f"context batch_min needs whole groups of group_size={group_size} images, "
                f"got batch_size={batch_size} from first_image={first_image}"
            )
        if batch_size * self.per_image * max(self.num_targets, self.num_contexts) * self.num_patches > _INT32_MAX:
            times = f" with {self.per_image} masks each" if self.per_image > 1 else ""
            raise ValueError(
                f"{batch_size} images of {self.num_patches} patches{times} are too many for 32-bit token indices"
            )

    def _draw(self, batch_size, seed, step, first_image, device) -> Drawn:
        return draw(self.plan, Counter.of(seed, step, first_image, batch_size, self.per_image, device))


def rounded_up(counts: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Numbers of tokens rounded up to multiples: rows for them."""
    return tuple(-(-count // multiple) * multiple for count in counts)


def _promise(tokens: Ragged, constant: bool, equal: bool) -> Ragged:
    """The set with the promise of equal lengths: ``max_seqlen`` (constant), or what all rows are divided into."""
    if constant and tokens.num_rows == tokens.num_sequences * tokens.max_seqlen:
        return replace(tokens, uniform=True)
    if equal:
        return replace(tokens, max_seqlen=tokens.num_rows // tokens.num_sequences, uniform=True)
    return tokens
