"""How ``JEPAModel`` learns that an optimizer has stepped: from the weights, or from the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.step_tensors import local

_VALUES = 8
"""Values of each parameter that are compared; a step changes some of them."""


@torch.no_grad()
def first_values(module: nn.Module) -> Tensor:
    """A few values of every parameter (of this rank's shard, under FSDP2), copied into one vector."""
    return torch.cat([local(p).reshape(-1)[:_VALUES] for p in module.parameters()])


def differ(now: Tensor, then: Tensor) -> Tensor:
    """Whether values have changed, as a bool scalar on their device, so that the host does not wait.

    A cast or a move to another device is no change. Values of parameters that have been sharded since cannot be
    compared; they count as unchanged.
    """
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
    """Whether the optimizer's last step changed weights; to be called in a post hook of the step.

    Some optimizers leave a step out by a decision on the device (``GradScaler``, gradients that are not finite). The
    answer is then a tensor there, so that the host does not wait.
    """
    if isinstance(optimizer, FusedAdamW):
        return optimizer.performed
    found_inf = getattr(optimizer, "found_inf", None)  # GradScaler leaves it there for the time of the step
    return True if found_inf is None else found_inf == 0
