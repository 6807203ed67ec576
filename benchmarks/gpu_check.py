"""The driver behind gpu_check.sh: runs each part in processes of its own and keeps whatever they wrote.

A whole run goes from what is wanted most to what is wanted least, and every part has a budget that is kept by killing
its processes: install, quick (every op once against its definition, five steps), step, ops (the hottest), masks, tests,
and more as time is left. A results file holds one entry per part: the machine and commit it ran on, its commands with
exit status and seconds, and what they measured. It is written after every command, so a run that is cut off keeps what
it has. Running a part again replaces that part alone. A summary of at most 40 lines, failures first, stands at the end
of the output.

The budgets are estimates: 38 % of the matmul peak make 0.29 s of a ViT-H/14 step and 0.15 s of a ViT-B/16 one (128 and
512 images), of which a process runs some ten for each implementation it names. It starts in 15 s, and compiles the
blocks in 60 to 90 s where inductor's cache does not have them; that cache is filled while ops are checked, by a process
for each that is to be compiled. Kernels of ours take ten minutes of one core, or nothing where ``benchmarks.gpu_cache``
has packed them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import LEAST_SECONDS, ROOT, Run
from ijepa_fast.bench.table import with_ratios
from ijepa_fast.masks import extension

Entry = dict[str, Any]
WHOLE_RUN = {"install": 40, "quick": 130, "step": 150, "ops": 70, "masks": 40, "tests": 100, "more": 400}
"""Parts of a whole run and the seconds that each may take; what one leaves goes to the last."""
WHOLE_SECONDS = 535
SUMMARY_LINES = 40
TEST_PROCESSES = 4
FIRST_TESTS = ("test_kernels_on_gpu.py", "test_attention_on_gpu.py", "test_step_on_gpu.py", "test_linear_on_gpu.py")
LEAST_STEP_SECONDS, COMPILE_SECONDS = 75, 300
"""Least time for a process of whole steps, and where torch.compile's cache is empty."""


def python(module: str, *arguments: Any) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


CACHE = ROOT / "triton_cache.tar.xz"
"""What ``benchmarks.gpu_cache`` has packed."""


def install(run: Run, entry: Entry) -> None:
    """Install the checkout without network; where that fails, what follows runs from the folder. Build csrc/."""
    run.execute(entry, "pip install", python("pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", "."))
    build_extension(run, entry)


def unpack(file: Path, cache: Path) -> int:
    """Into a folder for TRITON_CACHE_DIR; how many kernels there are. Descriptions name their files by whole paths."""
    with tarfile.open(file) as archive:
        archive.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*"):
        names = json.loads(group.read_text())["child_paths"]
        there = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": there}))
    return len(list(cache.glob("*/*.cubin")))


def compiled_kernels() -> set[Path]:
    """Binaries in Triton's cache, but for those of inductor, which are named triton_..."""
    found = Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")
    return {path for path in found if not path.name.startswith("triton_")}


def build_extension(run: Run, entry: Entry) -> int | None:
    """Build csrc/ if it is not built: steps would be timed with the slower sampler."""
    if extension.library_path() is not None:
        return 0
    return run.execute(entry, "build csrc", [sys.executable, "tools/build_extension.py"], **this_gpu_only(entry))


def this_gpu_only(entry: Entry) -> dict[str, str]:
    """Environment in which nvcc compiles for this GPU alone, which takes it a quarter of the time."""
    capability = entry["machine"].get("capability")
    return {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}


def quick(run: Run, entry: Entry) -> None:
    """Every op once against its definition on real shapes, and the step as it is by default, for five rounds.

    Beside the checks, each in a process of its own, everything is compiled by torch that is timed later. Networks have
    one block for that: all blocks of a network share their code, and batches as they are fit beside one another.
    """
    entry |= {"reports": [], "rows": []}
    models, steps = ("tiny", [("vit_tiny", 2)]) if run.tiny else ("ViT-H/14", [("vit_h14", 128), ("vit_b16", 512)])
    check = [("check", ["--models", models, "--check-only", "--without", "compile"])]
    jobs = [(run_ops, run, entry, check)]
    jobs += [(compile_step, run, entry, *each, name) for name in COMPILED for each in steps if not run.tiny]
    side_by_side(jobs)
    side_by_side([(run_steps, run, entry, [(*each, "exact", "ours")], 5) for each in steps])


COMPILED = ("ours", "compiled", "ours+triton", "ours+capture")
"""Steps of a whole run with blocks that torch compiles."""


