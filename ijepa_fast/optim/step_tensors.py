"""What one step of ``FusedAdamW`` works on: lists of tensors, on this rank, in the layout ``ops.adamw_ema_`` takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa_fast import ops

LOW_PRECISION = (torch.bfloat16, torch.float16)


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient a step uses: ``main_grad`` if the parameter has one, else ``grad``."""
    main = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_groups(tensor: Tensor) -> dict[str, dist.ProcessGroup]:
    """The groups of ranks among which a tensor is divided, by name; empty where each rank has all of it.

    Raises:
        ValueError: a DTensor whose ranks hold summands rather than shards.
    """
    found = {}
    for dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_partial():
            raise ValueError(f"gradients must be reduced before the step, got a DTensor placed as {tensor.placements}")
        if not placement.is_replicate():
            group = tensor.device_mesh.get_group(dim)
            found[group.group_name] = group
    return found


class SteppedParameter(NamedTuple):
    """One parameter of a step, with what belongs to it. Tensors may be DTensors.

    Attributes:
        master: what AdamW steps: the parameter, or the fp32 value it is rounded from.
        average: of the master; None without EMA.
        average_copy: the low-precision tensor that receives the rounded average, or None.
    """

    parameter: nn.Parameter
    group: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    average: Tensor | None
    average_copy: Tensor | None


class _NormPart(NamedTuple):
    """Gradients divided among the same ranks: their places, those ranks' groups, and tables of ``ops.grad_norm``."""

    members: list[int]
    groups: list[dist.ProcessGroup]
    tables: dict[str, Tensor]


class StepTensors:
    """The tensors of a step; built anew when other parameters have a gradient.

    Args:
        members: in the order of the parameter groups.
        steps: how often each was stepped, scalars.

    Attributes:
        parameters: of the members.
        steps: fp32 [P], a copy of the argument.
    """

    def __init__(self, members: Sequence[SteppedParameter], steps: Sequence[Tensor]):
        self.parameters = [member.parameter for member in members]
        self.steps = torch.stack([step.float() for step in steps])
        self._sharded = any(hasattr(parameter, "to_local") for parameter in self.parameters)
        masters = [local(member.master.detach()) for member in members]
        copies, copy_index = _present([None if m.master is m.parameter else m.parameter for m in members])
        averages, ema_index = _present([member.average for member in members])
        average_copies, ema_copy_index = _present([member.average_copy for member in members])
        for master, place in zip(masters, copy_index, strict=True):
            if place >= 0:
                _adopt_changes(master, copies[place])
        for place, copy_place in zip(ema_index, ema_copy_index, strict=True):
            if copy_place >= 0:
                _adopt_changes(averages[place], average_copies[copy_place])
        self._tensors = (
            masters,
            [local(member.exp_avg) for member in members],
            [local(member.exp_avg_sq) for member in members],
            copies,
            averages,
            average_copies,
        )
        self._indices = (copy_index, ema_index, ema_copy_index, [member.group for member in members])
        # On the CPU the definitions, undispatched: to dispatch an op with hundreds of small tensors takes longer.
        on_cpu = masters[0].device.type == "cpu"
        self._grad_norm, self._adamw_ema = (op.definition if on_cpu else op for op in (ops.grad_norm, ops.adamw_ema_))
        gradients = self.gradients()
        self._norm_parts = self._divide(gradients)
        self._tables = ops.pointer_tables("adamw_ema_", *self._lists(gradients))

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        return len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))

    def gradients(self) -> list[Tensor]:
        """The gradients on this rank, as they are now."""
        gradients = [gradient(parameter) for parameter in self.parameters]
        return [local(g) for g in gradients] if self._sharded else gradients

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Their L2 norm over all ranks, a scalar."""
        norms = [self._grad_norm([gradients[i] for i in part.members], **part.tables) for part in self._norm_parts]
        if len(norms) == 1 and not self._norm_parts[0].groups:
            return norms[0]
        total = torch.zeros((), dtype=torch.float64, device=norms[0].device)
        for norm, part in zip(norms, self._norm_parts, strict=True):
            square = norm.double().square()
            for group in part.groups:
                dist.all_reduce(square, group=group)
            total += square
        return total.sqrt().to(norms[0].dtype)

    def update(
        self, gradients: Sequence[Tensor], settings: Tensor, momentum: Tensor, grad_scale: Tensor, apply: Tensor
    ) -> None:
        """``ops.adamw_ema_`` on these tensors."""
        lists = self._lists(gradients)
        self._adamw_ema(*lists, settings, self.steps, momentum, grad_scale, apply, **self._tables)

    def _lists(self, gradients: Sequence[Tensor]) -> tuple[list, ...]:
        masters, *rest = self._tensors
        return (masters, gradients, *rest, *self._indices)

    def _divide(self, gradients: Sequence[Tensor]) -> list[_NormPart]:
        divided: dict[tuple[str, ...], tuple[list[int], list[dist.ProcessGroup]]] = {}
        for i, parameter in enumerate(self.parameters):
            groups = shard_groups(gradient(parameter))
            divided.setdefault(tuple(groups), ([], list(groups.values())))[0].append(i)
        return [
            _NormPart(members, groups, ops.pointer_tables("grad_norm", [gradients[i] for i in members]))
            for members, groups in divided.values()
        ]


def _present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are not None, on this rank, and the place of each given one among them (-1: none)."""
    found: list[Tensor] = []
    places = []
    for tensor in tensors:
        places.append(-1 if tensor is None else len(found))
        if tensor is not None:
            found.append(local(tensor.detach()))
    return found, places


def _adopt_changes(wide: Tensor, low: Tensor) -> None:
    """Copy ``low`` into ``wide`` wherever it is not its rounded value: somebody loaded other weights, which count."""
    wide.copy_(torch.where(low == wide.to(low.dtype), wide, low.to(wide.dtype)))
