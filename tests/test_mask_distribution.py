"""What the mask sampler draws, against exact probabilities and against the figures known of the official recipe.

The exact probabilities are written from the paper's rule in real numbers (scale and aspect uniform, sides rounded,
places uniform). Seeds are fixed, so a test passes always or never; tolerances are 4 to 5 standard errors, and half a
unit of the last digit where a quoted figure is the reference.
"""

import math

import numpy as np
import pytest
import torch

from ijepa_fast.masks.geometry import SizeRule
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler

GRID_14, GRID_16 = (14, 14), (16, 16)


def shape_probabilities(config, grid):
    """{(height, width): probability} of one target block, before clipping to the grid."""
    config = config.resolved()
    patches = grid[0] * grid[1]
    (scale_low, scale_high), (aspect_low, aspect_high) = config.target_scale, config.target_aspect
    probabilities = {}
    for area in range(math.floor(patches * scale_low), math.floor(patches * scale_high) + 1):
        scales = max(area / patches, scale_low), min((area + 1) / patches, scale_high)
        share = (scales[1] - scales[0]) / (scale_high - scale_low)
        low, high = aspect_low, aspect_high
        if config.shared_scale_aspect:
            slope = (aspect_high - aspect_low) / (scale_high - scale_low)
            low, high = (aspect_low + slope * (scale - scale_low) for scale in scales)
        for height in range(1, math.ceil(math.sqrt(area * high)) + 1):
            for width in range(1, math.ceil(math.sqrt(area / low)) + 1):
                start = max((height - 0.5) ** 2 / area, area / (width + 0.5) ** 2, low)
                stop = min((height + 0.5) ** 2 / area, area / (width - 0.5) ** 2, high)
                if start < stop:
                    part = share * (stop - start) / (high - low)
                    probabilities[height, width] = probabilities.get((height, width), 0.0) + part
    return probabilities


def cover_probability(grid, extent, height, width):
    """[H, W] probability that a block of this size lies over each patch."""

    def along(size, reach, length):
        length = min(length, reach)
        starts = np.arange(size)[:, None] - np.arange(length)
        return ((starts >= 0) & (starts <= reach - length)).sum(1) / (reach - length + 1)

    return np.outer(along(grid[0], extent[0], height), along(grid[1], extent[1], width))


def visible_probability(config, grid):
    """[H, W] probability that a patch is in the exact context, for a square context block whose first place will do."""
    config = config.resolved()
    patches = grid[0] * grid[1]
    extent = grid if config.draw_last_row_col else (grid[0] - 1, grid[1] - 1)
    low, high = config.context_scale
    scales = low + (high - low) * (np.arange(100_000) + 0.5) / 100_000
    sides = np.floor(np.sqrt(np.floor(scales * patches)) + 0.5).astype(int)
    in_block = sum((sides == side).mean() * cover_probability(grid, extent, side, side) for side in np.unique(sides))
    shapes = shape_probabilities(config, grid)
    covers = {shape: cover_probability(grid, extent, *shape) for shape in shapes}
    if config.size_per == "step":  # all targets of an image have one size
        clear = sum(p * (1 - covers[shape]) ** config.num_targets for shape, p in shapes.items())
    else:
        clear = (1 - sum(p * covers[shape] for shape, p in shapes.items())) ** config.num_targets
    return in_block * clear


def target_rectangles(masks, grid):
    """[S, 4] top, left, height, width, after a check that the targets are full rectangles."""
    bounds = masks.targets.cu_seqlens.long()
    tokens = masks.targets.indices.long() % (grid[0] * grid[1])
    first, last = tokens[bounds[:-1]], tokens[bounds[1:] - 1]
    top, left = first // grid[1], first % grid[1]
    height, width = last // grid[1] - top + 1, last % grid[1] - left + 1
    assert torch.equal(height * width, masks.targets.lengths)
    return torch.stack([top, left, height, width], dim=1).numpy()


def assert_chi_square(counts, probabilities):
    """Counts agree with probabilities: the statistic is within 5 standard deviations above its mean."""
    expected = counts.sum() * probabilities
    counts, expected = counts[expected > 1e-6], expected[expected > 1e-6]
    freedom = counts.size - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("config", [MaskConfig(), MaskConfig(draw_last_row_col=False)], ids=["all", "without-last"])
@pytest.mark.parametrize("grid", [GRID_14, (10, 17)])
def test_target_places_are_uniform_up_to_the_last_row_and_column(config, grid):
    extent = grid if config.draw_last_row_col else (grid[0] - 1, grid[1] - 1)
    rectangles = target_rectangles(MaskSampler(config, grid).sample(20_000, seed=1, step=5), grid)
    tested = 0
    for height, width in np.unique(rectangles[:, 2:], axis=0):
        tops, lefts = rectangles[(rectangles[:, 2:] == (height, width)).all(1)][:, :2].T
        places = (extent[0] - height + 1, extent[1] - width + 1)
        assert tops.max() < places[0] and lefts.max() < places[1]
        if tops.size < 10 * places[0] * places[1]:
            continue
        counts = np.bincount(tops * places[1] + lefts, minlength=places[0] * places[1])
        assert_chi_square(counts, np.full(counts.size, 1 / counts.size))
        tested += 1
    assert tested >= 4


