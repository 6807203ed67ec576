"""Plain torch definition of every op. Kernels are tested against these, and CPU tensors run them.

Legend: B images, C channels, p patch size, N patches per image, T packed rows, S sequences, M target blocks per
image, D width, H heads, Dh head dim, K = C * p * p rounded up to a multiple of 16.

Rows whose index is -1 are padding (see ``ragged.Ragged``); every op writes zeros there. Sums are accumulated in
fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_KINDS = ("smooth_l1", "l2", "l1")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded_patch_width(channels: int, patch_size: int) -> int:
    """K: values of one patch rounded up to a multiple of 16, so that bf16 rows start on 32-byte boundaries."""
    return -(-channels * patch_size * patch_size // 16) * 16


def gather_patches(
    images: Tensor, indices: Tensor, patch_size: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    """Normalised pixels of the wanted patches, one patch a row.

    Args:
        images: uint8 or floating [B, C, h, w], h and w divisible by ``patch_size``. uint8 is divided by 255 first.
        indices: int32 [T], ``image * N + patch`` with patches in row-major order; -1 for padding.
        patch_size: p, pixels.
        mean, std: per channel, in units of [0, 1] images; both empty to leave the values as they are.
        dtype: of the result.

    Returns:
        [T, K]; columns in (channel, row, column) order, as a convolution's weight flattens; zeros behind C * p * p.
    """
    batch, channels, height, width = images.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    rows = indices.clamp(min=0).long()
    image, patch = rows // (grid_h * grid_w), rows % (grid_h * grid_w)
    grid = images.view(batch, channels, grid_h, patch_size, grid_w, patch_size)
    x = grid[image, :, patch // grid_w, :, patch % grid_w].to(
        accumulation_dtype(torch.promote_types(images.dtype, dtype))
    )
    if images.dtype == torch.uint8:
        x = x / 255
    if mean:
        shape = (1, channels, 1, 1)
        x = (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
    x = x.flatten(1).to(dtype).masked_fill((indices < 0)[:, None], 0)
    return F.pad(x, (0, padded_patch_width(channels, patch_size) - x.shape[1]))


def gather_add(x: Tensor, table: Tensor, indices: Tensor, gather: bool) -> Tensor:
    """Rows of ``x`` plus the position of their patch.

    ``out[t] = x[indices[t] if gather else t] + table[indices[t] % N]``

    Args:
        x: [R, D]; without ``gather`` R = T.
        table: [N, D] positions.
        indices: int32 [T]; -1 for padding.

    Returns:
        [T, D] in the dtype of ``x``.
    """
    rows = indices.clamp(min=0).long()
    values = x.index_select(0, rows) if gather else x
    out = values + table.index_select(0, rows % table.shape[0]).to(x.dtype)
    return out.masked_fill((indices < 0)[:, None], 0)


def gather_add_backward(
    grad: Tensor, indices: Tensor, num_rows: int, num_positions: int, gather: bool, need_table: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``gather_add`` into ``x`` [num_rows, D] and, if wanted, ``table`` [N, D] (fp32, else empty)."""
    grad = grad.masked_fill((indices < 0)[:, None], 0)
    rows = indices.clamp(min=0).long()
    wide = grad.to(accumulation_dtype(grad.dtype))
    grad_table = wide.new_zeros(0)
    if need_table:
        grad_table = wide.new_zeros(num_positions, grad.shape[1]).index_add_(0, rows % num_positions, wide)
    if not gather:
        return grad, grad_table
    grad_x = wide.new_zeros(num_rows, grad.shape[1]).index_add_(0, rows, wide)
    return grad_x.to(grad.dtype), grad_table


def predictor_tokens(
    context: Tensor, mask_token: Tensor, positions: Tensor, indices: Tensor, sources: Tensor, copies: Tensor
) -> Tensor:
    """Input rows of the predictor: projected context or the mask token, plus the position of the patch.

    ``out[t] = (context[sources[t]] if sources[t] >= 0 else mask_token) + positions[indices[t] % N]``

    Args:
        context: [Tc, D] projected context rows.
        mask_token: [D].
        positions: [N, D] frozen table.
        indices: int32 [Tp] token index of every predictor row; -1 for padding.
        sources: int32 [Tp] context row each predictor row copies; -1 for a mask token (or padding).
        copies: int32 [Tc, M] predictor rows that copy a context row; -1 where there is none. Read by the backward.

    Returns:
        [Tp, D] in the dtype of ``context``.
    """
    from_context = context.index_select(0, sources.clamp(min=0).long())
    values = torch.where((sources >= 0)[:, None], from_context, mask_token.to(context.dtype))
    table = positions.index_select(0, indices.clamp(min=0).long() % positions.shape[0]).to(context.dtype)
    return (values + table).masked_fill((indices < 0)[:, None], 0)


