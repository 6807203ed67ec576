"""Variable-length attention over packed sequences, by the backend that is asked for or the best that can run.

Legend: Tq, Tk packed rows of queries and keys, S sequences, H heads, Dh head dim.

``varlen_attention`` and ``varlen_self_attention`` are the two calls a model makes. ``backend="auto"`` takes the first
entry of the priority list of its device that can run the given dtype, head dim and length, and logs each choice once.
A backend named by the user that cannot run raises with the reason: when the model is built if it cannot be imported, at
the first call if it cannot run what it is given.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.attention.backends import BACKENDS, BackendUnavailable, Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """Which backends are tried, in order, for the requests that it holds for. None stands for any."""

    backends: tuple[str, ...]
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    longest: int | None = None
    uniform: bool | None = None

    def holds_for(self, request: Request) -> bool:
        return (
            (self.device is None or request.device.type == self.device)
            and (self.dtypes is None or request.dtype in self.dtypes)
            and (self.head_dims is None or request.head_dim in self.head_dims)
            and (self.longest is None or request.max_seqlen <= self.longest)
            and (self.uniform is None or request.uniform == self.uniform)
        )


PRIORITY = (
    # Nothing has been measured on a GPU yet, and the package's own kernels have run in Triton's interpreter only. So
    # the FlashAttention inside torch comes first, which is known to run, until ``ijepa-fast bench`` says what is faster
    # for which head dims and lengths: those get rows of their own above this one. cuDNN's attention, for sets of one
    # length alone (``uniform``: whole images in the target encoder), waits for that too.
    Preference(("torch_varlen", "triton", "flash_attn", "xformers", "sdpa", "reference"), device="cuda"),
    Preference(("cpu", "sdpa", "reference"), device="cpu"),
    Preference(("sdpa", "reference")),
)
"""The first row that holds for a request is used; backends of a row that cannot run it are passed over."""

OPS = ("triton", "cpu")
"""Backends that are the package's own op on one kind of device; it also takes packed queries, keys and values."""


def check_backend(name: str) -> None:
    """For whoever builds a model: what can be said of a backend before its device and dtype are known.

    Raises:
        ValueError: ``name`` is neither "auto" nor a backend.
        BackendUnavailable: the named backend cannot be imported.
    """
    _check_name(name)
    if name != "auto" and (reason := BACKENDS[name].reason()):
        raise BackendUnavailable(f"attention backend {name!r} cannot run here: {reason}")


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")


_logged: set[tuple] = set()


def resolve(name: str, request: Request) -> str:
    """The backend that will run ``request``: ``name`` itself, or for "auto" the first that can.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: the named backend cannot run the request, or none can.
    """
    _check_name(name)
    if name != "auto":
        if reason := BACKENDS[name].reason(request):
            raise BackendUnavailable(f"attention backend {name!r} cannot run {request}: {reason}")
        return name
    reasons: dict[str, str] = {}
    for preference in PRIORITY:
        if not preference.holds_for(request):
            continue
        for candidate in preference.backends:
            reason = BACKENDS[candidate].reason(request)
            if reason is None:
                if not torch.compiler.is_compiling():
                    _log_once(request, candidate, reasons)
                return candidate
            reasons[candidate] = reason
        break
    raise BackendUnavailable(f"no attention backend can run {request}: {reasons}")


def _log_once(request: Request, chosen: str, reasons: dict[str, str]) -> None:
    kind = (request.device, request.dtype, request.head_dim, chosen)  # lengths may differ at every call
    if kind not in _logged:
        _logged.add(kind)
        dtype = str(request.dtype).removeprefix("torch.")
        passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        log.info(
            "attention with heads of width %d runs on the backend %r (%s, %s)%s",
            request.head_dim,
            chosen,
            request.device.type,
            dtype,
            f"; passed over: {passed_over}" if passed_over else "",
        )


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

    Raises:
        ValueError: no backend has that name; shapes, dtypes or devices that do not fit; or, where cu_q and cu_k are on
            the CPU, bounds that do not fit the rows or the lengths (a GPU would have to be waited for).
        BackendUnavailable: the named backend cannot run the request, or none can.
    """
    if not torch.compiler.is_compiling():
        if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(f"q must be [Tq, H, Dh], k and v [Tk, H, Dh], got {shapes}")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        if cu_q.shape != cu_k.shape:
            raise ValueError(f"cu_q has {tuple(cu_q.shape)} entries, but cu_k {tuple(cu_k.shape)}")
        _check_bounds("cu_q", cu_q, max_q, q)
        if cu_k is not cu_q or max_k != max_q:
            _check_bounds("cu_k", cu_k, max_k, k)
    return _attend(q, k, v, cu_q, cu_k, max_q, max_k, backend, uniform)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, backend: str, uniform: bool
) -> Tensor:
    request = Request(q.device, q.dtype, q.shape[-1], max(max_q, max_k), uniform)
    attend = BACKENDS[resolve(backend, request)].attend
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform)


def varlen_self_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, backend: str = "auto", uniform: bool = False
) -> Tensor:
    """``varlen_attention`` of packed [T, 3, H, Dh] queries, keys and values: returns [T, H, Dh], raises as that."""
    if not torch.compiler.is_compiling():
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(f"qkv must be [T, 3, H, Dh], got {tuple(qkv.shape)}")
        _check_bounds("cu_seqlens", cu_seqlens, max_seqlen, qkv)
    request = Request(qkv.device, qkv.dtype, qkv.shape[-1], max_seqlen, uniform)
    if resolve(backend, request) in OPS:
        return ops.varlen_self_attention(qkv, cu_seqlens, max_seqlen)[0]
    q, k, v = qkv.unbind(1)
    return _attend(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, backend, uniform)


def _check_bounds(name: str, cu_seqlens: Tensor, max_seqlen: int, rows: Tensor) -> None:
    """That prefix sums are some, and fit the packed ``rows`` and the longest length."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"{name} must be int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device}, where the rows are, got {cu_seqlens.device}")
    # The values of a GPU would have to be waited for, and fake tensors have none.
    if not cu_seqlens.is_cpu or type(cu_seqlens) is not Tensor:
        return
    values = cu_seqlens.numpy()  # whose operations on so few numbers are quicker
    first, last = values[0], values[-1]
    if first != 0 or last > len(rows):
        raise ValueError(f"{name} must go from 0 to at most the {len(rows)} rows, got from {first} to {last}")
    lengths = values[1:] - values[:-1]
    if lengths.min(initial=0) < 0:
        raise ValueError(f"{name} must not fall, but one of its lengths is {lengths.min()}")
    if (longest := lengths.max(initial=0)) > max_seqlen:
        raise ValueError(f"the longest sequence of {name} has {longest} rows, more than the {max_seqlen} given")
