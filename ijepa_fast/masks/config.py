"""The settings of masks: what is context, what is target, how large and how many.

Legend: N patches per image.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from ijepa_fast.masks.sampling import MAX_PATCHES, MAX_PER_IMAGE

_ASPECT_LIMIT = 64.0

# The masking ablation of the paper (section 3 for multiblock): number of targets and their scale.
_STRATEGY_DEFAULTS = {
    "multiblock": (4, (0.15, 0.2)),
    "block": (1, (0.6, 0.6)),
    "random": (1, (0.6, 0.6)),
    "rasterized": (3, (0.25, 0.25)),
}


@dataclass(frozen=True)
class MaskConfig:
    """How context and targets are drawn; the defaults are the paper's recipe (section 3) without truncation.

    Args:
        strategy: multiblock (target blocks, and a context block without them), block (target blocks, the context is all
            the rest), random (targets of scattered patches, the context is all the rest), rasterized (one quadrant of
            the image is the context, the other three are the targets). The last three are ablations of the paper.
        context: exact (every visible patch), fixed (a uniform random subset of constant size, see mask_ratio) or
            batch_min (every context cut to the shortest of its group, as the official code does).
        num_targets: target blocks per image. None: 4 for multiblock, 1 for block and random; always 3 for rasterized.
        target_scale: smallest and largest share of the image that a target covers. None: 0.15 to 0.2 for multiblock,
            0.6 for block and random; rasterized has quadrants.
        target_aspect: smallest and largest height over width of a target block.
        num_contexts: context blocks per image, drawn independently of one another (multiblock only).
        context_scale: smallest and largest share of the image that a context block covers, targets included.
        context_aspect: smallest and largest height over width of a context block.
        min_keep: a block counts only if it has more patches than this, a context block without its target patches.
        allow_overlap: the context keeps the patches that are targets (multiblock only).
        mask_ratio: share of the image that a fixed context leaves out: it has round((1 - mask_ratio) * N) patches.
        size_per: whether sizes are drawn for every block, once per image for all its targets (and once for all its
            context blocks; with several masks per image, once for each), or once per step for the whole global batch.
        shared_scale_aspect: scale and aspect come from one random number, so that larger blocks are taller.
        draw_last_row_col: blocks may reach the last row and column of the patch grid.
        group_size: number of consecutive images of the global batch that batch_min truncates together (the official
            batch per GPU). Required for batch_min, without effect otherwise.
        per_image: K, masks of every image, drawn independently of one another: each is a context with target blocks of
            its own. They share the image and one pass of the target encoder; the loss is the mean over all of them.
        color_jitter: J. Each mask sees its context through colours of its own: every channel, in units of its standard
            deviation, times 1 + u * J plus v * J, with u and v uniform in [-1, 1). Targets keep the image's colours.

    Raises:
        ValueError: a value is outside its range, or options contradict each other.
    """

    strategy: Literal["multiblock", "block", "random", "rasterized"] = "multiblock"
    context: Literal["exact", "fixed", "batch_min"] = "exact"
    num_targets: int | None = None
    target_scale: tuple[float, float] | None = None
    target_aspect: tuple[float, float] = (0.75, 1.5)
    num_contexts: int = 1
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_aspect: tuple[float, float] = (1.0, 1.0)
    min_keep: int = 10
    allow_overlap: bool = False
    mask_ratio: float = 0.75
    size_per: Literal["block", "image", "step"] = "block"
    shared_scale_aspect: bool = False
    draw_last_row_col: bool = True
    group_size: int | None = None
    per_image: int = 1
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("strategy", "context", "size_per"):
            choices = get_args(get_type_hints(MaskConfig)[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in (("num_targets", 1), ("num_contexts", 1), ("min_keep", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < MAX_PATCHES:
                raise ValueError(f"{name} must be in [{least}, {MAX_PATCHES}), got {value}")
        for name in ("target_scale", "context_scale"):
            low, high = getattr(self, name) or _STRATEGY_DEFAULTS[self.strategy][1]
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must satisfy 0 < low <= high <= 1, got ({low}, {high})")
        for name in ("target_aspect", "context_aspect"):
            low, high = getattr(self, name)
            if not 1 / _ASPECT_LIMIT <= low <= high <= _ASPECT_LIMIT:
                raise ValueError(f"{name} must satisfy 1/64 <= low <= high <= 64, got ({low}, {high})")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")
        if not 1 <= self.per_image <= MAX_PER_IMAGE:
            raise ValueError(f"per_image must be in [1, {MAX_PER_IMAGE}], got {self.per_image}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter must be in [0, 1], got {self.color_jitter}")
        if self.context == "batch_min" and self.group_size is None:
            raise ValueError("context batch_min needs group_size, the number of images that are truncated together")
        if self.strategy != "multiblock" and (self.allow_overlap or self.num_contexts != 1):
            raise ValueError(
                f"allow_overlap and num_contexts are for strategy multiblock; {self.strategy} has one context, "
                f"apart from its targets (got allow_overlap={self.allow_overlap}, num_contexts={self.num_contexts})"
            )
        if self.strategy == "rasterized" and self.num_targets not in (None, 3):
            raise ValueError(f"strategy rasterized has 3 targets, got num_targets={self.num_targets}")

    def resolved(self) -> "MaskConfig":
        """This configuration with the strategy's own values in place of None."""
        num_targets, target_scale = _STRATEGY_DEFAULTS[self.strategy]
        if self.num_targets is not None:
            num_targets = self.num_targets
        return replace(self, num_targets=num_targets, target_scale=self.target_scale or target_scale)

    @classmethod
    def official(cls, group_size: int, **overrides) -> "MaskConfig":
        """The masks of the official code: contexts truncated to the shortest of `group_size` images, last row and
        column never drawn, one random number for scale and aspect, one size per step for all targets."""
        habits = {
            "context": "batch_min",
            "size_per": "step",
            "shared_scale_aspect": True,
            "draw_last_row_col": False,
            "group_size": group_size,
        }
        return cls(**(habits | overrides))
