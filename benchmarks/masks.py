"""Mask sampling: equal bits on every device, images per second on one CPU core, device time on a GPU.

    python -m benchmarks.masks --device cpu --json benchmarks/results/masks-cpu.json
    python -m benchmarks.masks --device cuda --json FILE
    python -m benchmarks.masks --device cuda --equality-only --batches 33 200     (what compute-sanitizer watches)

Nothing is timed before the torch sampler, the C++ extension and, on a GPU, the CUDA extension have drawn the same
masks. Rates on the CPU are of one thread, best of all rounds: other work on the machine can only slow a round down.
Beside them stands a loop that draws image by image, as the collator of a data loader does. Times on a GPU are of CUDA
graphs of many calls, whose step is read from device memory.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.bench.measure import SCHEMA, graph_times, machine, side_stream, write_json
from ijepa_fast.masks import extension
from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler

IMAGES, GROUP_SIZE = 2048, 128
CONFIGS = {
    "official": MaskConfig.official(GROUP_SIZE),
    "exact": MaskConfig(),
    "fixed": MaskConfig(context="fixed"),
}
GRIDS = {"14x14": (14, 14), "16x16": (16, 16), "28x28": (28, 28)}
BATCHES = (1, 8, 33, 128, 1000, 2048, 4096)
CALLS_PER_GRAPH, LEAST_ROUNDS = 20, 5


def assert_equal(ours: Masks, theirs: Masks) -> None:
    for kind in ("context", "targets"):
        for name in ("indices", "cu_seqlens"):
            a, b = (getattr(getattr(masks, kind), name).cpu() for masks in (ours, theirs))
            assert torch.equal(a, b), f"{name} of {kind} differ"


def whole_groups(config: MaskConfig, images: int) -> int:
    """At least so many images, a whole number of groups where the configuration needs it."""
    group = (config.group_size or 1) if config.context == "batch_min" else 1
    return -(-images // group) * group


def check_equality(devices: Sequence[str], batches: Sequence[int]) -> int:
    """The extension on each device draws what the torch sampler draws on the CPU. The number of comparisons.

    Raises:
        AssertionError: it does not, or a graph's replay with a new step does not.
        ValueError: the extension has no code for a device.
    """
    comparisons = 0
    for config in (*CONFIGS.values(), MaskConfig.official(1)):
        for grid in GRIDS.values():
            ours, theirs = (MaskSampler(config, grid, implementation=name) for name in ("extension", "torch"))
            for batch in sorted({whole_groups(config, batch) for batch in batches}):
                expected = theirs.sample(batch, seed=1, step=batch)
                for device in devices:
                    assert_equal(ours.sample(batch, seed=1, step=batch, device=device, round_rows=1), expected)
                    comparisons += 1
    return comparisons


def per_image_loop(grid: tuple[int, int], steps: Sequence[int]) -> tuple[list, list]:
    """The official recipe as a collator draws it, image by image: lists of int64 index tensors, context and targets.

    Written from the paper; sizes once per step, contexts truncated to the shortest of each GROUP_SIZE images.
    """
    height, width = grid
    contexts, targets = [], []
    for step in steps:
        sizes = random.Random(step)
        share = sizes.random()
        area, aspect = int(height * width * (0.15 + 0.05 * share)), 0.75 + 0.75 * share
        block = min(round(math.sqrt(area * aspect)), height - 1), min(round(math.sqrt(area / aspect)), width - 1)
        side = round(math.sqrt(int(height * width * (0.85 + 0.15 * sizes.random()))))
        context_block = min(side, height - 1), min(side, width - 1)

        def place(size):
            top = int(torch.randint(0, height - size[0], (1,)))
            left = int(torch.randint(0, width - size[1], (1,)))
            return slice(top, top + size[0]), slice(left, left + size[1])

        group = []
        for _ in range(GROUP_SIZE):
            visible = torch.ones(height, width, dtype=torch.int32)
            for _ in range(4):
                target, where = torch.zeros(height, width, dtype=torch.int32), place(block)
                target[where] = 1
                visible[where] = 0
                targets.append(target.flatten().nonzero().squeeze(1))
            context = torch.zeros(height, width, dtype=torch.int32)
            where = place(context_block)
            context[where] = visible[where]
            group.append(context.flatten().nonzero().squeeze(1))
        shortest = min(map(len, group))
        contexts += [context[:shortest] for context in group]
    return contexts, targets


def check_the_loop(steps: int = 100) -> None:
    """Loop and sampler do the same work: their mean context and target tokens agree within 4 standard errors."""
    contexts, targets = per_image_loop((14, 14), range(steps))
    sampler = MaskSampler(CONFIGS["official"], (14, 14))
    counts = torch.tensor([sampler.counts(GROUP_SIZE, seed=0, step=step) for step in range(steps)]).double()
    loop_context = torch.tensor([len(c) for c in contexts]).view(steps, GROUP_SIZE).sum(1).double()
    loop_targets = torch.tensor([len(t) for t in targets]).view(steps, GROUP_SIZE * 4).sum(1).double()
    for ours, loop in ((counts[:, 0], loop_context), (counts[:, 1], loop_targets)):
        error = math.sqrt((ours.var() + loop.var()) / steps)
        assert abs(ours.mean() - loop.mean()) < 4 * error


def _rates(images: int, call: Callable[[int], Any], seconds: float) -> dict[str, Any]:
    call(0)
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while len(rates) < LEAST_ROUNDS or time.perf_counter() < until:
        start = time.perf_counter()
        call(len(rates) + 1)
        rates.append(images / (time.perf_counter() - start))
    return {"images_per_second": round(max(rates)), "median": round(statistics.median(rates)), "rounds": len(rates)}


def cpu_rates(implementations: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One row per implementation, recipe and grid; the last is the loop."""
    found = []
    for grid_name, grid in GRIDS.items():
        for recipe, config in CONFIGS.items():
            for name in implementations:
                sampler = MaskSampler(config, grid, implementation=name)
                rates = _rates(IMAGES, lambda step, s=sampler: s.sample(IMAGES, seed=0, step=step), seconds)
                found.append({"implementation": name, "recipe": recipe, "grid": grid_name, **rates})
    loop = _rates(GROUP_SIZE, lambda step: per_image_loop((14, 14), [step]), seconds)
    return [*found, {"implementation": "loop", "recipe": "official", "grid": "14x14", **loop}]


