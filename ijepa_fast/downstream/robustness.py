"""What is left of a linear probe's accuracy on corrupted images: the part of ImageNet-C that Pillow and numpy give."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from ijepa_fast.data import EvalLoader
from ijepa_fast.data.bands import Pixels, pixels_of
from ijepa_fast.downstream.classify import accuracies
from ijepa_fast.downstream.store import BATCH
from ijepa_fast.downstream.tasks import Subject, on
from ijepa_fast.evaluate.probe import fit_linear_probe
from ijepa_fast.philox import Stream

REFERENCE_SIDE = 224
"""Side in pixels that the strengths are made for; lengths are scaled with the crops."""

STRENGTHS: dict[str, tuple[float, ...]] = {
    "gaussian noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot noise": (60, 25, 12, 5, 3),
    "impulse noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "gaussian blur": (1, 2, 3, 4, 6),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "JPEG": (25, 18, 15, 10, 7),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
}
"""Corruption -> its five strengths, as in ImageNet-C (arXiv 1903.12261 and its code): standard deviation, photons,
share of pixels, radius in pixels, factor, quality, and factor of the side."""


def robustness(subject: Subject) -> dict:
    """Accuracy of the quick linear probe, fitted on clean images, on test images with each corruption and strength."""
    pixels = pixels_of(subject.data.test)
    if pixels[:2] != Pixels()[:2]:
        raise ValueError(f"corruptions are of 8-bit RGB images, this encoder takes {pixels}")
    train = subject.features("train")
    probe = fit_linear_probe(subject.last(on(subject.device, train.values)), train.labels, seed=subject.options.seed)
    cases = [(None, 0), *((name, level) for name in STRENGTHS for level in range(5))]
    correct, count = dict.fromkeys(cases, 0), 0
    loader = EvalLoader(
        subject.data.test, subject.image_size, BATCH, subject.options.workers, resize_ratio=subject.resize_ratio
    )
    for batch in tqdm(loader, desc="robustness", unit="batch", disable=None):
        labelled = batch.labels >= 0
        count += int(labelled.sum())
        for name, level in cases:
            images = batch.images
            if name is not None:
                pairs = zip(images, batch.indices.tolist(), strict=True)
                images = torch.stack([corrupted(image, name, level, index) for image, index in pairs])
            features = subject.last(subject.pooled(images.to(subject.device)))
            correct[name, level] += int((probe.predict(features).cpu() == batch.labels)[labelled].sum())
    by_strength = {name: [correct[name, level] / count for level in range(5)] for name in STRENGTHS}
    means = {name: sum(values) / 5 for name, values in by_strength.items()}
    figures = {"clean": correct[None, 0] / count, "mean corrupted": sum(means.values()) / len(means), **means}
    return accuracies(subject, figures) | {"by strength": by_strength}


def corrupted(image: Tensor, name: str, level: int, index: int = 0) -> Tensor:
    """An image uint8 [3, h, w] with a corruption of ``STRENGTHS`` at one of its five levels.

    Noise is a function of (name, level, index) alone.
    """
    return _CORRUPTIONS[name](image, STRENGTHS[name][level], _generator(name, level, index))


def _generator(name: str, level: int, index: int) -> np.random.Generator:
    place = list(STRENGTHS).index(name)
    return np.random.Generator(np.random.Philox(key=index, counter=[0, level, place, int(Stream.CORRUPTION)]))


def _rounded(values: np.ndarray) -> Tensor:
    return torch.from_numpy((values.clip(0, 1) * 255).round().astype(np.uint8))


def _gaussian_noise(image: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    return _rounded(image.numpy() / 255 + rng.normal(0, deviation, image.shape))


def _shot_noise(image: Tensor, photons: float, rng: np.random.Generator) -> Tensor:
    return _rounded(rng.poisson(image.numpy() / 255 * photons) / photons)


def _impulse_noise(image: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    draw = rng.random(image.shape)
    return _rounded(np.where(draw < share / 2, 0.0, np.where(draw < share, 1.0, image.numpy() / 255)))


def _contrast(image: Tensor, factor: float, rng: np.random.Generator) -> Tensor:
    values = image.numpy() / 255
    mean = values.mean((1, 2), keepdims=True)
    return _rounded((values - mean) * factor + mean)


def _through_pillow(change: Callable[[Image.Image, float], Image.Image]) -> Callable:
    def corruption(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
        picture = change(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), strength)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    return corruption


def _blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius * min(image.size) / REFERENCE_SIDE))


def _jpeg(image: Image.Image, quality: float) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality))
    return Image.open(buffer).convert("RGB")


def _pixelate(image: Image.Image, factor: float) -> Image.Image:
    small = image.resize([max(1, int(side * factor)) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


_CORRUPTIONS: dict[str, Callable[[Tensor, float, np.random.Generator], Tensor]] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "gaussian blur": _through_pillow(_blur),
    "contrast": _contrast,
    "JPEG": _through_pillow(_jpeg),
    "pixelate": _through_pillow(_pixelate),
}
