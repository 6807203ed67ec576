"""How a run saves: one file by the first rank, or a folder of shards by all ranks, also while the run goes on."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from pathlib import Path

from ijepa_fast.ranks import Ranks
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run import sharded
from ijepa_fast.run.checkpoint import Checkpoint


class Saver:
    """Writes the checkpoints of a run, and removes old ones.

    Args:
        folder: of the checkpoints.
        keep: newest ones that stay.
        me: this rank.
        shards: whether every rank brings tensors, else the first one alone.
        background: go on while shards are written, one checkpoint at a time.
    """

    def __init__(self, folder: Path, keep: int, me: Ranks, *, shards: bool, background: bool):
        self.folder, self.keep, self.me, self.shards, self.background = folder, keep, me, shards, background
        self._writing: tuple[Path, Future] | None = None
        self._written: list[Path] = []
        self._told: Path | None = None
        self._group = me.group_for_saves() if shards else None

    def save(self, checkpoint: Checkpoint, best: bool) -> None:
        """Write a checkpoint; what is no tensor counts on the first rank.

        Raises:
            OSError: it, or the one before, cannot be written; older ones are untouched.
        """
        if not self.shards:
            self._written.append(checkpoints.save(self.folder, checkpoint, self.keep, best))
            return
        self.wait()
        folder = self.folder / f"step_{checkpoint.step:09d}"
        try:
            writing = sharded.save(
                folder,
                checkpoint.tensors,
                {"step": checkpoint.step, "extra": checkpoint.extra},
                group=self._group,
                background=self.background,
                finished=partial(checkpoints.tidy, self.folder, folder, self.keep, best),
            )
        except OSError as error:
            raise checkpoints.with_newest(self.folder, error) from error
        if writing is None:
            self._written.append(folder)
        else:
            self._writing = folder, writing

    def written(self) -> list[Path]:
        """The checkpoints that are on the disk since this was last asked."""
        written, self._written = self._written, []
        return written

    def check(self) -> None:
        """Raise OSError if a save in the background has failed on any rank; every rank must ask."""
        if not self.background:
            return
        folder, writing = self._writing or (None, None)
        done = writing is not None and writing.done()
        error = writing.exception() if done else None
        failures = self.me.union({} if error is None else {self.me.rank: str(sharded.failed(folder, error))})
        if failures:
            self._writing = None
            raise checkpoints.with_newest(self.folder, OSError(failures[min(failures)]))
        if done and folder != self._told:
            self._written.append(folder)
            self._told = folder

    def wait(self) -> None:
        """Wait for a save in the background, and ``check`` it."""
        if self._writing is not None:
            self._writing[1].exception()
            self.check()
            self._writing = None  # here alone: all ranks wait for the same saves, and find them done at other times
