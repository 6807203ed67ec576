"""Blocks under torch.compile: the same numbers, and no compilation after the first steps whatever the token counts."""

import pytest
import torch
from model_cases import assert_equal, assert_same_gradients, gradients, make_images, make_masks, make_model
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.fused_blocks import fuse
from ijepa_fast.step import options
from tests.tiny import GRID, MASKS, images, tiny_model, tiny_step

COMPILE = torch.compile


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


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["compile", "fused+compile"])
def test_everything_is_compiled_before_the_first_step(monkeypatch, blocks):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **o: COMPILE(function, **o | {"backend": "aot_eager"}))
    step = tiny_step()
    counters.clear()
    options.apply(options.StepOptions(blocks=blocks), step.model, device=torch.device("cpu"), precision="fp32")
    assert 0 < (compiled := counters["stats"]["unique_graphs"])
    for number in range(4):
        step(images(number), number, all_targets=number % 2 == 0)
    assert counters["stats"]["unique_graphs"] == compiled


def broken(function, **options):
    """torch.compile whose code for the backward pass cannot be made."""

    def fail(*_):
        raise RuntimeError("gcc: fatal error\nand more")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=fail)
    return COMPILE(function, **options | {"backend": backend})


def test_a_compiler_that_fails_leaves_plain_blocks_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(options, "blocks_on", lambda blocks, device: "compile")
    caplog.set_level("INFO", logger="ijepa_fast")
    model, plain, predict, seen = tiny_model(), tiny_model(), options.IJEPA.predict, []

    def spied(model, images, *more, **settings):
        seen.append(len(images))
        return predict(model, images, *more, **settings)

    monkeypatch.setattr(options.IJEPA, "predict", spied)
    options.apply(options.StepOptions(), model, device=torch.device("cpu"), precision="fp32", images=5)
    assert set(seen) == {5}  # a whole micro-batch, by which sums over rows are split
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING" and "ijepa_fast" in record.name]
    assert "FAILED" in warning.message and warning.message.endswith("RuntimeError: gcc: fatal error and more")
    assert all(parameter.grad is None for parameter in model.parameters())
    masks = MaskSampler(MASKS, GRID).sample(8, seed=0, step=0)
    ours, theirs = (network(images(0), masks)[0].total for network in (model, plain))
    assert torch.equal(ours, theirs) and ours.requires_grad
    # Whoever asks for it is told.
    with pytest.raises(RuntimeError, match="gcc: fatal error"):
        asked = options.StepOptions(blocks="compile")
        options.apply(asked, tiny_model(), device=torch.device("cpu"), precision="fp32")


def test_auto_is_plain_on_the_cpu_and_compiled_where_a_gpu_has_a_c_compiler(monkeypatch, caplog):
    caplog.set_level("INFO", logger="ijepa_fast")
    assert options.blocks_on("auto", torch.device("cpu")) == "plain" and not caplog.records
    gpu = torch.device("cuda")
    assert options.blocks_on("fused", gpu) == "fused" and not caplog.records
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(options.shutil, "which", lambda name: name == "gcc" or None)
    monkeypatch.setattr(options.Path, "exists", lambda path: True)
    assert options.blocks_on("auto", gpu) == "compile"
    monkeypatch.setattr(options.Path, "exists", lambda path: False)
    assert options.blocks_on("auto", gpu) == "plain"
    monkeypatch.setattr(options.shutil, "which", lambda name: None)
    assert options.blocks_on("auto", gpu) == "plain"
    said = [record.message for record in caplog.records]
    assert said[0] == "step.blocks compile" and "Python.h" in said[1] and "no C compiler" in said[2]
