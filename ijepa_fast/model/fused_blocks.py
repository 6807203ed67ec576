"""Transformer blocks on the package's fused kernels: what ``blocks.Block`` computes, cut at other places.

Legend: T packed rows, D width.

Two sums and two norms stand between the products of a block, and a norm's kernel can do the sum before it: it adds the
product that comes, that product's bias and the residual stream, and its backward pass sums the bias's gradient. So a
block here begins behind its own first norm and ends with the first norm of the block that follows. GELU, its derivative
and the first layer's bias gradient run inside the MLP's products, and weight gradients are ``ops.weight_gradient``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa_fast import ops
from ijepa_fast.ragged import Ragged, take_rows


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Whether fused blocks with weights of ``dtype`` can run. The CPU runs the definitions of the ops, in any dtype.

    Raises:
        ValueError: a GPU without Triton, or with weights that its matrix unit does not take.
    """
    if device.type == "cpu":
        return
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("fused blocks on a GPU need Triton, which is not installed")
    if device.type != "cuda":
        raise ValueError(f"fused blocks run on cpu and cuda, got {device}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"fused blocks on a GPU need weights in bfloat16 or float16, got {dtype}")


def run(
    blocks: nn.ModuleList,
    x: Tensor,
    tokens: Ragged,
    queries: Ragged | None,
    call: Callable[..., tuple[Tensor | None, Tensor]],
    checkpointing: bool,
) -> Tensor:
    """``blocks.Block`` after ``blocks.Block``: [T, D] -> [T, D], or the rows ``queries.indices`` alone.

    Args:
        call: ``block_forward``, compiled or not.
        checkpointing: keep a block's two inputs for the backward pass, and compute the rest once more.
    """
    normal, stream = blocks[0].norm1(x).to(blocks[0].attn.qkv.weight.dtype), x
    for i, block in enumerate(blocks):
        following, wanted = (blocks[i + 1].norm1, None) if i + 1 < len(blocks) else (None, queries)
        arguments = (block, following, normal, stream, tokens, wanted)
        if checkpointing and torch.is_grad_enabled():
            normal, stream = checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            normal, stream = call(*arguments)
    return stream


def block_forward(
    block: nn.Module,
    following: nn.LayerNorm | None,
    normal: Tensor,
    stream: Tensor,
    tokens: Ragged,
    queries: Ragged | None,
) -> tuple[Tensor | None, Tensor]:
    """A block without its first norm, and the norm that follows.

    Args:
        block: a ``blocks.Block``.
        following: the next block's first norm; None of the last block.
        normal: [T, D] in the dtype of the weights; what the block's first norm gave for ``stream``.
        stream: [T, D]; the sum of all blocks before, which may be wider.
        queries: as in ``blocks.Block``.

    Returns:
        The same two for the next block; the first is None without a ``following``.
    """
    attention, mlp = block.attn, block.mlp
    attended = ops.linear(attention.attend(normal, tokens, queries), attention.proj.weight, None)
    if queries is not None:
        stream = take_rows(stream, queries.indices)
    normal, stream = _add_and_normalise(attended, attention.proj.bias, stream, block.norm2)
    layers = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight)
    if following is None:
        return None, stream + ops.mlp(normal, *layers, mlp.fc2.bias)
    return _add_and_normalise(ops.mlp(normal, *layers, None), mlp.fc2.bias, stream, following)


def _add_and_normalise(x: Tensor, bias: Tensor, stream: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    normal, total, _, _ = ops.layer_norm(x, stream, bias, norm.weight, norm.bias, norm.eps)
    return normal, total