def compile_step(run: Run, entry: Entry, model: str, batch: int, name: str) -> None:
    """Fill torch.compile's cache; nothing that is timed here is kept."""
    command = python("benchmarks.step", "--model", model, "--batch", batch, "--depth", 1, "--impl", name)
    run.execute(entry, f"compile {model} {name}", [*command, "--device", run.device, "--rounds", "2", "--warm-up", "1"])


def side_by_side(jobs: Sequence[tuple]) -> None:
    with ThreadPoolExecutor(len(jobs)) as pool:
        for job in [pool.submit(*job) for job in jobs]:
            job.result()  # raises what was raised in it


HOTTEST = (
    *(f"varlen_attention, {part}" for part in ("context", "target encoder", "predictor")),
    *("linear_gelu, target encoder", "linear_gelu, context, with pre", "hidden_gradient, context"),
    *("weight_gradient, context", "layer_norm, context, with residual", "predictor_tokens, predictor"),
    *("target_loss, targets", "adamw_ema_, all parameters", "grad_norm, all parameters"),
)
OTHER_MODELS = ["--models", "ViT-B/16", "ViT-L/16", "ViT-g/16"]
PLAIN = ["--groups", "rows", "linear", "optimizer", "--without", "compile"]
ATTENTION = ["--groups", "attention", "--without", "compile"]
OPS_PASSES: tuple[tuple[str, list[str]], ...] = (
    ("hottest, ViT-H/14", ["--models", "ViT-H/14", "--cases", *HOTTEST, "--without", "compile"]),
    # Attention by itself: an illegal access would take all that its process has still to time.
    ("attention, ViT-H/14", ["--models", "ViT-H/14", *ATTENTION]),
    ("ViT-H/14", ["--models", "ViT-H/14", *PLAIN]),
    ("attention", [*OTHER_MODELS, *ATTENTION, "--modes", "forward", "both"]),
    ("compile", ["--models", "ViT-H/14", "--groups", "rows", "linear", "attention", "--providers", "compile"]),
    ("rows", [*OTHER_MODELS, *PLAIN]),
)
TINY_PASSES = (
    ("rows", ["--models", "tiny", "--groups", "rows", "--modes", "forward", "--without", "compile"]),
    ("others", ["--models", "tiny", "--groups", "linear", "attention", "optimizer", "--modes", "forward"]),
)


def ops(run: Run, entry: Entry) -> None:
    """The hottest ops; all others where this is not part of a whole run."""
    run_ops(run, entry, TINY_PASSES if run.tiny else OPS_PASSES[:1] if run.whole else OPS_PASSES)


def run_ops(run: Run, entry: Entry, passes: Sequence[tuple[str, list[str]]]) -> None:
    """Most wanted first. Rows of different passes are of one machine and minutes apart, so their ratios stand."""
    rows: list[dict[str, Any]] = []
    for number, (name, arguments) in enumerate(passes):
        seconds = max(run.left() - 20, 1)
        command = python("benchmarks.ops", "--device", run.device, *arguments, "--seconds", f"{seconds:.0f}")
        rows += (run.measure(entry, f"ops, {name}", command, f"ops-{number}.json") or {"rows": []})["rows"]
        entry["rows"] = with_ratios(list({tuple(map(str, place(row))): row for row in reversed(rows)}.values())[::-1])
        run.save()


def place(row: dict[str, Any]) -> tuple:
    return row["model"], row["op"], row["case"], row["mode"], row["provider"]


STEPS = (
    # Most wanted first; the first four are those of a whole run. The compiled baseline has processes without other
    # compiled blocks than those of ours.
    ("vit_h14", 128, "exact", "ours,eager,ours+plain,ours+fused,ours+triton,ours+capture"),
    ("vit_b16", 512, "exact", "ours,eager,ours+plain,ours+fused,ours+triton,ours+capture"),
    ("vit_h14", 128, "exact", "ours,compiled"),
    ("vit_b16", 512, "exact", "ours,compiled"),
    ("vit_h14", 128, "exact", "ours,ours+fp8,ours+fused+triton,ours+fused+triton+overlap,ours+wide"),
    ("vit_b16", 512, "exact", "ours,ours+fused+triton,ours+fused+triton+capture,ours+fused+triton+overlap"),
    ("vit_h14", 128, "batch_min", "ours,eager,ours+triton,ours+fused+triton"),
    ("vit_l16", 128, "exact", "ours,eager,ours+triton,ours+fused+triton,ours+fused+triton+capture"),
    ("vit_l16", 128, "exact", "ours,compiled"),
    ("vit_h14", 128, "batch_min", "ours,compiled"),
    ("vit_h14", 128, "exact", "ours,ours+plain,ours+compile+fused,ours+compile+fused+triton"),
    ("vit_b16", 512, "exact", "ours,ours+plain,ours+triton+capture,ours+compile+fused+triton"),
    ("vit_l16", 128, "exact", "ours,ours+plain,ours+triton+capture,ours+compile+fused+triton"),
)
TINY_STEPS = (("vit_tiny", 2, "exact", "ours,eager"),)
WHOLE_STEPS, MORE_STEPS = 4, 6


