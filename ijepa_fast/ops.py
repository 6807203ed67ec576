"""The operators of the package, registered with torch: the only file that knows ``torch.library``.

Each op stands with its shape rule (fake) and its autograd formula. What an op computes is defined in
``reference.py``, which every device without a kernel of ours runs; CUDA tensors take the kernels, and attention on
the CPU torch's fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from ijepa_fast import cpu_attention, reference


def _cuda_kernel(op: torch.library.CustomOpDef, module: str, function: str) -> None:
    """CUDA tensors take ``ijepa_fast.kernels.<module>.<function>``, whose file (and Triton) is loaded at first use."""

    @op.register_kernel("cuda")
    def launch(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return getattr(import_module(f"ijepa_fast.kernels.{module}"), function)(*args)


@torch.library.custom_op("ijepa_fast::gather_patches", mutates_args=())
def gather_patches(
    images: Tensor, indices: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    return reference.gather_patches(images, indices, patch_size, list(mean), list(std), dtype)


@gather_patches.register_fake
def _(images, indices, patch_size, mean, std, dtype):
    width = reference.padded_patch_width(images.shape[1], patch_size)
    return images.new_empty(indices.shape[0], width, dtype=dtype)


_cuda_kernel(gather_patches, "gather_patches", "gather_patches")


@torch.library.custom_op("ijepa_fast::gather_add", mutates_args=())
def gather_add(x: Tensor, table: Tensor, indices: Tensor, gather: bool) -> Tensor:
    return reference.gather_add(x, table, indices, gather)


@gather_add.register_fake
def _(x, table, indices, gather):
    return x.new_empty(indices.shape[0], x.shape[1])


@torch.library.custom_op("ijepa_fast::gather_add_backward", mutates_args=())
def gather_add_backward(
    grad: Tensor, indices: Tensor, num_rows: int, num_positions: int, gather: bool, need_table: bool
) -> tuple[Tensor, Tensor]:
    return reference.gather_add_backward(grad, indices, num_rows, num_positions, gather, need_table)


@gather_add_backward.register_fake
def _(grad, indices, num_rows, num_positions, gather, need_table):
    table_shape = (num_positions, grad.shape[1]) if need_table else (0,)
    wide = reference.accumulation_dtype(grad.dtype)
    return grad.new_empty(num_rows, grad.shape[1]), grad.new_empty(table_shape, dtype=wide)


def _gather_add_setup(ctx, inputs, output):
    x, table, indices, gather = inputs
    ctx.save_for_backward(indices)
    ctx.num_rows, ctx.num_positions, ctx.table_dtype, ctx.gather = x.shape[0], table.shape[0], table.dtype, gather


def _gather_add_grad(ctx, grad):
    (indices,) = ctx.saved_tensors
    need_table = ctx.needs_input_grad[1]
    grad_x, grad_table = gather_add_backward(
        grad.contiguous(), indices, ctx.num_rows, ctx.num_positions, ctx.gather, need_table
    )
    return grad_x, grad_table.to(ctx.table_dtype) if need_table else None, None, None


gather_add.register_autograd(_gather_add_grad, setup_context=_gather_add_setup)
_cuda_kernel(gather_add, "gather_add", "gather_add")
_cuda_kernel(gather_add_backward, "gather_add", "gather_add_backward")


@torch.library.custom_op("ijepa_fast::predictor_tokens", mutates_args=())
def predictor_tokens(
    context: Tensor, mask_token: Tensor, positions: Tensor, indices: Tensor, sources: Tensor, copies: Tensor
) -> Tensor:
    return reference.predictor_tokens(context, mask_token, positions, indices, sources, copies)


@predictor_tokens.register_fake
def _(context, mask_token, positions, indices, sources, copies):
    return context.new_empty(indices.shape[0], context.shape[1])


@torch.library.custom_op("ijepa_fast::predictor_tokens_backward", mutates_args=())
def predictor_tokens_backward(grad: Tensor, indices: Tensor, sources: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    return reference.predictor_tokens_backward(grad, indices, sources, copies)


@predictor_tokens_backward.register_fake
def _(grad, indices, sources, copies):
    wide = reference.accumulation_dtype(grad.dtype)
    return grad.new_empty(copies.shape[0], grad.shape[1]), grad.new_empty(grad.shape[1], dtype=wide)


def _predictor_tokens_setup(ctx, inputs, output):
    _, mask_token, _, indices, sources, copies = inputs
    ctx.save_for_backward(indices, sources, copies)
    ctx.token_dtype = mask_token.dtype


def _predictor_tokens_grad(ctx, grad):
    grad_context, grad_token = predictor_tokens_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_context, grad_token.to(ctx.token_dtype), None, None, None, None


predictor_tokens.register_autograd(_predictor_tokens_grad, setup_context=_predictor_tokens_setup)
_cuda_kernel(predictor_tokens, "predictor_tokens", "predictor_tokens")
_cuda_kernel(predictor_tokens_backward, "predictor_tokens", "predictor_tokens_backward")


@torch.library.custom_op("ijepa_fast::target_loss", mutates_args=())
def target_loss(
    prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, kind: str, normalize: bool, eps: float
) -> Tensor:
    if kind not in reference.LOSS_KINDS:
        raise ValueError(f"loss must be one of {', '.join(reference.LOSS_KINDS)}, got {kind!r}")
    return reference.target_loss(prediction, target, rows, cu_seqlens, kind, normalize, eps)


@target_loss.register_fake
def _(prediction, target, rows, cu_seqlens, kind, normalize, eps):
    return prediction.new_empty((), dtype=reference.accumulation_dtype(prediction.dtype))


@torch.library.custom_op("ijepa_fast::target_loss_backward", mutates_args=())
def target_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    normalize: bool,
    eps: float,
) -> Tensor:
    return reference.target_loss_backward(grad, prediction, target, rows, cu_seqlens, kind, normalize, eps)


@target_loss_backward.register_fake
def _(grad, prediction, target, rows, cu_seqlens, kind, normalize, eps):
    return prediction.new_empty(prediction.shape)


def _target_loss_setup(ctx, inputs, output):
    prediction, target, rows, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(prediction, target, rows, cu_seqlens)


def _target_loss_grad(ctx, grad):
    return target_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None


target_loss.register_autograd(_target_loss_grad, setup_context=_target_loss_setup)
_cuda_kernel(target_loss, "target_loss", "target_loss")
_cuda_kernel(target_loss_backward, "target_loss", "target_loss_backward")


@torch.library.custom_op("ijepa_fast::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # autocast would reach the products inside the reference
        return reference.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k)


@varlen_attention.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k):
    lse = q.new_empty(q.shape[0], q.shape[1], dtype=reference.accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("ijepa_fast::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return reference.varlen_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k)


@varlen_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _varlen_attention_setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.bounds = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _varlen_attention_grad(ctx, grad, _grad_lse):
    grads = varlen_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.bounds)
    return *grads, None, None, None, None


varlen_attention.register_autograd(_varlen_attention_grad, setup_context=_varlen_attention_setup)
_cuda_kernel(varlen_attention, "varlen_attention", "varlen_attention")
varlen_attention.register_kernel("cpu")(cpu_attention.varlen_attention)
_cuda_kernel(varlen_attention_backward, "varlen_attention_backward", "varlen_attention_backward")
varlen_attention_backward.register_kernel("cpu")(cpu_attention.varlen_attention_backward)


@torch.library.custom_op("ijepa_fast::varlen_self_attention", mutates_args=())
def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.varlen_self_attention(qkv, cu_seqlens, max_seqlen)


@varlen_self_attention.register_fake
def _(qkv, cu_seqlens, max_seqlen):
    rows, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(rows, heads, dtype=reference.accumulation_dtype(qkv.dtype))
    return qkv.new_empty(rows, heads, head_dim), lse


@torch.library.custom_op("ijepa_fast::varlen_self_attention_backward", mutates_args=())
def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.varlen_self_attention_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen)


@varlen_self_attention_backward.register_fake
def _(grad, qkv, out, lse, cu_seqlens, max_seqlen):
    return qkv.new_empty(qkv.shape)


def _varlen_self_attention_setup(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens)


def _varlen_self_attention_grad(ctx, grad, _grad_lse):
    grad_qkv = varlen_self_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.max_seqlen)
    return grad_qkv, None, None


varlen_self_attention.register_autograd(_varlen_self_attention_grad, setup_context=_varlen_self_attention_setup)
_cuda_kernel(varlen_self_attention, "varlen_attention", "varlen_self_attention")
varlen_self_attention.register_kernel("cpu")(cpu_attention.varlen_self_attention)
_cuda_kernel(varlen_self_attention_backward, "varlen_attention_backward", "varlen_self_attention_backward")
varlen_self_attention_backward.register_kernel("cpu")(cpu_attention.varlen_self_attention_backward)


@torch.library.custom_op("ijepa_fast::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.layer_norm(x, residual, x_bias, weight, bias, eps)


@layer_norm.register_fake
def _(x, residual, x_bias, weight, bias, eps):
    statistics = x.new_empty(x.shape[0], dtype=reference.accumulation_dtype(x.dtype))
    adds = residual is not None or x_bias is not None
    h = x.new_empty(x.shape if adds else (0,), dtype=x.dtype if residual is None else residual.dtype)
    return x.new_empty(x.shape), h, statistics, torch.empty_like(statistics)


@torch.library.custom_op("ijepa_fast::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.layer_norm_backward(grad, grad_h, h, mean, rstd, weight, need_weight, need_bias, need_x_bias)


@layer_norm_backward.register_fake
def _(grad, grad_h, h, mean, rstd, weight, need_weight, need_bias, need_x_bias):
    sums = [mean.new_empty(h.shape[1] if need else 0) for need in (need_weight, need_bias, need_x_bias)]
    return h.new_empty(h.shape), grad.new_empty(grad.shape if grad.dtype != h.dtype else (0,)), *sums


def _layer_norm_setup(ctx, inputs, output):
    x, residual, x_bias, weight, bias, _ = inputs
    _, h, mean, rstd = output
    ctx.adds = residual is not None or x_bias is not None
    ctx.mark_non_differentiable(mean, rstd, *([] if ctx.adds else [h]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h if ctx.adds else x, mean, rstd, weight)
    ctx.x_dtype, ctx.dtypes = x.dtype, [None if t is None else t.dtype for t in (weight, bias, x_bias)]


def _layer_norm_grad(ctx, grad, grad_h, _grad_mean, _grad_rstd):
    h, mean, rstd, weight = ctx.saved_tensors
    if grad is None:  # only h was used
        grad = torch.zeros_like(h, dtype=ctx.x_dtype)
    needs_x, needs_residual, needs_x_bias, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_h = grad_h.contiguous() if ctx.adds and grad_h is not None else None
    total, grad_x, *sums = layer_norm_backward(
        grad.contiguous(), grad_h, h, mean, rstd, weight, needs_weight, needs_bias, needs_x_bias
    )
    needs = (needs_weight, needs_bias, needs_x_bias)
    of_weight, of_bias, of_x_bias = (
        g.to(dtype) if need else None for g, dtype, need in zip(sums, ctx.dtypes, needs, strict=True)
    )
    of_x = total if ctx.x_dtype == h.dtype else grad_x
    return of_x if needs_x else None, total if needs_residual else None, of_x_bias, of_weight, of_bias, None


layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)
_cuda_kernel(layer_norm, "layer_norm", "layer_norm")
_cuda_kernel(layer_norm_backward, "layer_norm", "layer_norm_backward")


@torch.library.custom_op("ijepa_fast::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return reference.bias_gelu(x, bias)


@bias_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("ijepa_fast::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.bias_gelu_backward(grad, x, bias)


@bias_gelu_backward.register_fake
def _(grad, x, bias):
    width = 0 if bias is None else x.shape[1]
    return x.new_empty(x.shape), x.new_empty(width, dtype=reference.accumulation_dtype(x.dtype))


def _bias_gelu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _bias_gelu_grad(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = bias_gelu_backward(grad.contiguous(), x, bias)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype)


bias_gelu.register_autograd(_bias_gelu_grad, setup_context=_bias_gelu_setup)
_cuda_kernel(bias_gelu, "gelu", "bias_gelu")
_cuda_kernel(bias_gelu_backward, "gelu", "bias_gelu_backward")


@torch.library.custom_op("ijepa_fast::grad_norm", mutates_args=())
def grad_norm(grads: Sequence[Tensor], rows: Tensor | None = None, blocks: Tensor | None = None) -> Tensor:
    return reference.grad_norm(grads)


@grad_norm.register_fake
def _(grads, rows=None, blocks=None):
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return grads[0].new_empty((), dtype=wide)


_cuda_kernel(grad_norm, "grad_norm", "grad_norm")


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


_cuda_kernel(ema_, "ema", "ema_")


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


_cuda_kernel(adamw_ema_, "adamw_ema", "adamw_ema_")


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
