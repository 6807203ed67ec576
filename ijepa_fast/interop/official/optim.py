"""Optimizer and schedules with the official constructors and conventions.

The schedule objects count calls: ``step()`` advances first and sets the value of the new index, so the first step of
a run has index 1 (``ijepa_fast.optim.schedules`` has the same values as functions of the step).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ijepa_fast.optim import FusedAdamW, decays
from ijepa_fast.optim.schedules import interpolate


class WarmupCosineSchedule:
    """Learning rate: linear from ``start_lr`` to ``ref_lr``, then half a cosine to ``final_lr``, which is held.

    Args:
        optimizer: whose groups' "lr" is set.
        warmup_steps: length of the linear part.
        start_lr, ref_lr, final_lr: at index 0, after the warm-up, at ``T_max`` and beyond.
        T_max: index at which the schedule ends, warm-up included.
        last_epoch: accepted, without effect.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        start_lr: float,
        ref_lr: float,
        T_max: int,
        last_epoch: int = -1,
        final_lr: float = 0.0,
    ):
        self.optimizer, self.warmup_steps, self.T_max = optimizer, warmup_steps, T_max
        self.start_lr, self.ref_lr, self.final_lr = start_lr, ref_lr, final_lr
        self.index = 0

    def step(self) -> float:
        """Advance, set and return the learning rate."""
        self.index += 1
        if self.index < self.warmup_steps:
            lr = interpolate("linear", self.start_lr, self.ref_lr, self.index / self.warmup_steps)
        else:
            progress = (self.index - self.warmup_steps) / max(1, self.T_max - self.warmup_steps)
            lr = interpolate("cosine", self.ref_lr, self.final_lr, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


class CosineWDSchedule:
    """Weight decay: half a cosine from ``ref_wd`` to ``final_wd`` at index ``T_max``, held beyond.

    Groups with a true "WD_exclude" are left alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ref_wd: float, T_max: int, final_wd: float = 0.0):
        self.optimizer, self.ref_wd, self.final_wd, self.T_max = optimizer, ref_wd, final_wd, T_max
        self.index = 0

    def step(self) -> float:
        """Advance, set and return the weight decay."""
        self.index += 1
        weight_decay = interpolate("cosine", self.ref_wd, self.final_wd, self.index / self.T_max)
        for group in self.optimizer.param_groups:
            if not group.get("WD_exclude"):
                group["weight_decay"] = weight_decay
        return weight_decay


def parameter_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict]:
    """The official four groups: encoder and predictor decayed, then encoder and predictor not decayed.

    Frozen position tables are in the first two. Order and contents are what the optimizer state of official
    checkpoints is numbered by.
    """
    groups = []
    for decayed in (True, False):
        for module in (encoder, predictor):
            group = {"params": [p for p in module.parameters() if decays(p) == decayed]}
            groups.append(group if decayed else group | {"WD_exclude": True, "weight_decay": 0})
    return groups


def init_opt(
    encoder: nn.Module,
    predictor: nn.Module,
    iterations_per_epoch: int,
    start_lr: float,
    ref_lr: float,
    warmup: float,
    num_epochs: int,
    wd: float = 1e-6,
    final_wd: float = 1e-6,
    final_lr: float = 0.0,
    use_bfloat16: bool = False,
    ipe_scale: float = 1.25,
) -> tuple[FusedAdamW, torch.amp.GradScaler | None, WarmupCosineSchedule, CosineWDSchedule]:
    """FusedAdamW over the four groups, a loss scaler (with ``use_bfloat16``), and both schedules.

    Args:
        encoder, predictor: with frozen tables as parameters, as the ones here have; wrapped or not.
        iterations_per_epoch: steps.
        start_lr, ref_lr, final_lr: of the learning rate.
        warmup: epochs.
        num_epochs: of the run.
        wd, final_wd: of the weight decay.
        use_bfloat16: with a scaler, as the official code has it: bf16 needs none, but its checkpoints hold one.
        ipe_scale: stretches the schedules beyond the last epoch.
    """
    optimizer = FusedAdamW(parameter_groups(encoder, predictor))
    # Left to the scaler, as with torch's AdamW: the official loop logs the gradients after the step, unscaled.
    optimizer._step_supports_amp_scaling = False
    length = int(ipe_scale * num_epochs * iterations_per_epoch)
    schedule = WarmupCosineSchedule(
        optimizer, int(warmup * iterations_per_epoch), start_lr, ref_lr, T_max=length, final_lr=final_lr
    )
    device = next(encoder.parameters()).device.type
    scaler = torch.amp.GradScaler(device) if use_bfloat16 else None
    return optimizer, scaler, schedule, CosineWDSchedule(optimizer, wd, length, final_wd)


def grad_logger(named_params: Iterable[tuple[str, Tensor]]) -> SimpleNamespace:
    """Norms of the weights' gradients, with one wait for the device (the official function has one per weight).

    Biases and other 1-D parameters are left out.

    Returns:
        first_layer and last_layer (of the first and last qkv weight; 0 if there is none), min, max, avg, sum, count.
    """
    graded = [(name, p.grad) for name, p in named_params if p.grad is not None and decays(p)]
    norms = torch.stack(torch._foreach_norm([grad for _, grad in graded])).tolist() if graded else []
    of_qkv = [norm for (name, _), norm in zip(graded, norms, strict=True) if "qkv" in name] or [0.0]
    return SimpleNamespace(
        first_layer=of_qkv[0],
        last_layer=of_qkv[-1],
        min=min(norms, default=float("inf")),
        max=max(norms, default=float("-inf")),
        avg=sum(norms) / max(len(norms), 1),
        sum=sum(norms),
        count=len(norms),
    )
