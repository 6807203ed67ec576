"""Whole training steps on random images: their rate, and whether two ways to compute a step train the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_fast.bench.measure import Times, repeat
from ijepa_fast.config import RunConfig
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.run.build import assemble
from ijepa_fast.step.train_step import TrainStep

WARM_UP = 3
SCHEDULED_STEPS = 1000
"""Steps that the schedules are made for, at least."""


def random_step(config: RunConfig, device: torch.device, images: int) -> tuple[TrainStep, Tensor]:
    """The step that ``config`` describes with fresh weights, and as many random images, uint8 [images, C, h, w].

    Equal on one device for all configurations that differ in how a step is computed.

    Raises:
        ValueError: settings that do not fit together.
    """
    torch.manual_seed(config.seed)
    with device:  # a CPU takes ten seconds to draw the weights of ViT-H
        model = config.model.build(config.objective)
    sampler = MaskSampler(config.masks, model.context_encoder.grid, channels=config.model.in_chans)
    per_epoch = SCHEDULED_STEPS // 100
    steps = max(SCHEDULED_STEPS, round(2 * config.optim.warmup_epochs * per_epoch))
    step = assemble(model, config, sampler, config.optim.schedules(steps, per_epoch), images, device)
    shape = (images, config.model.in_chans, *config.model.size)
    return step, torch.randint(256, shape, dtype=torch.uint8, device=device)


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
    tokens: list[tuple[int, int]] = []
    took = repeat(
        lambda number: tokens.append(step(pixels, number).tokens),
        device,
        seconds=seconds,
        warm_up=WARM_UP,
        patience=2 * seconds,
    )
    if int(step.first_bad_step) >= 0:
        raise RuntimeError(f"the loss of step {int(step.first_bad_step)} was not finite")
    context, targets = (sum(counts) / len(tokens) / images for counts in zip(*tokens, strict=True))
    figures = rate(Times.of([each.wall * 1e6 for each in took], "steps"), images) | {
        "images": images,
        "precision": config.train.precision,
        "context_tokens": round(context, 2),
        "target_tokens": round(targets, 2),
    }
    if device.type == "cuda":
        figures["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return figures


def rate(times: Times, images: int) -> dict[str, Any]:
    """The times of a step of so many images, and its median rate."""
    return {"times": times.as_dict(), "images_per_second": round(images / times.p50 * 1e6, 2)}


# Agreement: what a step computes is described by a mapping with any of "loss", "gradient" (by parameter; of the first
# batch), "losses" (of the first updates), "moved" (norms of what updates changed) and "skipped" (their number).

NOTHING = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Share of the whole gradient below which that of a single parameter is rounding."""
_HALF = {"loss": 5e-3, "gradient": 0.1, "losses": 1e-2, "moved": 0.1, "skipped": 0}
LIMITS = {
    "fp32": {"loss": 1e-5, "gradient": 1e-3, "losses": 1e-4, "moved": 0.1, "skipped": 0},
    "bf16": _HALF,
    "fp16": _HALF,
    # Between implementations, which round at other places.
    "bf16, others": {"loss": 2e-2, "gradient": 0.2, "losses": 5e-2},
    # Of targets computed in 8 bits, whose 3 bits of mantissa are off by 2 to 3 % in every product.
    "approximate": {"loss": 5e-2, "losses": 5e-2, "targets": 2e-2},
}
"""Largest differences by precision: twenty times and more of what rounding makes of fused blocks on a CPU. Adam's first
updates move a weight by the learning rate whatever its gradient, so where that is all but zero, rounding decides on the
direction."""


def gradients_of(
    loss: Tensor,
    networks: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    **kept: Any,
) -> dict[str, Tensor]:
    """Copies of the gradients by parameter, with the device or dtype in ``kept``; fp32 where they were scaled. Nothing
    is trained."""
    (loss if scaler is None else scaler.scale(loss)).backward()
    # Copies: captured steps keep their gradients in place.
    named = networks.named_parameters()
    gradients = {name: p.grad.detach().to(copy=True, **kept) for name, p in named if p.grad is not None}
    if scaler is not None:
        gradients = {name: value.float() / scaler.get_scale() for name, value in gradients.items()}
    optimizer.zero_grad()
    return gradients


def differences(values: Mapping[str, Any], want: Mapping[str, Any], precision: str) -> dict[str, float]:
    """How far two ways are apart in what both mappings have: relatively, but for "skipped", which may not be more.

    Raises:
        ValueError: they train different parameters.
    """
    apart: dict[str, float] = {}
    for name in (name for name in _HALF if name in values and name in want):
        if name == "gradient":
            apart[name] = gradient_difference(values[name], want[name], NOTHING[precision])
        elif name == "skipped":
            apart[name] = values[name] - want[name]
        elif name == "loss":
            apart[name] = relative(values[name], want[name])
        else:
            apart[name] = largest(map(relative, values[name], want[name]))
    return apart


def disagreement(apart: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The differences that are larger than allowed, in words; empty if none is."""
    wrong = [name for name, difference in apart.items() if name in limits and not difference <= limits[name]]  # or NaN
    return ", ".join(f"{name} {apart[name]:.2g} apart (at most {limits[name]:g})" for name in wrong)


def relative(value: float, want: float) -> float:
    """0 for equal numbers, infinite for another one than 0."""
    if value == want:
        return 0.0
    return abs(value - want) / abs(want) if want else math.inf


def largest(values: Iterable[float]) -> float:
    """NaN if one of them is, which ``max`` may pass over."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def gradient_difference(gradients: Mapping[str, Tensor], want: Mapping[str, Tensor], nothing: float) -> float:
    """The largest relative difference of a parameter's gradient, over parameters; NaN if one of them is not a number.

    Args:
        gradients, want: by name of the parameter.
        nothing: share of the whole gradient that is added to the norm that a difference is divided by.

    Raises:
        ValueError: they are of different parameters.
    """
    if others := gradients.keys() ^ want.keys():
        raise ValueError(f"different parameters are trained: {', '.join(sorted(others)[:5])}")
    whole = sum(float(value.float().square().sum()) for value in want.values()) ** 0.5
    return largest(
        float((gradients[name].float() - value.float()).norm()) / (float(value.float().norm()) + nothing * whole)
        for name, value in want.items()
    )
