"""Host side of varlen_attention, shared by forward and backward: tile sizes, input checks, launch.

Legend: Tq, Tk packed query and key rows, S sequences, H heads, Dh head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import accumulation_dtype
from ijepa_fast.kernels.specs import CompileSpec, architecture, record_specs
from ijepa_fast.kernels.varlen_attention_tiles import STRIDE_UNIT

MAX_SEQLEN = 1024
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_PARTS = {24: (32, 0), 32: (32, 0), 64: (64, 0), 80: (64, 16), 88: (64, 32), 96: (64, 32), 128: (128, 0)}
"""Head dim -> widths of the one or two tiles that its columns are loaded as."""

MAX_GRID_Z = 65535
MAX_ROW_STRIDE = 2**31 // MAX_SEQLEN
"""Offsets within a sequence are 32-bit."""


class AttentionTile(NamedTuple):
    """Queries and keys that one program works on at a time, and Triton's options."""

    block_q: int
    block_k: int
    num_warps: int
    max_registers: int | None = None  # per thread; None leaves it to the compiler
    num_stages: int = 2


class Config(NamedTuple):
    """Tiles of the forward kernel, the dQ kernel and the dK/dV kernel."""

    forward: AttentionTile
    dq: AttentionTile
    dkdv: AttentionTile


SHORT = 192
"""Mean sequence length, in rows, up to which the tiles for short sequences are used."""

# Chosen from compiled code (registers, spills, instructions per loop) and counted traffic, not yet from times.
# At 30 to 190 rows 64 x 64 tiles waste least per instruction, and three or four programs of 4 warps hide the waits of
# each other's short loops: hence the register bounds 168 and 128 on sm_90. A tile 32 wide takes over where 64 would
# leave two programs. From 192 rows on, reading keys and values again for every 64 queries exceeds what L2 delivers, and
# 128 queries share them. Where the matrix unit reads registers (sm_80), tiles must be smaller still.
_TILES = {
    ("sm_80", "short"): {
        (24, 32): Config(AttentionTile(64, 64, 4), AttentionTile(64, 64, 4), AttentionTile(32, 64, 4)),
        (64, 80, 88, 96): Config(AttentionTile(64, 32, 4), AttentionTile(64, 32, 4), AttentionTile(32, 64, 4)),
        (128,): Config(AttentionTile(128, 32, 8), AttentionTile(64, 32, 4), AttentionTile(32, 64, 4)),
    },
    ("sm_80", "long"): {
        (24, 32): Config(AttentionTile(128, 64, 8), AttentionTile(64, 64, 4), AttentionTile(32, 64, 4)),
        (64, 80, 88, 96, 128): Config(AttentionTile(128, 32, 8), AttentionTile(64, 32, 4), AttentionTile(32, 64, 4)),
    },
    ("sm_90", "short"): {
        (24, 32): Config(AttentionTile(64, 64, 4, 128), AttentionTile(64, 64, 4, 128), AttentionTile(64, 64, 4, 168)),
        (64,): Config(AttentionTile(64, 64, 4, 128), AttentionTile(64, 64, 4, 168), AttentionTile(32, 64, 4, 168)),
        (80,): Config(AttentionTile(64, 64, 4, 168), AttentionTile(64, 64, 4, 168), AttentionTile(32, 64, 4, 168)),
        (88, 96): Config(AttentionTile(64, 64, 4, 168), AttentionTile(64, 32, 4, 168), AttentionTile(32, 64, 4)),
        (128,): Config(AttentionTile(64, 32, 4, 168), AttentionTile(64, 32, 4, 168), AttentionTile(32, 64, 4)),
    },
    ("sm_90", "long"): {
        (24, 32): Config(AttentionTile(128, 64, 8, 128), AttentionTile(128, 64, 8, 128), AttentionTile(64, 64, 4, 168)),
        (64,): Config(AttentionTile(128, 64, 8, 128), AttentionTile(128, 32, 8, 128), AttentionTile(32, 64, 4, 168)),
        (80,): Config(AttentionTile(128, 32, 8, 128), AttentionTile(128, 32, 8, 128), AttentionTile(32, 64, 4, 168)),
        (88, 96): Config(AttentionTile(128, 32, 8, 128), AttentionTile(128, 32, 8, 128), AttentionTile(32, 64, 4)),
        (128,): Config(AttentionTile(128, 32, 8, 128), AttentionTile(64, 32, 4, 168), AttentionTile(32, 64, 4)),
    },
    ("sm_100", "short"): {
        (24, 32, 64, 80): Config(AttentionTile(64, 64, 4), AttentionTile(64, 64, 4), AttentionTile(64, 64, 4)),
        (88, 96): Config(AttentionTile(64, 64, 4), AttentionTile(64, 64, 4), AttentionTile(32, 64, 4)),
        (128,): Config(AttentionTile(64, 64, 4), AttentionTile(64, 32, 4), AttentionTile(32, 64, 4)),
    },
    ("sm_100", "long"): {
        (24, 32, 64, 80): Config(AttentionTile(128, 64, 8), AttentionTile(64, 64, 4), AttentionTile(64, 64, 4)),
        (88, 96): Config(AttentionTile(128, 64, 8), AttentionTile(64, 64, 4), AttentionTile(32, 64, 4)),
        (128,): Config(AttentionTile(128, 64, 8), AttentionTile(64, 32, 4), AttentionTile(32, 64, 4)),
    },
}
CONFIGS = {
    (arch, dtype, head_dim, lengths): config
    for (arch, lengths), by_head_dims in _TILES.items()
    for head_dims, config in by_head_dims.items()
    for head_dim in head_dims
    for dtype in DTYPES
}
"""(architecture, dtype, head dim, "short" or "long") -> tiles."""


