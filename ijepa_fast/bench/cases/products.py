"""Products with what stands next to them, at the sizes of context encoder, target encoder and predictor.

Legend: T packed rows, D width, H hidden width of the MLP.

The weight gradient is that of the projection after attention, D x D: the smallest matrix of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ijepa_fast import ops
from ijepa_fast.bench.cases.floors import widths
from ijepa_fast.bench.cases.rows import TABLE_STD, Batch, Case, Provider, low_precision, with_compiled

FORWARD = ["forward"]
"""The only mode: these are passes of a layer's forward or backward, and have no gradient of their own."""


def linear_cases(batch: Batch) -> list[Case]:
    trained = ("context", "predictor")
    return [
        linear_gelu(batch, "target encoder", False),
        *(linear_gelu(batch, part, True) for part in trained),
        *(hidden_gradient(batch, part) for part in trained),
        *(weight_gradient(batch, part) for part in trained),
    ]


def _rows(batch: Batch, part: str) -> int:
    return len(batch.layout.tokens.indices if part == "predictor" else batch.indices(part))


def linear_gelu(batch: Batch, part: str, keep_pre: bool) -> Case:
    rows, (width, hidden) = _rows(batch, part), widths(batch.model, part)
    outputs = 2 if keep_pre else 1

    def draw(generator):
        weight, x = TABLE_STD * batch.normal(generator, hidden, width), batch.normal(generator, rows, width)
        return x, weight, TABLE_STD * batch.normal(generator, hidden, dtype=torch.float32)

    def ours(x, weight, bias):
        return ops.linear_gelu(x, weight, bias, keep_pre)[:outputs]

    def exact(x, weight, bias):
        return ops.linear_gelu.definition(x, weight, bias, keep_pre)[:outputs]

    def eager(x, weight, bias):
        pre = F.linear(x, weight, bias)
        return (F.gelu(pre), pre)[:outputs]

    special = "with pre" if keep_pre else ""
    costs = batch.costs(f"linear_gelu {special}".strip(), part, FORWARD)
    name = f"{part}, {special}" if special else part
    return Case("linear_gelu", name, costs, draw, 0, exact, with_compiled(ours, Provider(eager, low_precision(2))))


def hidden_gradient(batch: Batch, part: str) -> Case:
    rows, (width, hidden) = _rows(batch, part), widths(batch.model, part)

    def draw(generator):
        weight, pre = TABLE_STD * batch.normal(generator, width, hidden), batch.normal(generator, rows, hidden)
        return batch.normal(generator, rows, width), weight, pre

    def ours(grad, weight, pre):
        return ops.hidden_gradient(grad, weight, pre, True)

    def exact(grad, weight, pre):
        return ops.hidden_gradient.definition(grad, weight, pre, True)

    def eager(grad, weight, pre):
        grad_pre = torch.ops.aten.gelu_backward(grad @ weight, pre)
        return grad_pre, grad_pre.sum(0)

    costs = batch.costs("hidden_gradient", part, FORWARD)
    return Case("hidden_gradient", part, costs, draw, 0, exact, with_compiled(ours, Provider(eager)))


def weight_gradient(batch: Batch, part: str) -> Case:
    rows, (width, _) = _rows(batch, part), widths(batch.model, part)

    def draw(generator):
        return batch.normal(generator, rows, width), batch.normal(generator, rows, width)

    def ours(grad, x):
        return ops.weight_gradient(grad, x, True)

    def exact(grad, x):
        return ops.weight_gradient.definition(grad, x, True)

    def eager(grad, x):
        return grad.t() @ x, grad.sum(0)

    costs = batch.costs("weight_gradient", part, FORWARD)
    return Case("weight_gradient", part, costs, draw, 0, exact, with_compiled(ours, Provider(eager)))
