"""The backends of variable-length attention: how each is loaded, what it can run, and what it needs around it.

Legend: Tq, Tk packed rows of queries and keys, S sequences, H heads, Dh head dim.

Third-party packages are imported only by the loader of their own backend. ``attention.py`` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.attention.padding import PackRows, PadRows, covered, guarded

HALF = (torch.float16, torch.bfloat16)
KERNEL_HEAD_DIMS = (24, 32, 64, 80, 88, 96, 128)
KERNEL_MAX_SEQLEN = 1024
"""What the package's own kernels are made for. Said here too, because their file cannot be read without Triton."""
WHOLE_WINDOW = (2**30, 2**30)
"""Keys before and after a query that it attends to. FlashAttention-2 takes windows as long as a set for none at all
(``mha_varlen_fwd``, ``mha_varlen_bwd``)."""


class BackendUnavailable(RuntimeError):
    """A backend named by the user cannot run; the message says why."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked to run.

    Attributes:
        max_seqlen: upper bound of the lengths of queries and keys.
        uniform: all query sequences have one length, all key sequences have one, and no row is padding.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    max_seqlen: int
    uniform: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = "sets of one length" if self.uniform else "sets of any length"
        return f"on {self.device.type} in {dtype}, head dim {self.head_dim}, {lengths} up to {self.max_seqlen} tokens"


@dataclass(eq=False)
class Backend:
    """One way to compute variable-length attention.

    Attributes:
        load: imports what is needed and returns ``attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform) -> out``; raises
            ImportError or BackendUnavailable with the reason where nothing can run here.
        refuse: why a request cannot be run, or None.
        attend: what ``load`` returned, once it was called.
        missing: why ``load`` failed, if it did.
    """

    name: str
    load: Callable[[], Callable[..., Tensor]]
    refuse: Callable[[Request], str | None]
    attend: Callable[..., Tensor] | None = field(default=None, init=False)
    missing: str | None = field(default=None, init=False)

    def reason(self, request: Request | None = None) -> str | None:
        """Why this backend cannot run (here at all, or ``request``); None if it can."""
        refusal = None if request is None else self.refuse(request)
        return refusal or _why_missing(self.name)


@torch.compiler.assume_constant_result
def _why_missing(name: str) -> str | None:
    """Loads a backend at the first call. torch.compile runs this as it stands, rather than trace into imports."""
    backend = BACKENDS[name]
    if backend.attend is None and backend.missing is None:
        try:
            backend.attend = backend.load()
        except (ImportError, BackendUnavailable) as error:
            backend.missing = str(error)
    return backend.missing


def _load_op() -> Callable[..., Tensor]:
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        return ops.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k)[0]

    return attend


def _load_triton() -> Callable[..., Tensor]:
    """The op, with the kernels that it takes on CUDA."""
    for module in ("varlen_attention", "varlen_attention_backward"):
        import_module(f"ijepa_fast.kernels.{module}")
    if torch.version.hip is not None:
        raise BackendUnavailable("its kernels are made for NVIDIA GPUs")
    _check_capability()
    return _load_op()


def _check_capability() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        raise BackendUnavailable(f"needs a GPU of compute capability 8.0 or later, this one has {found}")


def _load_reference() -> Callable[..., Tensor]:
    definition = ops.varlen_attention.definition

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        return definition(q, k, v, cu_q, cu_k, max_q, max_k)[0]

    return attend


def _dense(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    """torch's attention of packed sequences of equal length, without copies: [Tq, H, Dh]."""
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _load_sdpa() -> Callable[..., Tensor]:
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        sequences = cu_q.shape[0] - 1
        if sequences == 0:
            return torch.zeros_like(q)
        max_q, max_k = max(max_q, 1), max(max_k, 1)
        if uniform:
            return _dense(q, k, v, sequences)
        num_rows, lengths_k = q.shape[0], cu_k.diff()
        q = PadRows.apply(q, cu_q, max_q).transpose(1, 2)
        k, v = (PadRows.apply(x, cu_k, max_k).transpose(1, 2) for x in (k, v))
        # A sequence without keys keeps one zero key: softmax over nothing is NaN, and NaN * 0 is NaN.
        valid = torch.arange(max_k, device=q.device) < lengths_k.clamp(min=1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
        return PackRows.apply(out.transpose(1, 2), cu_q, num_rows)

    return attend


def _load_cudnn() -> Callable[..., Tensor]:
    """cuDNN's kernels, as torch calls them; they need sequences of equal length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.backends.cudnn.is_available():
        raise BackendUnavailable("this torch has no cuDNN")
    _check_capability()

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        if cu_q.shape[0] == 1:
            return torch.zeros_like(q)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _dense(q, k, v, cu_q.shape[0] - 1)

    return attend


def _version(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(map(int, text.split(".")[:2]))


def _load_torch_varlen() -> Callable[..., Tensor]:
    """FlashAttention-2, unless torch was told to take another version in its place."""
    from torch.nn.attention import current_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    with_copies = guarded(varlen_attn)
    version = _version(torch.__version__)
    # On AMD GPUs the kernels are others; which of them later versions take has not been read.
    if torch.version.hip is not None or version > (2, 14):
        return with_copies
    # torch 2.14 takes cuDNN where it can, but not for windows; 2.10 has none. num_splits would do for forward alone.
    flash = varlen_attn if version < (2, 14) else partial(varlen_attn, window_size=WHOLE_WINDOW)
    with_sequences = covered(flash)

    def attend(*arguments):
        return (with_sequences if current_flash_attention_impl() is None else with_copies)(*arguments)

    return attend


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

        return guarded(attend4)
    around = guarded
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        from flash_attn import __version__, flash_attn_varlen_func

        # On AMD GPUs the kernels are others; those of other versions have not been read.
        if torch.version.hip is None and (2, 4) <= _version(__version__) <= (2, 8):
            around = covered

    def attend(q, k, v, cu_q, cu_k, max_q, max_k):
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k)
        return out[0] if isinstance(out, tuple) else out

    return around(attend)


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

    return guarded(attend)


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
    if refusal := _refuse_unless(("cuda",), HALF)(request):
        return refusal
    if request.head_dim not in KERNEL_HEAD_DIMS:
        return f"has kernels for head dims {', '.join(map(str, KERNEL_HEAD_DIMS))}, not {request.head_dim}"
    if request.max_seqlen > KERNEL_MAX_SEQLEN:
        return f"has kernels for up to {KERNEL_MAX_SEQLEN} tokens, not {request.max_seqlen}"
    return None


def _refuse_cudnn(request: Request) -> str | None:
    """What torch asks before it gives attention to cuDNN, of inputs like ours (its ``can_use_cudnn_attention``)."""
    if refusal := _refuse_unless(("cuda",), HALF, 128)(request):
        return refusal
    if not request.uniform:
        return "needs sets of one length without padding"
    if request.max_seqlen < 2:
        return f"needs at least 2 tokens in a set, got {request.max_seqlen}"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "torch takes it for not deterministic, and deterministic algorithms are demanded"
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("triton", _load_triton, _refuse_triton),
        Backend("flash_attn", _load_flash_attn, _refuse_unless(("cuda",), HALF, 256)),
        Backend("xformers", _load_xformers, _refuse_unless(("cuda",), (*HALF, torch.float32), 256)),
        Backend("torch_varlen", _load_torch_varlen, _refuse_unless(("cuda",), HALF, 256)),
        Backend("cudnn", _load_cudnn, _refuse_cudnn),
        Backend("cpu", _load_op, _refuse_unless(("cpu",), None)),
        Backend("sdpa", _load_sdpa, lambda request: None),
        Backend("reference", _load_reference, lambda request: None),
    )
}
