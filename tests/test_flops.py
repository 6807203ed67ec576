"""Closed-form operation counts against published figures, hand counts, and torch's FlopCounterMode on real steps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_fast import ops
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.step.flops import StepFlops, TokenCounts, step_flops

B16 = ModelConfig()
L16 = ModelConfig(embed_dim=1024, depth=24, num_heads=16, predictor_depth=12)
H14 = ModelConfig(patch_size=14, embed_dim=1280, depth=32, num_heads=16, predictor_depth=12)

# GFLOP per image of plain implementations (all rows of every block) on the mean token counts of the official geometry:
# context tokens, target tokens, then target forward, context and predictor forward and backward. Worked out by hand
# and independently of this module, with one decimal and counts of one decimal: good to 0.4 %.
BY_HAND = [
    (B16, 50.2, 33.4, (34.9, 26.0, 22.4)),
    (B16, 81.7, 33.4, (34.9, 42.7, 31.2)),
    (L16, 50.2, 33.4, (122.5, 91.8, 44.5)),
    (L16, 81.7, 33.4, (122.5, 150.6, 62.2)),
    (H14, 68.4, 44.2, (333.2, 261.5, 61.0)),
    (H14, 109.8, 44.2, (333.2, 422.0, 84.8)),
]


@pytest.mark.parametrize(("model", "context", "target", "want"), BY_HAND)
def test_reproduces_the_table_of_the_design(model, context, target, want):
    got = step_flops(model, TokenCounts.constant(context, target), all_targets=True, all_predictions=True)
    for value, expected in zip(got, want, strict=True):
        assert value / 1e9 == pytest.approx(expected, rel=4e-3)
    assert got.total == sum(got)


def test_smallest_case_by_hand():
    """One block everywhere, width 4, hidden 8, 4 patches of 1 pixel, one context of 2 and one target of 1 token."""
    model = ModelConfig(2, 1, embed_dim=4, depth=1, num_heads=1, mlp_ratio=2, predictor_embed_dim=4, predictor_depth=1)
    per_row = 2 * (4 * 4 * 4 + 2 * 4 * 8)  # q, k, v, projection, and two layers of the MLP
    embed = 2 * 3 * 4
    want = StepFlops(
        target=4 * (embed + per_row) + 4 * 4 * (4 * 4),
        context=2 * 2 * embed + 3 * (2 * per_row + 4 * 4 * (2 * 2)),
        predictor=3 * ((2 + 1) * 2 * 4 * 4 + 3 * per_row + 4 * 4 * (3 * 3)),
    )
    assert step_flops(model, TokenCounts.constant(2, 1, 1, 1), all_targets=True, all_predictions=True) == want
    key_value = 2 * 2 * 4 * 4
    needed = StepFlops(
        target=4 * (embed + key_value) + (per_row - key_value) + 4 * 4 * 4,
        context=want.context,
        predictor=3 * ((2 + 1) * 2 * 4 * 4 + 3 * key_value + (per_row - key_value) + 4 * 4 * 3),
    )
    assert step_flops(model, TokenCounts.constant(2, 1, 1, 1)) == needed


def test_token_counts_of_masks():
    sampler = MaskSampler(MaskConfig(min_keep=2, num_contexts=2, num_targets=3), (6, 6))
    masks = [sampler.sample(4, seed=0, step=step) for step in (0, 1)]
    got = TokenCounts.of(*masks)
    sums = [0.0] * 5
    for drawn in masks:
        contexts = [len(tokens) for tokens in drawn.context.to_lists()]
        targets = [len(tokens) for tokens in drawn.targets.to_lists()]
        for image in range(4):
            c, m = contexts[2 * image : 2 * image + 2], targets[3 * image : 3 * image + 3]
            values = (sum(c), sum(m), sum(x * x for x in c), sum(x * x for x in m), sum(x * y for x in c for y in m))
            sums = [total + value / 8 for total, value in zip(sums, values, strict=True)]
    assert (got.context, got.targets, got.context_squares, got.target_squares, got.products) == pytest.approx(sums)
    assert (got.num_contexts, got.num_targets) == (2, 3)


def test_expected_counts_of_the_recipes():
    """Means that the design quotes, from other draws: 89.8 and 33.4 (exact), 50.2 and 33.4 (official, 128 a group)."""
    exact = TokenCounts.expected(MaskConfig(), (14, 14))
    assert exact.context == pytest.approx(89.8, rel=0.02) and exact.targets == pytest.approx(4 * 33.4, rel=0.02)
    official = TokenCounts.expected(MaskConfig.official(128), (14, 14), draws=64)
    assert official.context == pytest.approx(50.2, rel=0.03)


# Sizes at which the products that the closed form leaves out (pooling, EMA) are as small as in real models.
MODEL = ModelConfig(56, 4, embed_dim=96, depth=3, num_heads=4, predictor_embed_dim=48, predictor_depth=3)
MASKS = {
    "exact": MaskConfig(),
    "batch_min": MaskConfig.official(4),
    "two contexts": MaskConfig(num_contexts=2, num_targets=2),
    "more target rows than patches": MaskConfig(num_targets=8, min_keep=5),
}


@pytest.mark.parametrize("all_targets", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("config", MASKS.values(), ids=MASKS)
def test_counted_flops_of_a_step_are_the_closed_form(config, rounded, all_targets):
    torch.manual_seed(0)
    model = MODEL.build(Objective())
    sampler = MaskSampler(config, (14, 14))
    capacity = None
    if rounded:
        capacity = tuple(-(-rows // 128) * 128 for rows in sampler.counts(4, seed=0, step=0))
    masks = sampler.sample(4, seed=0, step=0, capacity=capacity)
    images = torch.zeros(4, 3, 56, 56, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model(images, masks, all_targets=all_targets)[0].total.backward()
    counted = counter.get_total_flops() / 4
    want = step_flops(MODEL, TokenCounts.of(masks), all_targets=all_targets).total
    # Rounding up lengthens every linear layer of context and predictor by at most this factor.
    slack = 1.0
    if rounded:
        exact = sampler.counts(4, seed=0, step=0)
        slack = max(rows / used for rows, used in zip(capacity, exact, strict=True))
        assert slack > 1
    assert want * 0.99 <= counted <= want * 1.01 * slack


def test_ops_count_the_tokens_and_not_the_bounds():
    lengths = [3, 0, 5]
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    qkv = torch.randn(10, 3, 2, 4, requires_grad=True)
    want = 4 * 2 * 4 * sum(length**2 for length in lengths)
    for attend in (
        lambda: ops.varlen_self_attention(qkv, cu, 7)[0],
        lambda: ops.varlen_attention(*qkv.unbind(1), cu, cu, 7, 7)[0],
    ):
        with FlopCounterMode(display=False) as counter:
            out = attend()
        assert counter.get_total_flops() == want
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * want
