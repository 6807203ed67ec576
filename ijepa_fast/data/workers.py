"""The processes that decode images: how many, how they are waited for, and what is said where they fail."""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

log = logging.getLogger(__name__)

MOST_WORKERS = 16
"""Workers that "auto" takes at most; more than these feed a GPU only where images are very large."""
SHARED_MEMORY = "/dev/shm"


class LoaderError(RuntimeError):
    """No further batch can be had: a worker died, shared memory is full, nothing came in time, too many bad images."""


class StopRequested(Exception):
    """The function ``stop`` that was given to a loader returned True while a batch was awaited."""


def worker_count(workers: int | Literal["auto"], ranks: int) -> int:
    """Workers per rank: as many as asked for, but not more than this machine has cores for each of its ranks.

    "auto" takes one for each of these cores, and 16 at the most. LOCAL_WORLD_SIZE, which torchrun sets, says how many
    ranks share the machine; without it all ``ranks`` do.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if workers == "auto":
        return min(room, MOST_WORKERS)
    if workers > room:
        _say_once(f"loader.workers is {workers}, but there are {room} cores for each rank: {room} workers are used")
    return min(workers, room)


@cache
def _say_once(message: str) -> None:
    log.info(message)


def loading_options(workers: int, prefetch: int, pin_memory: bool) -> dict:
    """Arguments of the DataLoader: requests are whole batches, workers stay out of the run's signals.

    Raises:
        ValueError: prefetch is below 1.
    """
    if prefetch < 1:
        raise ValueError(f"prefetch must be at least 1, got {prefetch}")
    return {
        "batch_size": None,
        "collate_fn": _unchanged,
        "num_workers": workers,
        "prefetch_factor": prefetch if workers else None,
        "timeout": 1 if workers else 0,  # seconds between two looks at `stop` in `batches`
        "worker_init_fn": _set_up_worker,
        "pin_memory": pin_memory,
        # The DataLoader draws a seed for its workers: from its own generator, not from the global one of the run.
        "generator": torch.Generator(),
    }


def check_loading(workers: int | Literal["auto"], timeout: float) -> None:
    """ValueError for a number of workers or a time limit that cannot be."""
    if workers != "auto" and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 0):
        raise ValueError(f'loader.workers must be "auto" or a number that is not negative, got {workers!r}')
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")


def never() -> bool:
    """The default of ``stop``: nobody asks to stop."""
    return False


def batches(
    dataset: Dataset, options: dict, timeout: float, stop: Callable[[], bool] = never, slow_start: bool = False
) -> Iterator:
    """The batches of a DataLoader.

    Args:
        dataset, options: arguments of the DataLoader, those of `loading_options` included.
        timeout: seconds after which waiting for one batch is given up.
        stop: asked once per second while a batch is awaited.
        slow_start: the first batch may take any time.

    Raises:
        StopRequested: `stop` returned True.
        LoaderError: see there.
    """
    others = set(multiprocessing.active_children())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # worker_count has said it in one line
        try:
            iterator = _start(DataLoader(dataset, **options))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise LoaderError(f"{SHARED_MEMORY} has no room for loader workers{_shared_memory_remedy()}") from error
    workers = [process for process in multiprocessing.active_children() if process not in others]
    limit = math.inf if slow_start else timeout
    while True:
        began, warned = time.monotonic(), False
        while True:
            if stop():
                raise StopRequested("asked to stop while a batch was awaited")
            try:
                batch = next(iterator)
                break
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise _explained(error, workers) from None
            waited = time.monotonic() - began
            if waited >= limit:
                for worker in workers:
                    worker.kill()  # it may be stuck where no other signal reaches it
                raise LoaderError(
                    f"no batch came within {waited:.0f} s (the timeout is {timeout:g}): the {len(workers)} loader "
                    "workers were alive but delivered nothing. Is the storage reachable? --loader.workers 0 decodes in "
                    "the training process and shows where it hangs"
                )
            if waited >= 60 and not warned:
                log.warning("no batch of images for %.0f s; after %g s the run ends", waited, limit)
                warned = True
        yield batch
        limit = timeout


def _explained(error: Exception, workers: list) -> Exception:
    """The error without the worker's traceback where it is one of ours, or with the reason why a worker died."""
    if isinstance(error, LoaderError):
        return type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2])
    # A batch that a dead worker had ready cannot be fetched from it, which gives an OSError or EOFError.
    if "exited unexpectedly" not in str(error) and isinstance(error, RuntimeError):
        return error
    for worker in workers:
        worker.join(timeout=1 / len(workers))
    dead = [f"process {worker.pid} {_ending(worker.exitcode)}" for worker in workers if not worker.is_alive()]
    return LoaderError(f"a loader worker died: {'; '.join(dead)}") if dead else error


def _ending(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory runs out: use fewer loader.workers"
    if exit_code == -getattr(signal, "SIGBUS", 0):
        return f"was ended by SIGBUS, as happens when {SHARED_MEMORY} is full{_shared_memory_remedy()}"
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    guard = ""
    if exit_code == 1 and multiprocessing.get_start_method() != "fork":
        guard = '; a program that trains with workers must begin below `if __name__ == "__main__":`'
    return f"ended with exit code {exit_code}{guard}"


def _shared_memory_remedy() -> str:
    try:
        use = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return ""
    return (
        f" ({use.free >> 20} of {use.total >> 20} MiB are free): enlarge it (docker run --shm-size 8g), or use fewer "
        "loader.workers; with --loader.workers 0 it is not needed"
    )


def shared(tensor: Tensor) -> Tensor:
    """The tensor in memory that the main process can read; itself outside of a worker.

    Without this the DataLoader would move it there in a thread, which prints what goes wrong and loses the batch.

    Raises:
        LoaderError: there is no room for it.
    """
    if get_worker_info() is None:
        return tensor
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        size = tensor.numel() * tensor.element_size() / 2**20
        raise LoaderError(
            f"{SHARED_MEMORY} has no room for {size:.1f} MiB of images{_shared_memory_remedy()} [{error}]"
        ) from error


def _start(loader: DataLoader) -> Iterator:
    """``iter(loader)``, with the effect of a Ctrl-C put off until all workers are there.

    Python calls functions of logging, random and others around a fork, and drops what they raise: a KeyboardInterrupt
    that came just then would be printed and forgotten.

    A worker that dies is noticed while a batch is awaited. The DataLoader's handler of SIGCHLD, which would raise in
    the middle of a step, is taken away again.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # neither handler is set or called here
    interrupt, child = signal.getsignal(signal.SIGINT), _child_handler()
    held = []  # without the frames, which would keep the workers alive
    if callable(interrupt):
        signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        return iter(loader)
    finally:
        if child is not None:
            signal.signal(signal.SIGCHLD, child)
        if callable(interrupt):
            signal.signal(signal.SIGINT, interrupt)
            for number in held:
                interrupt(number, None)


def _child_handler():
    return signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None


def _unchanged(batch):
    return batch


def _set_up_worker(_worker: int) -> None:
    """Leave the signals that a terminal or a scheduler sends to the whole process group to the main process.

    It may need the next batches, or time to save, and a worker that dies meanwhile is an error there; it ends its
    workers itself, so a SIGTERM counts only if it comes from it (where the system tells: not on macOS).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
