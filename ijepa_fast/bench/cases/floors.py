"""Least bytes through memory and operations of each op, in closed form: the floors of the benchmarks.

Bytes count every input once and every output once, for 16-bit activations (or ``itemsize`` bytes) and fp32 tables;
vectors as long as a row is wide are left out. Legend: Tc, Tt, Tp packed rows of context, targets and predictor, N
patches per image, D, Dp widths of encoder and predictor, K values of a patch rounded up to 16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import Masks
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.model.vit import PREDICTOR_DEPTH, SIZES
from ijepa_fast.ops import padded_patch_width

INDEX = 4  # bytes of an index
WIDE, LOW = 4, 2  # bytes of an fp32 master, moment or average, and of the bf16 values beside them


def _vit(size: str, patch_size: int) -> ModelConfig:
    return ModelConfig(patch_size=patch_size, predictor_depth=PREDICTOR_DEPTH[size], **SIZES[size])


MODELS = {
    "ViT-B/16": _vit("base", 16),
    "ViT-L/16": _vit("large", 16),
    "ViT-H/14": _vit("huge", 14),
    "ViT-g/16": _vit("giant", 16),
}
TINY = {
    # For machines without a GPU, and for tests: head dim 24 and patches of 14, which are no powers of two.
    "tiny": ModelConfig(168, 14, embed_dim=96, depth=2, num_heads=4, predictor_embed_dim=64, predictor_depth=2)
}


@dataclass(frozen=True)
class Cost:
    """Least bytes through memory, and floating-point operations."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Workload:
    """The sizes of one batch, which is all that a floor depends on. Rows may be means over many batches.

    Attributes:
        context_rows, target_rows: Tc and Tt.
        context_pairs, predictor_pairs: sums of the squared lengths of the sequences.
        parameters, averaged: trained parameters, and those of them that have an EMA.
        itemsize: bytes of an activation.
    """

    model: ModelConfig
    batch: int
    context_rows: float
    target_rows: float
    context_pairs: float
    predictor_pairs: float
    num_targets: int
    parameters: int
    averaged: int
    itemsize: int = 2

    @staticmethod
    def of(model: ModelConfig, masks: Masks, itemsize: int = 2) -> Workload:
        """The sizes of one batch with these masks."""
        layout = predictor_layout(masks.context, masks.targets, masks.num_contexts, masks.num_targets)
        pairs = [float(tokens.lengths.double().square().sum()) for tokens in (masks.context, layout.tokens)]
        rows = [float(tokens.cu_seqlens[-1]) for tokens in (masks.context, masks.targets)]
        parameters = parameter_counts(model)
        return Workload(model, masks.num_images, *rows, *pairs, masks.num_targets, *parameters, itemsize)

    @property
    def row(self) -> int:
        """Bytes of a row of the encoder."""
        return self.itemsize * self.model.embed_dim

    @property
    def patches(self) -> int:
        """N."""
        return self.model.patches

    @property
    def predictor_rows(self) -> float:
        """Tp."""
        return self.num_targets * self.context_rows + self.target_rows

    def rows(self, part: str) -> float:
        """Packed rows of "context", "target encoder" or "predictor"."""
        return {
            "context": self.context_rows,
            "target encoder": self.batch * self.patches,
            "predictor": self.predictor_rows,
        }[part]

    def pairs(self, part: str) -> float:
        """Pairs of query and key, of the same parts."""
        return {
            "context": self.context_pairs,
            "target encoder": self.batch * self.patches**2,
            "predictor": self.predictor_pairs,
        }[part]


@functools.cache
def parameter_counts(model: ModelConfig) -> tuple[int, int]:
    """Trained parameters, and those of the encoder, which have an EMA."""
    networks = on_meta(model)
    averaged = sum(parameter.numel() for parameter in networks.context_encoder.parameters())
    return averaged + sum(parameter.numel() for parameter in networks.predictor.parameters()), averaged


def on_meta(model: ModelConfig):
    """The networks, their tensors without memory."""
    with torch.device("meta"):
        return model.build(Objective())


def hidden_width(model: ModelConfig) -> int:
    return round(model.embed_dim * model.mlp_ratio)


def widths(model: ModelConfig, part: str) -> tuple[int, int]:
    """Width of a part's rows, and of its MLP."""
    if part != "predictor":
        return model.embed_dim, hidden_width(model)
    ratio = model.mlp_ratio if model.predictor_mlp_ratio is None else model.predictor_mlp_ratio
    return model.predictor_embed_dim, round(model.predictor_embed_dim * ratio)


