"""The order in which attention on the CPU takes its sequences: one call for all of a length, and the same results."""

import math

import pytest
import torch

from ijepa_fast import ops
from ijepa_fast.ops import cpu_attention

LENGTHS_Q = [5, 0, 3, 5, 2, 3, 5, 0, 2, 4]
LENGTHS_K = [7, 4, 3, 7, 0, 3, 6, 4, 0, 3]
PADDING = 3


def prefix_sums(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries of each call of torch's kernels. No plan of another test is at hand."""
    cpu_attention._order_of.cache_clear()
    seen = []

    def counted(kernel, place):
        return lambda *args: seen.append(tuple(args[place].shape)) or kernel(*args)

    monkeypatch.setattr(cpu_attention, "_forward", counted(cpu_attention._forward, 0))
    monkeypatch.setattr(cpu_attention, "_backward", counted(cpu_attention._backward, 1))
    yield seen
    cpu_attention._order_of.cache_clear()


def cross_attention(gradients=True):
    """Output, log-sum-exp and gradients, with NaN in padding rows."""
    generator = torch.Generator().manual_seed(0)
    rows = (sum(LENGTHS_Q), sum(LENGTHS_K), sum(LENGTHS_K), sum(LENGTHS_Q))
    q, k, v, grad = leaves = [torch.randn(count + PADDING, 2, 8, generator=generator) for count in rows]
    for x, count in zip(leaves, rows, strict=True):
        x[count:] = math.nan
        x.requires_grad_(gradients)
    out, lse = ops.varlen_attention(q, k, v, prefix_sums(LENGTHS_Q), prefix_sums(LENGTHS_K), 5, 7)
    return [out.detach(), lse, *(torch.autograd.grad(out, (q, k, v), grad.detach()) if gradients else ())]


def self_attention():
    generator = torch.Generator().manual_seed(0)
    count = sum(LENGTHS_Q)
    qkv, grad = (torch.randn(count + PADDING, *shape, generator=generator) for shape in ((3, 2, 8), (2, 8)))
    qkv[count:] = grad[count:] = math.nan
    qkv.requires_grad_()
    out, lse = ops.varlen_self_attention(qkv, prefix_sums(LENGTHS_Q), 5)
    return [out.detach(), lse, *torch.autograd.grad(out, qkv, grad)]


@pytest.mark.parametrize(
    ("attend", "in_order", "as_packed"),
    [
        (cross_attention, [(1, 2, 4, 8), (1, 2, 5, 8), (2, 2, 3, 8), (2, 2, 5, 8)], 6),
        (self_attention, [(1, 2, 4, 8), (2, 2, 2, 8), (2, 2, 3, 8), (3, 2, 5, 8)], 8),
    ],
)
def test_one_call_takes_all_sequences_of_a_length_and_changes_no_bit(attend, in_order, as_packed, calls, monkeypatch):
    ordered = attend()
    assert sorted(calls) == sorted(2 * in_order)  # forward and backward
    calls.clear()
    cpu_attention._order_of.cache_clear()
    monkeypatch.setattr(cpu_attention, "CALL", 0)  # nothing is worth bringing in order
    packed = attend()
    assert len(calls) == 2 * as_packed
    for got, want in zip(ordered, packed, strict=True):
        assert not got.isnan().any() and torch.equal(got, want)


def test_long_sequences_stay_where_they_are(calls):
    """Moving their rows costs more than the calls: here 2 * 3 * 100 rows of 64 values against one call."""
    lengths = [100, 99, 100]
    qkv = torch.randn(sum(lengths), 3, 1, 64)
    out = ops.varlen_self_attention(qkv, prefix_sums(lengths), 100)[0]
    assert [shape[0] for shape in calls] == [1, 1, 1]
    first = ops.varlen_self_attention(qkv[:100], prefix_sums([100]), 100)[0]
    assert torch.equal(out[:100], first)


def test_an_order_made_in_inference_mode_serves_training(calls):
    with torch.inference_mode():
        without = cross_attention(gradients=False)
    for got, want in zip(cross_attention(), without, strict=False):
        assert torch.equal(got, want)
