"""Where every row of the predictor's input comes from, computed on the device from the masks.

Legend: B masks (one or several of each image), C context blocks and M target blocks per mask, Tc, Tt, Tp packed rows of
context, targets and predictor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_fast.ragged import PADDING, Ragged


@dataclass(frozen=True)
class PredictorLayout:
    """The predictor's sequences: number ``(b * C + c) * M + m`` is context block c of mask b, then its target block m.

    Attributes:
        tokens: the predictor's input; ``indices`` are token indices (image * N + patch) in context and target part.
        sources: int32 [Tp]; the context row each row copies, -1 for mask tokens and padding.
        copies: int32 [Tc, M]; the predictor rows that copy a context row, -1 for padding.
        predicted: the rows to predict, one sequence per predictor sequence; ``indices`` are rows of the predictor.
        target_rows: int32 [rows of ``predicted``]; the row of the packed targets each one is compared with, -1 for
            padding.
        target_tokens: the same rows as token indices, for targets held as [B * N, D].
    """

    tokens: Ragged
    sources: Tensor
    copies: Tensor
    predicted: Ragged
    target_rows: Tensor
    target_tokens: Tensor


def _rows_of(cu_seqlens: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence (0 on padding) of each of ``num_rows`` packed rows, its place in it, and whether it is padding."""
    row = torch.arange(num_rows, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    padding = row >= cu_seqlens[-1]
    sequence = sequence.masked_fill(padding, 0)
    return sequence, row - cu_seqlens[sequence], padding


def _prefix_sums(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _int32(values: Tensor, padding: Tensor) -> Tensor:
    return values.masked_fill(padding, PADDING).to(torch.int32)


def predictor_layout(
    context: Ragged, targets: Ragged, num_contexts: int, num_targets: int, num_rows: int | None = None
) -> PredictorLayout:
    """Join every context block of a mask with every target block of it.

    Args:
        context: B * C sequences, mask-major; targets: B * M sequences, mask-major.
        num_contexts: C; num_targets: M.
        num_rows: Tp; by default what full inputs without padding need, ``M * Tc + C * Tt``.

    Raises:
        ValueError: the sequence counts do not belong to one number of masks.
    """
    masks = context.num_sequences // max(num_contexts, 1)
    rest = context.num_sequences % max(num_contexts, 1)  # torch.compile knows no divmod of sizes that vary
    if rest or min(num_contexts, num_targets) < 1 or targets.num_sequences != masks * num_targets:
        raise ValueError(
            f"{context.num_sequences} context and {targets.num_sequences} target sequences do not fit "
            f"{num_contexts} context and {num_targets} target blocks per mask"
        )
    if num_rows is None:
        num_rows = num_targets * context.num_rows + num_contexts * targets.num_rows
    device = context.device
    # Predictor sequence (b, c, m) takes context sequence (b, c) and target sequence (b, m).
    shape = (masks, num_contexts, num_targets)
    context_of = torch.arange(masks * num_contexts, device=device).view(masks, num_contexts, 1).expand(shape)
    target_of = torch.arange(masks * num_targets, device=device).view(masks, 1, num_targets).expand(shape)
    context_of, target_of = context_of.flatten(), target_of.flatten()
    context_length, target_length = context.lengths[context_of], targets.lengths[target_of]
    cu_seqlens = _prefix_sums(context_length + target_length)

    # Every row of the input: first the context's rows, then one for each target token. Rows of the other kind get
    # indices out of range below, which are never used. All of it runs on the device: lengths are known there alone.
    sequence, place, padding = _rows_of(cu_seqlens, num_rows)
    is_target = place >= context_length[sequence]
    source = context.cu_seqlens[context_of[sequence]] + place
    target = targets.cu_seqlens[target_of[sequence]] + place - context_length[sequence]
    last_context, last_target = max(context.num_rows - 1, 0), max(targets.num_rows - 1, 0)
    indices = torch.where(
        is_target, _at(targets.indices, target, last_target), _at(context.indices, source, last_context)
    )
    # Without padding, equal context and target lengths make equal sums.
    tokens = Ragged(
        _int32(indices, padding),
        cu_seqlens,
        context.max_seqlen + targets.max_seqlen,
        context.uniform
        and targets.uniform
        and num_rows == num_targets * context.num_rows + num_contexts * targets.num_rows,
    )

    # The same the other way round, for the backward pass: it sums the gradients of a context row's M copies by reading
    # them, in a fixed order, where adding each copy's to its source would have none.
    context_sequence, context_place, context_padding = _rows_of(context.cu_seqlens, context.num_rows)
    first = context_sequence[:, None] * num_targets + torch.arange(num_targets, device=device)
    copies = _int32(cu_seqlens[first] + context_place[:, None], context_padding[:, None])

    # What is read of the output: the target part of every sequence, as sequences of their own.
    cu_predicted = _prefix_sums(target_length)
    sequence, place, predicted_padding = _rows_of(cu_predicted, num_contexts * targets.num_rows)
    predicted = _int32(cu_seqlens[sequence] + context_length[sequence] + place, predicted_padding)
    target_row = targets.cu_seqlens[target_of[sequence]] + place
    return PredictorLayout(
        tokens,
        _int32(source, padding | is_target),
        copies,
        Ragged(predicted, cu_predicted, targets.max_seqlen, targets.uniform),
        _int32(target_row, predicted_padding),
        _int32(_at(targets.indices, target_row, last_target), predicted_padding),
    )


def _at(values: Tensor, rows: Tensor, last: int) -> Tensor:
    """``values[rows]`` with rows of the other kind (out of range here, and unused) brought into range."""
    if values.shape[0] == 0:
        return torch.full_like(rows, PADDING, dtype=values.dtype)
    return values[rows.clamp(0, last).long()]
