"""What FlashAttention-2 does to packed rows, on the CPU: the same rows written, everything else NaN.

Legend: Tq, Tk packed rows of queries and keys, H heads, Dh head dim.
"""

import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from ijepa_fast.attention.dispatch import BACKENDS


def _per_sequence(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Iterator[tuple[slice, slice]]:
    """Rows that a grid of max_q queries and max_k keys reaches, of every sequence."""
    if len(cu_q) == 1:
        raise RuntimeError("batch size must be positive")
    if not (max_q and max_k):
        raise RuntimeError("a grid must not be empty")
    if not (cu_q.is_contiguous() and cu_k.is_contiguous() and cu_q.dtype == cu_k.dtype == torch.int32):
        raise RuntimeError("cu_seqlens must be contiguous and int32")
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(bounds_q) - 1):
        yield (
            slice(bounds_q[i], min(bounds_q[i + 1], bounds_q[i] + max_q)),
            slice(bounds_k[i], min(bounds_k[i + 1], bounds_k[i] + max_k)),
        )


def _unwritten(x: Tensor) -> Tensor:
    return torch.full(x.shape, math.nan, dtype=x.dtype)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5, -1)


@torch.library.custom_op("ijepa_fast_tests::flash_attention_2", mutates_args=())
def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """[Tq, H, Dh], of q [Tq, H, Dh], k and v [Tk, H, Dh]; zeros for queries of sequences without keys."""
    out = _unwritten(q)
    for rows_q, rows_k in _per_sequence(cu_q, cu_k, max_q, max_k):
        out[rows_q] = torch.einsum("hqk,khd->qhd", _weights(q[rows_q], k[rows_k]), v[rows_k])
    return out


@torch.library.custom_op("ijepa_fast_tests::flash_attention_2_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; zeros for queries of sequences without keys, and for keys of those without queries."""
    dq, dk, dv = _unwritten(q), _unwritten(k), _unwritten(v)
    scale = q.shape[-1] ** -0.5
    for rows_q, rows_k in _per_sequence(cu_q, cu_k, max_q, max_k):
        weights = _weights(q[rows_q], k[rows_k])
        dot = torch.einsum("qhd,qhd->hq", grad[rows_q], out[rows_q])
        dweights = torch.einsum("qhd,khd->hqk", grad[rows_q], v[rows_k])
        dscores = weights * (dweights - dot[..., None]) * scale
        dq[rows_q] = torch.einsum("hqk,khd->qhd", dscores, k[rows_k])
        dk[rows_k] = torch.einsum("hqk,qhd->khd", dscores, q[rows_q])
        dv[rows_k] = torch.einsum("hqk,qhd->khd", weights, grad[rows_q])
    return dq, dk, dv


@flash_attention_2.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@_backward_op.register_fake
def _(grad, q, k, v, out, cu_q, cu_k, max_q, max_k):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.max_q, ctx.max_k = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, grad):
    q, k, v, cu_q, cu_k, out = ctx.saved_tensors
    return *_backward_op(grad, q, k, v, out, cu_q, cu_k, ctx.max_q, ctx.max_k), None, None, None, None


flash_attention_2.register_autograd(_backward, setup_context=_setup_context)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """cuDNN promises nothing of rows outside the sequences, nor of sequences without queries or keys."""
    whole = (cu_q.diff() > 0) & (cu_k.diff() > 0)
    written = torch.zeros(len(q), dtype=torch.bool)
    for begin, end in zip(cu_q[:-1][whole].tolist(), cu_q[1:][whole].tolist(), strict=True):
        written[begin:end] = True
    return torch.where(written[:, None, None], flash_attention_2(q, k, v, cu_q, cu_k, max_q, max_k), math.nan)


def loaded(
    name: str,
    attend: Callable[..., Tensor] = flash_attention_2,
    module: str = "flash_attn",
    version: str = "2.8.3",
    cudnn: Callable[..., Tensor] | None = None,
) -> Callable:
    """What the loader of a backend puts around ``attend``, which stands for the library's function.

    Of flash-attn, 3 and 4 are told apart by the ``module`` that they are imported from. torch's function takes
    ``cudnn``, if there is one, unless it is given a window.
    """

    def varlen_attn(*arguments, window_size=(-1, -1)):
        return (attend if cudnn is None or window_size != (-1, -1) else cudnn)(*arguments)

    modules = dict.fromkeys(("flash_attn.cute", "flash_attn_interface", "flash_attn"))  # whose import fails
    modules[module] = SimpleNamespace(flash_attn_varlen_func=attend, __version__=version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
        for known, content in modules.items():
            patch.setitem(sys.modules, known, content)
        return BACKENDS[name].load()
