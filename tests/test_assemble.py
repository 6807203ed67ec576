"""A step assembled from a configuration does what the configuration says."""

from dataclasses import replace

import pytest
import torch

from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.run.build import assemble
from ijepa_fast.step import captured
from ijepa_fast.step.captured import CapturedStep
from ijepa_fast.step.options import StepOptions
from ijepa_fast.step.train_step import TrainStep
from tests.test_captured import Recorder
from tests.tiny import GRID, MASKS, images, tiny_run, tiny_step

CPU = torch.device("cpu")


def made(config, count=8):
    torch.manual_seed(0)
    model = config.model.build(config.objective)
    schedules = Schedules(total_steps=20, warmup_steps=2)
    return assemble(model, config, MaskSampler(MASKS, GRID), schedules, count, CPU)


def run(train=None, **settings):
    config = tiny_run("none", "none", **(train or {}))
    return replace(config, **settings)


def test_it_trains_as_the_pieces_put_together_by_hand():
    assembled, by_hand = made(run()), tiny_step()
    for number in range(3):
        got, want = (step(images(number), number).losses.total for step in (assembled, by_hand))
        assert torch.equal(got, want)
    assert type(assembled) is TrainStep


def test_settings_reach_what_they_are_for():
    config = run({"precision": "fp16", "accumulate": 2}, seed=3)
    optim = replace(config.optim, betas=(0.8, 0.9), max_grad_norm=0.5)
    options = StepOptions(activation_checkpointing=True, wide_residual=True, attention="sdpa")
    step = made(replace(config, optim=optim, step=options))
    assert (step.seed, step.accumulate) == (3, 2) and step.scaler is not None
    networks, optimizer = step.model, step.optimizer
    assert networks.context_encoder.blocks[0].mlp.fc1.weight.dtype == torch.float16
    assert networks.context_encoder.activation_checkpointing and networks.predictor.activation_checkpointing
    assert not networks.target_encoder.activation_checkpointing
    assert (
        networks.context_encoder.blocks[1].attn.backend == networks.predictor.predictor_blocks[0].attn.backend == "sdpa"
    )
    assert networks.context_encoder.wide_residual and networks.target_encoder.wide_residual
    assert optimizer.max_grad_norm == 0.5 and not optimizer.flat_gradients
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_compile_and_capture(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    config = run({"device": "auto", "capture": True, "blocks": "compile"})
    with pytest.raises(ValueError, match="need a GPU"):
        made(config)
    compiled.clear()
    monkeypatch.setattr(captured, "CudaGraphs", lambda device: Recorder())
    step = made(config)
    assert isinstance(step, CapturedStep) and step.optimizer.flat_gradients and step.scaler is None
    assert len(compiled) == 6 and all(options["fullgraph"] for options in compiled)
