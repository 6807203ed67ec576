"""Gradient norm, EMA, and AdamW with EMA, see ``reference/optimizer.py``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::grad_norm", mutates_args=())
def grad_norm(grads: Sequence[Tensor], rows: Tensor | None = None, blocks: Tensor | None = None) -> Tensor:
    return reference.grad_norm(grads)


@grad_norm.register_fake
def _(grads, rows=None, blocks=None):
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return grads[0].new_empty((), dtype=wide)


cuda_kernel(grad_norm, "grad_norm", "grad_norm")


@torch.library.custom_op("ijepa_fast::ema_", mutates_args=("targets",))
def ema_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: Tensor,
    rows: Tensor | None = None,
    blocks: Tensor | None = None,
) -> None:
    reference.ema_(targets, sources, momentum)


@ema_.register_fake
def _(targets, sources, momentum, rows=None, blocks=None):
    return None


cuda_kernel(ema_, "ema", "ema_")


@torch.library.custom_op(
    "ijepa_fast::adamw_ema_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "emas", "ema_copies")
)
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    emas: Sequence[Tensor],
    ema_copies: Sequence[Tensor],
    copy_index: Sequence[int],
    ema_index: Sequence[int],
    ema_copy_index: Sequence[int],
    group_index: Sequence[int],
    settings: Tensor,
    steps: Tensor,
    momentum: Tensor,
    grad_scale: Tensor,
    apply: Tensor,
    rows: Tensor | None = None,
    blocks: Tensor | None = None,
) -> None:
    reference.adamw_ema_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        copies,
        emas,
        ema_copies,
        copy_index,
        ema_index,
        ema_copy_index,
        group_index,
        settings,
        steps,
        momentum,
        grad_scale,
        apply,
    )


@adamw_ema_.register_fake
def _(*args, **kwargs):
    return None


cuda_kernel(adamw_ema_, "adamw_ema", "adamw_ema_")


def pointer_tables(op: str, *lists: Sequence) -> dict[str, Tensor]:
    """Tables of addresses through which the kernels of an optimizer op find its tensors: its last two arguments.

    Keep them and give them to every call with these tensors: a call without (or with tables of other tensors) builds
    its own, which takes the host a millisecond and cannot be captured in a CUDA graph.

    Args:
        op: "grad_norm", "ema_" or "adamw_ema_".
        lists: the op's leading arguments that are lists.

    Returns:
        "rows" and "blocks"; empty where no kernel runs: on the CPU.
    """
    device = lists[0][0].device
    if device.type != "cuda":
        return {}
    module = import_module(f"ijepa_fast.kernels.{op.rstrip('_')}")
    with torch.cuda.device(device):
        rows, blocks = module.tables(*lists)
    return {"rows": rows, "blocks": blocks}
