"""From a configuration to a training step.

The training loop and the benchmarks assemble their steps here, so that what is timed is what is trained. An option of
``TrainConfig`` that changes how a step computes is put to work in one of these functions and nowhere else.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from ijepa_fast.config import RunConfig
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.side_stream import SideStream
from ijepa_fast.step.captured import CapturedStep
from ijepa_fast.step.memory import set_checkpointing
from ijepa_fast.step.train_step import PRECISION_DTYPES, TrainStep


def use_deterministic(config: RunConfig) -> None:
    """Tell torch if ``config`` wants it; before the first product on a GPU."""
    if config.train.deterministic:
        # Without it cuBLAS refuses its first product; torch looks once, at that product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def prepare(model: IJEPA, config: RunConfig, images: int, device: torch.device) -> None:
    """Bring networks to ``device``, in place, with weights and blocks as ``config`` wants them.

    Args:
        images: of a micro-batch on this device, for the estimate of its memory.

    Raises:
        ValueError: the model or the device cannot do what an option asks for.
    """
    model.use_fp8_targets(config.train.fp8_targets, device)
    model.to(device)
    cast_weights(model, PRECISION_DTYPES[config.train.precision])
    set_checkpointing(model, config, images, device)
    if config.train.fused:
        # FP8 products are not among the fused kernels: a target encoder that multiplies so keeps its plain blocks.
        model.fuse_blocks(targets=config.train.fp8_targets == "off")
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        network.wide_residual = config.train.wide_residual
        if config.train.compile:
            network.compile_blocks()
    if config.train.overlap_target:
        model.target_stream = SideStream(device)


def make_optimizer(model: IJEPA, config: RunConfig) -> FusedAdamW:
    """Of networks that are prepared."""
    optim = config.optim
    return FusedAdamW(
        parameter_groups(model, optim.layer_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        flat_gradients=config.train.capture,
    )


def make_scaler(config: RunConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """Small fp16 gradients would be zero without it."""
    return torch.amp.GradScaler(device.type) if config.train.precision == "fp16" else None


def make_step(
    model: IJEPA,
    optimizer: FusedAdamW,
    sampler: MaskSampler,
    schedules: Schedules,
    config: RunConfig,
    *,
    scaler: torch.amp.GradScaler | None = None,
    wrapped: nn.Module | None = None,
) -> TrainStep:
    """The step of prepared networks; ``wrapped`` is ``model`` inside DistributedDataParallel, if it is."""
    return (CapturedStep if config.train.capture else TrainStep)(
        model,
        optimizer,
        sampler,
        schedules,
        seed=config.seed,
        wrapped=wrapped,
        accumulate=config.train.accumulate,
        scaler=scaler,
    )


def assemble(
    model: IJEPA, config: RunConfig, sampler: MaskSampler, schedules: Schedules, images: int, device: torch.device
) -> TrainStep:
    """All of the above, for one device.

    Args:
        model: networks as ``config.model.build`` makes them.
        images: per step.
    """
    prepare(model, config, images // config.train.accumulate, device)
    scaler = make_scaler(config, device)
    return make_step(model, make_optimizer(model, config), sampler, schedules, config, scaler=scaler)
