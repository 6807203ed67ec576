"""Whole training steps of a configuration on random images: images per second and memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.assemble import assemble
from ijepa_fast.bench.measure import Times
from ijepa_fast.config import RunConfig
from ijepa_fast.masks import MaskSampler
from ijepa_fast.step import TrainStep

WARM_UP, WANTED, LEAST = 3, 5, 2  # steps: not timed, timed at least, timed at least where they are slow
STEPS = 1000  # of the schedules


def random_step(config: RunConfig, device: torch.device, images: int) -> tuple[TrainStep, Tensor]:
    """The step that ``config`` describes with fresh weights, and as many random images, uint8 [images, 3, h, w].

    Equal on one device for all configurations that differ in how a step is computed.

    Raises:
        ValueError: settings that do not fit together.
    """
    torch.manual_seed(config.seed)
    with device:  # a CPU takes ten seconds to draw the weights of ViT-H
        model = config.model.build(config.objective)
    sampler = MaskSampler(config.masks, model.context_encoder.grid)
    step = assemble(model, config, sampler, config.optim.schedules(STEPS, STEPS // 100), images, device)
    side = config.model.img_size
    return step, torch.randint(256, (images, 3, side, side), dtype=torch.uint8, device=device)


def step_rate(config: RunConfig, device: torch.device, images: int, seconds: float = 20.0) -> dict[str, Any]:
    """``rate`` of the step that ``config`` describes, on random images."""
    step, pixels = random_step(config, device, images)
    return {"images": images, "precision": config.train.precision, **rate(step, pixels, seconds)}


def rate(step: TrainStep, pixels: Tensor, seconds: float) -> dict[str, Any]:
    """Train on the same images for about ``seconds``.

    Drawing the masks, the loss, the update and the EMA are part of a step; loading and cropping images are not.

    Returns:
        "times" (``Times`` of a step; method "steps"), "images_per_second" (median), "context_tokens" and
        "target_tokens" per image, "first_losses" (of up to ``WARM_UP`` steps), and on CUDA "peak_memory_gib".

    Raises:
        RuntimeError: the loss was not finite.
    """
    images, device = len(pixels), pixels.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples: list[float] = []
    losses: list[Tensor] = []
    context = targets = number = 0
    began = time.perf_counter()
    while not _enough(len(samples), time.perf_counter() - began, seconds):
        start = time.perf_counter()
        result = step(pixels, number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        number += 1
        if number <= WARM_UP:
            losses.append(result.losses.total.clone())  # captured steps write the next one to the same place
        if number > WARM_UP or start - began > seconds:
            samples.append((time.perf_counter() - start) * 1e6)
            context, targets = context + result.tokens[0], targets + result.tokens[1]
    if int(step.first_bad_step) >= 0:
        raise RuntimeError(f"the loss of step {int(step.first_bad_step)} was not finite")
    times = Times.of(samples, "steps")
    found = {
        "times": times.as_dict(),
        "images_per_second": round(images / times.p50 * 1e6, 2),
        "context_tokens": round(context / len(samples) / images, 2),
        "target_tokens": round(targets / len(samples) / images, 2),
        "first_losses": [float(loss) for loss in losses],
    }
    if device.type == "cuda":
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found


def _enough(samples: int, elapsed: float, seconds: float) -> bool:
    return (samples >= WANTED and elapsed > seconds) or (samples >= LEAST and elapsed > 2 * seconds)
