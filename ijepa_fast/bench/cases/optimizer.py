"""grad_norm, ema_ and adamw_ema_ over all parameters of a model, beside what torch offers.

Weights of linear layers are bf16 with fp32 masters, everything else is fp32, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.bench.cases.floors import on_meta
from ijepa_fast.bench.cases.rows import Batch, Case, Provider
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.optim import LOW_PRECISION, parameter_groups

SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
DECAY = 0.04
MOMENTUM = 0.996
STEP = 10.0
WEIGHT_STD = 0.02
PART = "all parameters"


@dataclass(frozen=True)
class Parameters:
    """Shape of each parameter in the order of the groups, and whether it is bf16, has an EMA, is decayed."""

    shapes: list[torch.Size]
    low: list[bool]
    averaged: list[bool]
    group: list[int]
    decays: list[bool]  # per group

    @staticmethod
    def of(batch: Batch) -> Parameters:
        model = on_meta(batch.model)
        cast_weights(model, torch.bfloat16)
        groups = parameter_groups(model)
        every = [
            (p.shape, p.dtype in LOW_PRECISION, "ema" in group, number)
            for number, group in enumerate(groups)
            for p in group["params"]
        ]
        return Parameters(*map(list, zip(*every, strict=True)), [group["decays"] for group in groups])

    def places(self, wanted: list[bool]) -> list[int]:
        """Where each parameter stands in the list of those that are wanted, -1 for the others."""
        counts = iter(range(len(wanted)))
        return [next(counts) if want else -1 for want in wanted]


def optimizer_cases(batch: Batch) -> list[Case]:
    parameters = Parameters.of(batch)
    return [grad_norm(batch, parameters), adamw_ema(batch, parameters), ema(batch, parameters)]


def _draw_gradients(batch: Batch, parameters: Parameters, generator: torch.Generator) -> list[Tensor]:
    dtypes = [torch.bfloat16 if low else torch.float32 for low in parameters.low]
    return [batch.normal(generator, *s, dtype=d) for s, d in zip(parameters.shapes, dtypes, strict=True)]


def _draw_wide(batch: Batch, shapes: list[torch.Size], generator: torch.Generator) -> list[Tensor]:
    return [WEIGHT_STD * batch.normal(generator, *shape, dtype=torch.float32) for shape in shapes]


def grad_norm(batch: Batch, parameters: Parameters) -> Case:
    def draw(generator):
        return [_draw_gradients(batch, parameters, generator)]

    def foreach(low, wide):
        norms = [norm for group in (low, wide) for norm in torch._foreach_norm(group, 2, torch.float32)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def by_dtype(grads):
        return [[g for g in grads if (g.dtype in LOW_PRECISION) == low] for low in (True, False)]

    providers = {
        "ours": Provider(
            lambda grads, tables: ops.grad_norm(grads, **tables),
            lambda grads: [grads, ops.pointer_tables("grad_norm", grads)],
        ),
        "foreach": Provider(foreach, by_dtype),
    }
    costs = batch.costs("grad_norm", PART, ["forward"])
    return Case("grad_norm", PART, costs, draw, 0, ops.grad_norm.definition, providers, in_place=True)


def ema(batch: Batch, parameters: Parameters) -> Case:
    shapes = [shape for shape, averaged in zip(parameters.shapes, parameters.averaged, strict=True) if averaged]
    on_host = torch.tensor(MOMENTUM, dtype=torch.float64)
    on_device = on_host.to(batch.device)

    def draw(generator):
        return [_draw_wide(batch, shapes, generator) for _ in range(2)]

    def ours(targets, sources, tables):
        ops.ema_(targets, sources, on_device, **tables)
        return targets

    def exact(targets, sources):
        ops.ema_.definition(targets, sources, on_host)
        return targets

    def foreach(targets, sources):
        torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)
        return targets

    def loop(targets, sources):
        for target, source in zip(targets, sources, strict=True):
            target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)
        return targets

    providers = {
        "ours": Provider(ours, lambda *lists: [*lists, ops.pointer_tables("ema_", *lists)]),
        "foreach": Provider(foreach),
        "loop": Provider(loop),
    }
    return Case("ema_", PART, batch.costs("ema_", PART, ["forward"]), draw, 0, exact, providers, in_place=True)


def adamw_ema(batch: Batch, parameters: Parameters) -> Case:
    low, averaged, count = parameters.low, parameters.averaged, len(parameters.shapes)
    # An EMA of low precision has a wide one beside it, which is what is averaged.
    both = [a and b for a, b in zip(low, averaged, strict=True)]
    index = [parameters.places(wanted) for wanted in (low, averaged, both)]
    settings = torch.tensor([[*SETTINGS.values(), DECAY * decays] for decays in parameters.decays], dtype=torch.float64)
    steps = torch.full((count,), STEP, device=batch.device)
    momentum = torch.tensor(MOMENTUM, dtype=torch.float64)
    on_host = settings, steps, momentum, torch.ones(()), torch.tensor(True)
    on_device = [value.to(batch.device) for value in on_host]

    def draw(generator):
        masters, moments, squares, averages = (_draw_wide(batch, parameters.shapes, generator) for _ in range(4))
        grads = _draw_gradients(batch, parameters, generator)
        copies = [m.bfloat16() for m, place in zip(masters, index[0], strict=True) if place >= 0]
        kept = [a for a, place in zip(averages, index[1], strict=True) if place >= 0]
        kept_copies = [a.bfloat16() for a, place in zip(averages, index[2], strict=True) if place >= 0]
        return masters, grads, moments, [s.square() for s in squares], copies, kept, kept_copies

    def results(masters, grads, moments, squares, copies, averages, average_copies):
        return [*masters, *moments, *squares, *copies, *averages, *average_copies]

    def ours(*arguments):
        *lists, tables = arguments
        ops.adamw_ema_(*lists, *index, parameters.group, *on_device, **tables)
        return results(*lists)

    def with_tables(*lists):
        return [*lists, ops.pointer_tables("adamw_ema_", *lists, *index, parameters.group)]

    def exact(*lists):
        ops.adamw_ema_.definition(*lists, *index, parameters.group, *on_host)
        return results(*lists)

    def taken(tensors, places):
        return [tensor for tensor, place in zip(tensors, places, strict=True) if place >= 0]

    def with_wide_gradients(*lists):
        return [*lists, [torch.empty_like(master) for master in lists[0]], list(steps.clone().unbind())]

    def fused(*arguments):
        """torch.optim.AdamW(fused=True) on fp32 masters, the casts around it, and a foreach EMA."""
        *lists, wide, numbers = arguments
        masters, grads, moments, squares, copies, averages, average_copies = lists
        torch._foreach_copy_(wide, grads)
        for number, decays in enumerate(parameters.decays):
            members = [i for i, group in enumerate(parameters.group) if group == number]
            tensors = ([of[i] for i in members] for of in (masters, wide, moments, squares))
            more = SETTINGS | {"weight_decay": DECAY * decays, "amsgrad": False, "maximize": False}
            torch._fused_adamw_(*tensors, [], [numbers[i] for i in members], **more)
        torch._foreach_copy_(copies, taken(masters, index[0]))
        torch._foreach_lerp_(averages, taken(masters, index[1]), 1 - MOMENTUM)
        torch._foreach_copy_(average_copies, [averages[index[1][i]] for i in range(count) if index[2][i] >= 0])
        return results(*lists)

    providers = {"ours": Provider(ours, with_tables), "fused": Provider(fused, with_wide_gradients)}
    costs = batch.costs("adamw_ema_", PART, ["forward"])
    return Case("adamw_ema_", PART, costs, draw, 0, exact, providers, in_place=True)