def predictor_tokens_backward(grad: Tensor, indices: Tensor, sources: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients into ``context`` [Tc, D] (sum of the M copies in order) and ``mask_token`` [D] (fp32)."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    grad_context = wide.new_zeros(copies.shape[0], grad.shape[1])
    for copy in copies.T:
        taken = wide.index_select(0, copy.clamp(min=0).long())
        grad_context += taken.masked_fill((copy < 0)[:, None], 0)
    is_mask_token = (sources < 0) & (indices >= 0)
    grad_token = wide.masked_fill(~is_mask_token[:, None], 0).sum(0)
    return grad_context.to(grad.dtype), grad_token


def _loss_rows(prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, normalize: bool, eps: float):
    """Difference to the (normalised) target rows [T, D] and each row's weight [T], both wide."""
    wide = accumulation_dtype(prediction.dtype)
    wanted = target.index_select(0, rows.clamp(min=0).long()).to(wide)
    if normalize:
        wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=eps)
    difference = (prediction.to(wide) - wanted).masked_fill((rows < 0)[:, None], 0)
    lengths = cu_seqlens.diff()
    t = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True).clamp(max=max(lengths.shape[0] - 1, 0))
    length = lengths.index_select(0, sequence).clamp(min=1)
    weight = 1 / (length.to(wide) * lengths.shape[0] * prediction.shape[-1])
    return difference, weight.masked_fill(rows < 0, 0)


def target_loss(
    prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, kind: str, normalize: bool, eps: float
) -> Tensor:
    """Distance of the predictions to the target encoder's (layer-normalised) features.

    Mean over features, then over a block's rows, then over all S blocks: the official mean when blocks have equal
    sizes (arXiv 2301.08243, section 3, averages over blocks).

    Args:
        prediction: [T, D], one row per target token, packed by ``cu_seqlens``.
        target: [R, D] target features.
        rows: int32 [T], the row of ``target`` each prediction is compared with; -1 for padding.
        cu_seqlens: int32 [S + 1], the target blocks. An empty block counts in S and adds nothing.
        kind: "smooth_l1" (beta 1), "l2" (squared difference) or "l1".
        normalize: layer-normalise the target rows over D, without affine parameters.
        eps: of that layer-norm; the official code uses 1e-5.

    Returns:
        fp32 scalar (fp64 for fp64 predictions).
    """
    difference, weight = _loss_rows(prediction, target, rows, cu_seqlens, normalize, eps)
    distance = difference.abs()
    if kind == "smooth_l1":
        values = torch.where(distance < 1, 0.5 * distance * distance, distance - 0.5)
    elif kind == "l2":
        values = distance * distance
    else:
        values = distance
    return (values.sum(-1) * weight).sum()


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
    """Gradient of ``target_loss`` into ``prediction`` [T, D]; the target gets none (it has a stop-gradient)."""
    difference, weight = _loss_rows(prediction, target, rows, cu_seqlens, normalize, eps)
    if kind == "smooth_l1":
        slope = difference.clamp(-1, 1)
    elif kind == "l2":
        slope = 2 * difference
    else:
        slope = difference.sign()
    return (slope * (weight * grad)[:, None]).to(prediction.dtype)


