"""The sums between blocks in fp32 beside bf16 weights."""

import copy

import pytest
import torch
from torch import nn

from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.blocks import Block
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import cast_weights

GRID = (6, 6)


def make_model(depth=2, dtype=torch.bfloat16, wide=True, **options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": depth, "num_heads": 2, "predictor_embed_dim": 16, "predictor_depth": depth}
    model = ModelConfig(24, 4, **sizes, **options).build(Objective())
    cast_weights(model, dtype)
    return widened(model, wide)


def widened(model, wide=True):
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        network.wide_residual = wide
    return model


def images(count=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=generator)


def masks(count=4):
    return MaskSampler(MaskConfig(min_keep=1), GRID).sample(count, seed=0, step=0, capacity=(256, 256))


def loss_and_gradients(model, **options):
    loss = model(images(), masks(), **options)[0].total
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("all_targets", [True, False])
def test_sums_are_fp32_and_products_bf16(all_targets):
    model, sums, products = make_model(), set(), set()
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, inputs, out: sums.update((inputs[0].dtype, out.dtype)))
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, out: products.add(out.dtype))
    predicted = model.predict(images(), masks(), all_targets=all_targets)
    assert sums == {torch.float32} and products == {torch.bfloat16}
    assert predicted.context.dtype == predicted.targets.dtype == predicted.values.dtype == torch.bfloat16
    (features,) = model.target_encoder.intermediate_layers(images(), 1)
    assert torch.equal(features, model.target_encoder(images())) and features.dtype == torch.bfloat16


def test_deep_networks_lose_less():
    """Against the same (rounded) weights in fp64, over the features of a deep encoder."""
    model = make_model(depth=24, init="depth_scaled").target_encoder
    exact = copy.deepcopy(model).double()
    exact.wide_residual = False
    wanted = exact(images())
    errors = []
    for model.wide_residual in (True, False):
        errors.append(float((model(images()).double() - wanted).square().mean().sqrt()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_see_no_difference(dtype):
    model = make_model(dtype=dtype, wide=False).to(dtype)
    narrow, wide = loss_and_gradients(model), loss_and_gradients(widened(model))
    assert torch.equal(narrow[0], wide[0])
    assert all(torch.equal(a, b) for a, b in zip(narrow[1], wide[1], strict=True))


def test_gradients_are_those_of_the_narrow_stream_but_for_rounding():
    model = make_model()
    loss, gradients = loss_and_gradients(model)
    exact_loss, exact = loss_and_gradients(widened(copy.deepcopy(model).double(), False))
    assert float((loss.double() - exact_loss).abs()) <= 2**-8 * float(exact_loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, gradient, want in zip(trained, gradients, exact, strict=True):
        assert gradient.dtype == parameter.dtype
        # Rounded to bf16 a few times in each of four blocks.
        assert float((gradient.double() - want).norm()) <= 16 * 2**-8 * float(want.norm()) + 1e-9


def test_recomputed_blocks_give_the_same_bits():
    model = make_model()
    kept = loss_and_gradients(model)
    for network in (model.context_encoder, model.predictor):
        network.activation_checkpointing = True
    recomputed = loss_and_gradients(model)
    assert torch.equal(kept[0], recomputed[0])
    assert all(torch.equal(a, b) for a, b in zip(kept[1], recomputed[1], strict=True))


@pytest.mark.slow
def test_compiled_blocks():
    model = make_model()
    wanted = loss_and_gradients(model, all_targets=False)
    torch.compiler.reset()
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        network.compile_blocks(backend="aot_eager")
    found = loss_and_gradients(model, all_targets=False)
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(b.abs().max()))
