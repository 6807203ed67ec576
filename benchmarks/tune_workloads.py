"""What ``tune.py`` times for every row of the kernels' tables: the ops that read the row, at ViT-H/14 sizes.

Legend: T packed rows, D width, S sequences, H heads, Dh head dim.

A workload is drawn while the row under test stands in its table, because pointer tables depend on it. It is one call
that runs everything the row decides about, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import Ragged

Call = Callable[[], object]
DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}
PATCHES = 256


@dataclass(frozen=True)
class Scale:
    """How much data a workload works on; the seed makes sets that share nothing."""

    device: torch.device
    images: int = 128
    parameters: int = 2**24
    seed: int = 0

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def tokens(self, low: int, high: int, blocks: int = 1) -> Ragged:
        """Random patches of every image, ``blocks`` sets of low to high each."""
        generator = torch.Generator().manual_seed(self.seed)
        lengths = torch.randint(low, high + 1, (self.images * blocks,), generator=generator).tolist()
        lists = [
            (i // blocks * PATCHES + torch.randperm(PATCHES, generator=generator)[:length]).sort().values.tolist()
            for i, length in enumerate(lengths)
        ]
        return Ragged.from_lists(lists).to(self.device)


def gather_patches(scale: Scale, itemsize: int, side: int) -> Call:
    pixels = scale.normal(scale.images, 3, 16 * side, 16 * side)
    pixels = (pixels * 50 + 128).clamp(0, 255).byte() if itemsize == 1 else pixels.to(DTYPES[itemsize])
    indices = scale.tokens(77, 153).indices
    options = (side, [0.5] * 3, [0.25] * 3, torch.bfloat16 if itemsize < 4 else torch.float32)
    return lambda: ops.gather_patches(pixels, indices, *options)


def gather_add(scale: Scale, itemsize: int, width: int) -> Call:
    indices = scale.tokens(77, 153).indices
    x = scale.normal(indices.shape[0], width, dtype=DTYPES[itemsize])
    table = scale.normal(PATCHES, width)

    return lambda: (ops.gather_add(x, table, indices), ops.gather_add_backward(x, indices))


def predictor_tokens(scale: Scale, itemsize: int, width: int) -> Call:
    layout = predictor_layout(scale.tokens(77, 153), scale.tokens(33, 56, blocks=4), 1, 4)
    x = scale.normal(layout.copies.shape[0], width, dtype=DTYPES[itemsize])
    grad = scale.normal(layout.sources.shape[0], width, dtype=DTYPES[itemsize])
    positions = scale.normal(PATCHES, width)
    rows = (layout.tokens.indices, layout.sources, layout.copies)

    def run():
        return ops.predictor_tokens(x, positions[0], positions, *rows), ops.predictor_tokens_backward(grad, *rows)

    return run


def target_loss(scale: Scale, itemsize: int, width: int) -> Call:
    blocks = scale.tokens(33, 56, blocks=4)
    prediction = scale.normal(blocks.num_rows, width, dtype=DTYPES[itemsize])
    target = scale.normal(scale.images * PATCHES, width, dtype=DTYPES[itemsize])
    one = torch.ones((), device=scale.device)
    arguments = (prediction, target, blocks.indices, blocks.cu_seqlens, "smooth_l1", True, 1e-5)
    return lambda: (ops.target_loss(*arguments), ops.target_loss_backward(one, *arguments))


def layer_norm(scale: Scale, itemsize: int, width: int) -> Call:
    x = scale.normal(scale.tokens(77, 153).num_rows, width, dtype=DTYPES[itemsize])
    affine = scale.normal(width)
    return lambda: ops.layer_norm(x, x, affine, affine, affine, 1e-6)


def layer_norm_backward(scale: Scale, itemsize: int, width: int) -> Call:
    x = scale.normal(scale.tokens(77, 153).num_rows, width, dtype=DTYPES[itemsize])
    affine = scale.normal(width)
    _, h, mean, rstd = ops.layer_norm(x, x, affine, affine, affine, 1e-6)
    return lambda: ops.layer_norm_backward(x, x, h, mean, rstd, affine, True, True, True)


def quantize_fp8(scale: Scale, itemsize: int, width: int) -> Call:
    x = scale.normal(scale.tokens(PATCHES, PATCHES).num_rows, width, dtype=DTYPES[itemsize])
    return lambda: ops.quantize_fp8(x, True)


def _product(scale: Scale, itemsize: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the predictor or of the context encoder, and the first matrix of an MLP on them."""
    rows = (scale.tokens(110, 209, blocks=4) if width == 384 else scale.tokens(77, 153)).num_rows
    weight = 0.02 * scale.normal(4 * width, width)
    return scale.normal(rows, width, dtype=DTYPES[itemsize]), weight.to(DTYPES[itemsize])


