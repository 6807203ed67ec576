"""Does a step's cost grow linearly with its tokens? Time per token over batch and image size, optimizer and attention
aside.

    python -m benchmarks.scaling --model vit_h14 --device cuda --json FILE

A token is a row of any of the three networks: of an image, its patches, its context, and the context again before
each of its target blocks. The optimizer's time does not depend on tokens, attention's depends on their squares; both
are timed and taken off: the update within the step, attention by itself, at the lengths of these masks and as often as
the networks have blocks. What is left per token should be the same everywhere. The spread is the largest over the
smallest, less one.

A batch that does not fit into memory is said not to, and no larger one of that image size is tried.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.implementations import MODELS, Case, model_config, parse, run_config
from benchmarks.step import phases, warm
from ijepa_fast.attention.dispatch import varlen_self_attention
from ijepa_fast.bench.measure import cpu_times, graph_times, own_stream, repeat, results, save
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import Ragged
from ijepa_fast.step.train_step import PRECISION_DTYPES

BATCHES, SIZES = (32, 64, 128, 256, 512), (224, 448)
COPIES = 4
"""Sets of queries, keys and values that take turns, so that none is found in a cache."""


def attention_ms(case: Case) -> float:
    """Milliseconds that attention takes in a step of ours, all blocks of all networks together."""
    model, masks = case.model, case.drawn[0]
    layout = predictor_layout(masks.context, masks.targets, masks.num_contexts, masks.num_targets)
    patches = case.grid[0] * case.grid[1]
    parts = (
        (Ragged.full(case.batch, patches), model.embed_dim, model.depth, False),
        (masks.context, model.embed_dim, model.depth, True),
        (layout.tokens, model.predictor_embed_dim, model.predictor_depth, True),
    )
    total = 0.0
    for tokens, width, depth, trained in parts:
        with own_stream(case.device):
            calls = [_attention(case, tokens.to(case.device), width, trained) for _ in range(COPIES)]
            times = graph_times(calls) if case.device.type == "cuda" else cpu_times(calls[0], seconds=0.0)
        total += depth * times.p50 / 1e3
    return total


def _attention(case: Case, tokens: Ragged, width: int, trained: bool) -> Callable[[], Any]:
    """A call of the model's attention on fresh tensors; forward and backward where it is trained."""
    heads, dtype = case.model.num_heads, PRECISION_DTYPES[case.precision]
    qkv = torch.randn(tokens.num_rows, 3, heads, width // heads, device=case.device, dtype=dtype)
    qkv.requires_grad_(trained)

    def forward():
        return varlen_self_attention(qkv, tokens.cu_seqlens, tokens.max_seqlen, backend="auto", uniform=tokens.uniform)

    if not trained:
        return forward
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), qkv, grad)


def measure_point(case: Case, name: str, rounds: int, warm_up: int) -> dict[str, Any]:
    """Medians of one batch and image size."""
    attention = attention_ms(case)
    candidate = case.make(name)
    warm(candidate, case, warm_up)

    def median_ms(call: Callable[[int], Any]) -> float:
        return statistics.median(took.wall * 1e3 for took in repeat(call, case.device, least=rounds, warm_up=0))

    ms = median_ms(lambda number: candidate.run(warm_up + number))
    if candidate.captured:  # gradients stay where they are, so the optimizer can be stepped by itself
        update = median_ms(lambda _: candidate.holder.optimizer.step())
    else:
        update = phases(candidate, case.device, rounds)["update"]
    counts, patches = candidate.tokens, case.grid[0] * case.grid[1]
    tokens = patches + (1 + counts.num_targets) * counts.context + counts.targets
    return {
        "tokens_per_image": tokens,
        "ms": ms,
        "update_ms": update,
        "attention_ms": attention,
        "us_per_token": (ms - update - attention) * 1e3 / (tokens * case.batch),
    }


def points(options: argparse.Namespace, device: torch.device, precision: str) -> Iterator[dict[str, Any]]:
    """Points as they are measured, smallest first; one that was not measured has "not_run", with the reason."""
    until = time.monotonic() + options.seconds
    for img_size in options.sizes:
        full = False
        for batch in sorted(options.batches):
            place = {"img_size": img_size, "batch": batch}
            if full or time.monotonic() > until:
                reason = "a smaller batch did not fit" if full else f"no time after {options.seconds:.0f} s"
                yield place | {"not_run": reason}
                continue
            try:
                config = model_config(options.model, img_size)
                case = Case(config, batch, "exact", device, precision, steps=options.rounds + options.warm_up)
                measured = measure_point(case, options.impl, options.rounds, options.warm_up)
            except torch.OutOfMemoryError:
                full, measured = True, {"not_run": "does not fit into memory"}
            case = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield place | measured


def spread(measured: Sequence[dict[str, Any]]) -> float | None:
    """Largest over smallest time per token, less one; None of fewer than two."""
    values = [point["us_per_token"] for point in measured if "us_per_token" in point]
    return max(values) / min(values) - 1 if len(values) > 1 else None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit_h14")
    parser.add_argument("--impl", default="ours", help="ours, with suffixes as for benchmarks.step")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="sides of images in pixels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--json", type=Path, help="write the report here, whole after every point")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    try:
        kind, variants = parse(options.impl)
        run_config(variants, max(options.batches), precision, device.type)
    except ValueError as problem:
        parser.error(f"--impl {options.impl}: {problem}")
    if kind != "ours":
        parser.error(f"--impl must be ours or a variant of it, got {options.impl!r}")
    settings = {name: getattr(options, name) for name in ("model", "impl", "rounds", "warm_up")}
    settings |= {"masks": "exact", "precision": precision}
    report = results("scaling", device, settings=settings, points=[], spread=None)
    for point in points(options, device, precision):
        report["points"].append(point)
        report["spread"] = spread(report["points"])
        save(options.json, report)
        print(line(point), flush=True)
    if report["spread"] is not None:
        print(f"spread {report['spread']:.1%}")
    return report


def line(point: dict[str, Any]) -> str:
    head = f"{point['img_size']} px, batch {point['batch']:4}: "
    if "not_run" in point:
        return head + point["not_run"]
    return head + (
        f"{point['us_per_token']:8.4f} us per token; step {point['ms']:.1f} ms, of which update "
        f"{point['update_ms']:.1f} and attention {point['attention_ms']:.1f}"
    )


if __name__ == "__main__":
    main()
