"""Rates to be reached on one H200, and by whole steps on a CPU, and whether a run reached them.

A target is (what, wanted, measured, met), in words; met is None where it was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.results_files import Report

Target = tuple[str, str, str, bool | None]
MODEL = "ViT-H/14"
COPY_BOUND = ("gather_patches", "gather_add", "predictor_tokens", "target_loss", "adamw_ema_", "ema_")
LEAST_SHARE = 0.85
PEERS = (
    ("adamw_ema_", "fused", 1.4, "fused torch AdamW, _foreach_lerp_ and casts"),
    ("ema_", "foreach", 1.0, "_foreach_lerp_"),
    ("ema_", "loop", 1.5, "the mul_/add_ loop"),
)
BATCHES = {"vit_b16": 512}
"""Images in a step, where they are not 128."""
ATTENTION_MODELS = ("ViT-H/14", "ViT-B/16")
ATTENTION_PARTS = ("context", "target encoder", "predictor")
STEPS = (
    # model, masks, images/s, against eager (per context token for exact masks), against compiled
    ("vit_b16", "exact", 4000, 4.0, 1.4),
    ("vit_l16", "exact", 1400, 3.0, 1.25),
    ("vit_h14", "exact", 640, 3.0, 1.15),
    ("vit_h14", "batch_min", 820, 3.0, 1.15),
)
FP8_STEPS = (("vit_h14", "exact", 740),)
CPU_BATCH = 16
CPU_STEPS = (("vit_small", "batch_min", 0.87), ("vit_small", "exact", 1.2))
"""Model, masks, and our time over eager's at most."""
SPREAD = 0.1


def op_targets(rows: Sequence[Report]) -> Iterator[Target]:
    ours = {(r["model"], r["op"], r["case"], r["mode"]): r for r in rows if r["provider"] == "ours" and "times" in r}
    for (model, op, case, mode), row in ours.items():
        if model == MODEL and op in COPY_BOUND and mode != "both":
            share = row["of_floor"]
            yield f"{op}, {case}, {mode}", f"{LEAST_SHARE:.0%} of a copy", f"{share:.0%}", share >= LEAST_SHARE
    compared = [(f"{op} over {title}", (MODEL, op, "all parameters", "forward"), peer, least)
                for op, peer, least, title in PEERS]  # fmt: skip
    compared += [
        (f"varlen_attention, {model}, {part}, forward and backward, over varlen_attn",
         (model, "varlen_attention", part, "both"), "torch_varlen", 1.0)
        for model in ATTENTION_MODELS for part in ATTENTION_PARTS
    ]  # fmt: skip
    for what, place, peer, least in compared:
        ratio = ours.get(place, {}).get("faster_than", {}).get(peer)
        yield what, f"{least:g} times as fast", *(("", None) if ratio is None else (f"{ratio:.2f}", ratio >= least))


def best_of_ours(results: Report, fp8: bool = False) -> str | None:
    """Name of the fastest variant of ours, with an FP8 target encoder or without."""
    names = [name for name in results if name.split("+")[0] == "ours" and ("fp8" in name.split("+")) == fp8]
    return max(names, key=lambda name: results[name]["images_per_second"], default=None)


def step_targets(reports: Sequence[Report]) -> Iterator[Target]:
    """Targets of the reports of one machine. The best of our variants counts, and is named."""
    found: dict[tuple[str, str], Report] = {}
    for report in reports:
        place = report["settings"]["model"], report["settings"]["masks"]
        if report["settings"]["batch"] != BATCHES.get(place[0], 128):
            continue
        here = report["implementations"]
        # Rates can be compared within a run. Across runs, the ratio of each to "ours" in its own run can.
        if "ours" in here:
            ours = here["ours"]["images_per_second"]
            here = {name: result | {"over_ours": result["images_per_second"] / ours} for name, result in here.items()}
        found[place] = here | found.get(place, {})  # the first report counts where several have the same
    for model, masks, least, over_eager, over_compiled in STEPS:
        results, what, exact = found.get((model, masks), {}), f"{model}, {masks}", masks == "exact"
        best = best_of_ours(results)
        yield _rate(what, least, results, best)
        unit = "context tokens/s" if exact else "images/s"
        yield _over(results, best, "eager", over_eager, f"{what}: {unit} over eager", per_token=exact)
        yield _over(results, best, "compiled", over_compiled, f"{what}: images/s over compiled")
        memory = [results.get(name, {}).get("peak_memory_bytes") for name in (best, "compiled")]
        if all(memory):
            share = memory[0] / memory[1]
            yield f"{what}: peak memory over compiled", "at most 1", f"{share:.2f} ({best})", share <= 1
    for model, masks, least in FP8_STEPS:
        results = found.get((model, masks), {})
        yield _rate(f"{model}, {masks}, FP8 target encoder", least, results, best_of_ours(results, fp8=True))


def _rate(what: str, least: float, results: Report, best: str | None) -> Target:
    if best is None:
        return what, f"{least:,} images/s", "", None
    rate = results[best]["images_per_second"]
    return what, f"{least:,} images/s", f"{rate:,.0f} ({best})", rate >= least


def _over(results: Report, best: str | None, peer: str, least: float, what: str, per_token: bool = False) -> Target:
    wanted = f"{least:g} times as fast"
    if not all("over_ours" in results.get(name, {}) for name in (best, peer)):
        return what, wanted, "", None
    a, b = (r["over_ours"] * (r["context_tokens"] if per_token else 1) for r in (results[best], results[peer]))
    return what, wanted, f"{a / b:.2f} ({best})", a / b >= least


def cpu_step_targets(reports: Sequence[Report]) -> Iterator[Target]:
    """Targets of the reports of one CPU, those that were measured."""
    for model, masks, most in CPU_STEPS:
        for report in reports:
            settings, ratio = report["settings"], report["ratio"].get("ours/eager")
            if (settings["model"], settings["masks"], settings["batch"]) != (model, masks, CPU_BATCH) or not ratio:
                continue
            work = [report["implementations"][name]["useful_gflops_per_image"] for name in ("ours", "eager")]
            cpu_time = report["cpu_time_ratio"]["ours/eager"]
            measured = f"{ratio:.3f} (processor time {cpu_time:.3f}, operations {work[0] / work[1]:.3f})"
            yield f"{model}, batch {CPU_BATCH}, {masks}: time over eager", f"at most {most:g}", measured, ratio <= most


def scaling_targets(reports: Sequence[Report]) -> Iterator[Target]:
    """Targets of the reports of GPUs."""
    for report in reports:
        settings, spread = report["settings"], report["spread"]
        ran = [point for point in report["points"] if "not_run" not in point]
        what = f"{settings['model']}, {settings['impl']}: time per token"
        if spread is None:
            yield what, f"within {SPREAD:.0%}", "", None
            continue
        batches, sizes = ({point[name] for point in ran} for name in ("batch", "img_size"))
        what += f", batch {min(batches)} to {max(batches)}, {' and '.join(map(str, sorted(sizes)))} px"
        yield what, f"within {SPREAD:.0%}", f"{spread:.1%}", spread <= SPREAD
