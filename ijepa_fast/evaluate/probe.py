"""Linear probe: a softmax classifier on frozen features, at several settings at once.

Legend: n training images, D width, R directions (at most min(n, D)), S settings, C classes, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ijepa_fast.evaluate.features import labelled
from ijepa_fast.philox import Stream, random_words

LEARNING_RATES = (0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)

_MOMENTUM = 0.9
_MIN_STEPS = 200
_DAMPING = 1e-3
_SMALLEST_VARIANCE = 1e-6
_LOGITS_AT_ONCE = 1 << 25
_VALUES_AT_ONCE = 1 << 27
"""Values of features that are copied at once, half a GiB in fp32."""


@dataclass(frozen=True)
class ProbeSetting:
    """One point of the grid, with its accuracy on the held-out part of the training images."""

    learning_rate: float
    weight_decay: float
    validation_accuracy: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies are shares in [0, 1].

    Attributes:
        accuracy: on the test images, of the chosen setting trained again on all training images.
        learning_rate, weight_decay: the chosen setting.
        validation_accuracy: of the chosen setting, on the held-out part of the training images.
        train_accuracy: of the final classifier on all training images.
        grid: all settings that were tried.
    """

    accuracy: float
    learning_rate: float
    weight_decay: float
    validation_accuracy: float
    train_accuracy: float
    grid: list[ProbeSetting]


@dataclass(frozen=True)
class FittedProbe:
    """A linear classifier of features [n, D].

    Attributes:
        setting: the one it was trained with, with its accuracy on the held-out images.
        train_accuracy: on all training images.
        grid: all settings that were tried.
    """

    heads: _Heads
    classes: Tensor
    setting: ProbeSetting
    train_accuracy: float
    grid: list[ProbeSetting]

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Labels int64 [n], on the device of the features that it was fitted on."""
        features = features.to(self.classes.device).float()
        return self.classes[((features - self.heads.mean) @ self.heads.weight + self.heads.bias).argmax(1)]

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the images that it gets right; a label that no training image has is an error."""
        return float((self.predict(features) == labels.to(self.classes.device)).double().mean())


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, **options
) -> ProbeResult:
    """Test accuracy of a linear softmax classifier, see ``fit_linear_probe``, whose ``options`` these are.

    The test images are scored once, at the very end, and have no other use. Images with label -1 are left out.

    Raises:
        ValueError: as ``fit_linear_probe``.
    """
    features, labels = labelled(test_features, test_labels, "test")
    if train_features.dim() == 2 and train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"training features have {train_features.shape[1]} dimensions, test features {features.shape[1]}"
        )
    probe = fit_linear_probe(train_features, train_labels, **options)
    return ProbeResult(
        accuracy=probe.accuracy(features, labels),
        learning_rate=probe.setting.learning_rate,
        weight_decay=probe.setting.weight_decay,
        validation_accuracy=probe.setting.validation_accuracy,
        train_accuracy=probe.train_accuracy,
        grid=probe.grid,
    )


