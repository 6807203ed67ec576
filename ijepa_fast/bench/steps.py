"""Whole training steps of a configuration on random images: images per second and memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.bench.measure import Times
from ijepa_fast.config import RunConfig
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.step.build import assemble
from ijepa_fast.step.train_step import TrainStep

WARM_UP, WANTED, LEAST = 3, 5, 2  # steps: not timed, timed at least, timed at least where they are slow
STEPS = 1000  # of the schedules, at least


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
    per_epoch = STEPS // 100
    steps = max(STEPS, round(2 * config.optim.warmup_epochs * per_epoch))
    step = assemble(model, config, sampler, config.optim.schedules(steps, per_epoch), images, device)
    side = config.model.img_size
    return step, torch.randint(256, (images, 3, side, side), dtype=torch.uint8, device=device)


def step_rate(config: RunConfig, device: torch.device, images: int, seconds: float = 20.0) -> dict[str, Any]:
    """Train ``config`` on ``images`` random images per step for about ``seconds``.

    Drawing the masks, the loss, the update and the EMA are part of a step; loading and cropping images are not.

    Returns:
        "times" (``Times`` of a step; method "steps"), "images_per_second" (median), "context_tokens" and
        "target_tokens" per image, and on CUDA "peak_memory_gib".

    Raises:
        ValueError: settings that do not fit together.
        RuntimeError: the loss was not finite.
    """
    step, pixels = random_step(config, device, images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples: list[float] = []
    context = targets = number = 0
    began = time.perf_counter()
    while not _enough(len(samples), time.perf_counter() - began, seconds):
        start = time.perf_counter()
        result = step(pixels, number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        number += 1
        if number > WARM_UP or start - began > seconds:
            samples.append((time.perf_counter() - start) * 1e6)
            context, targets = context + result.tokens[0], targets + result.tokens[1]
    if int(step.first_bad_step) >= 0:
        raise RuntimeError(f"the loss of step {int(step.first_bad_step)} was not finite")
    times = Times.of(samples, "steps")
    found = {
        "images": images,
        "precision": config.train.precision,
        "times": times.as_dict(),
        "images_per_second": round(images / times.p50 * 1e6, 2),
        "context_tokens": round(context / len(samples) / images, 2),
        "target_tokens": round(targets / len(samples) / images, 2),
    }
    if device.type == "cuda":
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found


def _enough(samples: int, elapsed: float, seconds: float) -> bool:
    return (samples >= WANTED and elapsed > seconds) or (samples >= LEAST and elapsed > 2 * seconds)
