"""The most recent rows of a stream, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class RingBuffer:
    """The last ``capacity`` rows pushed, in one tensor per column.

    Pushing never waits for the device, not even to know how many rows there are: the position is a tensor, so that a
    captured step may contain the push.

    Args:
        capacity: rows kept.
        columns: shape of one entry and dtype, by name.
        device: of the columns.
    """

    def __init__(
        self,
        capacity: int,
        columns: dict[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device | str | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._columns = {
            name: torch.zeros(capacity, *shape, dtype=dtype, device=device) for name, (shape, dtype) in columns.items()
        }
        self._pushed = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def push(self, **rows: Tensor) -> None:
        """Append rows, one tensor [B, *shape] for every column. Of more than ``capacity`` the last ones stay.

        Raises:
            ValueError: columns are missing, unknown, or of different or wrong shapes.
        """
        if rows.keys() != self._columns.keys():
            raise ValueError(f"columns are {sorted(self._columns)}, got {sorted(rows)}")
        count = len(next(iter(rows.values())))
        for name, column in self._columns.items():
            if rows[name].shape != (count, *column.shape[1:]):
                expected = [count, *column.shape[1:]]
                raise ValueError(f"rows of {name} must have the shape {expected}, got {list(rows[name].shape)}")
        kept = min(count, self.capacity)
        place = (self._pushed + torch.arange(count - kept, count, device=self._pushed.device)) % self.capacity
        for name, column in self._columns.items():
            newest = rows[name][count - kept :].to(column.device, column.dtype, non_blocking=True)
            column.index_copy_(0, place, newest)
        self._pushed += count

    def rows(self) -> dict[str, Tensor]:
        """A copy of every column, oldest row first. Waits for the device."""
        pushed = int(self._pushed)
        if pushed <= self.capacity:
            return {name: column[:pushed].clone() for name, column in self._columns.items()}
        return {name: column.roll(-(pushed % self.capacity), 0) for name, column in self._columns.items()}

    def clear(self) -> None:
        self._pushed.zero_()
