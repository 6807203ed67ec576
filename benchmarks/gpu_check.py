"""The driver behind gpu_check.sh: runs each part in processes of its own and keeps whatever they wrote.

A results file holds one entry per part: the machine and commit it ran on, its commands with exit status and seconds,
and what they measured. It is written after every command, so a run that is cut off keeps what it has. Running a part
again replaces that part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import LEAST_SECONDS, Run
from ijepa_fast.bench.table import with_ratios
from ijepa_fast.masks import extension

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {
    "install": 60,
    "masks": 110,
    "tests": 150,
    "step": 330,
    "ops": 170,
    "scaling": 400,
    "accuracy": 3600,
    "tune": 400,
}
"""Seconds that a part of a whole run, or of several, may take at most."""
RESERVED = {"tests": 100, "step": 210, "ops": 80}
"""Seconds that earlier parts of a whole run leave to these."""
WHOLE_RUN = ("install", "masks", "tests", "step", "ops")
WHOLE_SECONDS = 525
TEST_PROCESSES = 4
LEAST_STEP_SECONDS = 150
COMPILE_SECONDS = 300
"""Least time for whole steps that torch.compile takes part in."""


def install(run: Run, entry: dict[str, Any]) -> None:
    """Without network: what the package needs is there, or nothing here could run."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "-e", "."]
    if run.execute(entry, "pip install", command) != 0:
        sys.exit("gpu_check: the checkout could not be installed (above)")