@torch.no_grad()
def fit_linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = 20,
    batch_size: int = 256,
    validation_share: float = 0.2,
    seed: int = 0,
) -> FittedProbe:
    """A linear softmax classifier.

    All pairs of learning rate and weight decay are trained in one pass on a part of the training images; the pair
    that is best on the rest (stratified by class; on a tie, the one with the lower cross-entropy) is trained again on
    all of them.

    Features are standardised with the mean and std of the images that the classifier is trained on, and rotated to
    their principal axes, along which SGD takes steps in proportion to 1 / variance. So a learning rate means the same
    for all features, and the probe converges in a few epochs where plain SGD is still far away after 50: pooled
    features of an untrained encoder have nearly all their variance in a few directions, and would look worse than they
    are. Weight decay is an L2 penalty on the weights of the standardised features, ``weight_decay / 2 * |w|^2``.

    Everything is computed on the device of the features, with copies of at most half a GiB of them at once: they may be
    a memory-mapped file. Results are a function of the data and ``seed``.

    Args:
        train_features: [n, D].
        train_labels: int64 [n], any integers; images with label -1 are left out.
        learning_rates: relative to the step of a quadratic model; cosine decay to 0.
        weight_decays: L2 penalties.
        epochs: passes over the training images, more if they give fewer than 200 steps.
        batch_size: at most this many rows per step.
        validation_share: share of every class that is held out to choose the setting, at least one image and never
            all of them.
        seed: of the split and of the order of the images.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, features are not finite, or there is a choice to
            make but no class with two training images to make it on.
    """
    settings = _settings(learning_rates, weight_decays)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be between 0 and 1, got {validation_share}")
    features, labels = labelled(train_features, train_labels, "training")
    classes, targets = labels.unique(return_inverse=True)
    held_out = stratified_split(targets, validation_share, seed)
    schedule = {"num_classes": len(classes), "epochs": epochs, "batch_size": batch_size, "seed": seed}

    if held_out.any():
        heads = _train(features, targets, (~held_out).nonzero().flatten(), settings, **schedule)
        accuracy, loss = heads.score(features, targets, held_out.nonzero().flatten())
        grid = [replace(s, validation_accuracy=a) for s, a in zip(settings, accuracy.tolist(), strict=True)]
        best = max(range(len(grid)), key=lambda i: (grid[i].validation_accuracy, -loss[i].item()))
    elif len(settings) == 1:
        grid, best = settings, 0
    else:
        raise ValueError(
            f"choosing among {len(settings)} settings needs a class with at least two training images; "
            f"{len(labels)} images of {len(classes)} classes were given. Pass one learning rate and one weight decay"
        )
    everything = torch.arange(len(targets), device=targets.device)
    final = _train(features, targets, everything, [grid[best]], **schedule)
    return FittedProbe(final, classes, grid[best], float(final.score(features, targets, everything)[0]), grid)


def best_linear_probe(
    feature_sets: Mapping[str, tuple[Tensor, Tensor]], train_labels: Tensor, test_labels: Tensor, **options
) -> tuple[str, ProbeResult]:
    """Probe several (training, test) features of the same images and keep the set that validates best.

    The paper reports the better of the last layer and the last four (arXiv 2301.08243, appendix A); here the test
    images have no part in that choice either: on equal validation accuracy the first set is kept.

    Returns:
        The name of the set and its result. ``options`` are those of ``linear_probe``.
    """
    if not feature_sets:
        raise ValueError("there are no feature sets to probe")
    results = {
        name: linear_probe(train, train_labels, test, test_labels, **options)
        for name, (train, test) in feature_sets.items()
    }
    best = max(results, key=lambda name: results[name].validation_accuracy)
    return best, results[best]


def stratified_split(targets: Tensor, share: float, seed: int) -> Tensor:
    """bool [n]: which images are held out. From every class of m > 1 images ``round(share * m)``, but at least one
    and at most m - 1; a class of one image stays in training."""
    words = _words(len(targets), seed, Stream.SPLIT, 0, targets.device)
    order = words.argsort(stable=True)
    order = order[targets[order].argsort(stable=True)]  # class by class, in random order within
    sizes = targets.bincount()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place -= (sizes.cumsum(0) - sizes)[targets]
    wanted = (sizes * share).round().clamp_min(1).minimum(sizes - 1)
    return place < wanted[targets]