def step(run: Run, entry: Entry) -> None:
    """Whole steps. With --steps, those that an earlier run of this commit has measured are kept, and not measured
    again."""
    machines = run.earlier.get("machine", {}), entry["machine"]
    same = all(machines[0].get(name) == machines[1].get(name) for name in ("commit", "gpu", "torch", "triton"))
    earlier = run.earlier if run.steps and same else {}
    entry["reports"], entry["commands"] = earlier.get("reports", []), earlier.get("commands", {})
    run.save()
    if not run.tiny:
        build_extension(run, entry)
    chosen = [step for step in STEPS if run.steps in " ".join(map(str, step))]
    run_steps(run, entry, TINY_STEPS if run.tiny else chosen[:WHOLE_STEPS] if run.whole else chosen)


def run_steps(run: Run, entry: Entry, steps: Sequence[tuple], rounds: int | None = None) -> None:
    """Where a process dies before it has measured anything, the first implementation is run alone and the others
    without it: after an illegal access nothing more can be run in one process."""
    rounds = 2 if run.tiny else rounds or (5 if run.whole else None)
    for number, (model, batch, masks_of, names) in enumerate(steps):
        # One that hangs must not take all the others' time; but the first are wanted most.
        least = LEAST_STEP_SECONDS if run.whole else COMPILE_SECONDS
        limit = max(1.5 * run.left() / (len(steps) - number), least)
        attempts = [names]
        while attempts:
            attempt = attempts.pop(0)
            name = f"step {model} {masks_of} {attempt}"
            if entry["commands"].get(name, {}).get("exit_status") == 0:
                continue
            command = python("benchmarks.step", "--model", model, "--batch", batch, "--masks", masks_of)
            command += ["--impl", attempt, "--device", run.device]
            command += ["--rounds", str(rounds), "--warm-up", "1"] if rounds else []
            found = run.measure(entry, name, command, limit=limit)
            died = entry["commands"][name].get("exit_status", 0) not in (0, None)  # stopped ones would be again
            if attempt == names and died and not (found and found["implementations"]) and "," in names:
                attempts = names.split(",", 1)


def masks(run: Run, entry: Entry) -> None:
    """Equal bits, and times."""
    if build_extension(run, entry) == 0:
        quick = ["--batches", "8", "33", "--seconds", "0.05"] if run.tiny else ["--seconds", "0.5"]
        command = python("benchmarks.masks", "--device", run.device, *quick)
        entry["report"] = run.measure(entry, "masks", command, "masks.json")
        run.save()


