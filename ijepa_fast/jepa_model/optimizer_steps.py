"""Telling a module that a torch optimizer has stepped its parameters.

torch calls global hooks around the ``step`` of every ``torch.optim.Optimizer``, of whatever class. One pair of them is
installed when the first module asks for it, and passes the steps on to the modules that are alive: they are held
weakly, so nothing has to be taken back.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ijepa_fast.optim import FusedAdamW


class Watcher(Protocol):
    """What ``watch`` takes."""

    def is_stepped_by(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer holds parameters of the watcher."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before each step of such an optimizer."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after it. ``GradScaler`` does not call ``step`` where it finds infinities, so then neither is this,
        except for optimizers that look for them themselves: those have ``found_inf`` during the call."""


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_installed: list[object] = []


def watch(watcher: Watcher) -> None:
    """From now on tell ``watcher`` of steps, for as long as it lives."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before))
        _installed.append(register_optimizer_step_post_hook(_after))
    _watchers.add(watcher)


@torch.compiler.disable
def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for watcher in _concerned(optimizer, sys._getframe(1)):
        watcher.before_step(optimizer)


@torch.compiler.disable
def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for watcher in _concerned(optimizer, sys._getframe(1)):
        watcher.after_step(optimizer)


def _concerned(optimizer: Optimizer, caller: FrameType) -> list[Watcher]:
    """The watchers whose parameters ``optimizer`` steps, without those of a step that this one is only a part of.

    The step of a subclass that calls ``super().step()``, or of an optimizer around another one, has hooks inside hooks:
    the outermost counts, because the weights are not final before it.
    """
    concerned = [watcher for watcher in list(_watchers) if watcher.is_stepped_by(optimizer)]
    if concerned:
        outer = list(_enclosing_steps(caller))
        concerned = [watcher for watcher in concerned if not any(map(watcher.is_stepped_by, outer))]
    return concerned


def _enclosing_steps(caller: FrameType) -> Iterator[Optimizer]:
    """The optimizers in whose ``step`` we are, other than the innermost; read from the stack, so that an exception in
    a step (an interrupt, say) leaves nothing behind that would have to be tidied up."""
    steps = 0
    frame: FrameType | None = caller
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
            steps += 1
            if steps > 1:
                yield frame.f_locals["args"][0]
        frame = frame.f_back


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """``id`` of every parameter that the optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def changed_weights(optimizer: Optimizer) -> Tensor | bool:
    """In ``after_step``: whether the step did anything, without asking the device. ``GradScaler`` and infinities in
    the gradients make some optimizers leave a step out."""
    changed: Tensor | bool = True
    if isinstance(optimizer, FusedAdamW) and optimizer.grad_norm is not None:
        changed = optimizer.grad_norm < float("inf")
        if optimizer.blocked is not None:
            changed = changed & (optimizer.blocked == 0)
    found_inf = getattr(optimizer, "found_inf", None)  # GradScaler leaves it there for the time of the step
    return changed if found_inf is None else changed & (found_inf == 0)


def averages_into(optimizer: Optimizer, target: nn.Module) -> bool:
    """Whether the optimizer itself updates this moving average in its pass (``FusedAdamW`` with EMA tensors)."""
    if not isinstance(optimizer, FusedAdamW):
        return False
    of_target = {id(parameter) for parameter in target.parameters()}
    return any(id(average) in of_target for average in optimizer.averages.values())
