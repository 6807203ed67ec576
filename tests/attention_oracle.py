"""Attention in plain torch, one sequence after another, for packed inputs: what kernels are compared with.

Legend: Tq, Tk packed rows of queries and keys, H heads, Dh head dim.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionCase(NamedTuple):
    """Lengths of the sequences' queries and keys, and what else decides how the kernels run."""

    lengths_q: Sequence[int]
    lengths_k: Sequence[int]
    head_dim: int = 24
    heads: int = 2
    padding_q: int = 0
    padding_k: int = 0
    slack: int = 0  # of max_q and max_k over the longest sequence
    lengths: str = "short"  # the row of the kernels' table
    seed: int = 0

    @property
    def used(self) -> tuple[int, int]:
        """Rows of queries and of keys that are no padding."""
        return sum(self.lengths_q), sum(self.lengths_k)

    def values(self) -> list[Tensor]:
        """q, k, v and the gradient of the output; padding rows are NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        used_q, used_k = self.used

        def normal(used: int, padding: int) -> Tensor:
            values = torch.randn(used, self.heads, self.head_dim, generator=generator)
            return torch.cat([values, torch.full((padding, self.heads, self.head_dim), math.nan)])

        q, grad = (normal(used_q, self.padding_q) for _ in range(2))
        k, v = (normal(used_k, self.padding_k) for _ in range(2))
        return [q, k, v, grad]

    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        longest = (max(lengths, default=0) + self.slack for lengths in (self.lengths_q, self.lengths_k))
        return prefix_sums(self.lengths_q), prefix_sums(self.lengths_k), *longest


def prefix_sums(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float64 else x.float()


def per_sequence(case: AttentionCase) -> Iterator[tuple[slice, slice]]:
    """The rows of queries and keys of each sequence that has both."""
    first_q = first_k = 0
    for length_q, length_k in zip(case.lengths_q, case.lengths_k, strict=True):
        if length_q and length_k:
            yield slice(first_q, first_q + length_q), slice(first_k, first_k + length_k)
        first_q, first_k = first_q + length_q, first_k + length_k


def plain(case: AttentionCase) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Of q, k, v and the gradient of the output, in their dtype: out, ``finite`` log-sum-exp, dq, dk, dv."""

    def run(q, k, v, grad):
        out, dq = torch.zeros_like(q), torch.zeros_like(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        lse = wide(torch.zeros_like(q[..., 0]))
        lse[: case.used[0]] = -math.inf
        for rows_q, rows_k in per_sequence(case):
            leaves = [x[rows].detach().requires_grad_() for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k))]
            scores = torch.einsum("qhd,khd->hqk", *leaves[:2]) * case.head_dim**-0.5
            part = torch.einsum("hqk,khd->qhd", scores.softmax(-1), leaves[2])
            dq[rows_q], dk[rows_k], dv[rows_k] = torch.autograd.grad(part, leaves, grad[rows_q])
            out[rows_q] = part.detach()
            exact_scores = torch.einsum("qhd,khd->qhk", wide(q[rows_q]), wide(k[rows_k])) * case.head_dim**-0.5
            lse[rows_q] = exact_scores.logsumexp(-1)
        return out, finite(lse), dq, dk, dv

    return run


def finite(lse: Tensor) -> Tensor:
    """-inf, which queries without keys have, as a number that nothing else is close to."""
    return lse.masked_fill(lse == -math.inf, -1e4)


def magnitudes(case: AttentionCase, dtype: torch.dtype) -> list[float]:
    """The sums behind each result with every term taken positive, in units of fp32's rounding.

    Softmax weights, their gradients and the output that the backward reads are rounded to ``dtype``. A weight is the
    exponential of a score minus the log-sum-exp, so their roundings, in fp32 at least, count as often as they are
    large. The log-sum-exp consists of the scores' products, rounded twice, and of itself, twice more.
    """
    unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype.itemsize == 2 else 1
    q, k, v, grad = (x.double().abs() for x in case.values())
    signed_q, signed_k, *_ = (x.double() for x in case.values())
    largest = [0.0] * 5
    scale = case.head_dim**-0.5
    for rows_q, rows_k in per_sequence(case):
        scores = torch.einsum("qhd,khd->hqk", signed_q[rows_q], signed_k[rows_k]) * scale
        weights, lse = scores.softmax(-1), scores.logsumexp(-1)
        out_size = torch.einsum("hqk,khd->qhd", weights, v[rows_k])
        products = torch.einsum("qhd,khd->hqk", q[rows_q], k[rows_k]) * scale
        weights = weights * (unit + scores.abs() + lse.abs()[..., None])
        out = torch.einsum("hqk,khd->qhd", weights, v[rows_k])
        dweights = (
            torch.einsum("qhd,khd->hqk", grad[rows_q], v[rows_k]) + (grad[rows_q] * out_size).sum(-1).T[..., None]
        )
        sums = [
            out,
            2 * products + 2 * lse.abs()[..., None],
            scale * torch.einsum("hqk,khd->qhd", weights * dweights, k[rows_k]),
            scale * torch.einsum("hqk,qhd->khd", weights * dweights, q[rows_q]),
            torch.einsum("hqk,qhd->khd", weights, grad[rows_q]),
        ]
        largest = [max(bound, float(terms.max())) for bound, terms in zip(largest, sums, strict=True)]
    return largest
