"""Products with what stands next to them, at the sizes of context encoder, target encoder and predictor.

Legend: T packed rows, D width, H hidden width of the MLP.

The weight gradient is that of the projection after attention, D x D: the smallest matrix of a block. These are passes
of a layer's forward or backward, and have no gradient of their own.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ijepa_fast.bench.cases.floors import widths
from ijepa_fast.bench.cases.rows import TABLE_STD, Batch, Case, op_case

_forward_case = partial(op_case, modes=["forward"])


def linear_cases(batch: Batch) -> list[Case]:
    trained = ("context", "predictor")
    return [
        linear_gelu(batch, "target encoder", False),
        *(linear_gelu(batch, part, True) for part in trained),
        *(hidden_gradient(batch, part) for part in trained),
        *(weight_gradient(batch, part) for part in trained),
    ]


def linear_gelu(batch: Batch, part: str, keep_pre: bool) -> Case:
    rows, (width, hidden) = len(batch.indices(part)), widths(batch.model, part)
    outputs = 2 if keep_pre else 1

    def draw(generator):
        weight, x = TABLE_STD * batch.normal(generator, hidden, width), batch.normal(generator, rows, width)
        return x, weight, TABLE_STD * batch.normal(generator, hidden, dtype=torch.float32)

    def compute(op, x, weight, bias):
        return op(x, weight, bias, keep_pre)[:outputs]

    def eager(x, weight, bias):
        pre = F.linear(x, weight, bias)
        return (F.gelu(pre), pre)[:outputs]

    special = "with pre" if keep_pre else ""
    return _forward_case(batch, "linear_gelu", part, draw, compute, eager, special=special, cast_from=2)


def hidden_gradient(batch: Batch, part: str) -> Case:
    rows, (width, hidden) = len(batch.indices(part)), widths(batch.model, part)

    def draw(generator):
        weight, pre = TABLE_STD * batch.normal(generator, width, hidden), batch.normal(generator, rows, hidden)
        return batch.normal(generator, rows, width), weight, pre

    def compute(op, grad, weight, pre):
        return op(grad, weight, pre, True)

    def eager(grad, weight, pre):
        grad_pre = torch.ops.aten.gelu_backward(grad @ weight, pre)
        return grad_pre, grad_pre.sum(0)

    return _forward_case(batch, "hidden_gradient", part, draw, compute, eager)


def weight_gradient(batch: Batch, part: str) -> Case:
    rows, (width, _) = len(batch.indices(part)), widths(batch.model, part)

    def draw(generator):
        return batch.normal(generator, rows, width), batch.normal(generator, rows, width)

    def compute(op, grad, x):
        return op(grad, x, True)

    def eager(grad, x):
        return grad.t() @ x, grad.sum(0)

    return _forward_case(batch, "weight_gradient", part, draw, compute, eager)
