"""How ``JEPAModel`` learns that an optimizer has stepped: from the weights, or from the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ijepa_fast.optim import FusedAdamW

_VALUES = 8
"""Values of each parameter that are compared; a step changes some of them."""


def first_values(tensor: Tensor) -> Tensor:
    """A few values of a tensor, as a view."""
    rows = torch.atleast_1d(tensor.detach())
    return rows[(slice(1),) * (rows.ndim - 1) + (slice(_VALUES),)].reshape(-1)


def as_cast(noted: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Noted values rounded and moved as the weights were since, for that is no step.

    Values of parameters that were sharded since cannot be compared; they count as unchanged.
    """
    sizes = [value.numel() for value in values]
    if len(noted) != sum(sizes):
        return torch.cat(values)
    return torch.cat([old.to(value) for old, value in zip(noted.split(sizes), values, strict=True)])


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
