"""Averages over the steps of a log interval."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ijepa_fast.ranks import Ranks
from ijepa_fast.step.train_step import StepResult

_MEANS = ("loss", "loss_prediction", "loss_variance", "loss_covariance", "loss_invariance", "grad_norm")


class Meter:
    """Sums over a log interval, on the device; the host reads them at its end alone.

    Args:
        me: this process among the ranks.
        global_batch: images per step on all ranks.
    """

    def __init__(self, me: Ranks, global_batch: int):
        self.me, self.global_batch = me, global_batch
        self._clear()

    def _clear(self) -> None:
        self.sums: Tensor | None = None
        self.steps = self.images = self.context = self.targets = 0
        self.started, self.waited, self.timed = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which the loop waits for images."""
        since = time.perf_counter()
        yield
        self.waited += time.perf_counter() - since

    def add(self, result: StepResult, images: int) -> None:
        values = torch.stack([*(value.float() for value in result.losses), result.grad_norm])
        self.sums = values if self.sums is None else self.sums + values
        self.context, self.targets = self.context + result.tokens[0], self.targets + result.tokens[1]
        self.steps, self.timed, self.images = self.steps + 1, self.timed + 1, self.images + images

    def read(self) -> dict[str, float]:
        """Means over the interval and over ranks (every rank must call it), then start anew."""
        seconds = time.perf_counter() - self.started
        means = dict(zip(_MEANS, (self._mean_over_ranks() / self.steps).tolist(), strict=True))
        metrics = means | {
            "images_per_second": self.timed * self.global_batch / seconds,
            "data_wait_share": self.waited / seconds,
            "context_tokens_per_image": self.context / self.images,
            "target_tokens_per_image": self.targets / self.images,
        }
        self._clear()
        return metrics

    def _mean_over_ranks(self) -> Tensor:
        sums = self.sums.clone()
        if self.me.world_size > 1:
            torch.distributed.all_reduce(sums)
            sums /= self.me.world_size
        return sums

    def state(self) -> dict | None:
        """The interval so far, as JSON holds it, so that a resumed run logs what an undisturbed one would have.

        None at its start. Waits for the device, and every rank must call it.
        """
        if self.sums is None:
            return None
        counts = {name: getattr(self, name) for name in ("steps", "images", "context", "targets")}
        return counts | {"sums": self._mean_over_ranks().tolist()}

    def restore(self, state: dict | None, device: torch.device) -> None:
        """Continue the interval of ``state``; times count from now."""
        self._clear()
        if state is not None and len(state["sums"]) == len(_MEANS):  # fewer in checkpoints of earlier versions
            self.sums = torch.tensor(state["sums"], device=device)
            for name in ("steps", "images", "context", "targets"):
                setattr(self, name, state[name])
