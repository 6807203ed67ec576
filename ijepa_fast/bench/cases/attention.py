"""Variable-length attention at the lengths of context encoder, target encoder and predictor, beside other libraries.

Legend: T packed rows, S sequences, H heads, Dh head dim.

Queries, keys and values are slices of one packed [T, 3, H, Dh], as a projection leaves them; gradients go to each of
the three. Other libraries are called directly, without the care that ``attention.py`` takes of padding rows, of which
there are none here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ijepa_fast import ops
from ijepa_fast.attention import dispatch as attention
from ijepa_fast.bench.cases.floors import widths
from ijepa_fast.bench.cases.rows import Batch, Case, Provider
from ijepa_fast.ragged import Ragged


def attention_cases(batch: Batch) -> list[Case]:
    """Context, target encoder (dense) and predictor."""
    return [attention_case(batch, part) for part in ("context", "target encoder", "predictor")]


def attention_case(batch: Batch, part: str, peers: Mapping[str, tuple] | None = None) -> Case:
    """The case of a part, with these peers or all there are."""
    tokens = batch.masks.context
    if part != "context":
        whole = Ragged.full(batch.masks.num_images, batch.workload.patches, batch.device)
        tokens = whole if part == "target encoder" else batch.layout.tokens
    width, _ = widths(batch.model, part)
    heads, cu = batch.model.num_heads, tokens.cu_seqlens
    # The longest sequence there is: other libraries choose their tiles by it, and ours launches blocks for it.
    longest = int(tokens.lengths.max())
    bounds = (cu, cu, longest, longest)

    def draw(generator):
        qkv = batch.normal(generator, tokens.num_rows, 3, heads, width // heads)
        return [x.detach() for x in qkv.unbind(1)]

    backend = "triton" if batch.device.type == "cuda" else "auto"

    def ours(q, k, v):
        return attention.varlen_attention(q, k, v, *bounds, backend=backend, uniform=tokens.uniform)

    def exact(q, k, v):
        return ops.varlen_attention.definition(q, k, v, *bounds)[0]

    providers = {"ours": Provider(ours)}
    for name, (load, on_cpu) in (PEERS if peers is None else peers).items():
        try:
            if not (on_cpu or batch.device.type == "cuda"):
                raise Unavailable("runs on CUDA only")
            providers[name] = Provider(load(tokens, longest))
        except (ImportError, Unavailable) as reason:
            providers[name] = Provider(_never, unavailable=str(reason))
    return Case("varlen_attention", part, batch.costs("varlen_attention", part), draw, 3, exact, providers)


class Unavailable(Exception):
    """A library cannot run this case; the message says why."""


def _never(*_: Any) -> None:
    raise AssertionError("an unavailable provider was called")


def _sdpa(tokens: Ragged, longest: int) -> Callable[..., Any]:
    """torch's scaled_dot_product_attention: dense where lengths are equal, else padded with a mask."""
    cu = tokens.cu_seqlens
    return lambda q, k, v: attention.varlen_attention(
        q, k, v, cu, cu, longest, longest, backend="sdpa", uniform=tokens.uniform
    )


def _torch_varlen(tokens: Ragged, longest: int) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    cu = tokens.cu_seqlens
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest)


def _flash_attn(tokens: Ragged, longest: int) -> Callable[..., Any]:
    """FlashAttention 4, 3 or 2, whichever is installed, newest first."""
    cu = tokens.cu_seqlens
    try:
        from flash_attn.cute import flash_attn_varlen_func as attend
    except ImportError:
        try:
            from flash_attn_interface import flash_attn_varlen_func as attend
        except ImportError:
            from flash_attn import flash_attn_varlen_func as attend

    def run(q, k, v):
        out = attend(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
        return out[0] if isinstance(out, tuple) else out

    return run


def _xformers(tokens: Ragged, longest: int) -> Callable[..., Any]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(tokens.lengths.tolist(), device=tokens.device)
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def _cudnn(tokens: Ragged, longest: int) -> Callable[..., Any]:
    """cuDNN's kernel through scaled_dot_product_attention, which takes equal lengths only."""
    if not tokens.uniform:
        raise Unavailable("takes sequences of equal length only")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q, k, v):
        q, k, v = (x.unflatten(0, (tokens.num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    return run


def _flex(tokens: Ragged, longest: int) -> Callable[..., Any]:
    """Compiled flex_attention over all rows; blocks in which no two rows are of one set are passed over."""
    attend, mask = torch.compile(flex_attention, dynamic=False), block_mask(tokens)

    def run(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return run


def block_mask(tokens: Ragged) -> BlockMask:
    """torch's ``BlockMask`` [1, 1, T, T] for attention within each set, without the T * T mask that its own constructor
    would go through (10 billion entries for the predictor of ViT-H/14 at batch 128). No row may be padding."""
    size, cu, rows = 128, tokens.cu_seqlens, torch.arange(tokens.num_rows, device=tokens.device)
    sequence = torch.searchsorted(cu[1:].contiguous(), rows, right=True)
    firsts = rows[::size]
    lasts = (firsts + size - 1).clamp(max=tokens.num_rows - 1)
    # A block of queries reads the keys from the start of its first set to the end of its last: neighbouring blocks.
    start = cu[sequence[firsts]] // size
    stop = (cu[sequence[lasts] + 1] - 1) // size + 1
    order = torch.arange(len(firsts), device=tokens.device)
    blocks = (start[:, None] + order).clamp(max=len(firsts) - 1)
    return BlockMask.from_kv_blocks(
        (stop - start).to(torch.int32)[None, None],
        blocks.to(torch.int32)[None, None],
        BLOCK_SIZE=size,
        mask_mod=lambda b, h, q, k: sequence[q] == sequence[k],
        seq_lengths=(tokens.num_rows, tokens.num_rows),
    )


PEERS = {
    "torch_varlen": (_torch_varlen, False),
    "sdpa": (_sdpa, True),
    "compile": (_flex, False),
    "cudnn": (_cudnn, False),
    "flash_attn": (_flash_attn, False),
    "xformers": (_xformers, False),
}
"""Name -> (what makes a function of q, k and v; whether it runs on the CPU)."""
