"""The tasks there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ijepa_fast.config import did_you_mean
from ijepa_fast.data.datasets import Sources
from ijepa_fast.downstream import classify, dense, heads, robustness
from ijepa_fast.downstream.dense_data import open_depth, open_masks
from ijepa_fast.downstream.subject import Options, Subject


class Task(NamedTuple):
    """One way to judge an encoder.

    Attributes:
        function: takes a ``Subject`` and returns "figures", a dict of shares in [0, 1] by name (a name that ends in a
            unit in brackets is of another range); the same for "chance" and "deviation" where they are known; and
            whatever else explains the figures.
        data: what the images are labelled with.
        about: what it does, in words.
        needs: package that it imports, of an extra.
    """

    function: Callable[[Subject], dict]
    data: str
    about: str
    needs: str | None = None

    def run(self, subject: Subject) -> dict:
        with torch.random.fork_rng(devices=[]):  # heads begin with the same weights whatever was run before
            torch.manual_seed(subject.options.seed)
            return self.function(subject)


TASKS = {
    "knn": Task(classify.knn, "classes", "20 nearest neighbours vote"),
    "linear": Task(classify.linear, "classes", "quick linear probe on features of central crops"),
    "linear_protocol": Task(heads.linear_protocol, "classes", "linear layer as in the paper: LARS, 50 epochs of crops"),
    "attentive": Task(heads.attentive, "classes", "one cross-attention block with a learned query"),
    "lowshot": Task(classify.lowshot, "classes", "logistic regression on few labelled images", "sklearn"),
    "robustness": Task(robustness.robustness, "classes", "linear probe on corrupted test images (ImageNet-C)"),
    "segmentation": Task(dense.segmentation, "masks", "linear layer and nearest neighbours on patch features"),
    "depth": Task(dense.depth, "depth", "linear layer on patch features"),
}
OPENED_BY: dict[str, Callable[[str, str | None, Options, dict], Sources]] = {
    "classes": classify.open_classes,
    "masks": open_masks,
    "depth": open_depth,
}
"""Kind of data -> the function that opens it and says whatever is wrong with it, before features are taken. Its last
argument holds further arguments of ``open_sources``."""


def named_tasks(names: str) -> dict[str, Task]:
    """Tasks by their names, separated by commas.

    Raises:
        ValueError: a name is unknown, none is given, or the tasks need images that are labelled in different ways.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise ValueError(f"no task is named; there are {', '.join(TASKS)}")
    for name in chosen:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}")
    kinds = {name: TASKS[name].data for name in chosen}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ValueError(f"these tasks need images labelled in different ways ({told}): run them one after the other")
    return {name: TASKS[name] for name in chosen}
