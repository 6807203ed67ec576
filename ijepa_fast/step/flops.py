"""Floating-point operations of a training step: in closed form, and for torch's ``FlopCounterMode``.

A multiply-add counts as two operations. Counted is what the method needs: matrix products of linear layers, patch
embedding and attention. Recomputation, rounding up of shapes, norms, losses and the optimizer are not.

Importing this module registers the formulas of the package's attention and linear ops (and of the one that torch's SDPA
runs on the CPU) with torch; without it ``FlopCounterMode`` takes them to cost nothing.

Legend: N patches per image, K masks per image, C context and M target blocks per mask, D width, H heads, Dh head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import ijepa_fast.ops  # noqa: F401  (defines torch.ops.ijepa_fast)
from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler
from ijepa_fast.model.config import ModelConfig


class StepFlops(NamedTuple):
    """Operations per image: forward of the target encoder, forward and backward of the other two networks."""

    target: float
    context: float
    predictor: float

    @property
    def total(self) -> float:
        return self.target + self.context + self.predictor


@dataclass(frozen=True)
class TokenCounts:
    """Sums over all masks of an image, averaged over images. c and m are lengths of context and target blocks.

    Attributes:
        context: sum of c over the K * C context blocks.
        targets: sum of m over the K * M target blocks.
        context_squares, target_squares: sums of c * c and of m * m.
        products: sum of c * m over the C * M pairs of each mask.
        read: target patches of the image; with several masks per image, each patch once.
        num_contexts, num_targets: C and M.
    """

    context: float
    targets: float
    context_squares: float
    target_squares: float
    products: float
    read: float
    num_contexts: int
    num_targets: int

    @classmethod
    def of(cls, *masks: Masks) -> TokenCounts:
        """Exact counts of given masks. They must have the same numbers of blocks."""
        lengths = [
            (
                m.context.lengths.view(m.num_images, m.per_image, m.num_contexts),
                m.targets.lengths.view(m.num_images, m.per_image, m.num_targets),
            )
            for m in masks
        ]
        context, targets = (torch.cat(parts).double() for parts in zip(*lengths, strict=True))

        def mean(per_block: Tensor) -> float:
            return float(per_block.sum((1, 2)).mean())

        return cls(
            context=mean(context),
            targets=mean(targets),
            context_squares=mean(context.square()),
            target_squares=mean(targets.square()),
            products=float((context.sum(2) * targets.sum(2)).sum(1).mean()),
            read=sum(int((m.read or m.targets).cu_seqlens[-1]) for m in masks) / len(targets),
            num_contexts=context.shape[2],
            num_targets=targets.shape[2],
        )

    @classmethod
    def expected(cls, config: MaskConfig, grid: tuple[int, int], draws: int = 256) -> TokenCounts:
        """Means over ``draws`` steps of one group (16 images where images are not drawn in groups), from seed 0."""
        sampler = MaskSampler(config, grid)
        images = config.group_size if config.context == "batch_min" else 16
        return cls.of(*(sampler.sample(images, seed=0, step=step) for step in range(draws)))

    @classmethod
    def constant(cls, context: float, target: float, num_contexts: int = 1, num_targets: int = 4) -> TokenCounts:
        """For blocks that all have the same (or their mean) length."""
        return cls(
            context=num_contexts * context,
            targets=num_targets * target,
            context_squares=num_contexts * context**2,
            target_squares=num_targets * target**2,
            products=num_contexts * num_targets * context * target,
            read=num_targets * target,
            num_contexts=num_contexts,
            num_targets=num_targets,
        )


def _blocks(dim: int, hidden: int, depth: int, rows: float, pairs: float, last_rows: float, last_pairs: float) -> float:
    """Forward of ``depth`` transformer blocks.

    Args:
        rows: tokens; pairs: of a query and a key, summed over sequences.
        last_rows, last_pairs: the same of the last block, whose outputs are computed for these rows alone.
    """
    key_value, for_each_output = 4 * dim * dim, 4 * dim * dim + 4 * dim * hidden

    def block(rows_out: float, pairs: float) -> float:
        return rows * key_value + rows_out * for_each_output + 4 * dim * pairs

    return (depth - 1) * block(rows, pairs) + block(last_rows, last_pairs)


def step_flops(
    model: ModelConfig,
    tokens: TokenCounts,
    *,
    all_targets: bool = False,
    all_predictions: bool = False,
) -> StepFlops:
    """Operations of one training step per image.

    A backward pass costs twice the forward, but for the patch embedding, whose input has no gradient.

    Args:
        model: sizes.
        tokens: how long the blocks are.
        all_targets: whether the target encoder's last block computes every row, or only those that are read.
        all_predictions: the same of the predictor's last block. Plain implementations compute all rows of both. (The
            predictor's projection to targets is counted for target rows alone in any case.)
    """
    patches, pixels = model.patches, model.in_chans * model.patch_size**2
    contexts, targets = tokens.num_contexts, tokens.num_targets
    width, hidden = model.embed_dim, round(model.embed_dim * model.mlp_ratio)
    read = patches if all_targets else min(tokens.read, patches)
    target = 2 * pixels * width * patches + _blocks(
        width, hidden, model.depth, patches, patches**2, read, read * patches
    )
    everything = (tokens.context, tokens.context_squares)
    embed = 2 * pixels * width * tokens.context
    context = 2 * embed + 3 * _blocks(width, hidden, model.depth, *everything, *everything)

    narrow, ratio = model.predictor_embed_dim, model.predictor_mlp_ratio
    narrow_hidden = round(narrow * (model.mlp_ratio if ratio is None else ratio))
    predicted = contexts * tokens.targets
    rows = targets * tokens.context + predicted
    predicted_pairs = tokens.products + contexts * tokens.target_squares
    pairs = targets * tokens.context_squares + tokens.products + predicted_pairs
    last = (rows, pairs) if all_predictions else (predicted, predicted_pairs)
    projections = 2 * width * narrow * (tokens.context + predicted)
    predictor = 3 * (projections + _blocks(narrow, narrow_hidden, model.predictor_depth, rows, pairs, *last))
    return StepFlops(float(target), float(context), float(predictor))


def _packed(q: Tensor, cu_q: Tensor, cu_k: Tensor) -> int:
    pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return 4 * q.shape[-2] * q.shape[-1] * pairs


@register_flop_formula(torch.ops.ijepa_fast.varlen_attention, get_raw=True)
def _varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, *, out_val=None):
    return _packed(q, cu_q, cu_k)


@register_flop_formula(torch.ops.ijepa_fast.varlen_attention_backward, get_raw=True)
def _varlen_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *, out_val=None):
    return 2 * _packed(q, cu_q, cu_k)


@register_flop_formula(torch.ops.ijepa_fast.varlen_self_attention, get_raw=True)
def _varlen_self_attention(qkv, cu_seqlens, max_seqlen, *, out_val=None):
    return _packed(qkv, cu_seqlens, cu_seqlens)


@register_flop_formula(torch.ops.ijepa_fast.varlen_self_attention_backward, get_raw=True)
def _varlen_self_attention_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *, out_val=None):
    return 2 * _packed(qkv, cu_seqlens, cu_seqlens)


@register_flop_formula(torch.ops.ijepa_fast.linear_gelu, get_raw=True)
def _linear_gelu(x, weight, bias, keep_pre, *, out_val=None):
    return 2 * x.shape[0] * weight.numel()


@register_flop_formula(torch.ops.ijepa_fast.hidden_gradient, get_raw=True)
def _hidden_gradient(grad, weight, pre, need_bias, *, out_val=None):
    return 2 * grad.shape[0] * weight.numel()


@register_flop_formula(torch.ops.ijepa_fast.weight_gradient, get_raw=True)
def _weight_gradient(grad, x, need_bias, *, out_val=None):
    return 2 * grad.numel() * x.shape[1]


def _dense(q: Tensor, k: Tensor) -> int:
    return 4 * q.numel() * k.shape[-2]


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, get_raw=True)
def _cpu_attention(q, k, v, *args, out_val=None, **kwargs):
    return _dense(q, k)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, get_raw=True)
def _cpu_attention_backward(grad, q, k, v, *args, out_val=None, **kwargs):
    return 2 * _dense(q, k)
