"""What a target encoder that follows by itself has to know of optimizers: whether they stepped, and what they did."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.step_tensors import local

_VALUES = 8
"""Values of each parameter that stand for all of it: a step changes some of them, wherever its gradient is not zero."""


@torch.no_grad()
def first_values(module: nn.Module) -> Tensor:
    """A few values of every parameter (of this rank's shard, under FSDP2), copied into one vector."""
    return torch.cat([local(p).reshape(-1)[:_VALUES] for p in module.parameters()])


def differ(now: Tensor, then: Tensor) -> Tensor:
    """Whether values have changed: a bool scalar on their device, so that nobody waits. Casts and moves are no change,
    and values of parameters that were sharded in the meantime cannot be compared."""
    if now.shape != then.shape:
        return torch.zeros((), dtype=torch.bool, device=now.device)
    return (now != then.to(now)).any()


def holds(optimizer: Optimizer, module: nn.Module) -> bool:
    """Whether the optimizer steps parameters of the module."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in stepped for parameter in module.parameters())


def averages_into(optimizer: Optimizer, target: nn.Module) -> bool:
    """Whether the optimizer itself averages into the module in its pass (``FusedAdamW`` with EMA tensors)."""
    averages = optimizer.averages.values() if isinstance(optimizer, FusedAdamW) else ()
    averaged = {id(average) for average in averages}
    return any(id(parameter) in averaged for parameter in target.parameters())


def performed(optimizer: Optimizer) -> Tensor | bool:
    """In a post hook of its step: whether the step changed weights. The device is not asked: ``GradScaler`` and
    gradients that are not finite make some optimizers decide there to leave a step out."""
    if isinstance(optimizer, FusedAdamW):
        return optimizer.performed
    found_inf = getattr(optimizer, "found_inf", None)  # GradScaler leaves it there for the time of the step
    return True if found_inf is None else found_inf == 0