@pytest.mark.parametrize("grid", [GRID_14, GRID_16])
@pytest.mark.parametrize("size_per", ["block", "image"])
@pytest.mark.parametrize("shared", [False, True])
def test_sizes_follow_scale_and_aspect(grid, size_per, shared):
    config = MaskConfig(size_per=size_per, shared_scale_aspect=shared)
    rectangles = target_rectangles(MaskSampler(config, grid).sample(20_000, seed=2, step=0), grid)
    shapes = rectangles[:, 2:].reshape(-1, 4, 2)
    assert (shapes == shapes[:, :1]).all() == (size_per == "image")
    independent = shapes[:, 0] if size_per == "image" else shapes.reshape(-1, 2)
    expected = shape_probabilities(config, grid)
    seen, counts = np.unique(independent, axis=0, return_counts=True)
    assert set(map(tuple, seen.tolist())) <= set(expected)
    probabilities = np.array([expected[tuple(shape)] for shape in seen.tolist()])
    common = probabilities * len(independent) > 10
    assert_chi_square(
        np.append(counts[common], len(independent) - counts[common].sum()),
        np.append(probabilities[common], 1 - probabilities[common].sum()),
    )


@pytest.mark.parametrize("grid", [(6, 9), GRID_14, (31, 12)])
@pytest.mark.parametrize("scale", [(0.15, 0.2), (0.05, 0.6), (0.31, 0.32)])
@pytest.mark.parametrize("aspect", [(0.75, 1.5), (0.26, 0.9), (1.13, 3.7)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_sampler_knows_its_smallest_and_largest_target(grid, scale, aspect, shared):
    config = MaskConfig(target_scale=scale, target_aspect=aspect, shared_scale_aspect=shared)
    areas = [min(h, grid[0]) * min(w, grid[1]) for h, w in shape_probabilities(config, grid)]
    rule = SizeRule.from_ranges(grid[0] * grid[1], grid, scale, aspect, shared)
    assert rule.block_range() == (min(areas), max(areas))


def test_the_official_preset_draws_one_of_few_sizes_per_step():
    for grid, number in ((GRID_14, 5), (GRID_16, 6)):
        config = MaskConfig.official(16)
        sampler, shapes = MaskSampler(config, grid), []
        for step in range(250):
            sizes = np.unique(target_rectangles(sampler.sample(16, seed=3, step=step), grid)[:, 2:], axis=0)
            assert len(sizes) == 1
            shapes.append(tuple(sizes[0].tolist()))
        expected = shape_probabilities(config, grid)
        assert len(expected) == number and set(shapes) <= set(expected)
        kinds = sorted(expected, key=expected.get)
        for shape in kinds[1:]:  # the rarest may be missing from 250 draws
            error = math.sqrt(expected[shape] * (1 - expected[shape]) / 250)
            assert abs(shapes.count(shape) / 250 - expected[shape]) < 4.5 * error


def context_statistics(config, grid, steps, seed=4, batch=128):
    """Means over steps, with their standard errors: context tokens, target tokens per block, use of every patch [N]."""
    sampler, patches = MaskSampler(config, grid), grid[0] * grid[1]
    contexts, targets, uses = [], [], []
    for step in range(steps):
        masks = sampler.sample(batch, seed=seed, step=step)
        contexts.append(masks.context.num_rows / batch)
        targets.append(masks.targets.num_rows / (batch * sampler.num_targets))
        uses.append(np.bincount(masks.context.indices.numpy() % patches, minlength=patches) / batch)
    errors = [np.std(values, axis=0) / math.sqrt(steps) for values in (contexts, targets, uses)]
    return [np.mean(values, axis=0) for values in (contexts, targets, uses)], errors


@pytest.mark.parametrize("grid", [GRID_14, GRID_16])
@pytest.mark.parametrize(
    "config", [MaskConfig(), MaskConfig.official(128, context="exact")], ids=["default", "official"]
)
def test_exact_contexts_match_the_exact_probabilities(config, grid):
    (context, target, use), (context_error, target_error, use_error) = context_statistics(config, grid, steps=300)
    visible = visible_probability(config, grid)
    area = sum(p * height * width for (height, width), p in shape_probabilities(config, grid).items())
    assert abs(context - visible.sum()) < 4 * context_error
    assert abs(target - area) < 4 * target_error
    assert (abs(use - visible.ravel()) < 5 * use_error + 1e-9).all()
    if not config.draw_last_row_col:
        assert (use.reshape(grid)[-1] == 0).all() and (use.reshape(grid)[:, -1] == 0).all()


# Mean context tokens of the official recipe before and after truncation, from an independent simulation in floating
# point (2,000 to 4,000 steps for 16 and 32 images), and its standard errors.
@pytest.mark.parametrize(
    ("grid", "group_size", "exact", "truncated", "quoted_error"),
    [
        (GRID_14, 128, 81.7, 50.2, 0.1),
        (GRID_16, 128, 109.8, 68.4, 0.1),
        (GRID_16, 32, 110.1, 76.4, 0.24),
        (GRID_14, 16, 81.6, 59.4, 0.15),
        ((28, 28), 16, 359.6, 271.7, 0.6),
    ],
)
def test_truncation_of_the_official_preset(grid, group_size, exact, truncated, quoted_error):
    official = MaskConfig.official(group_size)
    (context, _, _), (error, _, _) = context_statistics(official, grid, steps=250, batch=group_size)
    assert abs(context - truncated) < 4 * math.hypot(error, quoted_error)
    untruncated = visible_probability(MaskConfig.official(group_size, context="exact"), grid).sum()
    assert abs(untruncated - exact) < 4 * quoted_error


def test_per_row_use_of_the_official_preset():
    quoted = [0.75, 0.60, 0.48, 0.36, 0.27, 0.21, 0.19, 0.18, 0.19, 0.19, 0.14, 0.07, 0.02, 0.00]
    (_, _, use), (_, _, error) = context_statistics(MaskConfig.official(128), GRID_14, steps=600)
    rows, row_errors = use.reshape(GRID_14).mean(1), error.reshape(GRID_14).max(1)
    assert (abs(rows - quoted) < 4 * row_errors + 0.005).all()
    assert rows[-1] == 0


def test_spread_of_the_default_context():
    for grid, deviation in ((GRID_14, 17.5), (GRID_16, 21.8)):
        lengths = MaskSampler(MaskConfig(), grid).sample(20_000, seed=6, step=0).context.lengths.double()
        assert abs(lengths.std() - deviation) < 4 * deviation / math.sqrt(2 * 20_000) + 0.05


def test_fixed_context_is_a_uniform_subset_of_what_is_visible():
    images, patches = 20_000, 196
    exact = MaskSampler(MaskConfig(), GRID_14).sample(images, seed=7, step=0).context
    fixed = MaskSampler(MaskConfig(context="fixed"), GRID_14).sample(images, seed=7, step=0).context
    assert (fixed.lengths == 49).all()
    seen, chosen = (
        torch.zeros(images * patches).index_fill_(0, context.indices.long(), 1).view(images, patches).double()
        for context in (exact, fixed)
    )
    same_block = exact.lengths >= 49  # otherwise `fixed` has looked for a better place
    seen, chosen = seen[same_block], chosen[same_block]
    assert same_block.double().mean() > 0.9
    assert (chosen <= seen).all()
    share = seen * (49 / seen.sum(1, keepdim=True))
    score = (chosen - share).sum(0) / (share * (1 - share)).sum(0).sqrt()
    assert score.abs().max() < 4.5
    # Neighbouring patches are chosen independently, up to the fixed total.
    rest = chosen - share
    neighbours = (rest[:, :-1] * rest[:, 1:]).sum() / (rest[:, :-1] ** 2).sum()
    assert abs(neighbours) < 0.03


def test_random_targets_are_uniform():
    masks = MaskSampler(MaskConfig(strategy="random"), (10, 12)).sample(20_000, seed=8, step=0)
    assert (masks.targets.lengths == 72).all() and (masks.context.lengths == 48).all()
    counts = torch.bincount(masks.targets.indices.long() % 120, minlength=120)
    score = (counts - 20_000 * 0.6) / math.sqrt(20_000 * 0.6 * 0.4)
    assert score.abs().max() < 4.5


def test_every_quadrant_is_the_context_equally_often():
    masks = MaskSampler(MaskConfig(strategy="rasterized"), GRID_14).sample(20_000, seed=9, step=0)
    corners = masks.context.indices[masks.context.cu_seqlens[:-1].long()] % 196
    kinds, counts = np.unique(corners.numpy(), return_counts=True)
    assert kinds.tolist() == [0, 7, 98, 105]
    assert_chi_square(counts, np.full(4, 0.25))


def test_block_areas_of_the_ablation():
    masks = MaskSampler(MaskConfig(strategy="block"), GRID_14).sample(5_000, seed=10, step=0)
    shares = masks.targets.lengths.double() / 196
    assert 0.55 < shares.min() and shares.max() < 0.65
    assert torch.equal(masks.context.lengths + masks.targets.lengths, torch.full((5_000,), 196, dtype=torch.int32))
