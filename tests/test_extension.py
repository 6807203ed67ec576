"""The C++/CUDA mask sampler draws the bits of the torch sampler, and gets out of the way where it cannot run.

The library is built for these tests from the sources at hand. Equality with the torch sampler carries over what is
known of that one: equality with the independent sampler (test_masks.py) and the distributions
(test_mask_distribution.py).
"""

from dataclasses import replace

import pytest
import torch
from extension_library import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_cases import CROWDED, HARD_CASES, samplers

from ijepa_fast.masks import extension
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler

GRID_14 = (14, 14)


@pytest.fixture(scope="module")
def library(request):
    path = build(request.config.cache.mkdir("extension"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "library_path", lambda: path)
        extension.reason.cache_clear()
        assert extension.reason("cpu") is None
        yield path
    extension.reason.cache_clear()


@pytest.fixture
def without_library(monkeypatch):
    """For tests that set `extension.library_path` themselves."""
    extension.reason.cache_clear()
    yield monkeypatch
    extension.reason.cache_clear()


@pytest.fixture
def cuda_library(library):
    if reason := extension.reason("cuda"):
        pytest.skip(reason)


def other(sampler, implementation):
    return MaskSampler(sampler.config, sampler.grid, implementation=implementation)


def tensors(masks):
    return masks.context.indices, masks.context.cu_seqlens, masks.targets.indices, masks.targets.cu_seqlens


def assert_equal(masks, expected):
    for ours, theirs in zip(tensors(masks), tensors(expected), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    bounds = [(masks.context.max_seqlen, masks.targets.max_seqlen) for masks in (masks, expected)]
    assert bounds[0] == bounds[1]
    assert (masks.num_contexts, masks.per_image) == (expected.num_contexts, expected.per_image)


def assert_same_bits(sampler, seed, step, first_group, num_groups):
    ours, torchs = other(sampler, "extension"), other(sampler, "torch")
    group_size = sampler.config.group_size or 3
    call = {"seed": seed, "step": step, "first_image": first_group * group_size}
    expected = torchs.sample(num_groups * group_size, **call)
    assert_equal(ours.sample(num_groups * group_size, **call), expected)
    counts = ours.counts(num_groups * group_size, **call)
    assert counts[:2] == (expected.context.num_rows, expected.targets.num_rows)
    padded = ours.sample(num_groups * group_size, **call, capacity=(counts[0] + 5, *counts[1:]))
    assert padded.context.indices[counts[0] :].tolist() == [-1] * 5
    assert torch.equal(padded.context.indices[: counts[0]], expected.context.indices)


def seeds_steps_and_groups():
    seeds, steps = st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1)
    return seeds, steps, st.integers(0, 2**20), st.integers(1, 3)


filtering = [HealthCheck.filter_too_much, HealthCheck.too_slow]


@given(samplers(largest_side=64), *seeds_steps_and_groups())
@settings(max_examples=100, suppress_health_check=filtering)
def test_equals_the_torch_sampler_bit_for_bit(library, sampler, seed, step, first_group, num_groups):
    assert_same_bits(sampler, seed, step, first_group, num_groups)


@pytest.mark.slow
@given(samplers(largest_side=64), *seeds_steps_and_groups())
@settings(max_examples=1000, suppress_health_check=filtering)
def test_equals_the_torch_sampler_in_a_thousand_cases(library, sampler, seed, step, first_group, num_groups):
    assert_same_bits(sampler, seed, step, first_group, num_groups)


@pytest.mark.parametrize("grid", [(8, 11), (14, 14), (40, 33), (48, 70)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("config", HARD_CASES, ids=lambda config: f"{config.strategy}-{config.context}")
def test_equals_the_torch_sampler_where_it_is_hard(library, config, grid):
    config = replace(config, group_size=config.group_size or 4)
    assert_same_bits(MaskSampler(config, grid), seed=2**63 + 5, step=3, first_group=8, num_groups=8)


@pytest.mark.parametrize("strategy", ["multiblock", "random"])
@pytest.mark.parametrize("grid", [(256, 256), (1, 65536), (65536, 1)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_equals_the_torch_sampler_on_the_largest_grids(library, strategy, grid):
    assert_same_bits(MaskSampler(MaskConfig(strategy=strategy), grid), seed=1, step=3, first_group=8, num_groups=1)


@pytest.mark.parametrize("config", HARD_CASES, ids=lambda config: f"{config.strategy}-{config.context}")
def test_splitting_a_batch_at_group_boundaries_changes_nothing(library, config):
    sampler = MaskSampler(config, GRID_14, implementation="extension")
    whole = sampler.sample(128, seed=5, step=2)
    for kind in ("context", "targets"):
        first, second = (
            getattr(sampler.sample(64, seed=5, step=2, first_image=start), kind).to_lists() for start in (0, 64)
        )
        second = [[token + 64 * 196 for token in sequence] for sequence in second]
        assert getattr(whole, kind).to_lists() == first + second


@pytest.mark.parametrize("config", [MaskConfig.official(16), CROWDED, MaskConfig(context="fixed")])
def test_threads_change_nothing(library, config):
    sampler = MaskSampler(config, GRID_14, implementation="extension")
    threads = torch.get_num_threads()
    drawn = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            drawn.append(sampler.sample(1024, seed=1, step=0))
    finally:
        torch.set_num_threads(threads)
    assert_equal(*drawn)


def test_every_element_is_written(library):
    """In memory that torch leaves as it is, and in memory that it fills."""
    sampler = MaskSampler(MaskConfig.official(8), GRID_14, implementation="extension")
    reference = sampler.sample(64, seed=1, step=0, capacity=(9000, 20000))
    mode = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode("error")  # now new tensors hold the largest integer
        assert_equal(sampler.sample(64, seed=1, step=0, capacity=(9000, 20000)), reference)
    finally:
        torch.set_deterministic_debug_mode(mode)


def test_seed_and_step_may_be_tensors(library):
    sampler = MaskSampler(MaskConfig.official(4), GRID_14, implementation="extension")
    assert_equal(
        sampler.sample(8, seed=torch.tensor(-3), step=torch.tensor(7)), sampler.sample(8, seed=2**64 - 3, step=7)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, r"step must be in \[0, 4294967296\), got -1"),
        ({"step": 2**32}, "step must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one int64 on cpu"),
        ({"step": torch.zeros(())}, "step must be one int64 on cpu, got torch.float32"),
        ({"first_image": 2**32}, "first_image must be in"),
        ({"first_image": 4}, "whole groups of group_size=8"),
        ({"capacity": (10, 5000)}, "tokens do not fit a capacity of 10 rows"),
        ({"capacity": (5000, 10)}, "tokens do not fit a capacity of 10 rows"),
    ],
)
def test_calls_that_cannot_be_served_raise(library, arguments, message):
    sampler = MaskSampler(MaskConfig.official(8), GRID_14, implementation="extension")
    with pytest.raises(ValueError, match=message):
        sampler.sample(**({"batch_size": 8, "seed": 0, "step": 0} | arguments))


@pytest.mark.parametrize("place", range(25))
def test_a_plan_that_could_leave_its_buffers_is_refused(library, place):
    numbers = extension.plan_numbers(MaskSampler(MaskConfig.official(8), GRID_14).plan)
    assert len(numbers) == 25
    zero = torch.zeros((), dtype=torch.int64)
    for value in (-1, 2**31):
        wrong = [*numbers[:place], value, *numbers[place + 1 :]]
        with pytest.raises(RuntimeError, match="block_masks: "):
            torch.ops.ijepa_fast.block_masks(zero, zero, 0, 8, wrong)
    for wrong in (numbers[:-1], [*numbers, 0], []):
        with pytest.raises(RuntimeError, match="build it again"):
            torch.ops.ijepa_fast.block_masks(zero, zero, 0, 8, wrong)


@pytest.mark.slow
def test_the_operator_is_sound_for_torch_compile(library):
    numbers = extension.plan_numbers(MaskSampler(MaskConfig(), GRID_14).plan)
    arguments = (torch.tensor(3), torch.tensor(4), 0, 8, numbers, 1500, 1600)
    operator = torch.ops.ijepa_fast.block_masks.default
    torch.library.opcheck(operator, arguments)
    compiled = torch.compile(lambda seed, step: operator(seed, step, *arguments[2:]), fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(*arguments[:2]), operator(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_without_the_library_torch_draws_and_the_reason_is_told(without_library):
    without_library.setattr(extension, "library_path", lambda: None)
    assert MaskSampler(MaskConfig(), GRID_14).sample(2, seed=0, step=0).num_images == 2
    with pytest.raises(ValueError, match="cannot draw masks on cpu: the C.* extension is not built"):
        MaskSampler(MaskConfig(), GRID_14, implementation="extension").sample(2, seed=0, step=0)


def test_a_library_that_cannot_be_loaded_is_named(without_library, tmp_path):
    broken = tmp_path / "_block_masks.abi3.so"
    broken.write_bytes(b"not a library")
    without_library.setattr(extension, "library_path", lambda: broken)
    assert f"{broken} cannot be loaded" in extension.reason("cpu")
    assert MaskSampler(MaskConfig(), GRID_14).sample(2, seed=0, step=0).num_images == 2


def test_a_device_without_code_is_left_to_torch(library):
    assert f"{library} has no code for meta" == extension.reason("meta")
    assert (
        MaskSampler(MaskConfig(), GRID_14).sample(2, seed=0, step=0, device="meta", capacity=(400, 400)).device.type
        == "meta"
    )


def test_an_unknown_implementation_raises():
    with pytest.raises(ValueError, match="implementation must be auto, torch or extension, got 'cuda'"):
        MaskSampler(MaskConfig(), GRID_14, implementation="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("config", HARD_CASES, ids=lambda config: f"{config.strategy}-{config.context}")
@pytest.mark.parametrize("grid", [(14, 14), (40, 33)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_cuda_draws_the_same_bits(cuda_library, config, grid):
    config = replace(config, group_size=1) if config.group_size is None else config
    sampler = MaskSampler(config, grid, implementation="extension")
    for batch_size in (1, 8, 33, 128, 1000, 2048, 4096):
        batch_size = -(-batch_size // config.group_size) * config.group_size
        expected = sampler.sample(batch_size, seed=7, step=batch_size)
        capacity = tuple(count + 300 for count in sampler.counts(batch_size, seed=7, step=batch_size))
        padded = sampler.sample(batch_size, seed=7, step=batch_size, capacity=capacity)
        exact = sampler.sample(batch_size, seed=7, step=batch_size, device="cuda", round_rows=1)
        assert_equal(exact.to("cpu"), expected)
        on_cuda = sampler.sample(batch_size, seed=7, step=batch_size, device="cuda", capacity=capacity)
        assert_equal(on_cuda.to("cpu"), padded)


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_a_new_step(cuda_library):
    sampler = MaskSampler(MaskConfig.official(16), GRID_14, implementation="extension")
    seed, step = (torch.full((), value, dtype=torch.int64, device="cuda") for value in (1, 0))
    call = {"device": "cuda", "capacity": (64 * 196, 4 * 64 * 196)}
    sampler.sample(64, seed=seed, step=step, **call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            masks = sampler.sample(64, seed=seed, step=step, **call)
        for number in (5, 6):
            step.fill_(number)
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(masks.to("cpu"), sampler.sample(64, seed=1, step=6, capacity=call["capacity"]))
