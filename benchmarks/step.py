"""Whole training steps, this package's beside the published algorithm and a skilled user's, interleaved in one run.

    python -m benchmarks.step --model vit_small --batch 16 --masks batch_min --impl ours,eager --device cpu --json FILE
    python -m benchmarks.step --model vit_b16 --batch 512 --impl ours,ours+compile,ours+capture,eager,compiled

implementations.py says what can be named and proves that they agree; what does not agree, or does not run, is named
under "failed" and not timed. Every round runs one step of each implementation on the same images, from the same
weights; the ratio of two is the median over rounds. ``eager`` can only use masks of equal lengths, so it always runs
the official truncated ones, while ``ours`` and ``compiled`` run those that --masks names. On the CPU the report also
has ratios of CPU time, which busy neighbours disturb less.

On a GPU each is first run alone, for its peak memory, and then timed beside the first one named, because not all of
them fit on it together; the report is written after each.

Drawing masks is part of our step. The others are handed theirs (``eager_mask_loop_ms`` in the report is what the
published loop over images takes), and normalised images, as from DataLoader workers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import masks_per_image
from benchmarks.baselines import draw_masks
from benchmarks.implementations import (
    MODELS,
    REHEARSAL,
    SEED,
    Candidate,
    Case,
    check_agreement,
    model_config,
    parse,
    run_config,
)
from benchmarks.results_files import PHASES
from ijepa_fast.bench.measure import Clock, Took, in_turns, matmul_rate, repeat, results, save
from ijepa_fast.bench.table import in_words
from ijepa_fast.masks.config import MaskConfig
from ijepa_fast.step.options import SUFFIXES


def phases(candidate: Candidate, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of every phase, medians over rounds. On a GPU these are of the stream: gaps count."""
    clock, networks = Clock(device), candidate.networks
    after = {"target_encoder": PHASES[0], "context_encoder": PHASES[0], "predictor": PHASES[4]}
    names = dict(zip(("target_encoder", "context_encoder", "predictor"), PHASES[1:4], strict=True))
    hooks = []
    for part, name in names.items():
        module = getattr(networks, part)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: clock.mark(name)))
        hooks.append(module.register_forward_hook(lambda *_, name=after[part]: clock.mark(name)))
    optimizer = candidate.holder.optimizer
    hooks.append(optimizer.register_step_pre_hook(lambda *_: clock.mark("update")))
    samples = []
    for n in range(rounds):
        clock.mark(PHASES[0])
        candidate.run(n)
        clock.mark("end")
        samples.append(clock.milliseconds())
    for hook in hooks:
        hook.remove()
    return {name: round(statistics.median(s.get(name, 0.0) for s in samples), 3) for name in PHASES}


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The ratio of every pair, median over rounds."""
    return {
        f"{a}/{b}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        for a, b in itertools.permutations(seconds, 2)
    }


def peak_memory(case: Case, name: str) -> int:
    """Bytes at the peak of a step, weights and optimizer included, of an implementation that has the GPU to itself."""
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    candidate = case.make(name)
    warm(candidate, case, len(REHEARSAL))
    torch.cuda.synchronize()
    # What a replay writes lies in the graphs' pool, which only counts as reserved.
    captured = candidate.captured
    return torch.cuda.max_memory_reserved() - reserved if captured else torch.cuda.max_memory_allocated() - allocated


def warm(candidate: Candidate, case: Case, warm_up: int) -> None:
    """Steps that are not timed; every graph that the timed ones replay is captured."""
    # A graph is captured when its shapes are met for the second time.
    numbers = [*range(case.steps), *range(case.steps)] if candidate.captured else range(warm_up)
    for number in numbers:
        candidate.run(number)


def measure_together(
    case: Case, names: Sequence[str], rounds: int, warm_up: int, report: dict[str, Any], memory: dict[str, int]
) -> None:
    """Check, warm up, then time ``rounds`` steps of each, one after another in turn. The results go into ``report``;
    of those that were measured before, only the ratios are new."""
    candidates = [case.make(name) for name in names]
    agreement, wrong = check_agreement(case, candidates)
    report["agreement"] |= agreement
    report["failed"] |= wrong
    candidates = [candidate for candidate in candidates if candidate.name not in report["failed"]]
    for candidate in candidates:
        warm(candidate, case, warm_up)
    peaks: list[float] = []
    calls = {candidate.name: candidate.run for candidate in candidates}
    took = in_turns(calls, rounds, case.device, first=warm_up, before=lambda: peaks.append(matmul_rate(case.device)))
    for candidate in (candidate for candidate in candidates if candidate.name not in report["implementations"]):
        measured = result(case, candidate, took[candidate.name], statistics.median(peaks))
        report["implementations"][candidate.name] = measured | {"peak_memory_bytes": memory.get(candidate.name)}
    report["matmul_tflops"] = report["matmul_tflops"] or statistics.median(peaks) / 1e12
    report["ratio"] |= ratios({name: [each.wall for each in of] for name, of in took.items()})
    if case.device.type == "cpu":
        report["cpu_time_ratio"] |= ratios({name: [each.cpu for each in of] for name, of in took.items()})


def result(case: Case, candidate: Candidate, took: Sequence[Took], peak: float) -> dict[str, Any]:
    """Figures of one implementation."""
    median = statistics.median(each.wall for each in took)
    rate = candidate.flops.total * case.batch / median
    parts = None if candidate.no_phases else phases(candidate, case.device, min(len(took), 5))
    return {
        "images_per_second": case.batch / median,
        "ms": median * 1e3,
        "ms_of_rounds": [round(each.wall * 1e3, 2) for each in took],
        "cpu_ms": statistics.median(each.cpu for each in took) * 1e3,
        "phases_ms": parts,
        "no_phases": candidate.no_phases,
        "context_tokens": candidate.tokens.context,
        "target_tokens": candidate.tokens.targets,
        "useful_gflops_per_image": candidate.flops.total / 1e9,
        "useful_tflops": rate / 1e12,
        "share_of_matmul_peak": rate / peak,
    }


def measure(
    case: Case, names: Sequence[str], rounds: int, warm_up: int, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """The report on these implementations; ``save`` gets it after each. The case has ``rounds + warm_up`` steps.

    On the CPU all are timed together. On a GPU, where memory would not do, each is timed beside the first one.
    "failed" names those that do not run, or do not train what the others do, with the reason.
    """
    on_gpu, (first, *others) = case.device.type == "cuda", names
    report: dict[str, Any] = {"agreement": {}, "failed": {}, "matmul_tflops": None}
    report |= {"implementations": {}, "ratio": {}} | ({} if on_gpu else {"cpu_time_ratio": {}})
    if "eager" in names:
        generator = torch.Generator().manual_seed(SEED)
        took = repeat(lambda _: draw_masks(case.batch, case.grid, generator), warm_up=0)
        report["eager_mask_loop_ms"] = statistics.median(each.wall for each in took) * 1e3
    pairs = [[first, other] for other in others]
    waiting, memory = deque(pairs or [[first]]) if on_gpu or not pairs else deque([list(names)]), {}
    while waiting:
        together = waiting.popleft()
        try:
            for name in (name for name in together if on_gpu and name not in memory):
                _tidy(case.device)
                memory[name] = peak_memory(case, name)
            measure_together(case, together, rounds, warm_up, report, memory)
        except Exception as problem:  # of one implementation: the others' results are worth having
            if len(together) > 2:
                waiting.extend(pairs)
            else:
                report["failed"][together[-1]] = f"together with {first}: {in_words(problem)}"
        save(report)
        with contextlib.suppress(Exception):  # after an illegal access the GPU answers nothing any more
            _tidy(case.device)
    if first not in report["implementations"]:
        report["failed"].setdefault(first, "nothing ran beside it")
        save(report)
    return report


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit_small")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--depth", type=int, help="blocks of each network, instead of the model's")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--masks", choices=("exact", "batch_min"), default="exact")
    suffixes = ", ".join(SUFFIXES)
    parser.add_argument(
        "--impl",
        default="ours,eager",
        help=f"comma-separated: ours (with +SUFFIX, of {suffixes}), eager, compiled; the first is beside all others",
    )
    parser.add_argument(
        "--masks-per-image", type=int, nargs="+", metavar="K", help="time ours with so many masks, instead of --impl"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, help="number of torch's threads on the CPU")
    parser.add_argument("--json", type=Path, help="write the report here, whole after each")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys(options.impl.split(",")))
    device = torch.device(options.device)
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    try:
        for name in names:
            run_config(parse(name)[1], options.batch, precision, device.type)
    except ValueError as problem:
        parser.error(f"--impl {options.impl}: {problem}")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = model_config(options.model, options.img_size)
    if options.depth:
        model = replace(model, depth=options.depth, predictor_depth=options.depth)
    if options.masks_per_image:
        config = MaskConfig.official(options.batch) if options.masks == "batch_min" else MaskConfig()
        common = (model, options.batch, config, options.masks_per_image, device, precision)
        compared = masks_per_image.compare(*common, options.rounds, options.warm_up)
        names = ("model", "img_size", "batch", "masks", "rounds", "warm_up", "threads")
        settings = {name: getattr(options, name) for name in names} | {"precision": precision}
        report = results("masks_per_image", device, settings=settings) | {"masks_per_image": compared, "failed": {}}
        save(options.json, report)
        print(masks_per_image.text(compared))
        return report
    case = Case(model, options.batch, options.masks, device, precision, steps=options.rounds + options.warm_up)
    settings = {name: getattr(options, name) for name in ("model", "img_size", "batch", "masks", "rounds", "warm_up")}
    head = results("step", device, settings=settings | {"precision": precision})
    keep = partial(save, options.json)
    report = head | measure(case, names, options.rounds, options.warm_up, lambda report: keep(head | report))
    keep(report)
    width = max(map(len, names))
    for name, figures in report["implementations"].items():
        print(
            f"{name:{width}} {figures['ms']:9.1f} ms  {figures['images_per_second']:8.2f} images/s  "
            f"{figures['useful_tflops']:7.3f} TFLOP/s ({figures['share_of_matmul_peak']:.0%} of matmul)  "
            f"{figures['context_tokens']:.1f} context tokens"
        )
    for pair, ratio in report["ratio"].items():
        print(f"{pair}: {ratio:.3f}")
    for name, reason in report["failed"].items():
        print(f"{name} is not timed: {reason}")
    return report


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
