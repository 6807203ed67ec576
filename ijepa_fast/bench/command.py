"""``ijepa-fast bench``: the rate of a recipe's training step, and a table of ops, within two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.bench import table as ops_table
from ijepa_fast.bench.measure import results, save
from ijepa_fast.bench.steps import step_rate
from ijepa_fast.config import RunConfig
from ijepa_fast.run.auto import resolved

RECIPES = {"cuda": "vitb16_in1k_exact", "cpu": "demo"}
"""Recipe that is measured by default."""
IMAGES = {"cuda": 128, "cpu": 16}
STEP_SHARE = 0.25
MODES = ("forward", "backward")


def bench(
    config: RunConfig,
    name: str,
    device: torch.device,
    *,
    images: int | None = None,
    seconds: float = 90.0,
    compiled: bool = False,
    path: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Whole steps of ``config``, then every op at the sizes of its model.

    Args:
        name: of the configuration, for the table.
        images: per step; by default ``IMAGES`` of the device.
        seconds: for everything together; ops for which no time is left are named.
        compiled: time torch.compile too, which takes it seconds per op to compile.
        path: JSON file to write.
        say: takes each line of the table as soon as it is known.

    Raises:
        ValueError: images is not positive, or settings do not fit together.
    """
    images = IMAGES[device.type] if images is None else images
    if images < 1:
        raise ValueError(f"images must be positive, got {images}")
    until = time.monotonic() + seconds
    if device.type == "cpu":
        # The ops are measured in fp32 there.
        config = replace(config, train=replace(config.train, precision="fp32"))
    config = resolved(config, device)
    report = results("bench", device, name=name)
    described = report["machine"]
    say(f"{described.get('gpu', described['cpu'])}, torch {described['torch']}, triton {described['triton']}")
    report["step"] = step = step_rate(config, device, images, STEP_SHARE * seconds)
    say(
        f"{name}: {step['images_per_second']:.1f} images/s in steps of {images} ({step['precision']}, "
        f"{step['context_tokens']:.1f} context tokens per image)"
        + (f", {step['peak_memory_gib']} GiB" if "peak_memory_gib" in step else "")
    )
    say(ops_table.header())
    table = []
    for row in ops_table.rows(
        {name: config.model},
        device,
        images=images,
        masks=config.masks,
        modes=MODES,
        providers=lambda provider: compiled or provider != "compile",
        seconds=until - time.monotonic(),
    ):
        table.append(row)
        if "times" in row or "failed" in row:
            say(ops_table.line(row))
    for remark in ops_table.remarks(table):
        say(remark)
    report["rows"] = ops_table.with_ratios(table)
    save(path, report)
    return report
