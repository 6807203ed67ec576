"""Transformer blocks over packed token sets, and the run through a stack of them.

Legend: T packed rows, D width (after H: of one head), H heads. Parameter names are those of ``vit.py``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ijepa_fast.attention.dispatch import check_backend, varlen_attention, varlen_self_attention
from ijepa_fast.ops import accumulation_dtype
from ijepa_fast.ragged import Ragged, take_rows

Init = Literal["flat", "depth_scaled", "whitened"]
COMPILED_VERSIONS = 64
"""Number of versions that torch.compile may make of a block."""
CPU_HIDDEN = 1 << 21
"""Number of hidden values that an MLP computes at a time on the CPU. 8 MB in fp32 stay in the cache between layers."""


def init_normal(weight: Tensor) -> None:
    """Std 0.02, cut at +-2. Clamping has the same distribution as ``trunc_normal_`` so far out (100 sigma), without
    the draw of exactly -1 that some torch versions turn into a weight of -2."""
    with torch.no_grad():
        weight.normal_(std=0.02).clamp_(-2, 2)


class Linear(nn.Linear):
    """``nn.Linear`` whose bias and input may be fp32 beside a low-precision weight."""

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """[T, K] -> [T, D]; ``outputs`` picks output features, and no others are computed."""
        weight, bias = self.part(outputs)
        bias = None if bias is None else bias.to(weight.dtype)
        # Under autocast the weight is the wider one, and torch casts both.
        return F.linear(x.to(weight.dtype) if x.itemsize > weight.itemsize else x, weight, bias)

    def part(self, outputs: slice | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of some output features; None for all."""
        # Never a slice of all: its gradient would be copied into zeros of the size of the weight.
        if outputs is None:
            return self.weight, self.bias
        return self.weight[outputs], None if self.bias is None else self.bias[outputs]


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (eps 1e-6) whose weight may be wider or narrower than the activations."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        # Either may be the wider one: gathered shards are bf16, and so may sums be.
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence.

    Attributes:
        backend: attention kernel, "auto" or a name in ``attention.backends.BACKENDS``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, tokens: Ragged, queries: Ragged | None = None) -> Tensor:
        """[T, D] -> [T, D], or the outputs of the rows ``queries.indices`` alone."""
        dim, heads = x.shape[-1], self.num_heads
        if queries is None:
            # Packed queries, keys and values stay one tensor: our kernels read them in place.
            qkv_T3HD = self.qkv(x).unflatten(-1, (3, heads, -1))
            out = varlen_self_attention(
                qkv_T3HD, tokens.cu_seqlens, tokens.max_seqlen, backend=self.backend, uniform=tokens.uniform
            )
        else:
            # Every token is a key and a value, but only the wanted rows ask.
            q = self.qkv(take_rows(x, queries.indices), slice(0, dim)).unflatten(-1, (heads, -1))
            k, v = self.qkv(x, slice(dim, None)).unflatten(-1, (2, heads, -1)).unbind(1)
            out = varlen_attention(
                q,
                k,
                v,
                queries.cu_seqlens,
                tokens.cu_seqlens,
                queries.max_seqlen,
                tokens.max_seqlen,
                backend=self.backend,
                uniform=tokens.uniform and queries.uniform,
            )
        return self.proj(out.flatten(1))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.shape[0] * self.fc1.out_features
        if x.is_cpu and hidden > CPU_HIDDEN and not torch.compiler.is_compiling():
            return torch.cat([self.fc2(F.gelu(self.fc1(part))) for part in x.chunk(-(-hidden // CPU_HIDDEN))])
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


def _keep_products():
    """Contexts of a checkpointed block: its matrix products are kept, and what is cheap is computed again."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


class BlockStack(nn.Module):
    """Base class of encoder and predictor: checks, initialisation and the run through their blocks.

    Attributes:
        activation_checkpointing: keep only the input of each block for the backward pass and compute the rest again;
            "selective" keeps the results of matrix products, too.
        wide_residual: keep the sums between blocks in fp32 beside low-precision weights; norms read them, products do
            not.
    """

    activation_checkpointing: bool | Literal["selective"] = False
    wide_residual: bool = False

    def use_attention(self, backend: str) -> None:
        """Choose the attention kernel: "auto" or a name in ``attention.backends.BACKENDS``.

        Raises:
            ValueError: no backend has this name.
            BackendUnavailable: it cannot be imported.
        """
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def compile_blocks(self, backend: str | None = "inductor") -> None:
        """Compile each block. Blocks of equal form share their code, for any token counts.

        Args:
            backend: of ``torch.compile``; None for plain blocks again.
        """
        # All compiled modules of a process share the count of versions: one for each width, dtype and kind of sets.
        # Training and evaluation together make nearly the 8 that are allowed, past which dynamo raises.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VERSIONS)
        for module in self.modules():
            if isinstance(module, Block) and backend is None:
                module._compiled_call_impl = None
            elif isinstance(module, Block):
                module.compile(fullgraph=True, dynamic=True, backend=backend)

    def widened(self, x: Tensor) -> Tensor:
        """The input of the first block, in the dtype that the sums between blocks are kept in."""
        return x.to(accumulation_dtype(x.dtype)) if self.wide_residual else x

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, tokens: Ragged, queries: Ragged | None) -> Tensor:
        """[T, D] -> [T, D] through all blocks; the last one computes the rows ``queries.indices`` alone, if given.

        The result is for the norm that follows: behind fused blocks it is a sum that this norm has yet to take.
        """
        for i, block in enumerate(blocks):
            # Earlier blocks need every row, as keys and values of the next.
            wanted = queries if i == len(blocks) - 1 else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                kept = {"context_fn": _keep_products} if self.activation_checkpointing == "selective" else {}
                x = checkpoint(block, x, tokens, wanted, use_reentrant=False, preserve_rng_state=False, **kept)
            else:
                x = block(x, tokens, wanted)
        return x

    @staticmethod
    def _check(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, init: Init, backend: str) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if round(embed_dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio leaves no hidden units at width {embed_dim}: {mlp_ratio}")
        if init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"width {embed_dim} cannot be split into {num_heads} heads")
        check_backend(backend)

    def _initialise(self, blocks: nn.ModuleList, init: Init) -> None:
        """Normal weights of std 0.02 cut at +-2 (absolute), zero biases, unit norms.

        "depth_scaled" divides the last weight of attention and MLP in block i (from 1) by sqrt(2 i). The published
        models were trained with "flat": the official start-up code initialises every linear again. "whitened" is
        "flat" but for the patch embedding of an encoder (``PatchEmbed.whiten``).
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