def masks(run: Run, entry: dict[str, Any]) -> None:
    """Build the extension; equal bits and times; the same under compute-sanitizer."""
    if build_extension(run, entry) != 0:
        return
    measure = [sys.executable, "-m", "benchmarks.masks", "--device", run.device]
    quick = ["--batches", "8", "33", "--seconds", "0.05"] if run.tiny else ["--seconds", "0.5"]
    run.execute(entry, "masks", [*measure, *quick, "--json", str(run.scratch / "masks.json")])
    entry["report"] = run.written("masks.json")
    run.save()
    tool = compute_sanitizer()
    if run.device != "cuda" or tool is None:
        entry["sanitizer"] = {"not_run": "compute-sanitizer was not found" if run.device == "cuda" else "no GPU"}
        return
    watched = [*measure, "--equality-only", "--batches", "33", "200"]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "77", *watched]
        name = f"compute-sanitizer {check}"
        # The caching allocator would hide writes behind the end of a tensor.
        status = run.execute(entry, name, command, limit=50, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status and "device not supported" in run.log(name).read_text(errors="replace").lower():
            run.note(entry["commands"], name, {"not_run": "the tool does not support this machine"})


def build_extension(run: Run, entry: dict[str, Any]) -> int | None:
    return run.execute(entry, "build csrc", [sys.executable, "tools/build_extension.py"], **this_gpu_only(entry))


def draw_with_the_extension(run: Run, entry: dict[str, Any]) -> None:
    """Steps would be timed with the slower sampler where it was not built, as when their part runs by itself."""
    if not run.tiny and extension.library_path() is None:
        build_extension(run, entry)


def this_gpu_only(entry: dict[str, Any]) -> dict[str, str]:
    """Environment in which nvcc compiles for this GPU alone, which takes it a quarter of the time."""
    capability = entry["machine"].get("capability")
    return {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}


def compute_sanitizer() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    beside = (f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer"))
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(beside))


def tests(run: Run, entry: dict[str, Any]) -> None:
    """Each file in a process of its own: an illegal access ends the process, and must not end the others."""
    files, marker = files_with_gpu_tests(), "gpu"
    if run.tiny:
        files, marker = [path for path in files if path.name == "test_kernels_on_gpu.py"], "not gpu"
    entry["files"] = {}

    def test(path: Path) -> None:
        junit = run.scratch / f"{path.stem}.xml"
        command = [sys.executable, "-m", "pytest", str(path.relative_to(ROOT)), "-m", marker, "-q", "--tb=short"]
        status = run.execute(entry, path.name, [*command, f"--junitxml={junit}"], **this_gpu_only(entry))
        run.note(entry["files"], path.name, outcome(junit, status))

    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        list(pool.map(test, files))
    entry["passed"] = sum(found["passed"] for found in entry["files"].values())
    entry["failed"] = [f"{name}: {what}" for name, found in entry["files"].items() for what in found["failed"]]


def files_with_gpu_tests() -> list[Path]:
    """Only these are imported: what the other tests need may not be installed where the GPU is."""
    marked = re.compile(r"^(@pytest\.mark\.gpu|pytestmark = .*mark\.gpu)", re.MULTILINE)
    return sorted(path for path in (ROOT / "tests").glob("test_*.py") if marked.search(path.read_text()))


def outcome(junit: Path, status: int | None) -> dict[str, Any]:
    """Number of passed tests and names of those that did not. A file that ran none has failed."""
    if not junit.exists():
        return {"passed": 0, "failed": ["stopped before its end" if status is None else f"exit status {status}"]}
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    bad = [case.get("name", "?") for case in cases if any(case.find(kind) is not None for kind in ("failure", "error"))]
    skipped = [f"{case.get('name', '?')} (skipped)" for case in cases if case.find("skipped") is not None]
    found = {"passed": len(cases) - len(bad) - len(skipped), "failed": bad + skipped}
    if status != 0 and not found["failed"]:
        found["failed"] = [f"exit status {status}"]
    return found


OTHER_MODELS = ["--models", "ViT-B/16", "ViT-L/16", "ViT-g/16"]
OPS_PASSES: tuple[tuple[str, list[str]], ...] = (
    # Attention by itself: an illegal access would take all that its process has still to time.
    ("ViT-H/14", ["--models", "ViT-H/14", "--groups", "rows", "linear", "optimizer", "--without", "compile"]),
    ("attention, ViT-H/14", ["--models", "ViT-H/14", "--groups", "attention", "--without", "compile"]),
    (
        "attention",
        [*OTHER_MODELS, "--groups", "attention", "--modes", "forward", "both", "--without", "compile"],
    ),
    ("compile", ["--models", "ViT-H/14", "--groups", "rows", "linear", "attention", "--providers", "compile"]),
    ("rows", [*OTHER_MODELS, "--groups", "rows", "linear", "optimizer", "--without", "compile"]),
)
TINY_PASSES = (
    ("rows", ["--models", "tiny", "--groups", "rows", "--modes", "forward", "--without", "compile"]),
    ("others", ["--models", "tiny", "--groups", "linear", "attention", "optimizer", "--modes", "forward"]),
)


def ops(run: Run, entry: dict[str, Any]) -> None:
    """Most wanted first. Rows of different passes are of one machine and minutes apart, so their ratios stand."""
    rows: list[dict[str, Any]] = []
    for name, arguments in TINY_PASSES if run.tiny else OPS_PASSES:
        file = f"ops-{len(rows)}.json"
        command = [sys.executable, "-m", "benchmarks.ops", "--device", run.device, *arguments]
        command += ["--seconds", f"{max(run.left() - 20, 1):.0f}", "--json", str(run.scratch / file)]
        run.execute(entry, f"ops, {name}", command)
        rows += (run.written(file) or {"rows": []})["rows"]
        entry["rows"] = with_ratios(rows)
        run.save()


STEPS = (
    # Most wanted first, and a first one that is short: what is stopped before its first group is timed leaves nothing.
    # What torch.compile takes part in, and so minutes, has processes of its own, and the baseline one without our
    # compiled blocks. They come last: a run has time for all the others, or for these (--steps compile).
    ("vit_h14", 128, "exact", "ours,eager"),
    ("vit_b16", 512, "exact", "ours,eager,ours+triton,ours+fused+triton"),
    ("vit_h14", 128, "batch_min", "ours,eager,ours+triton,ours+fused+triton"),
    ("vit_l16", 128, "exact", "ours,eager,ours+triton,ours+fused+triton"),
    ("vit_h14", 128, "exact", "ours,ours+triton,ours+fused,ours+fused+triton,ours+fused+triton+cudnn"),
    ("vit_h14", 128, "exact", "ours,ours+fused+triton+fp8,ours+triton+fp8row,ours+fused+triton+overlap,ours+wide"),
    ("vit_b16", 512, "exact", "ours,ours+capture,ours+fused+triton+capture,ours+fused+triton+overlap"),
    ("vit_l16", 128, "exact", "ours,ours+fused+triton+capture,ours+fused+triton+overlap"),
    ("vit_b16", 512, "exact", "ours,compiled"),
    ("vit_h14", 128, "exact", "ours,compiled"),
    ("vit_l16", 128, "exact", "ours,compiled"),
    ("vit_h14", 128, "batch_min", "ours,compiled"),
    ("vit_h14", 128, "exact", "ours,ours+compile,ours+compile+triton,ours+compile+fused+triton"),
    ("vit_b16", 512, "exact", "ours,ours+compile,ours+compile+triton,ours+compile+triton+capture"),
    ("vit_l16", 128, "exact", "ours,ours+compile,ours+compile+triton,ours+compile+triton+capture"),
)
TINY_STEPS = (("vit_tiny", 2, "exact", "ours,eager"),)


def step(run: Run, entry: dict[str, Any]) -> None:
    """Whole steps. Where a process dies before it has measured anything, the first implementation is run alone and the
    others without it: after an illegal access nothing more can be run in one process.

    With --steps, those that an earlier run of this commit has measured are kept, and not measured again.
    """
    machines = run.earlier.get("machine", {}), entry["machine"]
    same = all(machines[0].get(name) == machines[1].get(name) for name in ("commit", "gpu", "torch", "triton"))
    earlier = run.earlier if run.steps and same else {}
    entry["reports"], entry["commands"] = earlier.get("reports", []), earlier.get("commands", {})
    run.save()
    draw_with_the_extension(run, entry)
    steps = TINY_STEPS if run.tiny else [step for step in STEPS if run.steps in " ".join(map(str, step))]
    for number, (model, batch, masks_of, names) in enumerate(steps):
        # One that hangs must not take all the others' time; but the first are wanted most.
        least = COMPILE_SECONDS if "compile" in names else LEAST_STEP_SECONDS
        limit = max(1.5 * run.left() / (len(steps) - number), least)
        attempts = [names]
        while attempts:
            attempt = attempts.pop(0)
            name = f"step {model} {masks_of} {attempt}"
            if entry["commands"].get(name, {}).get("exit_status") == 0:
                continue
            command = [sys.executable, "-m", "benchmarks.step", "--model", model, "--batch", str(batch)]
            command += ["--masks", masks_of, "--impl", attempt, "--device", run.device]
            command += ["--rounds", "2", "--warm-up", "1"] if run.tiny else []
            status, found = measured(run, entry, name, command, limit)
            died = status not in (0, None)  # None: stopped, as it would be again
            if attempt == names and died and not (found and found["implementations"]):
                attempts = names.split(",", 1)


def measured(
    run: Run, entry: dict[str, Any], name: str, command: Sequence[str], limit: float = float("inf")
) -> tuple[int | None, dict[str, Any] | None]:
    """Exit status and report of a command that writes JSON; the report goes to the entry's, however far it came."""
    file = f"{re.sub('[^a-z0-9_]+', '-', name.lower())}.json"
    status = run.execute(entry, name, [*command, "--json", str(run.scratch / file)], limit)
    found = run.written(file)
    if found:
        entry["reports"].append(found)
        run.save()
    return status, found


SCALING_MODELS = ("vit_h14", "vit_b16")


def scaling(run: Run, entry: dict[str, Any]) -> None:
    """Time per token over batch and image size."""
    entry["reports"] = []
    draw_with_the_extension(run, entry)
    models = ("vit_tiny",) if run.tiny else SCALING_MODELS
    for number, model in enumerate(models):
        seconds = run.left() / (len(models) - number)
        command = [sys.executable, "-m", "benchmarks.scaling", "--model", model, "--device", run.device]
        command += ["--batches", "1", "2", "--sizes", "224", "--rounds", "2", "--warm-up", "1"] if run.tiny else []
        # What is begun before that ends after it: a batch of 512 takes half a minute.
        measured(run, entry, f"scaling {model}", [*command, "--seconds", f"{max(seconds - 40, 1):.0f}"], seconds)


TRAININGS = 8
"""Time of a contest over that of its first contender: three of them for that time, and as many epochs of each; the
published algorithm takes several times as long for these."""
JUDGING_SECONDS = 120


def accuracy(run: Run, entry: dict[str, Any]) -> None:
    """What training buys, on the images that --data names."""
    entry["reports"] = []
    draw_with_the_extension(run, entry)
    data = (("demo", "rendered"),) if run.tiny else run.data
    for number, (recipe, path) in enumerate(data):
        seconds = run.left() / (len(data) - number)
        minutes = max((seconds - JUDGING_SECONDS) / TRAININGS / 60, 0.2)
        command = [sys.executable, "-m", "benchmarks.train_to_accuracy", "--recipe", recipe, "--data", path]
        command += ["--name", recipe, "--regularised", "--device", run.device]
        command += (
            ["--steps", "2", "--equal", "epochs", "--batch", "8", "--threads", "1"]
            if run.tiny
            else ["--minutes", f"{minutes:.2f}"]
        )
        measured(run, entry, f"accuracy {recipe}", command, seconds)


def tune(run: Run, entry: dict[str, Any]) -> None:
    """Proposals for the kernels' tables."""
    run.execute(entry, "tune", [sys.executable, "-m", "benchmarks.tune", "--json", str(run.scratch / "tune.json")])
    entry["report"] = run.written("tune.json")


PARTS: dict[str, Callable[[Run, dict[str, Any]], None]] = {
    "install": install,
    "masks": masks,
    "tests": tests,
    "step": step,
    "ops": ops,
    "scaling": scaling,
    "accuracy": accuracy,
    "tune": tune,
}


def faults(report: dict[str, Any]) -> list[str]:
    """What a reader of the results must know went wrong, in words."""
    found = []
    for part, entry in report["parts"].items():
        if "error" in entry:
            found.append(f"{part}: {entry['error']}")
        for name, result in entry["commands"].items():
            if "not_run" in result:
                found.append(f"{part}: {name} was not run: {result['not_run']}")
            elif "stopped_after_s" in result:
                found.append(f"{part}: {name} was stopped after {result['stopped_after_s']} s")
            elif result["exit_status"]:
                found.append(f"{part}: {name} ended with exit status {result['exit_status']}")
        found += [f"{part}: {name} did not pass" for name in entry.get("failed", [])]
        found += [
            f"{part}: {row['provider']} of {row['op']}, {row['case']}, {row['mode']} ({row['model']}): {row['failed']}"
            for row in entry.get("rows", [])
            if "failed" in row
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("all", *PARTS), default=["all"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    parser.add_argument("--seconds", type=float, default=WHOLE_SECONDS, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="RECIPE=PATH",
        help="for part accuracy: image folders with train/ and val/",
    )
    parser.add_argument(
        "--steps",
        default="",
        metavar="WORDS",
        help='for part step: only those with these words in "MODEL BATCH MASKS IMPLEMENTATIONS", such as "compile" or '
        '"vit_h14 128 exact ours,eager"',
    )
    parser.add_argument("--tiny", action="store_true", help="a small version of every part; all that a CPU can do")
    options = parser.parse_args(argv)
    data = [tuple(pair.split("=", 1)) for pair in options.data]
    if bad := [pair for pair, split in zip(options.data, data, strict=True) if len(split) != 2 or not all(split)]:
        parser.error(f"--data takes RECIPE=PATH, got {bad[0]!r}")
    if "accuracy" in options.part and not (data or options.tiny):
        parser.error("--part accuracy needs --data RECIPE=PATH, e.g. imagenette=PATH")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device. --device cpu --tiny runs the chain, small, without one.")
        return 2
    if options.device == "cpu" and not options.tiny:
        print("gpu_check: on the CPU only --tiny makes sense; real sizes would take hours.")
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "dry run"
    path = options.out.resolve() / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    until = time.monotonic() + options.seconds
    wanted = WHOLE_RUN if "all" in options.part else tuple(part for part in PARTS if part in options.part)
    if not any(options.steps in " ".join(map(str, step)) for step in STEPS):
        parser.error(f"--steps {options.steps!r} names none of the whole steps")
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(options.device, options.tiny, path, Path(scratch), data, options.steps)
        run.report = json.loads(path.read_text()) if path.exists() else {"schema": 1, "kind": "gpu_check", "parts": {}}
        for number, part in enumerate(wanted):
            reserved = sum(RESERVED.get(later, 0) for later in wanted[number + 1 :])
            limit = BUDGETS[part] if len(wanted) > 1 else options.seconds
            entry = run.begin(part, min(limit, max(until - time.monotonic() - reserved, LEAST_SECONDS)))
            started = time.monotonic()
            try:
                PARTS[part](run, entry)
            except Exception as problem:  # the parts that follow are worth having
                entry["error"] = f"{type(problem).__name__}: {problem}"
            entry["seconds"] = round(time.monotonic() - started, 1)
            run.save()
    found = faults({"parts": {part: run.report["parts"][part] for part in wanted}})
    print(f"\n{path.name}: {', '.join(wanted)}", *found, sep="\n  ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
