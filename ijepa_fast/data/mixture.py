"""Several sources as one, each with its share of a run's images: a function of (seed, n) for the n-th image of the run.

Sources are told apart one after the other, from the last: of the first m images that are left, floor(m * share) belong
to the sources before it, share being theirs in what is left, and the others to it (Bresenham's line). So in any stretch
of a run a source has its share but for an image or two, and how many it had before the n-th is known without counting.
Its images come in its own order, epoch after epoch, as if it were alone, and none is dropped at the end of one.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from ijepa_fast.data.bands import pixels_of
from ijepa_fast.data.order import StepSamples, epoch_permutation
from ijepa_fast.data.source import Source

log = logging.getLogger(__name__)

_FINEST = 10**9
"""Largest denominator of a share, so that a step's numbers fit into 64 bits."""
_LEAST_SHARE = 1e-6


class Mixture:
    """A `Source` that holds all images of others, one source after the other; `TrainLoader` draws them by weight.

    Args:
        sources: whose images any index gives, and whose crops are alike.
        weights: how often images of each come, in relation to one another.
        names: what to call the sources in messages; by default their numbers.

    Attributes:
        labels, classes: those of the sources where all have the same classes, else None.
        shares: of the images of a run, by source; they add up to 1.

    Raises:
        ValueError: there are no sources, a weight is not a positive number or less than a millionth of all, or pixels
            differ.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], names: Sequence[str] | None = None):
        names = [f"source {number}" for number in range(len(sources))] if names is None else list(names)
        if not sources or len(weights) != len(sources):
            raise ValueError(f"a mixture needs a weight for each of its sources, got {len(sources)} and {len(weights)}")
        for name, weight in zip(names, weights, strict=True):
            check_weight(name, weight)
        self.sources, self.pixels = list(sources), pixels_of(sources[0])
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [float(weight / sum(exact)) for weight in exact]
        # Share of the sources before each one in what is left when those behind it have taken theirs.
        self._before = [
            (sum(exact[:number]) / sum(exact[: number + 1])).limit_denominator(_FINEST) for number in range(len(exact))
        ]
        for name, source, weight, share in zip(names, sources, weights, self.shares, strict=True):
            if pixels_of(source) != self.pixels:
                raise ValueError(f"the pixels of {name} are {pixels_of(source)}, those of {names[0]} {self.pixels}")
            if share < _LEAST_SHARE:
                raise ValueError(f"the weight of {name} is less than a millionth of all, got {weight}")
        self._ends = np.cumsum([len(source) for source in sources])
        self.labels, self.classes = None, sources[0].classes
        others = [name for name, s in zip(names, sources, strict=True) if s.labels is None or s.classes != self.classes]
        if others:
            self.classes = None
            log.info("the sources do not all have the same classes, so labels are not used: %s differs", others[0])
        else:
            self.labels = np.concatenate([source.labels for source in sources])
        self._orders: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in sources]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        parts = (f"{share:.1%} {source!r}" for share, source in zip(self.shares, self.sources, strict=True))
        return f"Mixture({', '.join(parts)})"

    def open(self, index: int):
        source, own = self._place(index)
        return source.open(own)

    def describe(self, index: int) -> str:
        source, own = self._place(index)
        return source.describe(own)

    @property
    def damaged(self) -> dict[str, str]:
        return {name: why for source in self.sources for name, why in getattr(source, "damaged", {}).items()}

    @cached_property
    def fingerprint(self) -> str:
        """Count of images and a hash of the sources' fingerprints and shares, in order."""
        digest = hashlib.sha256()
        for source, before in zip(self.sources, self._before, strict=True):
            digest.update(f"{source.fingerprint} {before}\n".encode())
        return f"mixture:{len(self)}:{digest.hexdigest()[:32]}"

    def _place(self, index: int) -> tuple[Source, int]:
        first, count = self.part_of(index)
        return self.sources[int(np.searchsorted(self._ends, first + count, side="left"))], index - first

    def part_of(self, index: int) -> tuple[int, int]:
        """First index and number of images of the source that an image comes from."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return first, int(self._ends[number]) - first

    def sample_indices(self, step: int, global_batch: int, seed: int) -> StepSamples:
        """The images of a global step, ``step * global_batch`` and those behind it, with the epoch of each in its own
        source. Its "epoch", by which substitutes are drawn, is the step.
        """
        indices, epochs = np.empty((2, global_batch), dtype=np.int64)
        rows, first = np.arange(global_batch), step * global_batch
        for number in reversed(range(len(self.sources))):
            # Python's integers: first * numerator may be larger than 64 bits hold.
            earlier, rest = divmod(first * self._before[number].numerator, self._before[number].denominator)
            counts = np.arange(len(rows) + 1) * self._before[number].numerator + rest
            left = np.diff(counts // self._before[number].denominator).astype(bool)
            mine, count = rows[~left], len(self.sources[number])
            epoch, place = np.divmod(first - earlier + np.arange(len(mine)), count)
            # An order of millions is drawn once: a rare source keeps it over steps that have none of its images.
            known, orders = self._orders[number], {}
            for each in np.unique(epoch).tolist():
                key = seed, each
                orders[key] = known[key] if key in known else epoch_permutation(seed, each, count)
                where = epoch == each
                indices[mine[where]] = orders[key][place[where]] + (self._ends[number] - count)
            if orders:
                self._orders[number] = orders
            epochs[mine] = epoch
            rows, first = rows[left], earlier
        return StepSamples(step, 0, indices, epochs)


def check_weight(name: str, weight) -> None:
    """ValueError unless a weight is a positive number."""
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        raise ValueError(f"the weight of {name} must be a positive number, got {weight!r}")
