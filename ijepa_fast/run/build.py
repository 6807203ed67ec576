"""From a configuration to a training step: by the same code for training and for benchmarks."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from ijepa_fast.config import RunConfig
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.ranks import Ranks
from ijepa_fast.run.auto import resolved
from ijepa_fast.step.captured import CapturedStep
from ijepa_fast.step.options import StepOptions, apply
from ijepa_fast.step.sharding import shard_mesh
from ijepa_fast.step.train_step import PRECISION_DTYPES, TrainStep

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


def check_batches(config: RunConfig, me: Ranks) -> None:
    """Raise ValueError where a step of ``config`` cannot be divided among ranks and micro-batches, or summed."""
    train, group = config.train, config.masks.group_size
    config.step.check(
        precision=train.precision,
        accumulate=train.accumulate,
        device=me.device.type,
        ranks=me.world_size,
        sharded=train.parallel != "ddp",
    )
    if train.reduce != "fp32" and train.parallel == "ddp":
        raise ValueError(
            f"train.reduce {train.reduce} is for train.parallel fsdp and hsdp; ddp sums gradients in the precision of "
            "their weights"
        )
    share = me.world_size * train.accumulate
    if train.batch_size % share:
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be split into {me.world_size} ranks x "
            f"{train.accumulate} micro-batches"
        )
    if config.masks.context == "batch_min" and (train.batch_size // share) % group:
        raise ValueError(
            f"masks.group_size {group} does not divide the {train.batch_size // share} images of a micro-batch "
            f"({train.batch_size} over {me.world_size} ranks x {train.accumulate} micro-batches)"
        )
    if config.objective.regularised and train.accumulate > 1:
        log.warning("the variance-covariance term is taken over each of the %d micro-batches", train.accumulate)


def use_deterministic(config: RunConfig) -> None:
    """Let torch refuse what has no fixed summation order, if ``config`` wants it; before the first product on a GPU."""
    if config.train.deterministic:
        # Without it cuBLAS refuses its first product; torch looks once, at that product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def mesh_of(config: RunConfig, me: Ranks) -> DeviceMesh | None:
    """The ranks that divide weights among them, as ``train.parallel`` wants it; None where each rank has all.

    Raises:
        ValueError: there are no ranks, or they do not fill groups of the size that is wanted.
    """
    parallel, shards = config.train.parallel, config.train.shards
    if parallel == "ddp":
        return None
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(f"train.parallel {parallel} is for ranks: start with torchrun --nproc-per-node NUMBER")
    if parallel == "fsdp":
        shards = me.world_size
    elif shards is None:
        if "LOCAL_WORLD_SIZE" not in os.environ:
            raise ValueError(
                "train.parallel hsdp makes groups of the ranks of a host, and LOCAL_WORLD_SIZE does not say how many "
                "those are: start with torchrun, or give train.shards"
            )
        shards = int(os.environ["LOCAL_WORLD_SIZE"])
    return shard_mesh(me.world_size, shards, me.device.type)


def prepare(model: IJEPA, config: RunConfig, images: int, device: torch.device, mesh: DeviceMesh | None = None) -> None:
    """Bring networks to ``device`` as ``config`` wants them (``step.options.apply``); ``images`` of a micro-batch."""
    apply(
        config.step,
        model,
        device=device,
        precision=config.train.precision,
        sizes=config.model,
        masks=config.masks,
        images=images,
        mesh=mesh,
        reduce_dtype=PRECISION_DTYPES[config.train.reduce],
    )


def make_optimizer(model: IJEPA, config: RunConfig) -> FusedAdamW:
    """The optimizer of networks that are prepared."""
    optim = config.optim
    return FusedAdamW(
        parameter_groups(model),
        lr=optim.lr,
        betas=optim.betas,
        max_grad_norm=optim.max_grad_norm,
        flat_gradients=config.step.capture,
    )


def make_scaler(config: RunConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16, whose small gradients would be zero without it; None otherwise."""
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
    return (CapturedStep if config.step.capture else TrainStep)(
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
    """The step of fresh networks on one device.

    Args:
        model: networks as ``config.model.build`` makes them.
        images: number of images of a step.
    """
    config = resolved(config, device)
    prepare(model, config, images // config.train.accumulate, device)
    scaler = make_scaler(config, device)
    return make_step(model, make_optimizer(model, config), sampler, schedules, config, scaler=scaler)


def tell_what_starts(config: RunConfig, model: IJEPA, me: Ranks, total_steps: int) -> None:
    """Log the size of the run and its networks."""
    train, device = config.train, me.device
    encoder, predictor = (
        sum(parameter.numel() for parameter in network.parameters()) / 1e6
        for network in (model.context_encoder, model.predictor)
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    many = f" with {me.world_size} ranks" if me.world_size > 1 else ""
    log.info(
        "%d steps of %d images in %s on %s%s; encoder of %.3g M parameters, predictor of %.3g M",
        *(total_steps, train.batch_size, train.precision, where, many, encoder, predictor),
    )


def hint_at_options(config: RunConfig, device: torch.device) -> None:
    """Name ``fastest`` to who trains on a GPU with the options of the step as they are by default."""
    if device.type == "cuda" and config.step == StepOptions():
        log.info("`ijepa-fast fastest` finds out which options of the step are faster on this GPU")
