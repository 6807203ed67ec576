"""Variable-length attention over packed sequences, and the registry of backends that compute it.

Legend: Tq, Tk packed rows of queries and keys, S sequences, H heads, Dh head dim.

``varlen_attention`` and ``varlen_self_attention`` are the two calls a model makes. ``backend="auto"`` takes the first
entry of the priority list of its device that can run the given dtype, head dim and length, and logs the choice once.
A backend named by the user that cannot run raises with the reason. Third-party packages are imported only by the
loader of their own backend.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast import ops, reference

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
PRIORITY = {
    "cuda": ("triton", "flash_attn", "torch_varlen", "xformers", "sdpa", "reference"),
    "cpu": ("cpu", "sdpa", "reference"),
}
"""Per device type, fastest first. Not measured on a GPU yet: the order is that of the design."""

OPS = ("triton", "cpu")
"""Backends that are the package's own op on one kind of device; it also takes packed queries, keys and values."""


class BackendUnavailable(RuntimeError):
    """A backend named by the user cannot run; the message says why."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked to run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    max_seqlen: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"on {self.device.type} in {dtype}, head dim {self.head_dim}, up to {self.max_seqlen} tokens"


@dataclass(frozen=True)
class Backend:
    """One way to compute variable-length attention.

    Attributes:
        load: imports what is needed and returns ``attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform) -> out``; raises
            ImportError with the reason where it cannot.
        refuse: why a request cannot be run, or None.
    """

    name: str
    load: Callable[[], Callable[..., Tensor]]
    refuse: Callable[[Request], str | None]

    def reason(self, request: Request | None = None) -> str | None:
        """Why this backend cannot run (here at all, or ``request``); None if it can."""
        if request is not None and (refusal := self.refuse(request)):
            return refusal
        try:
            _loaded(self.name)
        except ImportError as error:
            return str(error)
        return None


@functools.cache
def _loaded(name: str) -> Callable[..., Tensor]:
    return BACKENDS[name].load()


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None if it can run anything common on this machine, else the reason why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common = [Request(device, dtype, 64, 256) for dtype in (*HALF, torch.float32)]
    reasons = {name: [backend.reason(request) for request in common] for name, backend in BACKENDS.items()}
    return {name: None if None in found else found[0] for name, found in reasons.items()}


@functools.cache
def resolve(name: str, request: Request) -> str:
    """The backend that will run ``request``: ``name`` itself, or for "auto" the first that can.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: the named backend cannot run the request, or none can.
    """
    if name != "auto":
        check_name(name)
        if reason := BACKENDS[name].reason(request):
            raise BackendUnavailable(f"attention backend {name!r} cannot run {request}: {reason}")
        return name
    reasons = {}
    for candidate in PRIORITY.get(request.device.type, ("sdpa", "reference")):
        reasons[candidate] = BACKENDS[candidate].reason(request)
        if reasons[candidate] is None:
            if not torch.compiler.is_compiling():
                passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
                log.info("attention %s: %s%s", request, candidate, f" (not {passed_over})" if passed_over else "")
            return candidate
    raise BackendUnavailable(f"no attention backend can run {request}: {reasons}")


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is "auto" or a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    backend: str = "auto",
    uniform: bool = False,
) -> Tensor:
    """Softmax attention of every packed query sequence to the key sequence of the same number.

    Args:
        q: [Tq, H, Dh]; k, v: [Tk, H, Dh], one dtype.
        cu_q, cu_k: int32 [S + 1] prefix sums of the lengths, on the device of q. Rows beyond the last one are padding.
        max_q, max_k: upper bounds of the lengths, known to the host.
        backend: "auto" or a name in ``BACKENDS``.
        uniform: promise that all query sequences have length max_q, all key sequences max_k, and no row is padding.

    Returns:
        [Tq, H, Dh], zeros on padding rows; differentiable in q, k and v.
    """
    request = Request(q.device, q.dtype, q.shape[-1], max(max_q, max_k))
    attend = _loaded(resolve(backend, request))
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform)


def varlen_self_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, backend: str = "auto", uniform: bool = False
) -> Tensor:
    """``varlen_attention`` of packed [T, 3, H, Dh] queries, keys and values. Returns [T, H, Dh]."""
    request = Request(qkv.device, qkv.dtype, qkv.shape[-1], max_seqlen)
    if resolve(backend, request) in OPS:
        return ops.varlen_self_attention(qkv, cu_seqlens, max_seqlen)[0]
    q, k, v = qkv.unbind(1)
    return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, backend=backend, uniform=uniform)


class _PadRows(torch.autograd.Function):
    """Packed [T, ...] -> [S, max, ...]. Both directions are gathers, because each row has exactly one slot."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.num_rows = x.shape[0]
        return reference.pad_sequences(x, cu_seqlens, max_seqlen)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _take_rows(grad, ctx.saved_tensors[0], ctx.num_rows), None, None


