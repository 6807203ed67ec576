"""What was to be reached on one H200, and whether a run reached it.

A target is (what, wanted, measured, met), in words; met is None where it was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]
Target = tuple[str, str, str, bool | None]
MODEL = "ViT-H/14"
COPY_BOUND = ("gather_patches", "gather_add", "predictor_tokens", "target_loss", "adamw_ema_", "ema_")
LEAST_SHARE = 0.85
PEERS = (
    ("adamw_ema_", "fused", 1.4, "fused torch AdamW, _foreach_lerp_ and casts"),
    ("ema_", "foreach", 1.0, "_foreach_lerp_"),
    ("ema_", "loop", 1.5, "the mul_/add_ loop"),
)
ATTENTION_MODELS = ("ViT-H/14", "ViT-B/16")
ATTENTION_PARTS = ("context", "target encoder", "predictor")
STEPS = (
    # model, masks, images/s, against eager (per context token for exact masks), against compiled
    ("vit_b16", "exact", 4000, 4.0, 1.4),
    ("vit_l16", "exact", 1400, 3.0, 1.25),
    ("vit_h14", "exact", 640, 3.0, 1.15),
    ("vit_h14", "batch_min", 820, 3.0, 1.15),
)


def op_targets(rows: Sequence[Row]) -> Iterator[Target]:
    ours = {(r["model"], r["op"], r["case"], r["mode"]): r for r in rows if r["provider"] == "ours" and "times" in r}
    for (model, op, case, mode), row in ours.items():
        if model == MODEL and op in COPY_BOUND and mode != "both":
            share = row["of_floor"]
            yield f"{op}, {case}, {mode}", f"{LEAST_SHARE:.0%} of a copy", f"{share:.0%}", share >= LEAST_SHARE
    for op, peer, least, title in PEERS:
        ratio = ours.get((MODEL, op, "all parameters", "forward"), {}).get("faster_than", {}).get(peer)
        yield _compared(f"{op} over {title}", least, ratio)
    for model in ATTENTION_MODELS:
        for part in ATTENTION_PARTS:
            ratio = ours.get((model, "varlen_attention", part, "both"), {}).get("faster_than", {}).get("torch_varlen")
            yield _compared(f"varlen_attention, {model}, {part}, forward and backward, over varlen_attn", 1.0, ratio)


def _compared(what: str, least: float, ratio: float | None) -> Target:
    return what, f"{least:g} times as fast", *_measured(ratio, least, ".2f")


def _measured(value: float | None, least: float, form: str) -> tuple[str, bool | None]:
    return ("", None) if value is None else (format(value, form), value >= least)


def step_targets(reports: Sequence[Row]) -> Iterator[Target]:
    found = {(r["settings"]["model"], r["settings"]["masks"]): r["implementations"] for r in reports}
    for model, masks, least, over_eager, over_compiled in STEPS:
        results = found.get((model, masks), {})
        what = f"{model}, {masks}"
        rate = results.get("ours", {}).get("images_per_second")
        yield what, f"{least:,} images/s", *_measured(rate, least, ",.0f")
        per_token = "context tokens/s" if masks == "exact" else "images/s"
        yield _over(results, "eager", over_eager, f"{what}: {per_token} over eager", masks == "exact")
        yield _over(results, "compiled", over_compiled, f"{what}: images/s over compiled", False)
        memory = [results.get(name, {}).get("peak_memory_bytes") for name in ("ours", "compiled")]
        if all(memory):
            share = memory[0] / memory[1]
            yield f"{what}: peak memory over compiled", "at most 1", f"{share:.2f}", share <= 1


def _over(results: Row, peer: str, least: float, what: str, per_token: bool) -> Target:
    ratio = None
    if "ours" in results and peer in results:
        a, b = (
            r["images_per_second"] * (r["context_tokens"] if per_token else 1) for r in (results["ours"], results[peer])
        )
        ratio = a / b
    return what, f"{least:g} times as fast", *_measured(ratio, least, ".2f")