def linear_gelu(scale: Scale, itemsize: int, width: int) -> Call:
    x, weight = _product(scale, itemsize, width)
    bias = scale.normal(4 * width)
    return lambda: (ops.linear_gelu(x, weight, bias, True), ops.linear_gelu(x, weight, bias, False))


def hidden_gradient(scale: Scale, itemsize: int, width: int) -> Call:
    grad, weight = _product(scale, itemsize, width)
    weight_2, pre = weight.t().contiguous(), grad @ weight.t()
    return lambda: ops.hidden_gradient(grad, weight_2, pre, True)


def weight_gradient(scale: Scale) -> Call:
    """The predictor's four matrices, of which one has a bias that is not summed elsewhere."""
    x, _ = _product(scale, 2, 384)
    hidden, qkv = (scale.normal(x.shape[0], width, dtype=x.dtype) for width in (1536, 1152))
    calls = ((qkv, x, True), (x, x, False), (hidden, x, False), (x, hidden, False))
    return lambda: tuple(ops.weight_gradient(*call) for call in calls)


def _parameters(scale: Scale, dtype: torch.dtype) -> list[Tensor]:
    """Matrices and vectors of transformer blocks."""
    sizes = [scale.parameters // 16] * 15 + [scale.parameters // 2**12] * 256
    return list(scale.normal(sum(sizes), dtype=dtype).split(sizes))


def grad_norm(scale: Scale) -> Call:
    grads = _parameters(scale, torch.bfloat16)
    tables = ops.pointer_tables("grad_norm", grads)
    return lambda: ops.grad_norm(grads, **tables)


def ema_(scale: Scale) -> Call:
    targets, sources = (_parameters(scale, torch.float32) for _ in range(2))
    momentum = torch.tensor(0.996, dtype=torch.float64, device=scale.device)
    tables = ops.pointer_tables("ema_", targets, sources)
    return lambda: ops.ema_(targets, sources, momentum, **tables)


def adamw_ema_(scale: Scale) -> Call:
    params, first, second, emas = (_parameters(scale, torch.float32) for _ in range(4))
    second = [x.abs() for x in second]
    grads, copies, ema_copies = (_parameters(scale, torch.bfloat16) for _ in range(3))
    every = list(range(len(params)))
    lists = (params, grads, first, second, copies, emas, ema_copies, every, every, every, [0] * len(params))
    device = scale.device
    settings = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.04]], dtype=torch.float64, device=device)
    steps = torch.ones(len(params), device=device)
    momentum = torch.tensor(0.996, dtype=torch.float64, device=device)
    scalars = (
        settings,
        steps,
        momentum,
        torch.ones((), device=device),
        torch.ones((), dtype=torch.bool, device=device),
    )
    tables = ops.pointer_tables("adamw_ema_", *lists)
    return lambda: ops.adamw_ema_(*lists, *scalars, **tables)


def _attention(scale: Scale, dtype: torch.dtype, head_dim: int, lengths: str):
    """Predictor or context lengths, or those of the target encoder; 16 heads."""
    if lengths == "short":
        tokens = scale.tokens(77, 180)
    else:
        tokens = scale.tokens(PATCHES, PATCHES)
    qkv = scale.normal(tokens.num_rows, 3, 16, head_dim, dtype=dtype)
    return qkv, (tokens.cu_seqlens, PATCHES)


def attention_forward(scale: Scale, dtype: torch.dtype, head_dim: int, lengths: str) -> Call:
    qkv, bounds = _attention(scale, dtype, head_dim, lengths)
    return lambda: ops.varlen_self_attention(qkv, *bounds)


def attention_backward(scale: Scale, dtype: torch.dtype, head_dim: int, lengths: str) -> Call:
    qkv, bounds = _attention(scale, dtype, head_dim, lengths)
    out, lse = ops.varlen_self_attention(qkv, *bounds)
    return lambda: ops.varlen_self_attention_backward(out, qkv, out, lse, *bounds)


def patch_side(bound: int) -> int | None:
    """The patch size in use whose pixels a bucket of gather_patches' table holds."""
    return {64: 8, 256: 14}.get(bound)


def column_width(bound: int) -> int | None:
    """A width that is cut into blocks of ``bound`` columns."""
    return {64: 192, 128: 384, 256: 1280}.get(bound)


def inner_width(bound: int) -> int | None:
    """The width of the rows that are multiplied: the predictor's and ViT-H's."""
    return {512: 384, 65536: 1280}.get(bound)


def row_width(bound: int) -> int | None:
    """A model's width that a bucket of whole rows is the first to hold."""
    return {512: 384, 1024: 768, 1536: 1280, 2048: 1280}.get(bound)


def quantized_width(bound: int) -> int | None:
    """The same of inputs of the target encoder's products: its own width, and that of its MLP."""
    return {1536: 1280, 8192: 5120}.get(bound)