def tile_config(rows: Tensor, cu_seqlens: Tensor) -> Config:
    """The tiles for sequences packed in ``rows`` [T, H, Dh]. Their mean length chooses, which the host knows.

    Under the interpreter fp32 and fp64 take the tiles of bfloat16.
    """
    dtype = rows.dtype if rows.dtype in DTYPES else torch.bfloat16
    lengths = "short" if rows.shape[0] <= SHORT * (cu_seqlens.shape[0] - 1) else "long"
    return CONFIGS[architecture(), dtype, rows.shape[2], lengths]


def check_inputs(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """Raises ValueError for whatever the kernels would read wrongly, as far as the host can tell.

    Only the device knows that cu_q and cu_k start at 0, never fall, end within q and k, and that their steps stay
    within max_q and max_k: queries beyond max_q are left unwritten.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"varlen_attention: q must be [Tq, H, Dh] and k, v [Tk, H, Dh], got {shapes}")
    if q.shape[2] not in HEAD_DIM_PARTS:
        known = ", ".join(map(str, HEAD_DIM_PARTS))
        raise ValueError(f"varlen_attention: head dim must be one of {known}, got {q.shape[2]}")
    if not triton.knobs.runtime.interpret and q.dtype not in DTYPES:
        raise ValueError(f"varlen_attention: q, k and v must be bfloat16 or float16, got {q.dtype}")
    for name, bound in (("max_q", max_q), ("max_k", max_k)):
        if not 0 <= bound <= MAX_SEQLEN:
            raise ValueError(f"varlen_attention: {name} must be from 0 to {MAX_SEQLEN}, got {bound}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"varlen_attention: {name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
        if x.stride(2) != 1 or x.stride(1) != x.shape[2] or x.stride(0) % STRIDE_UNIT.value:
            raise ValueError(
                f"varlen_attention: the heads of a row of {name} must be contiguous and its rows start on multiples of "
                f"{STRIDE_UNIT.value} elements, got strides {x.stride()}"
            )
        if x.stride(0) >= MAX_ROW_STRIDE:
            raise ValueError(
                f"varlen_attention: rows of {name} must be less than {MAX_ROW_STRIDE} elements apart, "
                f"got strides {x.stride()}"
            )
    for name, x in (("cu_q", cu_q), ("cu_k", cu_k)):
        if x.dtype != torch.int32 or x.device != q.device or x.dim() != 1 or not x.is_contiguous():
            raise ValueError(
                f"varlen_attention: {name} must be int32 [S + 1] on {q.device}, contiguous, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
    if cu_q.shape != cu_k.shape or cu_q.shape[0] == 0:
        raise ValueError(f"varlen_attention: cu_q has {cu_q.shape[0]} entries and cu_k {cu_k.shape[0]}, not S + 1 each")


def check_gradient_inputs(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor) -> None:
    """Raises ValueError unless grad, out and lse are as the forward pass of q made them, and contiguous."""
    wanted = {"grad": (grad, q.shape, q.dtype), "out": (out, q.shape, q.dtype)}
    wanted["lse"] = (lse, q.shape[:2], accumulation_dtype(q.dtype))
    for name, (x, shape, dtype) in wanted.items():
        if x.shape != shape or x.dtype != dtype or x.device != q.device or not x.is_contiguous():
            raise ValueError(
                f"varlen_attention_backward: {name} must be {dtype} {list(shape)} on {q.device}, contiguous, "
                f"got {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}"
            )


def with_equal_strides(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v, copied if their rows lie differently far apart: the kernels use the same offsets for both."""
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def row_strides(*tensors: Tensor) -> list[int]:
    """Elements from row to row of each tensor, in the kernels' unit."""
    return [x.stride(0) // STRIDE_UNIT.value for x in tensors]


def launch(
    kernel,
    tile: AttentionTile,
    tensors: Sequence[Tensor],
    *,
    rows_of: Tensor,
    block: int,
    max_seqlen: int,
    strides: Sequence[int],
) -> None:
    """One program for every ``block`` rows of every sequence and head of ``rows_of`` [T, H, Dh], which it writes.

    Args:
        tensors: the kernel's pointers, in its order; the last are cu_q and cu_k.
        max_seqlen: of the sequences of ``rows_of``.
        strides: the kernel's row strides, in its order.
    """
    if not rows_of.numel():
        return
    num_rows, num_heads, head_dim = rows_of.shape
    num_sequences = tensors[-1].shape[0] - 1
    width, rest = HEAD_DIM_PARTS[head_dim]
    blocks = max(1, triton.cdiv(max_seqlen, block))  # one at least, to write zeros to the padding rows
    # A grid's third axis is limited, so many short sequences take several launches.
    for first_sequence in range(0, num_sequences + 1, MAX_GRID_Z):
        kernel[blocks, num_heads, min(num_sequences + 1 - first_sequence, MAX_GRID_Z)](
            *tensors,
            first_sequence,
            num_sequences,
            num_rows,
            *strides,
            HEAD_DIM=head_dim,
            WIDTH=width,
            REST=rest,
            BLOCK_Q=tile.block_q,
            BLOCK_K=tile.block_k,
            ACCUMULATE=tl.float64 if rows_of.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )


def attention_specs(arch: str, launcher: Callable, gradient: bool) -> Iterator[CompileSpec]:
    """The compilations of ``varlen_self_attention`` or its backward for every row of the table."""
    for row_arch, dtype, head_dim, lengths in CONFIGS:
        if row_arch != arch:
            continue
        num_rows = 2 * (SHORT if lengths == "short" else MAX_SEQLEN)
        qkv = torch.empty(num_rows, 3, 2, head_dim, dtype=dtype, device="meta")
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
        out, lse = torch.empty_like(qkv[:, 0]), torch.empty(num_rows, 2, device="meta")
        saved = (out, qkv, out, lse) if gradient else (qkv,)
        case = f"{str(dtype).removeprefix('torch.')} Dh={head_dim} {lengths}"
        yield from record_specs(arch, case, launcher, *saved, cu_seqlens, MAX_SEQLEN, product=True)
