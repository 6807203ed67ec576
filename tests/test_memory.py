"""The memory estimate against what autograd really keeps."""

from types import SimpleNamespace

import pytest
import torch

from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.step.memory import USABLE, activation_bytes, needs_checkpointing, state_bytes
from ijepa_fast.step.train_step import PRECISION_DTYPES

MODEL = ModelConfig(56, 4, embed_dim=96, depth=4, num_heads=4, predictor_embed_dim=48, predictor_depth=3)
IMAGES = 16


def build(precision, checkpointing=False, wide_residual=False):
    model = MODEL.build(Objective())
    cast_weights(model, PRECISION_DTYPES[precision])
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        network.wide_residual = wide_residual
        network.activation_checkpointing = checkpointing
    return model


def estimated(precision, checkpointing=False, wide_residual=False):
    size = PRECISION_DTYPES[precision].itemsize
    options = {"checkpointing": checkpointing, "wide_residual": wide_residual}
    return activation_bytes(MODEL, MaskConfig(), IMAGES, size, **options)


def needed(model, device, captured=False):
    return needs_checkpointing(model, MODEL, MaskConfig(), IMAGES, 2, torch.device(device), captured=captured)


def kept_bytes(model, masks, images):
    """Memory of all tensors that the graph of a loss holds on to, but for parameters; each piece once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, masks)[0].total
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("precision", "wide_residual"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_activations_are_those_autograd_keeps(precision, wide_residual):
    model = build(precision, wide_residual=wide_residual)
    masks = MaskSampler(MaskConfig(), (14, 14)).sample(IMAGES, seed=0, step=0)
    kept = kept_bytes(model, masks, torch.zeros(IMAGES, 3, 56, 56, dtype=torch.uint8))
    assert estimated(precision, wide_residual=wide_residual) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize(("precision", "wide_residual"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_checkpointing_keeps_block_inputs_and_needs_one_block(precision, wide_residual):
    """What is kept between the passes, and the largest block, which is there once more while it is recomputed."""
    model = build(precision, True, wide_residual)
    masks = MaskSampler(MaskConfig(), (14, 14)).sample(IMAGES, seed=0, step=0)
    between = kept_bytes(model, masks, torch.zeros(IMAGES, 3, 56, 56, dtype=torch.uint8))
    assert between < estimated(precision, True, wide_residual) < estimated(precision, False, wide_residual)
    selective = estimated(precision, "selective", wide_residual)
    assert estimated(precision, True, wide_residual) < selective


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_is_what_the_optimizer_holds(precision):
    model = build(precision)
    optimizer = FusedAdamW(parameter_groups(model))
    model(torch.zeros(2, 3, 56, 56, dtype=torch.uint8), MaskSampler(MaskConfig(), (14, 14)).sample(2, seed=0, step=0))[
        0
    ].total.backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert state_bytes(model) == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(("gib", "on"), [(0.01, True), (80.0, False)])
def test_auto_recomputes_only_where_memory_is_short(monkeypatch, gib, on):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(gib * 2**30))
    )
    model = build("bf16")
    assert needed(model, "cuda") is on and needed(model, "cpu") is False


def test_captured_steps_need_activations_twice(monkeypatch):
    model = build("bf16")
    total = int((state_bytes(model) + 1.5 * estimated("bf16")) / USABLE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    assert needed(model, "cuda") is False and needed(model, "cuda", captured=True) is True
