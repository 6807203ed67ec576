"""What is left of a linear probe's accuracy on corrupted images: the part of ImageNet-C that Pillow and numpy give."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from ijepa_fast.data.bands import Pixels, pixels_of
from ijepa_fast.data.workers import worker_count
from ijepa_fast.downstream.classify import accuracies, check_choice
from ijepa_fast.downstream.subject import Subject, on
from ijepa_fast.evaluate.probe import fit_linear_probe
from ijepa_fast.philox import Stream


def robustness(subject: Subject) -> dict:
    """Accuracy of the quick linear probe, fitted on clean images, on test images with each corruption and strength."""
    pixels = pixels_of(subject.data.test)
    if pixels[:2] != Pixels()[:2]:
        raise ValueError(f"corruptions are of 8-bit RGB images, this encoder takes {pixels}")
    check_choice(subject.data.train)
    train = subject.features("train")
    probe = fit_linear_probe(subject.last(on(subject.device, train.values)), train.labels, seed=subject.options.seed)
    cases = [(None, 0), *((name, level) for name in CORRUPTIONS for level in range(5))]
    correct, count = dict.fromkeys(cases, 0), 0
    with ThreadPoolExecutor(worker_count("auto", 1)) as pool:  # numpy and Pillow let others work meanwhile
        for batch in tqdm(subject.crops(subject.data.test), desc="robustness", unit="batch", disable=None):
            count += len(batch.labels)
            for name, level in cases:
                images = batch.images
                if name is not None:
                    indices = batch.indices.tolist()
                    images = torch.stack(list(pool.map(corrupted, images, repeat(name), repeat(level), indices)))
                predicted = probe.predict(subject.pooled(images.to(subject.device), blocks=1)).cpu()
                correct[name, level] += int((predicted == batch.labels).sum())
    by_strength = {name: [correct[name, level] / count for level in range(5)] for name in CORRUPTIONS}
    means = {name: sum(values) / 5 for name, values in by_strength.items()}
    figures = {"clean": correct[None, 0] / count, "mean corrupted": sum(means.values()) / len(means), **means}
    return accuracies(subject, figures) | {"by strength": by_strength}


def corrupted(image: Tensor, name: str, level: int, index: int = 0) -> Tensor:
    """An image uint8 [3, h, w] with a corruption of ``CORRUPTIONS`` at one of its five levels.

    Noise is a function of (name, level, index) alone.
    """
    function, strengths = CORRUPTIONS[name]
    counter = [0, level, list(CORRUPTIONS).index(name), int(Stream.CORRUPTION)]
    rng = np.random.Generator(np.random.Philox(key=index, counter=counter))
    changed = function(image.permute(1, 2, 0).numpy(), strengths[level], rng)
    if changed.dtype != np.uint8:
        changed = (changed.clip(0, 1) * 255).round().astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(changed)).permute(2, 0, 1)


# Of an image uint8 [h, w, 3]; what they return is that again, or float in [0, 1] where it is not clipped.


def _gaussian_noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return image / 255 + rng.normal(0, deviation, image.shape)


def _shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image / 255 * photons) / photons


def _impulse_noise(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    draw = rng.random(image.shape)
    return np.where(draw < share / 2, 0, np.where(draw < share, 255, image)).astype(np.uint8)


def _contrast(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1)) / 255
    return (image / 255 - mean) * factor + mean


def _blur(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    blur = ImageFilter.GaussianBlur(deviation * min(image.shape[:2]) / REFERENCE_SIDE)
    return np.array(Image.fromarray(image).filter(blur))


def _jpeg(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def _pixelate(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    whole = Image.fromarray(image)
    small = whole.resize([max(1, int(side * factor)) for side in whole.size], Image.Resampling.BOX)
    return np.array(small.resize(whole.size, Image.Resampling.BOX))


REFERENCE_SIDE = 224
"""Side in pixels that the strengths are made for; lengths are scaled with the crops."""
CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], tuple[float, ...]]] = {
    "gaussian noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian blur": (_blur, (1, 2, 3, 4, 6)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "JPEG": (_jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}
"""Corruption -> function and five strengths, those of hendrycks/robustness, imagenet_c/corruptions.py: standard
deviation, photons, share of values, standard deviation in pixels, factor, quality, and factor of the side. Six are of
ImageNet-C's fifteen (arXiv 1903.12261); Gaussian blur is one of its four further ones."""
