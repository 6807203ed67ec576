"""Transformer blocks over packed token sets, and the run through a stack of them.

Legend: T packed rows, D width (after H: of one head), H heads. Parameter names are those of ``vit.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa_fast import ops
from ijepa_fast.attention.dispatch import check_backend, varlen_attention, varlen_self_attention
from ijepa_fast.model import fused_blocks as fused
from ijepa_fast.model.fp8 import active_scaling, fp8_linear
from ijepa_fast.ops import accumulation_dtype
from ijepa_fast.ragged import Ragged, take_rows

Init = Literal["flat", "depth_scaled"]
COMPILED_VERSIONS = 64
"""That dynamo may make of a block."""
CPU_HIDDEN = 1 << 21
"""Hidden values that an MLP computes at a time on the CPU: 8 MB in fp32 stay in the cache between its layers."""


def init_normal(weight: Tensor) -> None:
    """Std 0.02, cut at +-2. Clamping has the same distribution as ``trunc_normal_`` so far out (100 sigma), without
    the draw of exactly -1 that some torch versions turn into a weight of -2."""
    with torch.no_grad():
        weight.normal_(std=0.02).clamp_(-2, 2)


class Linear(nn.Linear):
    """``nn.Linear`` whose bias and input may be fp32 beside a low-precision weight; see also ``fp8.fp8_products``."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        # Not as a slice of all outputs, whose gradient would be copied into zeros.
        return self._product(x, self.weight, self.bias)

    def project(self, x: Tensor, outputs: slice) -> Tensor:
        """Only some of the output features."""
        return self._product(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.fused:
            return ops.linear(x.to(weight.dtype), weight, bias)
        bias = None if bias is None else bias.to(weight.dtype)
        if active_scaling() != "off":
            return fp8_linear(x, weight, bias, active_scaling())
        # Under autocast it is the weight that is wider, and torch casts both.
        return F.linear(x.to(weight.dtype) if x.itemsize > weight.itemsize else x, weight, bias)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (eps 1e-6) whose weight may be fp32 beside low-precision activations."""

    fused = False

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return ops.layer_norm(x, None, None, self.weight, self.bias, self.eps)[0]
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    dense_backend: str | None = None
    """Backend for sets of equal length without padding, instead of the usual one."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, tokens: Ragged, queries: Ragged | None = None) -> Tensor:
        """[T, D] -> [T, D], or the outputs of the rows ``queries.indices`` alone."""
        return self.proj(self.attend(x, tokens, queries))

    def attend(self, x: Tensor, tokens: Ragged, queries: Ragged | None = None) -> Tensor:
        """The same before the projection."""
        dim, heads = x.shape[-1], self.num_heads
        uniform = tokens.uniform and (queries is None or queries.uniform)
        backend = self.dense_backend if uniform and self.dense_backend is not None else self.backend
        if queries is None:
            qkv_T3HD = self.qkv(x).unflatten(-1, (3, heads, -1))
            out = varlen_self_attention(
                qkv_T3HD, tokens.cu_seqlens, tokens.max_seqlen, backend=backend, uniform=uniform
            )
        else:
            q = self.qkv.project(take_rows(x, queries.indices), slice(0, dim)).unflatten(-1, (heads, -1))
            k, v = self.qkv.project(x, slice(dim, None)).unflatten(-1, (2, heads, -1)).unbind(1)
            out = varlen_attention(
                q,
                k,
                v,
                queries.cu_seqlens,
                tokens.cu_seqlens,
                queries.max_seqlen,
                tokens.max_seqlen,
                backend=backend,
                uniform=uniform,
            )
        return out.flatten(1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not torch.compiler.is_compiling():
            parts = -(-x.shape[0] * self.fc1.out_features // CPU_HIDDEN)
            if parts > 1:
                return torch.cat([self._rows(part) for part in x.chunk(parts)])
        return self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, backend: str):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, backend)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, tokens: Ragged, queries: Ragged | None = None) -> Tensor:
        """[T, D] -> [T, D]; with ``queries``, the rows ``queries.indices`` alone, and no work for the others."""
        attended = self.attn(self.norm1(x), tokens, queries)
        x = attended + (x if queries is None else take_rows(x, queries.indices))
        return x + self.mlp(self.norm2(x))


def block_forward(block: Block, x: Tensor, tokens: Ragged, queries: Ragged | None) -> Tensor:
    return block(x, tokens, queries)


class BlockStack(nn.Module):
    """What encoder and predictor share: checks, initialisation and the run through the blocks."""

    activation_checkpointing: bool = False
    wide_residual: bool = False
    """Keep the sums between blocks in fp32 beside low-precision weights; norms read them, products do not."""
    fused: bool = False
    _call = staticmethod(block_forward)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """From now on, run blocks through torch.compile. Blocks of equal form share their code, for any token counts.

        Args:
            backend: of ``torch.compile``.
        """
        # Networks share the code of a block, and dynamo makes a version of it for each width, dtype and kind of sets:
        # in training and evaluation together nearly the 8 that it is allowed, past which it gives up with an error.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VERSIONS)
        function = fused.block_forward if self.fused else block_forward
        self._call = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def fuse_blocks(self) -> None:
        """From now on, run blocks, norms and linear layers on the package's fused kernels (``fused.py``).

        Call it before ``compile_blocks``, on the device and in the dtype of the run.

        Raises:
            ValueError: blocks were compiled before, or the kernels cannot run here, with the reason.
        """
        self.check_fuse_blocks()
        for module in self.modules():
            if isinstance(module, (BlockStack, Linear, LayerNorm)):
                module.fused = True
        self._call = fused.block_forward

    def check_fuse_blocks(self) -> None:
        """Raise ValueError, as ``fuse_blocks`` does, if it cannot be called."""
        if "_call" in vars(self):
            raise ValueError("fuse_blocks must come before compile_blocks, and once")
        weight = next(module.weight for module in self.modules() if isinstance(module, Linear))
        fused.check_device(weight.device, weight.dtype)

    def _stream(self, x: Tensor) -> Tensor:
        """What enters the blocks, in the dtype that the sums between them are kept in."""
        return x.to(accumulation_dtype(x.dtype)) if self.wide_residual else x

    def _run(self, blocks: nn.ModuleList, x: Tensor, tokens: Ragged, queries: Ragged | None) -> Tensor:
        if self.fused:
            return fused.run(blocks, x, tokens, queries, self._call, self.activation_checkpointing)
        for i, block in enumerate(blocks):
            inputs = block, x, tokens, queries if i == len(blocks) - 1 else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._call, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._call(*inputs)
        return x

    @staticmethod
    def _check(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, init: Init, backend: str) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if round(embed_dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio leaves no hidden units at width {embed_dim}: {mlp_ratio}")
        if init not in ("flat", "depth_scaled"):
            raise ValueError(f"init must be 'flat' or 'depth_scaled', got {init!r}")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"width {embed_dim} cannot be split into {num_heads} heads")
        check_backend(backend)

    def _initialise(self, blocks: nn.ModuleList, init: Init) -> None:
        """Normal weights of std 0.02 cut at +-2 (absolute), zero biases, unit norms.

        "depth_scaled" divides the last weight of attention and MLP in block i (from 1) by sqrt(2 i). The published
        models were trained with "flat": the official start-up code initialises every linear again.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                init_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if init == "depth_scaled":
            for i, block in enumerate(blocks, start=1):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.data.div_((2 * i) ** 0.5)