def pad_sequences(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """[T, ...] packed -> [S, max_seqlen, ...] with zeros behind each sequence, and bool [S, max_seqlen] validity."""
    position = torch.arange(max_seqlen, device=x.device)
    valid = position < cu_seqlens.diff()[:, None]
    if x.shape[0] == 0:
        return x.new_zeros(*valid.shape, *x.shape[1:]), valid
    rows = (cu_seqlens[:-1, None] + position).clamp(max=x.shape[0] - 1)
    padded = x.index_select(0, rows.flatten()).unflatten(0, valid.shape)
    return padded.masked_fill_(~valid.view(*valid.shape, *[1] * (x.dim() - 1)), 0), valid


def pack_sequences(x: Tensor, valid: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Inverse of ``pad_sequences``: [S, max, ...] -> [num_rows, ...], zeros on padding rows."""
    rows = cu_seqlens[:-1, None] + torch.arange(x.shape[1], device=x.device)
    rows = torch.where(valid, rows, num_rows).flatten().long()
    return x.new_zeros(num_rows + 1, *x.shape[2:]).index_copy_(0, rows, x.flatten(0, 1))[:num_rows]


def _scores(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, wide: torch.dtype):
    q_SQHD, valid_q = pad_sequences(q.to(wide), cu_q, max_q)
    k_SKHD, valid_k = pad_sequences(k.to(wide), cu_k, max_k)
    scores_SHQK = torch.einsum("sqhd,skhd->shqk", q_SQHD, k_SKHD) * q.shape[-1] ** -0.5
    return scores_SHQK.masked_fill(~valid_k[:, None, None, :], float("-inf")), q_SQHD, k_SKHD, valid_q, valid_k


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each packed sequence: ``softmax(q k^T / sqrt(Dh)) v``.

    Args:
        q: [Tq, H, Dh]; k, v: [Tk, H, Dh]. Sequence s of q attends to sequence s of k and v.
        cu_q, cu_k: int32 [S + 1]; zero-length sequences and padding rows are allowed.
        max_q, max_k: upper bounds of the lengths.

    Returns:
        out [Tq, H, Dh] in the dtype of q, and the log-sum-exp of the scaled scores [Tq, H] (fp32, natural log; 0 on
        padding rows, -inf where a query has no key, whose output is 0).
    """
    wide = accumulation_dtype(q.dtype)
    scores, _, _, valid_q, _ = _scores(q, k, cu_q, cu_k, max_q, max_k, wide)
    v_SKHD, _ = pad_sequences(v.to(wide), cu_k, max_k)
    lse_SHQ = scores.logsumexp(-1)
    weights = (scores - lse_SHQ.masked_fill(lse_SHQ.isinf(), 0)[..., None]).exp()
    out = torch.einsum("shqk,skhd->sqhd", weights, v_SKHD).to(q.dtype)
    out_THD = pack_sequences(out, valid_q, cu_q, q.shape[0])
    return out_THD, pack_sequences(lse_SHQ.transpose(1, 2), valid_q, cu_q, q.shape[0])


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
    """Gradients of ``varlen_attention`` into q, k and v (no gradient flows through the log-sum-exp)."""
    wide = accumulation_dtype(q.dtype)
    scores, q_SQHD, k_SKHD, valid_q, valid_k = _scores(q, k, cu_q, cu_k, max_q, max_k, wide)
    v_SKHD, _ = pad_sequences(v.to(wide), cu_k, max_k)
    grad_SQHD, _ = pad_sequences(grad.to(wide), cu_q, max_q)
    out_SQHD, _ = pad_sequences(out.to(wide), cu_q, max_q)
    lse_SQH, _ = pad_sequences(lse.to(wide), cu_q, max_q)
    lse_SHQ = lse_SQH.transpose(1, 2)
    weights = (scores - lse_SHQ.masked_fill(lse_SHQ.isinf(), 0)[..., None]).exp()
    delta_SHQ = (grad_SQHD * out_SQHD).sum(-1).transpose(1, 2)
    grad_scores = weights * (torch.einsum("sqhd,skhd->shqk", grad_SQHD, v_SKHD) - delta_SHQ[..., None])
    grad_scores = grad_scores * q.shape[-1] ** -0.5
    grad_q = torch.einsum("shqk,skhd->sqhd", grad_scores, k_SKHD).to(q.dtype)
    grad_k = torch.einsum("shqk,sqhd->skhd", grad_scores, q_SQHD).to(k.dtype)
    grad_v = torch.einsum("shqk,sqhd->skhd", weights, grad_SQHD).to(v.dtype)
    return (
        pack_sequences(grad_q, valid_q, cu_q, q.shape[0]),
        pack_sequences(grad_k, valid_k, cu_k, k.shape[0]),
        pack_sequences(grad_v, valid_k, cu_k, v.shape[0]),
    )


def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """``varlen_attention`` of the three parts of ``qkv`` [T, 3, H, Dh]: out [T, H, Dh] and log-sum-exp [T, H]."""
    return varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Gradient of ``varlen_self_attention`` into ``qkv`` [T, 3, H, Dh]."""
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return torch.stack(varlen_attention_backward(grad, *qkv.unbind(1), out, lse, *bounds), 1)


def grad_norm(grads: list[Tensor], rows: Tensor | None = None, blocks: Tensor | None = None) -> Tensor:
    """L2 norm over all gradients together: a scalar, fp32 (fp64 if any gradient is).

    Args:
        rows, blocks: what ``ops.pointer_tables`` made for the list; only kernels read them, here and below.
    """
    norms = [torch.linalg.vector_norm(g, dtype=accumulation_dtype(g.dtype)) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def ema_(
    targets: list[Tensor],
    sources: list[Tensor],
    momentum: Tensor,
    rows: Tensor | None = None,
    blocks: Tensor | None = None,
) -> None:
    """``target = momentum * target + (1 - momentum) * source``, as ``target + (1 - momentum) * (source - target)``.

    Args:
        targets, sources: tensors of equal shapes, pairwise; the targets are updated in place.
        momentum: floating scalar in [0, 1].
    """
    torch._foreach_lerp_(targets, [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)], 1 - float(momentum))


SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay")
"""Columns of the settings of ``adamw_ema_``."""


def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    emas: list[Tensor],
    ema_copies: list[Tensor],
    copy_index: list[int],
    ema_index: list[int],
    ema_copy_index: list[int],
    group_index: list[int],
    settings: Tensor,
    steps: Tensor,
    momentum: Tensor,
    grad_scale: Tensor,
    apply: Tensor,
    rows: Tensor | None = None,
    blocks: Tensor | None = None,
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
        scaled = [_laid_out_like(params[i], grads[i].to(dtype)) for i in members]
        torch._fused_adamw_(
            [params[i] for i in members],
            scaled if scale == 1 else torch._foreach_mul(scaled, scale),
            [exp_avgs[i] for i in members],
            [exp_avg_sqs[i] for i in members],
            [],
            [numbers[i] for i in members],
            **dict(zip(SETTINGS, settings[group].tolist(), strict=True)),
            amsgrad=False,
            maximize=False,
        )
    copied = [i for i, place in enumerate(copy_index) if place >= 0]
    averaged = [i for i, place in enumerate(ema_index) if place >= 0]
    ema_copied = [i for i, place in enumerate(ema_copy_index) if place >= 0]
    if copied:
        torch._foreach_copy_([copies[copy_index[i]] for i in copied], [params[i] for i in copied])
    if averaged:
        ema_([emas[ema_index[i]] for i in averaged], [params[i] for i in averaged], momentum)
    if ema_copied:
        torch._foreach_copy_(
            [ema_copies[ema_copy_index[i]] for i in ema_copied], [emas[ema_index[i]] for i in ema_copied]
        )


def _laid_out_like(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides of its parameter, which torch's fused step takes for granted."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def layer_norm(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer-norm of ``h = x + x_bias + residual``, the step between two parts of a pre-norm transformer block.

    Args:
        x: [T, D].
        residual: [T, D] or None; the stream that x is added to, which may be wider than x.
        x_bias: [D] or None; bias of the projection that x comes from, for a projection that leaves it out.
        weight, bias: [D] or None; of the norm.

    Returns:
        out [T, D] in the dtype of x; h [T, D] in the dtype of the residual (else of x), or empty if h is x; mean and
        reciprocal standard deviation of the rows of h [T], fp32 (fp64 for fp64).
    """
    wide = accumulation_dtype(x.dtype)
    h, total = x.to(wide), x.new_empty(0)
    for term in (x_bias, residual):
        h = h if term is None else h + term.to(wide)
    if x_bias is not None or residual is not None:
        total = h.to(x.dtype if residual is None else residual.dtype)
        h = total.to(wide)
    mean = h.mean(-1)
    centred = h - mean[:, None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    out = centred * rstd[:, None]
    out = out if weight is None else out * weight.to(wide)
    out = out if bias is None else out + bias.to(wide)
    return out.to(x.dtype), total, mean, rstd


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
    """Gradients of ``layer_norm`` into h, x, weight, bias and x_bias.

    Args:
        grad: [T, D] of out; grad_h: [T, D] of h or None.
        h: what was normalised.

    Returns:
        Gradient of h [T, D] in its dtype; the same in the dtype of x if that differs, else empty; weight, bias and
        x_bias [D] in fp32 (fp64 for fp64), empty if not needed.
    """
    wide = mean.dtype
    grad_out = grad.to(wide)
    normal = (h.to(wide) - mean[:, None]) * rstd[:, None]
    scaled = grad_out if weight is None else grad_out * weight.to(wide)
    slope = scaled - normal * (scaled * normal).mean(-1, keepdim=True) - scaled.mean(-1, keepdim=True)
    total = slope * rstd[:, None]
    total = total if grad_h is None else total + grad_h.to(wide)
    empty = grad_out.new_empty(0)
    return (
        total.to(h.dtype),
        total.to(grad.dtype) if grad.dtype != h.dtype else grad.new_empty(0),
        (grad_out * normal).sum(0) if need_weight else empty,
        grad_out.sum(0) if need_bias else empty.clone(),
        total.sum(0) if need_x_bias else empty.clone(),
    )


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """GELU in its exact (erf) form of ``x + bias`` (arXiv 1606.08415): [T, D] in the dtype of x; bias [D] or None."""
    h = x.to(accumulation_dtype(x.dtype))
    return F.gelu(h if bias is None else h + bias.to(h.dtype)).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of ``bias_gelu`` into x [T, D] and bias [D] (fp32, or fp64 for fp64; empty if there is no bias)."""
    wide = accumulation_dtype(x.dtype)
    h = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    cumulative = 0.5 * (1 + torch.erf(h * 0.5**0.5))
    density = torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5
    grad_x = grad.to(wide) * (cumulative + h * density)
    return grad_x.to(x.dtype), grad_x.new_empty(0) if bias is None else grad_x.sum(0)
