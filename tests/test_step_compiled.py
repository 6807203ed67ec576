"""Blocks under torch.compile: the same numbers, and no compilation after the first steps whatever the token counts."""

import pytest
import torch
from model_cases import assert_equal, assert_same_gradients, gradients, make_images, make_masks, make_model
from torch._dynamo.utils import counters

from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.fused_blocks import fuse
from tests.tiny import images, tiny_step

GRID = (6, 6)


def compile_blocks(model, fused=False):
    torch.compiler.reset()
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        if fused:
            fuse(network)
        network.compile_blocks(backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_loss_and_gradients(all_targets, checkpointing):
    model, batch = make_model(GRID, activation_checkpointing=checkpointing), make_images(3, GRID)
    masks = make_masks(GRID, 3, padding=4)
    want = model(batch, masks, all_targets=all_targets)[0].total
    want_gradients = gradients(model, want)
    compile_blocks(model)
    got = model(batch, masks, all_targets=all_targets)[0].total
    assert counters["stats"]["unique_graphs"] > 0
    assert_equal(got, want)
    assert_same_gradients(gradients(model, got), want_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "masks", [MaskConfig(min_keep=1), MaskConfig.official(8, min_keep=1)], ids=["exact", "official"]
)
def test_other_token_counts_compile_nothing(masks, fused):
    step = tiny_step(masks=masks)
    compile_blocks(step.model, fused)
    counters.clear()
    tokens = set()
    for number in range(6):
        tokens.add(step(images(number), number).tokens)
        if number == 1:
            compiled = counters["stats"]["unique_graphs"]
    assert len(tokens) > 3
    # Context, target encoder and predictor, each inside and at its last block where that differs; fused, and first.
    assert 0 < compiled <= (9 if fused else 6)
    assert counters["stats"]["unique_graphs"] == compiled