@dataclass(frozen=True)
class _Heads:
    """S linear classifiers: logits = (x - mean) @ weight + bias."""

    mean: Tensor  # [D]
    weight: Tensor  # [D, S * C]
    bias: Tensor  # [S * C]
    num_settings: int

    def score(self, features: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and mean cross-entropy of every setting on some rows, fp64 [S]."""
        correct = torch.zeros(self.num_settings, dtype=torch.float64, device=features.device)
        loss = torch.zeros_like(correct)
        for part in rows.split(max(1, _LOGITS_AT_ONCE // len(self.bias))):
            x, y = features[part], targets[part]
            logits_BSC = ((x - self.mean) @ self.weight + self.bias).unflatten(1, (self.num_settings, -1))
            correct += (logits_BSC.argmax(2) == y[:, None]).sum(0)
            loss -= logits_BSC.log_softmax(2).gather(2, y[:, None, None].expand(-1, self.num_settings, 1)).sum((0, 2))
        return correct / len(rows), loss / len(rows)


def _train(
    features: Tensor,
    targets: Tensor,
    rows: Tensor,
    settings: Sequence[ProbeSetting],
    *,
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
) -> _Heads:
    """Momentum SGD on mean cross-entropy of some rows from zero weights, every setting on the same batches.

    The weights of all settings lie side by side, so that logits and gradients are one matrix product each.
    """
    device, num_settings = features.device, len(settings)
    mean, axes_DR, variance_R = _principal_axes(features, rows)
    directions = len(variance_R)
    batches = math.ceil(len(rows) / batch_size)
    # Rotated once where there is room for a copy of the features, else batch by batch.
    fits = len(rows) * directions <= _VALUES_AT_ONCE
    z_nR = (features[rows] - mean) @ axes_DR if fits else None
    targets = targets[rows]
    steps = max(epochs * batches, _MIN_STEPS)

    def per_setting(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(num_classes)

    decay = per_setting([s.weight_decay for s in settings])
    # A batch of b rows shows its covariance with an error of relative size R / b.
    rate = per_setting([s.learning_rate for s in settings]) / (1 + directions * batches / len(rows))
    rate_R = rate / (variance_R + _DAMPING * variance_R.mean())[:, None]
    weight = torch.zeros(directions, num_settings * num_classes, device=device)
    bias = weight.new_zeros(num_settings * num_classes)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    class_C = torch.arange(num_classes, device=device)
    for step, picked in zip(range(steps), _shuffled_batches(len(rows), batches, seed, device), strict=False):
        z_BR = z_nR[picked] if fits else (features[rows[picked]] - mean) @ axes_DR
        wrong_BSC = torch.addmm(bias, z_BR, weight).unflatten(1, (num_settings, num_classes)).softmax(2)
        wrong_BSC -= (targets[picked, None] == class_C)[:, None].float()
        wrong = wrong_BSC.flatten(1) / len(picked)
        weight_momentum.lerp_(z_BR.T @ wrong, 1 - _MOMENTUM)
        bias_momentum.lerp_(wrong.sum(0), 1 - _MOMENTUM)
        anneal = 0.5 * (1 + math.cos(math.pi * step / steps))
        # The penalty is applied implicitly: stable at any strength.
        weight.sub_(weight_momentum * (anneal * rate_R)).div_(1 + anneal * rate_R * decay)
        bias.sub_(bias_momentum * (anneal * rate))
    return _Heads(mean, axes_DR @ weight, bias, num_settings)


def _principal_axes(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D] of some rows, and of the standardised features the principal axes and their variances [R].

    The axes [D, R] contain the division by the std: ``(x - mean) @ axes`` has uncorrelated columns. Constant features
    have no part in them, nor have directions with less variance than fp32 tells from rounding.
    """
    count, dim = len(rows), features.shape[1]
    parts = rows.split(max(1, _VALUES_AT_ONCE // dim))
    mean = sum(features[part].double().sum(0) for part in parts) / count
    std = (sum((features[part].double() - mean).square_().sum(0) for part in parts) / count).sqrt()
    varies = std > _SMALLEST_VARIANCE * mean.abs()
    scale = torch.where(varies, 1 / std, 0).float()
    mean = mean.float()
    if count < dim:
        x = (features[rows] - mean) * scale
        variance, left = torch.linalg.eigh(x @ x.T / count)
        kept = variance > _SMALLEST_VARIANCE * variance[-1]
        axes = x.T @ (left[:, kept] / (count * variance[kept]).sqrt())
    else:
        gram = 0
        for part in parts:
            x = (features[part] - mean) * scale
            gram += x.T @ x
        variance, axes = torch.linalg.eigh(gram / count)
        kept = variance > _SMALLEST_VARIANCE * variance[-1]
        axes = axes[:, kept]
    return mean, scale[:, None] * axes, variance[kept]


def _shuffled_batches(count: int, batches: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Endless epochs, each a new order of all rows cut into batches whose sizes differ by at most one."""
    epoch = 0
    while True:
        yield from _words(count, seed, Stream.PROBE, epoch, device).argsort(stable=True).tensor_split(batches)
        epoch += 1


def _words(count: int, seed: int, stream: Stream, step: int, device: torch.device) -> Tensor:
    """One random word for each of ``count`` images, int64 [count]."""
    return random_words(seed, stream, step, torch.arange(count, device=device), 0)[0]


def _settings(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> list[ProbeSetting]:
    if not learning_rates or not all(0 < rate < math.inf for rate in learning_rates):
        raise ValueError(f"learning_rates must be positive numbers, at least one, got {list(learning_rates)}")
    if not weight_decays or not all(0 <= decay < math.inf for decay in weight_decays):
        raise ValueError(f"weight_decays must be numbers of at least 0, at least one, got {list(weight_decays)}")
    return [ProbeSetting(rate, decay, math.nan) for rate in learning_rates for decay in weight_decays]