class _PackRows(torch.autograd.Function):
    """[S, max, ...] -> packed [T, ...] with zeros on padding rows."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.max_seqlen = x.shape[1]
        return _take_rows(x, cu_seqlens, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return reference.pad_sequences(grad, ctx.saved_tensors[0], ctx.max_seqlen)[0], None, None


def _take_rows(x: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    row = torch.arange(num_rows, device=x.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    padding = sequence == cu_seqlens.shape[0] - 1
    sequence = sequence.clamp(max=max(x.shape[0] - 1, 0))
    slot = sequence * x.shape[1] + (row - cu_seqlens[sequence])
    out = x.flatten(0, 1).index_select(0, slot.masked_fill(padding, 0))
    return out.masked_fill_(padding.view(-1, *[1] * (out.dim() - 1)), 0)


class _ZeroPadding(torch.autograd.Function):
    """Zeros on padding rows, forward and backward: other libraries leave whatever was in memory."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return _ZeroPadding._masked(x, cu_seqlens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ZeroPadding._masked(grad, ctx.saved_tensors[0]), None

    @staticmethod
    def _masked(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        padding = torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
        return x.masked_fill(padding.view(-1, *[1] * (x.dim() - 1)), 0)


def _guarded(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attend`` of another library with padding rows kept zero in its inputs, its output and all gradients."""

    def guarded(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        if uniform:
            return attend(q, k, v, cu_q, cu_k, max_q, max_k)
        q, k, v = _ZeroPadding.apply(q, cu_q), _ZeroPadding.apply(k, cu_k), _ZeroPadding.apply(v, cu_k)
        return _ZeroPadding.apply(attend(q, k, v, cu_q, cu_k, max_q, max_k), cu_q)

    return guarded


def _load_op() -> Callable[..., Tensor]:
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        return ops.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k)[0]

    return attend


def _load_reference() -> Callable[..., Tensor]:
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        return reference.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k)[0]

    return attend


def _load_sdpa() -> Callable[..., Tensor]:
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        sequences = cu_q.shape[0] - 1
        if sequences == 0:
            return torch.zeros_like(q)
        max_q, max_k = max(max_q, 1), max(max_k, 1)
        if uniform:
            q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        num_rows, lengths_k = q.shape[0], cu_k.diff()
        q = _PadRows.apply(q, cu_q, max_q).transpose(1, 2)
        k, v = (_PadRows.apply(x, cu_k, max_k).transpose(1, 2) for x in (k, v))
        # A sequence without keys keeps one zero key: softmax over nothing is NaN, and NaN * 0 is NaN.
        valid = torch.arange(max_k, device=q.device) < lengths_k.clamp(min=1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
        return _PackRows.apply(out.transpose(1, 2), cu_q, num_rows)

    return attend


def _load_torch_varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    return _guarded(varlen_attn)


def _load_flash_attn() -> Callable[..., Tensor]:
    """FlashAttention 4, 3 or 2, whichever is installed, newest first."""
    try:
        from flash_attn.cute import flash_attn_varlen_func as flash4
    except ImportError:
        pass
    else:

        def attend4(q, k, v, cu_q, cu_k, max_q, max_k):
            out = flash4(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
            return out[0] if isinstance(out, tuple) else out

        return _guarded(attend4)
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        from flash_attn import flash_attn_varlen_func

    def attend(q, k, v, cu_q, cu_k, max_q, max_k):
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k)
        return out[0] if isinstance(out, tuple) else out

    return _guarded(attend)


def _load_xformers() -> Callable[..., Tensor]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    def info(cu_seqlens, max_seqlen):
        # xformers wants the lengths on the host too; its FlashAttention route reads only the device copy and the bound.
        return _SeqLenInfo(seqstart=cu_seqlens, max_seqlen=max_seqlen, min_seqlen=0, seqstart_py=cu_seqlens.tolist())

    def attend(q, k, v, cu_q, cu_k, max_q, max_k):
        bias = BlockDiagonalMask(q_seqinfo=info(cu_q, max_q), k_seqinfo=info(cu_k, max_k))
        used_q, used_k = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
        out = memory_efficient_attention(q[None, :used_q], k[None, :used_k], v[None, :used_k], attn_bias=bias)[0]
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - used_q))

    return _guarded(attend)


def _refuse_unless(devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...] | None, max_head_dim: int | None = None):
    def refuse(request: Request) -> str | None:
        if request.device.type not in devices:
            return f"runs on {' and '.join(devices)}, not on {request.device.type}"
        if dtypes is not None and request.dtype not in dtypes:
            return f"computes in {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {request.dtype}"
        if max_head_dim is not None and (request.head_dim > max_head_dim or request.head_dim % 8):
            return f"needs a head dim that is a multiple of 8 up to {max_head_dim}, got {request.head_dim}"
        return None

    return refuse


def _refuse_triton(request: Request) -> str | None:
    return "no kernel of this package is registered for variable-length attention"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("triton", _load_op, _refuse_triton),
        Backend("flash_attn", _load_flash_attn, _refuse_unless(("cuda",), HALF, 256)),
        Backend("xformers", _load_xformers, _refuse_unless(("cuda",), (*HALF, torch.float32), 256)),
        Backend("torch_varlen", _load_torch_varlen, _refuse_unless(("cuda",), HALF, 256)),
        Backend("cpu", _load_op, _refuse_unless(("cpu",), None)),
        Backend("sdpa", _load_sdpa, lambda request: None),
        Backend("reference", _load_reference, lambda request: None),
    )
}
