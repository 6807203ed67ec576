"""Settings chosen from the machine and the images at hand, for people who name none."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from ijepa_fast.config import RunConfig
from ijepa_fast.step.flops import TokenCounts, step_flops

log = logging.getLogger(__name__)

RECIPE = "own_images"
CPU_MINUTES = 15
"""Length of a run on a CPU, by estimate. It leaves room within 20 minutes for judging features before and after."""
SAMPLED = 64
"""Images whose size is looked at."""
SHARE_OF_PRODUCTS = 0.35
"""Share of the rate of large matrix products that a step of a small model is taken to reach on a CPU."""


def supported_precision(device: torch.device) -> tuple[str, str]:
    """The fastest training precision that the hardware multiplies without emulation, and the reason in words."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16", f"the GPU has compute capability {major}.{minor}"
        return "fp32", f"bf16 needs compute capability 8.0, the GPU has {major}.{minor}"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16", "this CPU multiplies bf16"
    return "fp32", "this CPU would emulate bf16, slowly"


def resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """The configuration with the precision that ``auto`` stands for on this device."""
    if config.train.precision != "auto":
        return config
    precision, reason = supported_precision(device)
    log.info("precision %s: %s", precision, reason)
    return replace(config, train=replace(config.train, precision=precision))


class Images(NamedTuple):
    """How many images there are, and the median of their shorter sides in pixels."""

    count: int
    side: int


def look_at(source) -> Images:
    """Number and size of the images of a ``Source``; sizes from a sample that is spread over all of them.

    Raises:
        ValueError: none of the sampled images can be read.
    """
    sides = []
    for i in range(min(SAMPLED, len(source))):
        try:
            with source.open(i * len(source) // min(SAMPLED, len(source))) as image:
                sides.append(min(image.size))
        except Exception:  # damaged files make decoders raise nearly anything; the loader counts and names them
            continue
    if not sides:
        raise ValueError(f"none of {min(SAMPLED, len(source))} images that were looked at can be read: {source!r}")
    return Images(len(source), round(statistics.median(sides)))


def own_images(
    base: RunConfig,
    images: Images,
    device: torch.device,
    rate: Callable[[torch.device], float],
    given: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Settings (dotted names) that fit a recipe for small sets to these images and this device.

    Args:
        base: the recipe.
        images: number and size.
        device: where the run will be.
        rate: multiplications and additions of matrix products that the device does in a second.
        given: settings that people name; length and warm-up follow the batch, steps and epochs among them.

    Raises:
        ValueError: fewer than 16 images.
    """
    if images.count < 16:
        raise ValueError(f"there are {images.count} images; pretraining needs at least 16, and learns from thousands")
    given = given or {}
    # A batch is at most a quarter of the set, so that an epoch has several steps.
    most = max(4, images.count // 4)
    named = given.get("model.img_size")
    side = images.side if named is None else min(named) if isinstance(named, (list, tuple)) else named
    if device.type == "cuda":
        size, patch = next(((size, patch) for size, patch in ((224, 16), (96, 8), (64, 8)) if side >= size), (32, 4))
    else:
        # 64 patches whatever the size: what a CPU can do, and all three cost the same.
        size = next((size for size in (96, 64) if side >= size), 32)
        patch = size // 8
    if named is not None:
        size, patch = named, _dividing(named, patch)
    if device.type == "cuda":
        settings = {
            "model.img_size": size,
            "model.patch_size": patch,
            "model.embed_dim": 384,
            "model.depth": 12,
            "model.num_heads": 6,
            "model.predictor_embed_dim": 192,
            "model.predictor_depth": 6,
            "train.batch_size": given.get("train.batch_size", _power_of_two(min(256, most))),
        }
        steps = round(min(300.0, max(20.0, 30e6 / images.count)) * images.count / settings["train.batch_size"])
    else:
        batch = given.get("train.batch_size", _power_of_two(min(base.train.batch_size, most)))
        sides = tuple(size) if isinstance(size, list) else size
        model = replace(
            base.model, img_size=sides, patch_size=patch, in_chans=given.get("model.in_chans", 3), mean_std="auto"
        )
        flops = step_flops(model, TokenCounts.expected(base.masks, model.grid, draws=16)).total
        seconds = flops * batch / (rate(device) * SHARE_OF_PRODUCTS)
        settings = {
            "model.img_size": size,
            "model.patch_size": patch,
            "train.batch_size": batch,
        }
        steps = CPU_MINUTES * 60 / seconds
    steps = given.get("train.steps") or max(100, int(round(steps, -2)))
    warmup = steps / 10 * settings["train.batch_size"] / images.count
    if "train.epochs" in given and "train.steps" not in given:
        steps, warmup = None, given["train.epochs"] / 10
    settings |= {"train.steps": steps, "optim.warmup_epochs": float(f"{warmup:.3g}")}
    if named is not None:
        del settings["model.img_size"]
    if images.side >= 2 * (size if named is None else side):
        return settings
    # Images that are hardly larger than the crops: the centre is all of a test image.
    return settings | {"evaluation.resize_ratio": 1.0}


def product_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Operations a second of large fp32 matrix products on all cores, measured."""
    a = torch.randn(512, 512, device=device)
    a @ a  # threads and buffers are there now
    started, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        a @ a
        products += 1
    return products * 2 * 512**3 / spent


def _dividing(size: object, wanted: int) -> int:
    """The divisor of a side, or of both, that is nearest to a wanted size of patches."""
    common = math.gcd(*size) if isinstance(size, (list, tuple)) else size
    divisors = [patch for patch in range(1, common + 1) if common % patch == 0]
    return min(divisors, key=lambda patch: abs(patch - wanted))


def _power_of_two(limit: int) -> int:
    return 1 << (limit.bit_length() - 1)
