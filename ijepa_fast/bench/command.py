"""``ijepa-fast bench`` and ``fastest``: what a recipe's training step and every op take here, and what is fastest."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.bench import table as ops_table
from ijepa_fast.bench.fastest import check, default_images, fastest
from ijepa_fast.bench.measure import results, save
from ijepa_fast.bench.steps import step_rate
from ijepa_fast.command_line import UsageError, run_config, run_parser
from ijepa_fast.config import RunConfig, flags, nested
from ijepa_fast.ranks import pick_device
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


def _config_of_a_benchmark(parser, argv: list[str]):
    """(RunConfig, its name, namespace as parsed); of a recipe that stands for the device if none is named."""

    if not any(argument.partition("=")[0] == "--config" for argument in argv):
        argv = ["--config", RECIPES[pick_device("auto", 0).type], *argv]
    config, parsed = run_config(parser, argv)
    named = [value for flag, value in zip(argv, argv[1:], strict=False) if flag == "--config"]
    named += [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
    return config, " + ".join(Path(name).stem for name in named), parsed


def bench_command(argv: list[str]) -> int:
    """``ijepa-fast bench``."""
    parser = run_parser("bench", "Images per second of a recipe's training step, and a table of all ops.")
    parser.add_argument("--images", type=int | None, default=None, help="Images per step, by default 128 (CPU: 16).")
    parser.add_argument("--seconds", type=float, default=90.0, help="Time for everything.")
    parser.add_argument("--compile", type=bool, default=False, help="Time torch.compile beside the ops.")
    parser.add_argument("--json", type=Path | None, default=None, help="File to write.")
    config, name, parsed = _config_of_a_benchmark(parser, argv)

    bench(
        config,
        name,
        pick_device(config.train.device, 0),
        images=parsed.images,
        seconds=parsed.seconds,
        compiled=parsed.compile,
        path=parsed.json,
    )
    return 0


@contextlib.contextmanager
def _ended_by_signals():
    """SIGTERM and SIGHUP end the program as an exception does, so that it leaves no files and processes behind."""

    def end(number, _frame):
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fastest_command(argv: list[str]) -> int:
    """``ijepa-fast fastest``."""
    parser = run_parser("fastest", "Try the options of a recipe's training step here, and name the fastest.")
    images_help = "Images per step on one GPU; by default its share of the batch, at most 128 at a time (CPU: 16)."
    parser.add_argument("--images", type=int | None, default=None, help=images_help)
    parser.add_argument("--gpus", type=int, default=1, help="Number of GPUs of the run; one of them is used here.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Seconds of timed steps for each choice.")
    parser.add_argument("--out", type=Path | None, default=None, help="YAML file to write the fastest settings to.")
    parser.add_argument("--json", type=Path | None, default=None, help="File to write everything to, after each way.")
    config, name, parsed = _config_of_a_benchmark(parser, argv)
    import yaml

    device = pick_device(config.train.device, 0)
    images = default_images(config, device, max(parsed.gpus, 1)) if parsed.images is None else parsed.images
    try:
        check(config, images, parsed.seconds, parsed.gpus)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for path in filter(None, (parsed.out, parsed.json)):  # now, not when there are results to lose
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            if not path.stat().st_size:
                file.write("{}\n")
    say = partial(print, flush=True)
    if images * parsed.gpus != config.train.batch_size:
        say(f"{images} of the {config.train.batch_size} images of a step; --images gives another number")
    with _ended_by_signals():
        found = fastest(
            config, name, device, images=images, seconds=parsed.seconds, gpus=parsed.gpus, path=parsed.json, say=say
        )
    if not found["settings"]:
        say(f"\nnothing here is faster than {name} as configured")
    else:
        say(f"\n{found['gain']:.2f}x as fast as configured: ijepa-fast pretrain ... {flags(found['settings'])}")
    if parsed.out is not None:
        parsed.out.write_text(yaml.safe_dump(nested(found["settings"])))
    return 0


COMMANDS = {"bench": bench_command, "fastest": fastest_command}