def sanitizer(run: Run, entry: Entry) -> None:
    """The CUDA masks under compute-sanitizer."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    beside = (f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer"))
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(beside))
    if run.device != "cuda" or tool is None:
        entry["sanitizer"] = {"not_run": "compute-sanitizer was not found" if run.device == "cuda" else "no GPU"}
        return
    watched = python("benchmarks.masks", "--device", "cuda", "--equality-only", "--batches", 33, 200)
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "77", *watched]
        name = f"compute-sanitizer {check}"
        # The caching allocator would hide writes behind the end of a tensor.
        status = run.execute(entry, name, command, limit=50, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status and "device not supported" in run.log(name).read_text(errors="replace").lower():
            run.note(entry["commands"], name, {"not_run": "the tool does not support this machine"})


def tests(run: Run, entry: Entry) -> None:
    """Tests marked gpu, most important first. Each file has a process of its own: an illegal access ends the process,
    and must not end the others."""
    files, marker = files_with_gpu_tests(), "gpu"
    if run.tiny:
        files, marker = [path for path in files if path.name == FIRST_TESTS[0]], "not gpu"
    entry["files"] = {}

    def test(path: Path) -> None:
        junit = run.scratch / f"{path.stem}.xml"
        command = python("pytest", path.relative_to(ROOT), "-m", marker, "-q", "--tb=short", f"--junitxml={junit}")
        status = run.execute(entry, path.name, command, **this_gpu_only(entry))
        run.note(entry["files"], path.name, outcome(junit, status))

    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        list(pool.map(test, files))
    entry["passed"] = sum(found["passed"] for found in entry["files"].values())
    entry["failed"] = [f"{name}: {what}" for name, found in entry["files"].items() for what in found["failed"]]


def files_with_gpu_tests() -> list[Path]:
    """Only these are imported: what the other tests need may not be installed where the GPU is."""
    marked = re.compile(r"^(@pytest\.mark\.gpu|pytestmark = .*mark\.gpu)", re.MULTILINE)
    found = [path for path in (ROOT / "tests").glob("test_*.py") if marked.search(path.read_text())]
    return sorted(found, key=lambda path: (path.name not in FIRST_TESTS, path.name))


def outcome(junit: Path, status: int | None) -> dict[str, Any]:
    """Number of passed tests, and names and messages of those that did not pass. A file that ran none has failed."""
    if not junit.exists():
        return {"passed": 0, "failed": ["stopped before its end" if status is None else f"exit status {status}"]}
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    bad: list[str] = []
    for kind in ("failure", "error", "skipped"):
        for case in (case for case in cases if case.find(kind) is not None):
            said = (case.find(kind).get("message") or "").split("\n")[0][:200]
            bad.append(f"{case.get('name', '?')} ({kind if kind == 'skipped' else said or kind})")
    found = {"passed": len(cases) - len(bad), "failed": bad}
    if status != 0 and not bad:
        found["failed"] = [f"exit status {status}"]
    return found


def more(run: Run, entry: Entry) -> None:
    """Run as time is left: FP8, second stream and other options, the sanitizer, time per token."""
    entry["reports"] = []
    several_masks(run, entry)
    run_steps(run, entry, [] if run.tiny else STEPS[WHOLE_STEPS:MORE_STEPS])
    sanitizer(run, entry)
    scaling(run, entry)


def several_masks(run: Run, entry: Entry) -> None:
    """Time of an image and mask where several masks share a pass of the target encoder."""
    model, batch = ("vit_tiny", 2) if run.tiny else ("vit_b16", 128)
    command = python("benchmarks.step", "--model", model, "--batch", batch, "--device", run.device)
    command += ["--masks-per-image", "1", "4", "--rounds", "2" if run.tiny else "5", "--warm-up", "1"]
    entry["masks_per_image"] = run.measure(entry, "masks per image", command, "masks-per-image.json", limit=150)
    run.save()


SCALING_MODELS = ("vit_h14", "vit_b16")


def scaling(run: Run, entry: Entry) -> None:
    """Time per token over batch and image size."""
    entry.setdefault("reports", [])
    if not run.tiny:
        build_extension(run, entry)
    models = ("vit_tiny",) if run.tiny else SCALING_MODELS
    for number, model in enumerate(models):
        seconds = run.left() / (len(models) - number)
        command = python("benchmarks.scaling", "--model", model, "--device", run.device)
        command += "--batches 1 2 --sizes 224 --rounds 2 --warm-up 1".split() if run.tiny else []
        # What is begun before that ends after it: a batch of 512 takes half a minute.
        command += ["--seconds", f"{max(seconds - 40, 1):.0f}"]
        run.measure(entry, f"scaling {model}", command, limit=seconds)


PARTS: dict[str, Callable[[Run, Entry], None]] = {
    "install": install,
    "quick": quick,
    "step": step,
    "ops": ops,
    "masks": masks,
    "tests": tests,
    "more": more,
    "sanitizer": sanitizer,
    "scaling": scaling,
}


def faults(parts: dict[str, Entry]) -> Iterator[str]:
    """Everything that went wrong, in words."""
    for part, entry in parts.items():
        if "error" in entry:
            yield f"{part}: {entry['error']}"
        yield from (f"{part}: {name} did not pass" for name in entry.get("failed", []))
        for row in (row for row in entry.get("rows", []) if "failed" in row):
            model, op, case, mode, provider = place(row)
            yield f"{part}: {provider} of {op}, {case}, {mode} ({model}): {row['failed']}"
        for report in entry.get("reports", []):
            yield from (f"{part}: {name}: {reason}" for name, reason in report.get("failed", {}).items())
        for name, result in entry["commands"].items():
            if "not_run" in result:
                yield f"{part}: {name} was not run: {result['not_run']}"
            elif "stopped_after_s" in result:
                yield f"{part}: {name} was stopped after {result['stopped_after_s']} s"
            elif result["exit_status"]:
                yield f"{part}: {name} ended with exit status {result['exit_status']}"


def figures(parts: dict[str, Entry]) -> Iterator[str]:
    """The measured figures, one line each."""
    for part, entry in parts.items():
        if "passed" in entry:
            yield f"{part}: {entry['passed']} tests passed"
        for report in entry.get("reports", []):
            where = f"{report.get('settings', {}).get('model')} {report.get('settings', {}).get('masks')}"
            for name, found in report.get("implementations", {}).items():
                share = found["share_of_matmul_peak"]
                yield f"{part}: {where} {name}: {found['images_per_second']:,.1f} images/s, {share:.0%} of matmul"
        ours = [row for row in entry.get("rows", []) if row["provider"] == "ours"]
        timed = [f"{row['op']} {row['of_floor']:.0%}" for row in ours if "times" in row]
        if ours:
            yield f"{part}: {len(ours)} rows of ours, " + (f"of floor: {', '.join(timed[:12])}" if timed else "checked")
        for count, found in ((entry.get("masks_per_image") or {}).get("masks_per_image") or {}).items():
            yield f"{part}: {count} masks per image: {found['ms_per_image_and_mask']:.3f} ms per image and mask"
        if "kernels" in entry:
            yield f"{part}: {len(entry['kernels'])} kernels were in no cache {' '.join(entry['kernels'])}"
        if entry.get("report") and "equal" in entry["report"]:
            yield f"{part}: {entry['report']['equal']['comparisons']} batches of masks equal to the bit"


def summary(parts: dict[str, Entry]) -> list[str]:
    """At most ``SUMMARY_LINES`` lines: failures first."""
    lines = [line[:240] for line in (*faults(parts), *figures(parts))]
    cut = [f"... and {len(lines) - SUMMARY_LINES + 1} lines more"] if len(lines) > SUMMARY_LINES else []
    return lines[: SUMMARY_LINES - len(cut)] + cut


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("all", *PARTS), default=["all"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    parser.add_argument("--seconds", type=float, default=WHOLE_SECONDS, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    help_steps = 'for part step: only those with these words in "MODEL BATCH MASKS IMPLEMENTATIONS", such as "compile"'
    parser.add_argument("--steps", default="", metavar="WORDS", help=help_steps)
    parser.add_argument("--tiny", action="store_true", help="a small version of every part; all that a CPU can do")
    options = parser.parse_args(argv)
    if not any(options.steps in " ".join(map(str, step)) for step in STEPS):
        parser.error(f"--steps {options.steps!r} names none of the whole steps")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device. --device cpu --tiny runs the chain, small, without one.")
        return 2
    if options.device == "cpu" and not options.tiny:
        print("gpu_check: on the CPU only --tiny makes sense; real sizes would take hours.")
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "dry run"
    path = options.out.resolve() / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    until = time.monotonic() + options.seconds
    whole = "all" in options.part
    wanted = tuple(WHOLE_RUN) if whole else tuple(part for part in PARTS if part in options.part)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(options.device, options.tiny, path, Path(scratch), options.steps, whole)
        run.report = json.loads(path.read_text()) if path.exists() else {"schema": 1, "kind": "gpu_check", "parts": {}}
        if CACHE.exists():
            os.environ["TRITON_CACHE_DIR"] = str(Path(scratch, "triton"))
            print(f"{unpack(CACHE, Path(scratch, 'triton'))} kernels from {CACHE.name}", flush=True)
        for part in wanted:
            seconds = min(WHOLE_RUN[part] if whole else options.seconds, max(until - time.monotonic(), LEAST_SECONDS))
            entry, started = run.begin(part, seconds), time.monotonic()
            before = compiled_kernels() if CACHE.exists() else set()
            try:
                PARTS[part](run, entry)
            except Exception as problem:  # the parts that follow are worth having
                entry["error"] = f"{type(problem).__name__}: {problem}"
            if CACHE.exists():
                entry["kernels"] = sorted(path.stem for path in compiled_kernels() - before)
            entry["seconds"] = round(time.monotonic() - started, 1)
            run.save()
    done = {part: run.report["parts"][part] for part in wanted}
    print(f"\n{path.name}: {', '.join(wanted)}", *summary(done), sep="\n  ")
    return 1 if any(faults(done)) else 0


if __name__ == "__main__":
    sys.exit(main())
