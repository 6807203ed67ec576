"""Padding rows of the whole objective: NaN in them, before and behind every op, changes no loss and no gradient."""

import pytest
import torch
from model_cases import assert_equal, assert_same_gradients, gradients, make_images, make_masks, make_model, pad

from ijepa_fast import ops
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model import blocks
from ijepa_fast.model.jepa import Objective


class _Poison(torch.autograd.Function):
    """NaN into the padding rows, forward (``on_values``) or backward: whoever receives them must not use them."""

    @staticmethod
    def forward(ctx, x, padding, on_values):
        ctx.save_for_backward(padding)
        ctx.on_values = on_values
        return _poisoned(x, padding) if on_values else x.clone()

    @staticmethod
    def backward(ctx, grad):
        (padding,) = ctx.saved_tensors
        if ctx.on_values:
            assert grad[padding].eq(0).all(), "an op gave its input's padding rows a gradient"
            return grad, None, None
        return _poisoned(grad, padding), None, None


def _poisoned(x, padding):
    return x.masked_fill(padding.view(-1, *[1] * (x.dim() - 1)), torch.nan)


def poison_ops(monkeypatch):
    """Every op gets NaN in the padding rows of its inputs and of its incoming gradient, and has to write zeros."""
    calls = []

    def around(attend, x, padding, out_padding):
        calls.append(int(padding.sum()))
        out = attend(_Poison.apply(x, padding, True))
        assert out[out_padding].eq(0).all(), "an op left something in padding rows"
        return _Poison.apply(out, out_padding, False)

    def behind(cu_seqlens, x):
        return torch.arange(len(x)) >= cu_seqlens[-1]

    plain = {name: getattr(ops, name) for name in ("gather_add", "predictor_tokens", "target_loss")}
    attend, attend_self = blocks.varlen_attention, blocks.varlen_self_attention

    def gather_add(x, table, indices):
        return around(lambda x: plain["gather_add"](x, table, indices), x, indices < 0, indices < 0)

    def predictor_tokens(context, mask_token, positions, indices, sources, copies):
        rest = mask_token, positions, indices, sources, copies
        padding = (copies < 0).all(1)
        return around(lambda x: plain["predictor_tokens"](x, *rest), context, padding, indices < 0)

    def target_loss(prediction, target, rows, *rest):
        calls.append(int((rows < 0).sum()))
        return plain["target_loss"](_Poison.apply(prediction, rows < 0, True), target, rows, *rest)

    def self_attention(qkv, cu_seqlens, max_seqlen, **options):
        padding = behind(cu_seqlens, qkv)
        return around(lambda x: attend_self(x, cu_seqlens, max_seqlen, **options), qkv, padding, padding)

    def cross_attention(q, k, v, cu_q, cu_k, *bounds, **options):
        k, v = (_Poison.apply(x, behind(cu_k, x), True) for x in (k, v))
        padding = behind(cu_q, q)
        return around(lambda q: attend(q, k, v, cu_q, cu_k, *bounds, **options), q, padding, padding)

    for function in (gather_add, predictor_tokens, target_loss):
        monkeypatch.setattr(ops, function.__name__, function)
    monkeypatch.setattr(blocks, "varlen_self_attention", self_attention)
    monkeypatch.setattr(blocks, "varlen_attention", cross_attention)
    return calls


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
@pytest.mark.parametrize("num_contexts", [1, 2])
def test_nan_in_padding_rows_reaches_no_gradient(monkeypatch, num_contexts, backend, all_targets):
    grid = (6, 6)
    objective = Objective(variance_weight=1.0, covariance_weight=1.0)
    model, images = make_model(grid, objective, attention=backend), make_images(3, grid)
    masks = make_masks(grid, 3, num_contexts=num_contexts)
    want, want_pooled = model(images, masks, all_targets=all_targets)
    want_gradients = gradients(model, want.total)
    calls = poison_ops(monkeypatch)
    got, pooled = model(images, pad(masks, 7), all_targets=all_targets)
    got_gradients = gradients(model, got.total)
    assert sum(calls) > 0
    assert_equal(got.total, want.total)
    assert_equal(pooled, want_pooled)
    assert_same_gradients(got_gradients, want_gradients)


def test_sampler_capacity_is_padding(monkeypatch):
    grid = (6, 6)
    sampler = MaskSampler(MaskConfig(min_keep=2), grid)
    model, images = make_model(grid), make_images(3, grid)
    exact = sampler.sample(3, seed=1, step=2)
    context_rows, target_rows = sampler.counts(3, seed=1, step=2)
    roomy = sampler.sample(3, seed=1, step=2, capacity=(context_rows + 11, target_rows + 6))
    want, got = model(images, exact)[0].total, model(images, roomy)[0].total
    assert_equal(got, want)
    assert_same_gradients(gradients(model, got), gradients(model, want))
