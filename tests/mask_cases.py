"""Mask configurations to test samplers with: drawn at random, and picked because they are hard."""

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler


@st.composite
def samplers(draw, largest_side=16):
    """A sampler over the whole space of configurations, kept to those that construction accepts."""

    def scales(low, high):
        bound = draw(st.floats(low, high))
        return bound, draw(st.floats(bound, high))

    strategy = draw(st.sampled_from(["multiblock"] * 3 + ["block", "random", "rasterized"]))
    multiblock = strategy == "multiblock"
    aspect = draw(st.floats(0.3, 1.5))
    config = {
        "strategy": strategy,
        "context": draw(st.sampled_from(["exact", "fixed", "batch_min"])),
        "num_targets": 3 if strategy == "rasterized" else draw(st.integers(1, 5 if multiblock else 2)),
        "target_scale": scales(0.1, 0.4),
        "target_aspect": (aspect, aspect * draw(st.floats(1, 3))),
        "min_keep": draw(st.integers(0, 12)),
        "mask_ratio": draw(st.floats(0.5, 0.95)),
        "size_per": draw(st.sampled_from(["block", "image", "step"])),
        "shared_scale_aspect": draw(st.booleans()),
        "draw_last_row_col": draw(st.booleans()),
        "group_size": draw(st.integers(1, 3)),
        "per_image": draw(st.sampled_from([1, 1, 2, 3])),
    }
    if multiblock:
        config["num_contexts"] = draw(st.integers(1, 3))
        config["context_scale"] = scales(0.3, 1.0)
        config["context_aspect"] = (aspect, 1.6)
        config["allow_overlap"] = draw(st.booleans())
    grid = draw(st.integers(4, largest_side)), draw(st.integers(4, largest_side))
    try:
        return MaskSampler(MaskConfig(**config), grid)
    except ValueError:
        assume(False)


# So crowded that many contexts need retries, and some give up on targets.
CROWDED = MaskConfig(num_targets=7, target_scale=(0.25, 0.4), context_scale=(0.3, 0.5), min_keep=11)

HARD_CASES = [
    MaskConfig(),
    MaskConfig.official(8),
    CROWDED,
    replace(CROWDED, num_contexts=2),
    replace(CROWDED, num_contexts=2, context="batch_min", group_size=4),
    replace(CROWDED, context="fixed", mask_ratio=0.7),
    MaskConfig(context="fixed", mask_ratio=0.3),
    MaskConfig(context="fixed", mask_ratio=0.3, strategy="block", target_scale=(0.2, 0.6)),
    MaskConfig(strategy="random", target_scale=(0.15, 0.3), num_targets=2),
    replace(CROWDED, num_contexts=2, context="batch_min", group_size=4, per_image=3),
    MaskConfig.official(8, per_image=2),
]
