"""Gradient norm, EMA, and AdamW with EMA, over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from ijepa_fast.ops.registration import op

SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay")
"""Columns of the settings of ``adamw_ema_``."""


@op("grad_norm")
def grad_norm(
    grads: Sequence[Tensor], tensor_table: Tensor | None = None, program_table: Tensor | None = None
) -> Tensor:
    """L2 norm over all gradients together: a scalar, fp32 (fp64 if any gradient is).

    Args:
        tensor_table, program_table: what ``ops.pointer_tables`` made for the list. Only kernels read them, in all three
            ops.
    """
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=wide)))


@grad_norm.register_fake
def _(grads, tensor_table=None, program_table=None):
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return grads[0].new_empty((), dtype=wide)


@op("ema", mutates_args=("targets",))
def ema_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: Tensor,
    tensor_table: Tensor | None = None,
    program_table: Tensor | None = None,
) -> None:
    """``target = momentum * target + (1 - momentum) * source``, as ``target + (1 - momentum) * (source - target)``.

    Args:
        targets, sources: tensors of equal shapes, pairwise; the targets are updated in place.
        momentum: floating scalar in [0, 1].
    """
    torch._foreach_lerp_(targets, [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)], 1 - float(momentum))


@ema_.register_fake
def _(targets, sources, momentum, tensor_table=None, program_table=None):
    return None


@op("adamw_ema", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "emas", "ema_copies"))
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
    tensor_table: Tensor | None = None,
    program_table: Tensor | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101, as torch.optim.AdamW), then the EMA of the updated parameters. In place.

    With g the scaled gradient and n the number of the step::

        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p = (1 - lr * weight_decay) * p
        p = p - lr / (1 - beta1 ** n) * m / (sqrt(v / (1 - beta2 ** n)) + eps)
        copy = p                                  (rounded)
        ema = ema + (1 - momentum) * (p - ema)
        ema_copy = ema                            (rounded)

    Args:
        params: P fp32 (or fp64) tensors, the values AdamW steps: the masters.
        grads: P gradients in any floating dtype.
        exp_avgs, exp_avg_sqs: P moments m and v, of the dtypes of ``params``.
        copies: low-precision parameters that receive the rounded masters.
        emas: averages, of the dtypes of their masters; ema_copies: their rounded copies.
        copy_index, ema_index, ema_copy_index: P entries each; where master i's copy, EMA and EMA copy stand in those
            lists, or -1 if it has none.
        group_index: P entries; the parameter group of each tensor.
        settings: fp64 [G, 5], the columns ``SETTINGS`` of each group.
        steps: fp32 [P], the number of this step of each tensor, counted from 1.
        momentum: floating scalar, of the EMA.
        grad_scale: floating scalar that multiplies every gradient (clip coefficient over loss scale).
        apply: bool scalar; False leaves all tensors untouched.
    """
    if not apply:
        return
    scale, numbers = float(grad_scale), steps.unbind()
    by_group: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, (group, param) in enumerate(zip(group_index, params, strict=True)):
        by_group.setdefault((group, param.dtype), []).append(i)
    for (group, dtype), members in by_group.items():
        stepped = [params[i] for i in members]
        scaled = [_laid_out_like(params[i], grads[i].to(dtype)) for i in members]
        torch._fused_adamw_(
            stepped,
            scaled if scale == 1 else torch._foreach_mul(scaled, scale),
            [exp_avgs[i] for i in members],
            [exp_avg_sqs[i] for i in members],
            [],
            [numbers[i] for i in members],
            **dict(zip(SETTINGS, settings[group].tolist(), strict=True)),
            amsgrad=False,
            maximize=False,
        )
        # Which it does not do itself: graphs that saved these values must learn that they have changed.
        torch.autograd.graph.increment_version(stepped)
    copied = [i for i, place in enumerate(copy_index) if place >= 0]
    averaged = [i for i, place in enumerate(ema_index) if place >= 0]
    ema_copied = [i for i, place in enumerate(ema_copy_index) if place >= 0]
    if copied:
        torch._foreach_copy_([copies[copy_index[i]] for i in copied], [params[i] for i in copied])
    if averaged:
        ema_.definition([emas[ema_index[i]] for i in averaged], [params[i] for i in averaged], momentum)
    if ema_copied:
        torch._foreach_copy_(
            [ema_copies[ema_copy_index[i]] for i in ema_copied], [emas[ema_index[i]] for i in ema_copied]
        )


@adamw_ema_.register_fake
def _(*args, **kwargs):
    return None


def _laid_out_like(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides of its parameter, which torch's fused step takes for granted."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def pointer_tables(op: str, *lists: Sequence) -> dict[str, Tensor]:
    """Tables of addresses through which the kernels of an optimizer op find its tensors: its last two arguments.

    Keep them and give them to every call with these tensors: a call without (or with tables of other tensors) builds
    its own, which takes the host a millisecond and cannot be captured in a CUDA graph.

    Args:
        op: "grad_norm", "ema_" or "adamw_ema_".
        lists: the op's leading arguments that are lists.

    Returns:
        "tensor_table" and "program_table"; empty where no kernel runs: on the CPU.
    """
    device = lists[0][0].device
    if device.type != "cuda":
        return {}
    module = import_module(f"ijepa_fast.kernels.{op.rstrip('_')}")
    with torch.cuda.device(device):
        tensor_table, program_table = module.tables(*lists)
    return {"tensor_table": tensor_table, "program_table": program_table}
