"""Transformer blocks on the package's fused kernels: what ``blocks.Block`` computes, with its sums inside its norms.

Legend: T packed rows, D width.

A norm's kernel can do the sum before it: it adds the product that comes, that product's bias and the residual stream,
and its backward pass sums the gradient of the bias. So a block here hands on its last sum untaken, as ``Unsummed``, and
the norm that follows takes it. GELU, its derivative and the gradient of the first bias run inside the products of the
MLP, and weight gradients are ``ops.weight_gradient``.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.model.blocks import Block, LayerNorm, Linear, Mlp
from ijepa_fast.ragged import Ragged, take_rows


class Unsummed(NamedTuple):
    """The sum ``stream + branch + bias`` before it is taken.

    Attributes:
        stream: [T, D]; the sum of all that came before, which may be wider than the weights.
        branch: [T, D] in the dtype of the weights; a product without its bias.
        bias: [D] of that product.
    """

    stream: Tensor
    branch: Tensor
    bias: Tensor


class FusedLinear(Linear):
    """Linear layer whose weight gradient is a split sum."""

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        weight, bias = self.part(outputs)
        return ops.linear(x.to(weight.dtype), weight, bias)


class BranchLinear(Linear):
    """The same without its bias, which the norm that follows adds."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x.to(self.weight.dtype), self.weight, None)


class BranchMlp(Mlp):
    """MLP without its last bias, which the norm that follows adds."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, None)


class FusedLayerNorm(LayerNorm):
    """Layer norm that first takes the sum of what it is given, if that is ``Unsummed``."""

    def forward(self, x: Tensor | Unsummed) -> Tensor:
        return self.sum_and_normalise(x)[0]

    def sum_and_normalise(self, x: Tensor | Unsummed) -> tuple[Tensor, Tensor]:
        """The normalised rows and the sum, both [T, D]."""
        stream, branch, bias = x if isinstance(x, Unsummed) else (None, x, None)
        normal, total, _, _ = ops.layer_norm(branch, stream, bias, self.weight, self.bias, self.eps)
        return normal, x if stream is None else total


class FusedBlock(Block):
    """``Block`` whose last sum is left to the norm that follows."""

    def forward(self, x: Tensor | Unsummed, tokens: Ragged, queries: Ragged | None = None) -> Unsummed:
        normal, stream = self.norm1.sum_and_normalise(x)
        # The first block's input may be wider than the weights.
        attended = self.attn(normal.to(self.attn.qkv.weight.dtype), tokens, queries)
        if queries is not None:
            stream = take_rows(stream, queries.indices)
        normal, stream = self.norm2.sum_and_normalise(Unsummed(stream, attended, self.attn.proj.bias))
        return Unsummed(stream, self.mlp(normal), self.mlp.fc2.bias)


FUSED = {Block: FusedBlock, Mlp: BranchMlp, Linear: FusedLinear, LayerNorm: FusedLayerNorm}


def fuse(network: nn.Module) -> None:
    """Turn the blocks, norms and linear layers of an encoder or a predictor into their fused kind, in place.

    Parameters and their names stay. Call it on the device and in the dtype of the run.

    Raises:
        ValueError: the kernels cannot run here, with the reason.
    """
    weight = next(module.weight for module in network.modules() if isinstance(module, Linear))
    check_device(weight.device, weight.dtype)
    for module in list(network.modules()):
        # As torch's fully_shard does it: optimizers, hooks and compiled blocks keep the modules that they hold.
        module.__class__ = FUSED.get(type(module), type(module))
        if isinstance(module, FusedBlock):
            module.attn.proj.__class__ = BranchLinear


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
