"""Ranks: one process per device, started by torchrun (or anything that sets its environment variables)."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """A rank of the run ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank, world_size: this process and how many there are; 0 of 1 without torchrun.
        device: of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=_GROUPS.get("hosts"))

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set; every rank must ask. Runs between hosts and does not wait for the GPU."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_GROUPS.get("hosts"))
        return bool(value)

    def union(self, mapping: dict) -> dict:
        """Entries of all ranks' dicts; every rank must ask. Runs between hosts and does not wait for the GPU."""
        if self.world_size == 1:
            return mapping
        parts: list[dict] = [{}] * self.world_size
        dist.all_gather_object(parts, mapping, group=_GROUPS.get("hosts"))
        return {key: value for part in parts for key, value in part.items()}

    def group_for_saves(self) -> dist.ProcessGroup | None:
        """The group of all ranks between hosts that nothing but saves uses, also while the run goes on; None for a
        process alone."""
        return _GROUPS.get("saves")

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Say which ranks do not answer where waiting for one of them has failed.

        Raises:
            RankLost: a rank ended, or did not answer for ``train.timeout``.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or _OF_GLOO.search(str(error))):
                raise
            raise RankLost(f"{_lost()}; this rank, {self.rank}, ends: {error}") from error

    def from_main(self, value):
        """Rank 0's value (anything picklable, sent between our own processes) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_GROUPS.get("hosts"))
        return box[0]


_OF_GLOO = re.compile(r"gloo/\S+\.(cc|h):\d+")
"""A place in gloo's sources, which its errors begin with: they have no type of their own."""

_GROUPS: dict[str, dist.ProcessGroup | None] = {}
"""Groups of all ranks on gloo: of "hosts", beside the one of GPUs, for "saves", and to "ask" who is still there."""


def _lost() -> str:
    """Which ranks do not answer, asked on a connection that nothing else uses; the first rank gets to know it."""
    try:
        dist.monitored_barrier(_GROUPS["ask"], timeout=timedelta(seconds=20), wait_all_ranks=True)
    except RuntimeError as error:
        if named := re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)):
            return f"rank {named[1].strip(', ')} does not answer"
        return "a rank does not answer: the one that the first rank names, or that itself"
    return "a rank was late (train.timeout)"


def _attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start of the ranks, which all of them have and no earlier start had.

    torchrun's store outlives the ranks that it starts again, and with it the addresses of those that are gone; and each
    host counts the restarts of its own. So the first rank makes the name and tells it to whoever asks, until all have
    heard it. A question of a rank that is gone gets an answer that nobody reads.

    Raises:
        RankLost: some rank does not ask within ``timeout``.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks_{rank}", mine)
        name = store.get(f"answer_{mine}").decode()
        store.set(f"{name}_{rank}", "heard")
        return name
    deadline, waiting = time.monotonic() + timeout.total_seconds(), list(range(1, world_size))
    while waiting := [other for other in waiting if not store.check([f"{mine}_{other}"])]:
        if time.monotonic() > deadline:
            named = ", ".join(map(str, waiting))
            minutes = timeout.total_seconds() / 60
            raise RankLost(f"rank {named} of {world_size} did not start within {minutes:g} minutes (train.timeout)")
        for other in waiting:
            if store.check([f"asks_{other}"]):
                store.set(f"answer_{store.get(f'asks_{other}').decode()}", mine)
        time.sleep(0.02)
    return mine


def pick_device(name: str, local_rank: int) -> torch.device:
    """ "auto", "cpu" or "cuda" -> device of this process. Raises ValueError for others and a GPU that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        apple = "; nothing here has run on Apple's GPUs yet, take cpu" if name == "mps" else ""
        raise ValueError(f"train.device must be auto, cpu or cuda, got {name!r}{apple}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but this torch sees no GPU (ijepa-fast doctor says more)")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible")
    return torch.device("cuda", local_rank)


@contextmanager
def ranks(device: str = "auto", timeout: timedelta = timedelta(minutes=20)) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    Without these variables the process is alone. With only some of them, or with a rendezvous that fails, every rank
    gets an error: nobody trains alone by accident. Ranks wait for each other up to ``timeout``, longer than for images.

    Raises:
        ValueError: incomplete environment, or a device that is not there.
    """
    given = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        yield Ranks(0, 1, _set_device(pick_device(device, 0)))
        return
    missing = sorted(set(_VARIABLES) - set(given))
    if missing:
        raise ValueError(f"distributed launch is missing {', '.join(missing)}; start with torchrun (found {given})")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    chosen = _set_device(pick_device(device, int(os.environ["LOCAL_RANK"])))
    on_gpu = chosen.type == "cuda"
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(_attempt(store, rank, world_size, timeout), store),
        rank=rank,
        world_size=world_size,
        # NCCL ends the process at its timeout. Hosts give up before, while there is time to ask who is lost.
        timeout=timeout + timedelta(minutes=1) if on_gpu else timeout,
        device_id=chosen if on_gpu else None,
    )
    _GROUPS["hosts"] = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else None
    for name in ("saves", "ask"):
        _GROUPS[name] = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield Ranks(rank, world_size, chosen)
    finally:
        dist.destroy_process_group()
        _GROUPS.clear()


def _set_device(device: torch.device) -> torch.device:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
