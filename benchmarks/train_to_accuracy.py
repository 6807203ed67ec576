"""Which encoder does a fixed time buy? Pretrain with each implementation and mask mode, then probe the target encoder.

    python -m benchmarks.train_to_accuracy --recipe cifar10 --data PATH --minutes 3 --json FILE
    python -m benchmarks.train_to_accuracy --recipe cifar10 --data PATH --steps 500 --json FILE

With --minutes every contender runs as many steps as fit into that time on this machine, by its own rate measured
beforehand, with schedules that end there; with --steps all run the same number. Contenders:

- ``exact``: this package, all visible patches.
- ``batch_min``: this package, the official truncated masks.
- ``eager``: the published algorithm (benchmarks/baselines.py), the same truncated masks.

All start from the same weights, see the same crops in the same order, and minimise the prediction loss alone, which is
what the published algorithm has: the recipe's regularisers are left out. Evaluation is the package's own for all three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Eager, load_weights, mask_lists
from ijepa_fast.bench.measure import machine, write_json
from ijepa_fast.config import RunConfig, from_dict, read_recipe
from ijepa_fast.data import TrainLoader
from ijepa_fast.data.datasets import Sources, open_sources
from ijepa_fast.jepa import IJEPA, Objective
from ijepa_fast.judge import judge
from ijepa_fast.masks import MaskConfig, MaskSampler
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.step import PRECISION_DTYPES, TrainStep
from ijepa_fast.vit import cast_weights

CONTENDERS = ("exact", "batch_min", "eager")
WARM_UP, RATED = 2, 5  # steps: not timed, and timed, to find the rate
WARM_UP_SHARE = 0.1
"""Of a run, at most: the recipes' warm-ups are made for longer ones."""

StepFunction = Callable[[Tensor, int], Any]


def prepare(config: RunConfig, seed: int) -> RunConfig:
    """The recipe as all contenders run it."""
    return replace(config, seed=seed, objective=Objective())


def build(name: str, config: RunConfig, steps: int, per_epoch: int, device: torch.device) -> tuple[IJEPA, StepFunction]:
    """A contender's function that trains on uint8 images, and the networks that hold its weights when asked.

    For ``eager`` the returned networks are copies: ``collect`` brings them up to date.
    """
    torch.manual_seed(config.seed)
    model = config.model.build(config.objective).to(device)
    grid, batch = model.context_encoder.grid, config.train.batch_size
    warmup = min(config.optim.warmup_epochs, WARM_UP_SHARE * steps / per_epoch)
    schedules = replace(config.optim, warmup_epochs=warmup).schedules(steps, per_epoch)
    official = MaskConfig.official(batch, min_keep=config.masks.min_keep)
    if name != "eager":
        cast_weights(model, PRECISION_DTYPES[config.train.precision])
        optimizer = FusedAdamW(parameter_groups(model), betas=config.optim.betas, eps=config.optim.eps)
        sampler = MaskSampler(config.masks if name == "exact" else official, grid)
        step = TrainStep(model, optimizer, sampler, schedules, seed=config.seed)
        return model, step
    eager = Eager(config.model, schedules, config.train.precision).to(device)
    load_weights(eager, model.state_dict())
    sampler = MaskSampler(official, grid)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (config.model.mean, config.model.std))

    def train(images: Tensor, number: int) -> float:
        masks = sampler.sample(len(images), seed=config.seed, step=number)
        lists = (
            mask_lists(masks.context, masks.num_contexts, sampler.num_patches),
            mask_lists(masks.targets, masks.num_targets, sampler.num_patches),
        )
        return eager((images / 255 - mean) / std, lists, number)

    train.eager = eager
    return model, train


def collect(model: IJEPA, step: StepFunction) -> IJEPA:
    """The trained networks of a contender."""
    if hasattr(step, "eager"):
        model.load_state_dict(step.eager.state_dict())
    return model


def rate(name: str, config: RunConfig, per_epoch: int, device: torch.device) -> float:
    """Seconds per step on random images, without loading."""
    _, step = build(name, config, 1000, per_epoch, device)
    side = config.model.img_size
    images = torch.randint(256, (config.train.batch_size, 3, side, side), dtype=torch.uint8, device=device)
    for number in range(WARM_UP + RATED):
        if number == WARM_UP:
            _wait(device)
            start = time.perf_counter()
        step(images, number)
    _wait(device)
    return (time.perf_counter() - start) / RATED


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def contest(
    name: str, config: RunConfig, sources: Sources, device: torch.device, steps: int | None, seconds: float | None
) -> dict[str, Any]:
    """Train one contender for so many steps or seconds, and judge it."""
    loading = {
        "image_size": config.model.img_size,
        "global_batch": config.train.batch_size,
        "seed": config.seed,
        "workers": config.loader.workers,
        "scale": config.loader.crop_scale,
        "ratio": config.loader.crop_ratio,
        "flip": config.loader.flip,
    }
    per_epoch = TrainLoader(sources.train, **loading).steps_per_epoch
    if steps is None:
        steps = max(1, int(seconds / rate(name, config, per_epoch, device)))
    model, step = build(name, config, steps, per_epoch, device)
    start = time.perf_counter()
    for number, batch in enumerate(TrainLoader(sources.train, **loading, num_steps=steps)):
        step(batch.images.to(device, non_blocking=True), number)
    _wait(device)
    took = time.perf_counter() - start
    figures = judge(collect(model, step).target_encoder, sources, config)
    return {"steps": steps, "epochs": steps / per_epoch, "seconds": took, **figures}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10", help="model, masks, crops and schedules")
    parser.add_argument("--data", required=True, help="labelled images: a folder with train/ and val/, or rendered")
    parser.add_argument("--impl", default=",".join(CONTENDERS), help=f"comma-separated, of {', '.join(CONTENDERS)}")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of training for each contender")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="images per step; the recipe's by default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args(arguments)
    names = options.impl.split(",")
    for name in names:
        if name not in CONTENDERS:
            parser.error(f"--impl must name some of {', '.join(CONTENDERS)}, got {name!r}")
    device = torch.device(options.device)
    config = from_dict(read_recipe(options.recipe))
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    train = replace(config.train, precision=precision, batch_size=options.batch or config.train.batch_size)
    config = replace(config, data=options.data, train=train)
    sources = open_sources(config.data, config.evaluation.data)
    if sources.test is None:
        parser.error(f"{options.data} has no labelled test images")
    runs = []
    for seed in range(options.seeds):
        for name in names:
            seconds = None if options.minutes is None else 60 * options.minutes
            result = contest(name, prepare(config, seed), sources, device, options.steps, seconds)
            runs.append({"contender": name, "seed": seed, **result})
            print(runs[-1], flush=True)
    report = {
        "schema": 1,
        "kind": "train_to_accuracy",
        "machine": machine(device),
        "settings": {
            "recipe": options.recipe,
            "minutes": options.minutes,
            "steps": options.steps,
            "batch": train.batch_size,
            "precision": precision,
        },
        "runs": runs,
    }
    if options.json:
        write_json(options.json, report)
    return report


if __name__ == "__main__":
    main()