def captured_call(sampler: MaskSampler, images: int, device: str) -> Callable[[], Masks]:
    """A call that a CUDA graph can hold: seed and step in device memory, room for the largest masks there are."""
    capacity = images * sampler.max_context, images * sampler.num_targets * sampler.max_target
    seed, step = (torch.full((), value, dtype=torch.int64, device=device) for value in (1, 7))
    return lambda: sampler.sample(images, seed=seed, step=step, device=device, capacity=capacity)


def cuda_times(batches: Sequence[int] = (128, 2048)) -> list[dict[str, Any]]:
    """Microseconds of device time per call, by batch, recipe and grid."""
    found = []
    with side_stream(torch.device("cuda")):
        for images in batches:
            for grid_name, grid in GRIDS.items():
                for recipe, config in CONFIGS.items():
                    call = captured_call(MaskSampler(config, grid, implementation="extension"), images, "cuda")
                    times = graph_times([call] * CALLS_PER_GRAPH)
                    found.append({"images": images, "recipe": recipe, "grid": grid_name, "times": times.as_dict()})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each rate on the CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="to compare for equality")
    parser.add_argument("--equality-only", action="store_true", help="time nothing")
    arguments = parser.parse_args(argv)
    devices = ["cpu"] if arguments.device == "cpu" else ["cpu", "cuda"]
    refusals = {device: extension.reason(device) for device in devices}
    if any(refusals.values()):
        print("\n".join(f"masks on {device}: {reason}" for device, reason in refusals.items() if reason))
        return 1
    torch.set_num_threads(1)
    report: dict[str, Any] = {"schema": SCHEMA, "kind": "masks", "machine": machine(arguments.device)}
    report["equal"] = {
        "implementations": ["torch on cpu", *(f"extension on {device}" for device in devices)],
        "batches": arguments.batches,
        "comparisons": check_equality(devices, arguments.batches),
    }
    if not arguments.equality_only:
        check_the_loop()
        report["images"], report["group_size"] = IMAGES, GROUP_SIZE
        if arguments.device == "cuda":
            report["device_times"] = cuda_times()
        report["rates"] = cpu_rates(("torch", "extension"), arguments.seconds)
    if arguments.json:
        write_json(arguments.json, report)
    for found in report.get("device_times", []):
        print(f"{found['images']:>5} images {found['recipe']:<9}{found['grid']}  {found['times']['p50']:8.1f} us")
    for found in report.get("rates", []):
        rate = found["images_per_second"]
        print(f"{found['implementation']:<10}{found['recipe']:<9}{found['grid']}  {rate:>12,} images/s")
    print(f"{report['equal']['comparisons']} comparisons bit for bit on {', '.join(devices)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
