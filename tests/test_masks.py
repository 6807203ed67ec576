"""The mask sampler against an independent one, its promises, and its errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_cases import CROWDED, HARD_CASES, samplers
from mask_oracle import Oracle

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler

GRID_14 = (14, 14)
DEFAULT = MaskConfig()


def as_lists(masks):
    return masks.context.to_lists(), masks.targets.to_lists()


@given(samplers(), st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 2))
@settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_equals_the_independent_sampler_bit_for_bit(sampler, seed, step, first_group, num_groups):
    batch_size, first_image = (num_groups * sampler.config.group_size, first_group * sampler.config.group_size)
    masks = sampler.sample(batch_size, seed=seed, step=step, first_image=first_image)
    expected = Oracle(sampler.config, sampler.grid).sample(batch_size, seed, step, first_image)
    assert list(as_lists(masks)) == expected
    for sets in (masks.context, masks.targets):
        assert sets.lengths.max() <= sets.max_seqlen
        assert not sets.uniform or sets.lengths.eq(sets.max_seqlen).all()
    counts = sampler.counts(batch_size, seed=seed, step=step, first_image=first_image)
    read = [] if masks.read is None else [masks.read.num_rows]
    assert counts == (masks.context.num_rows, masks.targets.num_rows, *read)


@pytest.mark.parametrize("config", HARD_CASES, ids=lambda config: f"{config.strategy}-{config.context}")
def test_equals_the_independent_sampler_where_it_is_hard(config):
    for grid in ((8, 11), (14, 14)):
        sampler = MaskSampler(config, grid)
        masks = sampler.sample(64, seed=2**63 + 5, step=3, first_image=64)
        assert list(as_lists(masks)) == Oracle(sampler.config, grid).sample(64, 2**63 + 5, 3, 64)


def test_a_crowded_image_gives_up_targets_but_never_min_keep():
    context, targets = as_lists(MaskSampler(CROWDED, (8, 11)).sample(500, seed=1, step=0))
    overlaps = [
        len(set(seen).intersection(*[set().union(*targets[7 * b : 7 * b + 7])])) for b, seen in enumerate(context)
    ]
    assert min(map(len, context)) > CROWDED.min_keep
    assert 0.05 < sum(overlap > 0 for overlap in overlaps) / 500 < 0.95


@pytest.mark.parametrize("context", ["exact", "fixed", "batch_min"])
@pytest.mark.parametrize("strategy", ["multiblock", "block", "random", "rasterized"])
def test_context_and_targets_are_apart(strategy, context):
    config = MaskConfig(strategy=strategy, context=context, group_size=8, target_scale=(0.15, 0.2), min_keep=4)
    sampler = MaskSampler(config, (12, 12))
    context, targets = as_lists(sampler.sample(200, seed=1, step=0))
    per_image = sampler.num_targets
    for image, seen in enumerate(context):
        hidden = set().union(*targets[image * per_image : (image + 1) * per_image])
        assert len(seen) > 4 and not hidden.intersection(seen)
        assert seen == sorted(seen) and {token // 144 for token in [*seen, *hidden]} == {image}


def test_a_target_over_everything_leaves_the_context_its_whole_block():
    config = MaskConfig(num_targets=1, target_scale=(1, 1), target_aspect=(1, 1), context_scale=(1, 1), min_keep=5)
    masks = MaskSampler(config, (6, 6)).sample(3, seed=1, step=0)
    assert masks.context.to_lists() == masks.targets.to_lists() == [list(range(36 * b, 36 * b + 36)) for b in range(3)]
    assert masks.context.max_seqlen == 36


def test_overlap_keeps_the_whole_block():
    sampler = MaskSampler(MaskConfig(allow_overlap=True, context_scale=(0.5, 0.5)), GRID_14)
    masks = sampler.sample(50, seed=1, step=0)
    assert (masks.context.lengths == 100).all() and masks.context.max_seqlen == 100  # round(sqrt(98)) squared


def test_a_fixed_context_takes_target_patches_last_of_all():
    config = MaskConfig(context="fixed", mask_ratio=0.5)
    context, targets = as_lists(MaskSampler(config, GRID_14).sample(300, seed=1, step=0))
    kinds = set()
    for image, chosen in enumerate(context):
        assert len(chosen) == 98
        hidden = set().union(*targets[4 * image : 4 * image + 4])
        assert len(hidden.intersection(chosen)) == max(0, 98 - (196 - len(hidden)))
        kinds.add(bool(hidden.intersection(chosen)))
    assert kinds == {True, False}


def test_batch_min_keeps_the_first_patches_of_the_exact_context():
    config = MaskConfig.official(4, num_contexts=2)
    exact = MaskSampler(replace(config, context="exact"), GRID_14).sample(24, seed=3, step=9)
    cut = MaskSampler(config, GRID_14).sample(24, seed=3, step=9)
    for group in range(6):
        rows = slice(8 * group, 8 * group + 8)
        whole = exact.context.to_lists()[rows]
        shortest = min(map(len, whole))
        assert cut.context.to_lists()[rows] == [context[:shortest] for context in whole]
    assert cut.targets.to_lists() == exact.targets.to_lists()


@pytest.mark.parametrize(
    "config",
    [MaskConfig.official(4), MaskConfig(), MaskConfig(context="fixed"), MaskConfig(strategy="random"), CROWDED],
    ids=["official", "exact", "fixed", "random", "crowded"],
)
def test_splitting_a_batch_at_group_boundaries_changes_nothing(config):
    sampler = MaskSampler(config, (12, 10))
    whole = as_lists(sampler.sample(16, seed=5, step=2))
    parts = [as_lists(sampler.sample(size, seed=5, step=2, first_image=first)) for first, size in ((0, 4), (4, 12))]
    shifted = [[[token + 4 * 120 for token in sequence] for sequence in kind] for kind in parts[1]]
    assert whole == (parts[0][0] + shifted[0], parts[0][1] + shifted[1])


def test_seed_step_and_image_each_change_the_masks():
    sampler = MaskSampler(MaskConfig(), GRID_14)
    reference = as_lists(sampler.sample(8, seed=5, step=2))
    assert as_lists(sampler.sample(8, seed=5, step=2)) == reference
    for other in ({"seed": 6, "step": 2}, {"seed": 5 + 2**32, "step": 2}, {"seed": 5, "step": 3}):
        assert as_lists(sampler.sample(8, **other)) != reference
    assert as_lists(sampler.sample(8, seed=5, step=2, first_image=8)) != reference


def test_seed_and_step_may_be_tensors():
    sampler = MaskSampler(MaskConfig.official(4), GRID_14)
    from_tensors = sampler.sample(8, seed=torch.tensor(-3), step=torch.tensor(7))
    assert as_lists(from_tensors) == as_lists(sampler.sample(8, seed=-3, step=7))


EQUAL_LENGTHS = {  # whether contexts and targets of 8 images are promised to be equally long, exact and with a capacity
    "exact": (MaskConfig(), (False, False), (False, False)),
    "official": (MaskConfig.official(8), (True, True), (False, False)),
    "two groups": (MaskConfig.official(4), (False, True), (False, False)),
    "fixed": (MaskConfig(context="fixed"), (True, False), (True, False)),
    "rasterized, even": (MaskConfig(strategy="rasterized"), (True, True), (True, True)),
    "random": (MaskConfig(strategy="random"), (True, True), (True, True)),
}


@pytest.mark.parametrize(("config", "exact", "with_capacity"), EQUAL_LENGTHS.values(), ids=EQUAL_LENGTHS)
def test_equal_lengths_are_promised_where_they_are_sure(config, exact, with_capacity):
    sampler = MaskSampler(config, GRID_14)
    masks = sampler.sample(8, seed=0, step=1)
    assert (masks.context.uniform, masks.targets.uniform) == exact
    for sets in (masks.context, masks.targets):
        assert not sets.uniform or sets.lengths.eq(sets.max_seqlen).all()
    capacity = sampler.counts(8, seed=0, step=1)
    masks = sampler.sample(8, seed=0, step=1, capacity=capacity)
    assert (masks.context.uniform, masks.targets.uniform) == with_capacity
    masks = sampler.sample(8, seed=0, step=1, capacity=tuple(rows + 1 for rows in capacity))
    assert not masks.context.uniform and not masks.targets.uniform


@pytest.mark.parametrize("strategy", ["multiblock", "random", "rasterized"])
def test_capacity_pads_with_rows_of_no_token(strategy):
    sampler = MaskSampler(MaskConfig(strategy=strategy), GRID_14)
    exact = sampler.sample(6, seed=1, step=0)
    counts = sampler.counts(6, seed=1, step=0)
    for extra in (0, 77):
        padded = sampler.sample(6, seed=1, step=0, capacity=(counts[0] + extra, counts[1] + extra))
        for ragged, unpadded in ((padded.context, exact.context), (padded.targets, exact.targets)):
            assert torch.equal(ragged.indices[: unpadded.num_rows], unpadded.indices)
            assert torch.equal(ragged.cu_seqlens, unpadded.cu_seqlens)
            assert ragged.num_rows == unpadded.num_rows + extra and (ragged.indices[unpadded.num_rows :] == -1).all()
    for short in ((counts[0] - 1, counts[1]), (counts[0], counts[1] - 1)):
        with pytest.raises(ValueError, match="do not fit a capacity"):
            sampler.sample(6, seed=1, step=0, capacity=short)


@pytest.mark.parametrize("config", [MaskConfig(), MaskConfig(strategy="random"), MaskConfig.official(6)])
def test_rows_are_rounded_up_to_what_the_device_likes(config):
    """Meta tensors stand for those of a GPU: the host finds the counts from its own sampler."""
    sampler = MaskSampler(config, GRID_14)
    call = {"batch_size": 6, "seed": 1, "step": 0}
    exact, on_device, rounded = (
        sampler.sample(**call, **settings) for settings in ({}, {"device": "meta"}, {"round_rows": 100})
    )
    for masks, multiple in ((exact, 1), (on_device, 128), (rounded, 100)):
        assert masks.tokens == (exact.context.num_rows, exact.targets.num_rows) == sampler.counts(**call)
        assert masks.to("meta").tokens == masks.tokens
        for tokens, rows in zip(masks.tokens, (masks.context.num_rows, masks.targets.num_rows), strict=True):
            assert rows == -(-tokens // multiple) * multiple
    assert as_lists(rounded) == as_lists(exact)
    assert sampler.sample(**call, capacity=(1200, 1200 * 4)).tokens is None
    with pytest.raises(ValueError, match="round_rows must be at least 1, got 0"):
        sampler.sample(**call, round_rows=0)


def test_masks_know_their_numbers():
    masks = MaskSampler(MaskConfig(num_contexts=2), GRID_14).sample(5, seed=1, step=0)
    assert (masks.num_images, masks.num_contexts, masks.num_targets) == (5, 2, 4)
    moved = masks.to("meta")
    assert moved.device.type == moved.targets.device.type == "meta" and moved.num_contexts == 2


def test_autocast_does_not_change_the_counts():
    sampler = MaskSampler(CROWDED, (16, 300))
    reference = as_lists(sampler.sample(4, seed=1, step=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert as_lists(sampler.sample(4, seed=1, step=0)) == reference


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"strategy": "blocks"}, "strategy must be one of multiblock, block, random, rasterized, got 'blocks'"),
        ({"context": "all"}, "context must be one of"),
        ({"size_per": "batch"}, "size_per must be one of"),
        ({"num_targets": 0}, "num_targets must be in .* got 0"),
        ({"num_contexts": 0}, "num_contexts .* got 0"),
        ({"min_keep": -1}, "min_keep .* got -1"),
        ({"target_scale": (0.2, 0.1)}, r"target_scale .* got \(0.2, 0.1\)"),
        ({"target_scale": (0.0, 0.1)}, "target_scale"),
        ({"context_scale": (0.9, 1.1)}, "context_scale"),
        ({"target_aspect": (0.001, 1.0)}, "target_aspect"),
        ({"context_aspect": (1.0, float("nan"))}, "context_aspect"),
        ({"mask_ratio": 1.0}, "mask_ratio .* got 1.0"),
        ({"group_size": 0}, "group_size must be positive, got 0"),
        ({"context": "batch_min"}, "batch_min needs group_size"),
        ({"strategy": "block", "allow_overlap": True}, "allow_overlap"),
        ({"strategy": "random", "num_contexts": 2}, "num_contexts=2"),
        ({"strategy": "rasterized", "num_targets": 4}, "3 targets, got num_targets=4"),
    ],
)
def test_bad_configurations_raise(config, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**config)


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        ({}, (4, 4), "4 x 4 grid a target can have as few as 1 patches, but must have more than min_keep=10"),
        ({}, (8, 8), "as few as 8 patches"),
        ({"min_keep": 100, "target_scale": (0.6, 0.6), "context_scale": (0.3, 0.4)}, (14, 14), "a context block can"),
        ({"draw_last_row_col": False}, (1, 30), "no room for blocks"),
        ({}, (0, 14), "grid must have 1 to 65536 patches, got 0 x 14"),
        ({}, (300, 300), "grid must have 1 to 65536 patches"),
        ({"strategy": "block", "target_scale": (0.95, 0.95)}, (14, 14), "1 targets of up to 19[0-9] patches can"),
        ({"strategy": "random", "num_targets": 2}, (14, 14), "2 targets of up to 117 patches can have as few as 0"),
        ({"strategy": "rasterized"}, (6, 6), "as few as 9"),
        ({"context": "fixed", "mask_ratio": 0.05}, (14, 14), "mask_ratio=0.05 asks for a context of 186 of 196"),
        ({"context": "fixed", "mask_ratio": 0.999}, (14, 14), "a context of 0 of 196 patches"),
        ({"context": "fixed", "mask_ratio": 0.7, "strategy": "rasterized"}, (14, 14), "1 to 49"),
        ({"context": "fixed", "mask_ratio": 0.5, "context_scale": (0.2, 0.3)}, (14, 14), "1 to 64"),
    ],
)
def test_impossible_settings_raise_with_their_numbers(config, grid, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler(MaskConfig(**config), grid)


def test_calls_that_cannot_be_served_raise():
    sampler = MaskSampler(MaskConfig.official(8), GRID_14)
    for batch_size, first_image in ((12, 0), (8, 4)):
        with pytest.raises(ValueError, match="whole groups of group_size=8"):
            sampler.sample(batch_size, seed=0, step=0, first_image=first_image)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        sampler.counts(0, seed=0, step=0)
    with pytest.raises(ValueError, match="step must be in"):
        sampler.sample(8, seed=0, step=-1)
    with pytest.raises(ValueError, match="too many for 32-bit"):
        MaskSampler(MaskConfig(), (256, 256)).sample(2**14, seed=0, step=0)


def test_official_preset():
    config = MaskConfig.official(128)
    assert config == MaskConfig(
        context="batch_min", size_per="step", shared_scale_aspect=True, draw_last_row_col=False, group_size=128
    )
    assert (config.resolved().num_targets, config.resolved().target_scale, config.min_keep) == (4, (0.15, 0.2), 10)
    assert MaskConfig.official(128, context="exact", min_keep=4).min_keep == 4
    sampler = MaskSampler(config, GRID_14)
    assert (sampler.num_targets, sampler.num_contexts) == (4, 1)


def test_fields_are_set_from_a_command_line():
    from jsonargparse import auto_cli

    def masks_of(masks: MaskConfig = DEFAULT) -> MaskConfig:
        return masks

    arguments = ["--masks.strategy=block", "--masks.target_scale=[0.5, 0.6]", "--masks.num_targets=2"]
    expected = MaskConfig(strategy="block", target_scale=(0.5, 0.6), num_targets=2)
    assert auto_cli(masks_of, args=arguments) == expected
    assert MaskSampler(auto_cli(masks_of, args=["--masks.strategy=rasterized"]), GRID_14).num_targets == 3


@pytest.mark.parametrize(
    ("strategy", "num_targets", "scale"),
    [
        ("multiblock", 4, (0.15, 0.2)),
        ("block", 1, (0.6, 0.6)),
        ("random", 1, (0.6, 0.6)),
        ("rasterized", 3, (0.25, 0.25)),
    ],
)
def test_each_strategy_has_the_targets_of_the_paper_unless_told_otherwise(strategy, num_targets, scale):
    resolved = replace(DEFAULT, strategy=strategy).resolved()
    assert (resolved.num_targets, resolved.target_scale) == (num_targets, scale)
    assert resolved.resolved() == resolved
    assert MaskConfig(target_scale=(0.3, 0.4), num_targets=2).resolved().target_scale == (0.3, 0.4)


@pytest.mark.parametrize("context", ["exact", "fixed", "batch_min"])
@pytest.mark.parametrize("strategy", ["multiblock", "block", "random", "rasterized"])
def test_with_a_capacity_nothing_is_read_from_the_device(strategy, context):
    """Meta tensors have no values: whatever asks for one raises."""
    crowded = {"num_targets": 7, "num_contexts": 2, "target_scale": (0.25, 0.4)} if strategy == "multiblock" else {}
    sampler = MaskSampler(MaskConfig(strategy=strategy, context=context, group_size=4, **crowded), GRID_14)
    seed = step = torch.zeros((), dtype=torch.int64, device="meta")
    masks = sampler.sample(8, seed=seed, step=step, device="meta", capacity=(900, 3000))
    assert (masks.context.num_rows, masks.targets.num_rows) == (900, 3000)
    assert masks.context.max_seqlen == sampler.max_context and masks.targets.max_seqlen == sampler.max_target


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [MaskConfig.official(4), CROWDED, MaskConfig(context="fixed"), MaskConfig(strategy="random")],
    ids=["official", "crowded", "fixed", "random"],
)
def test_cuda_draws_the_same_masks_without_waiting(config):
    sampler = MaskSampler(config, GRID_14)
    counts = sampler.counts(64, seed=3, step=11)
    seed, step = torch.tensor(3, device="cuda"), torch.tensor(11, device="cuda")
    sampler.sample(64, seed=seed, step=step, device="cuda", capacity=counts)  # loads kernels and libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = sampler.sample(64, seed=seed, step=step, device="cuda", capacity=counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert as_lists(masks) == as_lists(sampler.sample(64, seed=3, step=11))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_a_new_step():
    sampler = MaskSampler(MaskConfig.official(16), GRID_14)
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    capacity = (64 * 196, 4 * 64 * 196)
    sampler.sample(64, seed=1, step=step, device="cuda", capacity=capacity)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = sampler.sample(64, seed=1, step=step, device="cuda", capacity=capacity)
    for number in (5, 6):
        step.fill_(number)
        graph.replay()
        assert as_lists(masks) == as_lists(sampler.sample(64, seed=1, step=number))
