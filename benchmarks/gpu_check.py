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
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.bench.measure import machine, write_json
from ijepa_fast.bench.rows import with_ratios

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"install": 60, "masks": 110, "tests": 180, "ops": 170, "step": 400, "tune": 400}
"""Seconds that a part of a whole run may take at most."""
RESERVED = {"tests": 100, "ops": 90, "step": 100}
"""Seconds that earlier parts of a whole run leave to these."""
WHOLE_RUN = ("install", "masks", "tests", "ops", "step")
WHOLE_SECONDS = 525
TEST_PROCESSES = 4
LEAST_SECONDS, LEAST_STEP_SECONDS = 5, 150
TAIL_LINES = 25


@dataclass
class Run:
    """One run of the driver.

    Attributes:
        report: what is written to ``path``.
        deadline: of the current part, by ``time.monotonic``.
        scratch: folder for what processes leave behind: logs, their own JSON, test reports.
    """

    device: str
    tiny: bool
    path: Path
    scratch: Path
    report: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def save(self) -> None:
        with self.lock:
            write_json(self.path, self.report)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def begin(self, part: str, seconds: float) -> dict[str, Any]:
        """An entry for the part, in place of what an earlier run left there."""
        self.deadline = time.monotonic() + seconds
        entry: dict[str, Any] = {"machine": machine(self.device), "commands": {}}
        self.report["parts"][part] = entry
        self.save()
        return entry

    def execute(
        self, entry: dict[str, Any], name: str, command: Sequence[str], limit: float = float("inf"), **environment: str
    ) -> int | None:
        """Run a command within what is left of the part, and ``limit``. Its exit status; None if it was stopped."""
        seconds = min(self.left(), limit)
        if seconds < LEAST_SECONDS:
            entry["commands"][name] = {"not_run": "no time was left"}
            self.save()
            return None
        log = self.log(name)
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        took = round(time.monotonic() - started, 1)
        result = {"exit_status": status, "seconds": took} if status is not None else {"stopped_after_s": took}
        entry["commands"][name] = result
        self.save()
        print(f"--- {name}: {'stopped' if status is None else f'exit status {status}'} after {took} s", flush=True)
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-TAIL_LINES if status == 0 else -3 * TAIL_LINES :]), flush=True)
        return status

    def log(self, name: str) -> Path:
        """What a command printed."""
        return self.scratch / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.log"

    def written(self, name: str) -> dict[str, Any] | None:
        """The JSON that a command wrote into the scratch folder, if it did."""
        path = self.scratch / name
        return json.loads(path.read_text()) if path.exists() else None


def install(run: Run, entry: dict[str, Any]) -> None:
    """Without network: what the package needs is there, or nothing here could run."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "-e", "."]
    if run.execute(entry, "pip install", command) != 0:
        sys.exit("gpu_check: the checkout could not be installed (above)")


def masks(run: Run, entry: dict[str, Any]) -> None:
    """Build the extension; equal bits and times; the same under compute-sanitizer."""
    if run.execute(entry, "build csrc", [sys.executable, "tools/build_extension.py"], **this_gpu_only(entry)) != 0:
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
            entry["commands"][name] = {"not_run": "the tool does not support this machine"}
            run.save()


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
        entry["files"][path.name] = outcome(junit, status)

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
    ("ViT-H/14", ["--models", "ViT-H/14", "--without", "compile"]),
    ("attention", [*OTHER_MODELS, "--groups", "attention", "--modes", "forward", "both"]),
    ("compile", ["--models", "ViT-H/14", "--groups", "rows", "--providers", "compile"]),
    ("rows", [*OTHER_MODELS, "--groups", "rows", "optimizer", "--without", "compile"]),
)
TINY_PASSES = (
    ("rows", ["--models", "tiny", "--groups", "rows", "--modes", "forward", "--without", "compile"]),
    ("others", ["--models", "tiny", "--groups", "attention", "optimizer", "--modes", "forward"]),
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
    ("vit_h14", 128, "exact"),
    ("vit_b16", 512, "exact"),
    ("vit_h14", 128, "batch_min"),
    ("vit_l16", 128, "exact"),
)


def step(run: Run, entry: dict[str, Any]) -> None:
    """Whole steps. Where the three do not run together (memory, a compiler), the others are measured without eager."""
    entry["reports"] = []
    chains = (("ours,eager,compiled", "ours,compiled", "ours"), ("ours,eager", "ours"))[run.tiny]
    steps = (("vit_tiny", 2, "exact"),) if run.tiny else STEPS
    for number, (model, batch, masks_of) in enumerate(steps):
        # One that hangs must not take all the others' time; but the first is wanted most, and compiling takes minutes.
        limit = max(1.5 * run.left() / (len(steps) - number), LEAST_STEP_SECONDS)
        for implementations in chains:
            name = f"step {model} {masks_of} {implementations}"
            file = f"{re.sub('[^a-z0-9_]+', '-', name)}.json"
            command = [sys.executable, "-m", "benchmarks.step", "--model", model, "--batch", str(batch)]
            command += ["--masks", masks_of, "--impl", implementations, "--device", run.device]
            command += ["--rounds", "2", "--warm-up", "1"] if run.tiny else []
            status = run.execute(entry, name, [*command, "--json", str(run.scratch / file)], limit)
            if found := run.written(file):
                entry["reports"].append(found)
                run.save()
            if status in (0, None):  # done, or stopped: with fewer implementations it would be stopped, too
                break


def tune(run: Run, entry: dict[str, Any]) -> None:
    """Proposals for the kernels' tables."""
    run.execute(entry, "tune", [sys.executable, "-m", "benchmarks.tune", "--json", str(run.scratch / "tune.json")])
    entry["report"] = run.written("tune.json")


PARTS: dict[str, Callable[[Run, dict[str, Any]], None]] = {
    "install": install,
    "masks": masks,
    "tests": tests,
    "ops": ops,
    "step": step,
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
    parser.add_argument("--tiny", action="store_true", help="a small version of every part; all that a CPU can do")
    options = parser.parse_args(argv)
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
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(options.device, options.tiny, path, Path(scratch))
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
