"""Packed sets of tokens: the one data type between the image and the loss.

Legend: T packed rows, S sequences, B images, N patches per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""Index of a row that holds no token."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """S sequences of tokens, packed back to back into T rows.

    Attributes:
        indices: int32 [T]. Which token a row holds; ``PADDING`` (-1) beyond ``cu_seqlens[-1]``. For token sets of
            images this is ``image * N + patch``, the row in the flattened ``[B * N]`` patch grid.
        cu_seqlens: int32 [S + 1]. Prefix sums of the sequence lengths; sequence s is rows
            ``cu_seqlens[s]:cu_seqlens[s + 1]``. ``cu_seqlens[-1] <= T``.
        max_seqlen: upper bound of the sequence lengths, known to the host (never read back from the device).
        uniform: the host's promise that every sequence has exactly ``max_seqlen`` tokens and no row is padding, so
            that dense code may take ``[S, max_seqlen]`` for granted.

    T may exceed ``cu_seqlens[-1]``, so that shapes can be rounded up. The rows beyond it are padding: every op of
    this package writes zeros there, forward and backward.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    uniform: bool = False

    def __post_init__(self) -> None:
        for name, tensor in (("indices", self.indices), ("cu_seqlens", self.cu_seqlens)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"Ragged.{name} must be int32 and 1-D, got {tensor.dtype} {tuple(tensor.shape)}")
        if self.cu_seqlens.shape[0] < 1:
            raise ValueError("Ragged.cu_seqlens must hold at least the leading 0")
        if self.uniform and self.num_rows != self.num_sequences * self.max_seqlen:
            raise ValueError(
                f"{self.num_sequences} uniform sequences of {self.max_seqlen} tokens cannot fill {self.num_rows} rows"
            )

    @property
    def num_rows(self) -> int:
        """T: rows, padding included."""
        return self.indices.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def lengths(self) -> Tensor:
        """int32 [S]: tokens of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def valid(self) -> Tensor:
        """bool [T]: False on padding rows."""
        return self.indices >= 0

    def sequence_ids(self) -> Tensor:
        """int64 [T]: the sequence of every row; S on padding rows."""
        rows = torch.arange(self.num_rows, device=self.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows, right=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        return Ragged(
            self.indices.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_seqlen,
            self.uniform,
        )

    def padded(self, num_rows: int) -> Ragged:
        """The same sequences in ``num_rows`` rows, the new ones padding. Raises ValueError if there are fewer rows."""
        extra = num_rows - self.num_rows
        if extra < 0:
            raise ValueError(f"cannot pad {self.num_rows} rows to {num_rows}")
        indices = torch.nn.functional.pad(self.indices, (0, extra), value=PADDING)
        return Ragged(indices, self.cu_seqlens, self.max_seqlen, self.uniform and not extra)

    def every(self, step: int) -> Ragged:
        """The same rows seen as S / step sequences, each the join of ``step`` neighbours.

        With targets packed image-major, ``targets.every(num_targets)`` has one sequence per image.
        """
        if step < 1 or self.num_sequences % step:
            raise ValueError(f"{self.num_sequences} sequences cannot be joined in runs of {step}")
        return Ragged(self.indices, self.cu_seqlens[::step].contiguous(), self.max_seqlen * step, self.uniform)

    @staticmethod
    def full(num_sequences: int, length: int, device: torch.device | str = "cpu") -> Ragged:
        """``num_sequences`` whole sequences of ``length`` tokens: every patch of every image."""
        total = num_sequences * length
        indices = torch.arange(total, dtype=torch.int32, device=device)
        cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
        return Ragged(indices, cu_seqlens, length, uniform=True)

    @staticmethod
    def from_masks(masks: Sequence[Tensor], num_patches: int) -> Ragged:
        """From the official layout: a list of int64 [B, K] patch indices, one entry per block.

        Sequences come out mask-major, as the official encoder orders them: sequence ``m * B + b`` is
        ``masks[m][b]``.

        Raises:
            ValueError: a mask is not 2-D integer, the batch sizes differ, the list is empty, or (where masks are on
                the CPU) a patch is not in the image.
        """
        if not masks:
            raise ValueError("masks is an empty list; pass None for the whole image")
        batch = masks[0].shape[0]
        lengths, rows = [0], []
        for mask in masks:
            integer = not (mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool)
            if mask.dim() != 2 or not integer or mask.shape[0] != batch:
                raise ValueError(f"masks must be integer [B={batch}, K], got {mask.dtype} {tuple(mask.shape)}")
            # A GPU would have to be waited for.
            if mask.is_cpu and not torch.compiler.is_compiling() and ((mask < 0) | (mask >= num_patches)).any():
                raise ValueError(
                    f"masks must hold patches from 0 to {num_patches - 1}, "
                    f"got from {int(mask.min())} to {int(mask.max())}"
                )
            first = torch.arange(batch, device=mask.device)[:, None] * num_patches
            rows.append((mask + first).flatten().to(torch.int32))
            lengths += [mask.shape[1]] * batch
        cu_seqlens = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(masks[0].device)
        uniform = len(set(lengths[1:])) == 1
        return Ragged(torch.cat(rows), cu_seqlens, max(lengths), uniform)

    @staticmethod
    def from_lists(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Ragged:
        """From Python lists of token indices, one per sequence (for tests and small examples)."""
        lengths = [len(sequence) for sequence in sequences]
        indices = torch.tensor([i for sequence in sequences for i in sequence], dtype=torch.int32, device=device)
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        return Ragged(indices, cu_seqlens, max(lengths, default=0))

    def to_lists(self) -> list[list[int]]:
        """Token indices of each sequence, on the host (waits for the device)."""
        bounds = self.cu_seqlens.tolist()
        indices = self.indices.tolist()
        return [indices[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` with zero rows where ``rows`` is -1."""
    return x.index_select(0, rows.clamp(min=0)).masked_fill((rows < 0)[:, None], 0)
