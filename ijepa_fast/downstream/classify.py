"""Classification of pooled features: k-NN, the quick linear probe, and low-shot logistic regression."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.data import Source
from ijepa_fast.data.datasets import Sources, open_sources
from ijepa_fast.downstream.store import at_most
from ijepa_fast.downstream.subject import Options, Subject, on
from ijepa_fast.evaluate import best_linear_probe, knn_accuracy
from ijepa_fast.philox import Stream, random_words

log = logging.getLogger(__name__)

K, TEMPERATURE = 20, 0.07
REGULARISATION = 0.1
"""C of scikit-learn's LogisticRegression, on standardised features. Too few images are left to choose it by."""


def open_classes(data: str, evaluation_data: str | None, options: Options, images: dict) -> Sources:
    """Labelled training and test images.

    Args:
        images: further arguments of ``open_sources``.

    Raises:
        ValueError: a split is empty or has no labels, there is one class only, there are fewer training images than
            classes, or a test image is of a class that no training image has.
    """
    for shot in options.shots.split(","):
        _shot(shot.strip())
    train, test = open_sources(data, evaluation_data, **images)
    if train.labels is None:
        raise ValueError(f"the images of {data} have no classes: a folder for each of at least two classes is needed")
    if test is None:
        raise ValueError(
            f"{data} has no labelled test images (folders train/ and val/ or test/ with a folder per class in each); "
            "name them with --test PATH"
        )
    train, test = at_most(train, options.limit), at_most(test, options.limit)
    names = {"training": (data, train), "test": (evaluation_data or data, test)}
    for split, (path, source) in names.items():
        if not len(source) or not (source.labels >= 0).any():
            raise ValueError(f"{path} has no labelled {split} images")
    classes = len(train.classes or ()) or int(train.labels.max()) + 1
    if classes < 2:
        raise ValueError(f"the training images of {data} are all of one class")
    if len(train) < classes:
        raise ValueError(f"{len(train)} training images are fewer than the {classes} classes of {data}")
    if unseen := sorted(set(test.labels[test.labels >= 0].tolist()) - set(train.labels.tolist())):
        raise ValueError(f"test images are of classes that no training image has: {_named(train, unseen)}")
    return Sources(train, test)


def knn(subject: Subject) -> dict:
    """Accuracy of ``knn_accuracy`` on features of the last block."""
    (fit, labels), (tested, answers) = _both(subject)
    accuracy = knn_accuracy(subject.last(fit), labels, subject.last(tested), answers, K, TEMPERATURE)
    return accuracies(subject, {"accuracy": accuracy}) | {"k": K, "temperature": TEMPERATURE}


def linear(subject: Subject) -> dict:
    """Accuracy of ``linear_probe``; with ``layers`` last4 of the better of the last and the last four blocks."""
    check_choice(subject.data.train)
    (fit, labels), (tested, answers) = _both(subject)
    sets = {"last": (subject.last(fit), subject.last(tested))}
    if subject.options.layers == "last4":
        sets["last4"] = (fit, tested)
    layers, result = best_linear_probe(sets, labels, answers, seed=subject.options.seed)
    return accuracies(subject, {"accuracy": result.accuracy}) | {
        "layers": layers,
        "learning_rate": result.learning_rate,
        "weight_decay": result.weight_decay,
        "train_accuracy": result.train_accuracy,
    }


def lowshot(subject: Subject) -> dict:
    """Accuracy of logistic regression on few labelled images, mean and deviation over draws.

    scikit-learn's, on features of the last block that are standardised by the images drawn.
    """
    train, test = subject.features("train"), subject.features("test")
    fit, tested, answers = subject.last(train.values), subject.last(test.values).numpy(), test.labels.numpy()
    means, deviations, images = {}, {}, {}
    for shot in map(str.strip, subject.options.shots.split(",")):
        found = []
        for draw in range(subject.options.draws):
            rows = drawn(train.labels, shot, subject.options.seed, draw)
            predicted = classifier().fit(fit[rows].numpy(), train.labels[rows].numpy()).predict(tested)
            found.append(float((predicted == answers)[answers >= 0].mean()))
        means[shot], images[shot] = float(np.mean(found)), len(rows)
        deviations[shot] = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
        log.info("lowshot %s: %.1f %% (%d images)", shot, 100 * means[shot], len(rows))
    return accuracies(subject, means) | {"deviation": deviations, "images": images, "C": REGULARISATION}


def check_choice(train: Source) -> None:
    """ValueError unless an image can be held out, to choose among heads by, that is not all there is of its class."""
    if np.bincount(train.labels[train.labels >= 0]).max() < 2:
        raise ValueError(f"choosing among heads needs a class of two training images; there are {len(train)} images")


def accuracies(subject: Subject, figures: dict[str, float]) -> dict:
    """Figures of a task and, for each, the accuracy of always saying the most frequent class."""
    return {"figures": figures, "chance": dict.fromkeys(figures, chance(subject.data.test))}


def chance(test: Source) -> float:
    """Accuracy of always saying the most frequent class."""
    labels = test.labels[test.labels >= 0]
    return float(np.bincount(labels).max() / len(labels))


def classifier():
    """The logistic regression of ``lowshot``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=1000))


def drawn(labels: Tensor, shot: str, seed: int, draw: int) -> Tensor:
    """Rows of a random choice: "5" images of every class (or all it has), or "1%" of every class (at least one).

    Raises:
        ValueError: ``shot`` is neither.
    """
    share, count = _shot(shot)
    words = random_words(seed, Stream.SHOT, draw, torch.arange(len(labels)), 0)[0]
    chosen = []
    for label in labels[labels >= 0].unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[words[rows].argsort(stable=True)]
        chosen.append(rows[: max(1, round(share * len(rows))) if share else count])
    return torch.cat(chosen).sort().values


def _shot(shot: str) -> tuple[float, int]:
    """(share, number of images), of which one is 0."""
    share = shot.endswith("%")
    try:
        value = float(shot.removesuffix("%")) / 100 if share else int(shot)
        if not 0 < value <= (1 if share else math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(f"shots are shares (1%) or numbers of images of each class (5), got {shot!r}") from None
    return (value, 0) if share else (0, value)


def _both(subject: Subject) -> list[tuple[Tensor, Tensor]]:
    return [(on(subject.device, f.values), f.labels) for f in map(subject.features, ("train", "test"))]


def _named(source: Source, labels: list[int]) -> str:
    return ", ".join(source.classes[label] if source.classes else str(label) for label in labels[:5])