Formula = Callable[[Workload, str], Cost]
"""The cost of an op on a part of the batch."""


def _norm(count: int) -> Formula:
    """``count`` activations per row, as wide as the encoder."""
    return lambda w, part: Cost(count * w.row * w.rows(part))


def _first_layer(outputs: int) -> Formula:
    """Product of an MLP's first layer: a row in, its weights once, ``outputs`` hidden rows in or out."""

    def formula(w: Workload, part: str) -> Cost:
        width, hidden = widths(w.model, part)
        moved = w.itemsize * (w.rows(part) * (width + outputs * hidden) + width * hidden)
        return Cost(moved, 2 * w.rows(part) * width * hidden)

    return formula


def _square_weight_gradient(w: Workload, part: str) -> Cost:
    """The projection after attention: two rows in, a matrix out."""
    width, _ = widths(w.model, part)
    return Cost(w.itemsize * (2 * w.rows(part) * width + width * width), 2 * w.rows(part) * width * width)


def _attention(tensors: int, products: float) -> Formula:
    """``tensors`` activations per row; ``products`` matrix products with 2 * Dh operations per pair and head."""

    def formula(w: Workload, part: str) -> Cost:
        width, _ = widths(w.model, part)
        return Cost(tensors * w.itemsize * w.rows(part) * width, products * 2 * width * w.pairs(part))

    return formula


def _patches(w: Workload, part: str) -> Cost:
    """Bytes of pixels in, a padded row of activations out, an index."""
    size, channels = w.model.patch_size, w.model.in_chans
    return Cost(w.rows(part) * (channels * size**2 + w.itemsize * padded_patch_width(channels, size) + INDEX))


def _predictor_tokens(w: Workload, extra: float) -> Cost:
    """Rows of context on one side and of the predictor on the other, two indices for each of the latter."""
    rows = w.itemsize * w.model.predictor_embed_dim * (w.predictor_rows + w.context_rows)
    return Cost(rows + 2 * INDEX * w.predictor_rows + extra)


FORWARD: dict[str, Formula] = {
    "gather_patches": _patches,
    "gather_add": lambda w, part: Cost(w.rows(part) * (2 * w.row + INDEX) + WIDE * w.patches * w.model.embed_dim),
    "predictor_tokens": lambda w, part: _predictor_tokens(w, WIDE * w.patches * w.model.predictor_embed_dim),
    "target_loss": lambda w, part: Cost(w.target_rows * (2 * w.row + INDEX)),
    "layer_norm": _norm(2),
    "layer_norm with residual": _norm(4),
    # A row of the MLP's hidden layer in, 8 bits a value and the scale of the row out.
    "quantize_fp8": lambda w, part: Cost(w.rows(part) * ((w.itemsize + 1) * hidden_width(w.model) + WIDE)),
    "linear_gelu": _first_layer(1),
    "linear_gelu with pre": _first_layer(2),
    "hidden_gradient": _first_layer(2),
    "weight_gradient": _square_weight_gradient,
    "varlen_attention": _attention(4, 2),
    "grad_norm": lambda w, part: Cost(LOW * w.parameters),
    # Per parameter: gradient in, its rounded copy out, master and two moments in and out; average in and out, its copy.
    "adamw_ema_": lambda w, part: Cost((2 * LOW + 6 * WIDE) * w.parameters + (2 * WIDE + LOW) * w.averaged),
    "ema_": lambda w, part: Cost(3 * WIDE * w.averaged),
}
BACKWARD: dict[str, Formula] = {
    "gather_add": lambda w, part: Cost(w.rows(part) * (2 * w.row + INDEX)),
    "predictor_tokens": lambda w, part: _predictor_tokens(w, w.num_targets * INDEX * w.context_rows),
    "target_loss": lambda w, part: Cost(w.target_rows * (3 * w.row + INDEX)),
    "layer_norm": _norm(3),
    "layer_norm with residual": _norm(4),
    "varlen_attention": _attention(8, 5),
}
MODES = ("forward", "backward", "both")


def cost(op: str, mode: str, workload: Workload, part: str) -> Cost:
    """Cost of an op on a part of the batch. "both" is the forward and the backward pass.

    Raises:
        KeyError: the op has no such mode.
    """
    tables = {"forward": (FORWARD,), "backward": (BACKWARD,), "both": (FORWARD, BACKWARD)}[mode]
    return sum((table[op](workload, part) for table in tables), Cost(0.0))
