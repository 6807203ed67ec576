"""One training step: masks, loss, backward, clipping, AdamW and EMA.

Everything that varies is a function of (seed, step), so a run can be stopped and continued at any step. The host
never waits for the device here: what it wants to know it reads at the log interval.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA, Losses
from ijepa_fast.optim import LOW_PRECISION, FusedAdamW
from ijepa_fast.optim.schedules import Schedules

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one step leaves on the device.

    Attributes:
        losses: scalars, averaged over the micro-batches of this rank.
        grad_norm: scalar, before clipping.
        pooled: [b, D] average-pooled target features of this rank's images, fp32; without ``all_targets`` of target
            patches alone.
        tokens: numbers of tokens (context, targets) of this rank.
    """

    losses: Losses
    grad_norm: Tensor
    pooled: Tensor
    tokens: tuple[int, int]


class TrainStep:
    """Callable that runs one step on this rank's images.

    Args:
        model: the networks, already cast and on their device.
        optimizer: over the groups of ``parameter_groups(model)``.
        sampler: draws the masks.
        schedules: learning rate, weight decay and momentum.
        seed: of the masks.
        wrapped: ``model`` inside DistributedDataParallel, if it is.
        accumulate: micro-batches per step. Each holds the same number of images.
        scaler: loss scaler for fp16; None otherwise.
        round_rows: see ``MaskSampler.sample``.

    Attributes:
        first_bad_step: int64 scalar on the device; the first step whose loss was not finite, -1 while there is none.
            From that step on nothing is updated.
    """

    def __init__(
        self,
        model: IJEPA,
        optimizer: FusedAdamW,
        sampler: MaskSampler,
        schedules: Schedules,
        *,
        seed: int,
        wrapped: nn.Module | None = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        round_rows: int | None = None,
    ):
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.model, self.wrapped = model, wrapped if wrapped is not None else model
        self.optimizer, self.sampler, self.schedules = optimizer, sampler, schedules
        self.seed, self.accumulate, self.scaler, self.round_rows = seed, accumulate, scaler, round_rows
        device = next(model.parameters()).device
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Sums of many small low-precision gradients lose them; with one micro-batch there is nothing to sum.
        self.wide_sums = [p for p in self.parameters if p.dtype in LOW_PRECISION] if accumulate > 1 else []

    def __call__(self, images: Tensor, step: int, first_image: int = 0, *, all_targets: bool = False) -> StepResult:
        """Run step ``step`` (from 0) on ``images`` uint8 [b, C, h, w], which start at ``first_image`` of the batch.

        Args:
            all_targets: see ``IJEPA.forward``. Features of all patches are only worth their cost where the pooled ones
                are read.

        Raises:
            ValueError: the images cannot be split into ``accumulate`` equal micro-batches.
        """
        if images.shape[0] % self.accumulate:
            raise ValueError(f"{images.shape[0]} images cannot be split into {self.accumulate} equal micro-batches")
        self._set_schedules(step)
        losses, pooled, tokens = [], [], [0, 0]
        for i, micro_batch in enumerate(images.split(images.shape[0] // self.accumulate)):
            # A pure function of (seed, step, image): the same whatever the number of micro-batches and ranks.
            masks = self.sampler.sample(
                len(micro_batch),
                seed=self.seed,
                step=step,
                first_image=first_image + i * len(micro_batch),
                device=images.device,
                round_rows=self.round_rows,
            )
            # Ranks exchange gradients once a step, when the last micro-batch has added its own.
            with self._synchronise_only_if(i == self.accumulate - 1):
                loss, features = self.wrapped(micro_batch, masks, all_targets=all_targets)
                # Micro-batches have the same number of blocks, so the mean over all is the mean of their means.
                scaled = loss.total / self.accumulate
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            self._add_wide()
            losses.append(Losses(*(value.detach() for value in loss)))
            pooled.append(features)
            tokens = [sum(counts) for counts in zip(tokens, masks.tokens, strict=True)]
        mean = Losses(*(torch.stack(values).mean() for values in zip(*losses, strict=True)))
        self._note_bad(mean.total, step)
        self._update()
        return StepResult(mean, self.optimizer.grad_norm, torch.cat(pooled), tuple(tokens))

    def _set_schedules(self, step: int) -> None:
        lr, weight_decay = self.schedules.lr_at(step), self.schedules.weight_decay_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group.get("decays", True) else 0.0
        self.optimizer.momentum = self.schedules.momentum_at(step)

    def _synchronise_only_if(self, last: bool):
        # With low-precision parameters each micro-batch is reduced by itself, because only fp32 sums are kept.
        if last or self.wide_sums or not hasattr(self.wrapped, "no_sync"):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def _add_wide(self) -> None:
        """Add the low-precision gradients of a micro-batch to sums in fp32, which ``FusedAdamW`` reads."""
        for parameter in self.wide_sums:
            if parameter.grad is None:
                continue
            if getattr(parameter, "main_grad", None) is None:
                parameter.main_grad = parameter.grad.float()
            else:
                parameter.main_grad += parameter.grad
            parameter.grad = None

    def _note_bad(self, loss: Tensor, step: int | Tensor) -> None:
        loss = loss.clone()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # A bad loss of one rank must stop all of them; NaN and infinity survive a sum.
            torch.distributed.all_reduce(loss)
        # All on the device: the host learns of it at the log interval, and until then nothing is updated any more.
        newly_bad = (self.first_bad_step < 0) & ~loss.isfinite()
        self.first_bad_step.copy_(torch.where(newly_bad, step, self.first_bad_step))
        self.optimizer.blocked = (self.first_bad_step >= 0).float()

    def _update(self) -> None:
        """Clipping, AdamW and EMA, in the optimizer's one pass over all parameters."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.wide_sums:
            parameter.main_grad = None
