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
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import draw_masks
from ijepa_fast.bench.measure import graph_times, own_stream, repeat, results, save
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


def check_the_loop(steps: int = 100) -> None:
    """Loop and sampler do the same work: their mean context and target tokens agree within 4 standard errors."""
    generator, sampler = torch.Generator().manual_seed(0), MaskSampler(CONFIGS["official"], (14, 14))
    loop = torch.tensor([
        [sum(part.numel() for part in parts) for parts in draw_masks(GROUP_SIZE, (14, 14), generator)]
        for _ in range(steps)
    ]).double()  # fmt: skip
    ours = torch.tensor([sampler.counts(GROUP_SIZE, seed=0, step=step) for step in range(steps)]).double()
    for a, b in zip(ours.T, loop.T, strict=True):
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / steps)


def _rates(images: int, call: Callable[[int], Any], seconds: float) -> dict[str, Any]:
    rates = [images / took.wall for took in repeat(call, seconds=seconds, least=LEAST_ROUNDS)]
    return {"images_per_second": round(max(rates)), "median": round(statistics.median(rates)), "rounds": len(rates)}


def cpu_rates(implementations: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One row per implementation, recipe and grid; the last is the loop."""
    rows = []
    for grid_name, grid in GRIDS.items():
        for recipe, config in CONFIGS.items():
            for name in implementations:
                sampler = MaskSampler(config, grid, implementation=name)
                rates = _rates(IMAGES, lambda step, s=sampler: s.sample(IMAGES, seed=0, step=step), seconds)
                rows.append({"implementation": name, "recipe": recipe, "grid": grid_name, **rates})
    generator = torch.Generator().manual_seed(0)
    loop = _rates(GROUP_SIZE, lambda _: draw_masks(GROUP_SIZE, (14, 14), generator), seconds)
    return [*rows, {"implementation": "loop", "recipe": "official", "grid": "14x14", **loop}]


def captured_call(sampler: MaskSampler, images: int, device: str) -> Callable[[], Masks]:
    """A call that a CUDA graph can hold: seed and step in device memory, room for the largest masks there are."""
    capacity = images * sampler.max_context, images * sampler.num_targets * sampler.max_target
    seed, step = (torch.full((), value, dtype=torch.int64, device=device) for value in (1, 7))
    return lambda: sampler.sample(images, seed=seed, step=step, device=device, capacity=capacity)


def cuda_times(batches: Sequence[int] = (128, 2048)) -> list[dict[str, Any]]:
    """Microseconds of device time per call, by batch, recipe and grid."""
    rows = []
    with own_stream(torch.device("cuda")):
        for images in batches:
            for grid_name, grid in GRIDS.items():
                for recipe, config in CONFIGS.items():
                    call = captured_call(MaskSampler(config, grid, implementation="extension"), images, "cuda")
                    times = graph_times([call] * CALLS_PER_GRAPH)
                    rows.append({"images": images, "recipe": recipe, "grid": grid_name, "times": times.as_dict()})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each rate on the CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="to compare for equality")
    parser.add_argument("--equality-only", action="store_true", help="time nothing")
    arguments = parser.parse_args(argv)
    devices = ["cpu"] if arguments.device == "cpu" else ["cpu", "cuda"]
    refusals = {device: extension.reason(device) for device in devices}
    if any(refusals.values()):
        print("\n".join(f"masks on {device}: {reason}" for device, reason in refusals.items() if reason))
        return 1
    torch.set_num_threads(1)
    report = results("masks", arguments.device)
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
    save(arguments.json, report)
    for row in report.get("device_times", []):
        print(f"{row['images']:>5} images {row['recipe']:<9}{row['grid']}  {row['times']['p50']:8.1f} us")
    for row in report.get("rates", []):
        rate = row["images_per_second"]
        print(f"{row['implementation']:<10}{row['recipe']:<9}{row['grid']}  {rate:>12,} images/s")
    print(f"{report['equal']['comparisons']} comparisons bit for bit on {', '.join(devices)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
