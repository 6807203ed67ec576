"""Steps with 1, 2, 4, ... masks per image beside each other: what a mask costs when several share an image.

    python -m benchmarks.step --model vit_small --batch 16 --masks-per-image 1 2 4 8 --json FILE

All see the same images, in turns. Times are per (image, mask): decoding and the target encoder are paid once per image.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations import run_config
from ijepa_fast.bench.measure import in_turns
from ijepa_fast.bench.steps import LIMITS, random_step, relative
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, Masks
from ijepa_fast.ragged import Ragged
from ijepa_fast.step.flops import TokenCounts, step_flops
from ijepa_fast.step.train_step import TrainStep


def alone(masks: Masks, k: int) -> Masks:
    """Mask k of every image, without the others."""

    def of_k(tokens: Ragged, per_mask: int) -> Ragged:
        sequences = tokens.to_lists()
        firsts = range(k * per_mask, len(sequences), masks.per_image * per_mask)
        chosen = [sequence for first in firsts for sequence in sequences[first : first + per_mask]]
        return Ragged.from_lists(chosen, masks.device)

    return Masks(of_k(masks.context, masks.num_contexts), of_k(masks.targets, masks.num_targets), masks.num_contexts)


@torch.no_grad()
def difference(step: TrainStep, images: Tensor) -> float:
    """How far the loss of one batch is from the mean over its masks one by one, relatively."""
    masks = step.sampler.sample(len(images), seed=step.seed, step=0, device=images.device)
    singly = [float(step.model(images, alone(masks, k))[0].total) for k in range(masks.per_image)]
    return relative(float(step.model(images, masks)[0].total), statistics.mean(singly))


def compare(
    model: ModelConfig,
    batch: int,
    masks: MaskConfig,
    counts: Sequence[int],
    device: torch.device,
    precision: str,
    rounds: int,
    warm_up: int,
) -> dict[str, Any]:
    """Figures for every number of masks, the first beside all others.

    Raises:
        ValueError: a step does not compute the mean over the masks.
    """
    steps, images, figures = {}, None, {}
    for count in counts:
        config = replace(
            run_config((), batch, precision, device.type), model=model, masks=replace(masks, per_image=count)
        )
        steps[str(count)], images = random_step(config, device, batch)
        if not (apart := difference(steps[str(count)], images)) <= LIMITS[precision]["loss"]:
            raise ValueError(f"the loss with {count} masks per image is {apart:.2g} from the mean over single ones")
    calls = {name: lambda n, step=step: step(images, n) for name, step in steps.items()}
    in_turns(calls, warm_up, device)
    took = in_turns(calls, rounds, device, first=warm_up)
    side = model.img_size // model.patch_size
    for name, step in steps.items():
        count, of_first = int(name), took[str(counts[0])]
        tokens = TokenCounts.expected(step.sampler.config, (side, side), draws=16)
        figures[name] = {
            "ms": statistics.median(each.wall for each in took[name]) * 1e3,
            "cpu_ms": statistics.median(each.cpu for each in took[name]) * 1e3,
            "ms_of_rounds": [round(each.wall * 1e3, 2) for each in took[name]],
            "context_tokens": tokens.context,
            "useful_gflops_per_image_and_mask": step_flops(model, tokens).total / count / 1e9,
        }
        for kind, key in (("wall", "ms_per_image_and_mask"), ("cpu", "cpu_ms_per_image_and_mask")):
            pairs = list(zip(of_first, took[name], strict=True))
            figures[name][key] = statistics.median(getattr(b, kind) for _, b in pairs) * 1e3 / batch / count
            ratio = statistics.median(getattr(a, kind) / getattr(b, kind) for a, b in pairs) * count / counts[0]
            figures[name]["gain" if kind == "wall" else "cpu_gain"] = ratio
    return figures


def text(figures: dict[str, Any]) -> str:
    """A line for every number of masks."""
    return "\n".join(
        f"{name:>3} masks per image {one['ms']:9.1f} ms  {one['ms_per_image_and_mask']:8.2f} ms per image and mask  "
        f"({one['gain']:.2f}x; {one['cpu_gain']:.2f}x by CPU time; "
        f"{one['useful_gflops_per_image_and_mask']:.2f} GFLOP)"
        for name, one in figures.items()
    )
