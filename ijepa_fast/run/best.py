"""Which checkpoint of a run is its best."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Best:
    """The best regular save so far, by the mean of a figure over the log intervals since the save before it.

    A single interval's k-NN has an error of some two points; the highest of many would be the luckiest.

    Attributes:
        by: the figure: "knn", or "rank" (of the features) without labels.
        scores: its values since the last regular save.
        so_far: "step", "score" and "by" of the best checkpoint, None before the first.
    """

    by: str
    scores: list[float] = field(default_factory=list)
    so_far: dict | None = None

    def see(self, metrics: dict) -> None:
        """Take note of the metrics of a log interval."""
        score = metrics.get(self.by)
        if score is not None and math.isfinite(score):
            self.scores.append(score)

    def is_beaten_at(self, step: int) -> bool:
        """Whether the regular save after ``step`` steps is the best one now."""
        if not self.scores:
            return False
        score = sum(self.scores) / len(self.scores)
        self.scores = []
        best = self.so_far
        if best is not None and best["by"] == self.by and best["score"] >= score:
            return False
        self.so_far = {"step": step, "score": score, "by": self.by}
        return True
