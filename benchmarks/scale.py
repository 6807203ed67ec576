"""docs/scaling.md's figures: memory, bytes on the wire and balance of large encoders on 8, 64 and 256 GPUs, on paper.

    python -m benchmarks.scale [--draw]

With ``--draw`` masks are drawn for 10,000 steps of 64 images, and 10,000 steps of many ranks are simulated with them
(some minutes); without, the simulation is taken from the results file and the rest is worked out anew. Writes
benchmarks/results/scale.json and the tables between the marks of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.results_files import between, table
from ijepa_fast.bench.measure import results, save
from ijepa_fast.config import ModelConfig, from_dict, read_recipe
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.jepa import Objective
from ijepa_fast.step.scaling import image_flops, imbalance, on_paper

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scaling.md"
DRAWN_IMAGES, STEPS = 64, 10_000
GPUS, KINDS = (8, 64, 256), ("h100", "h200")
BALANCED = [(8, 8), (8, 32), (8, 128), (64, 8), (64, 32), (256, 8), (256, 32)]
"""GPUs, and images of each."""


def models() -> dict[str, ModelConfig]:
    huge = from_dict(read_recipe("vith14_in1k_exact")).model
    giant = from_dict(read_recipe("vitg16_in22k_exact")).model
    two = replace(giant, embed_dim=2048, depth=40, num_heads=16, mlp_ratio=4.0)
    seven = replace(giant, embed_dim=4096, depth=36, num_heads=32, mlp_ratio=4.0, predictor_embed_dim=768)
    return {"ViT-H/14": huge, "ViT-g/16": giant, "2 B": two, "7 B": seven}


def tables(report: dict) -> str:
    gib = 1e9
    parts = ("weights", "gradients", "moments", "target", "gathered")
    memory, wire = [], []
    for paper in report["paper"]:
        for mode, found in paper["modes"].items():
            state, sent, fits = found["state"], found["wire"], found["fits"]
            if paper["gpu"] == "h100":
                sums = [f"{state[part] / gib:.1f}" for part in parts] + [f"**{sum(state.values()) / gib:.1f}**"]
                h200 = next(
                    p["modes"][mode]["fits"]
                    for p in report["paper"]
                    if (p["model"], p["gpus"], p["gpu"]) == (paper["model"], paper["gpus"], "h200")
                )
                most = [f"{fits[kind]} / {h200[kind]}" for kind in ("none", "selective", "whole")]
                memory.append([paper["model"], paper["gpus"], mode, *sums, *most])
                wire.append(
                    [paper["model"], paper["gpus"], mode]
                    + [f"{sent[kind] / gib:.1f}" for kind in ("gather", "scatter", "all_reduce")]
                    + [f"{found['wire_seconds'] * 1e3:.0f}", f"{found['hidden_from']:.0f}"]
                )
    rates = [
        [p["model"], p["gpus"], f"{p['seconds_per_image'] * 1e3:.2f}"]
        + [f"{p['images_per_second']:,.0f}", f"{p['data_bytes'] / gib:.2f}"]
        for p in report["paper"]
        if p["gpu"] == "h100"
    ]
    unequal = [
        [row["gpus"], row["images"], *(f"{row[name]:.2%}" for name in ("drawn", "dealt in hosts", "dealt"))]
        for row in report["balance"]
    ]
    sections = [
        "### Memory of a GPU\nGB beside activations, and how many images a micro-batch may have on an H100 / H200, "
        "without recomputation, with selective and with whole.",
        table(["encoder", "GPUs", "mode", *parts, "all", "plain", "selective", "whole"], memory),
        "### Wire\nGB that a GPU sends in a step, how long that takes in ms, and from how many images a GPU on "
        "compute takes longer.",
        table(["encoder", "GPUs", "mode", "gathers", "scatters", "all-reduce", "ms", "hidden from"], wire),
        "### Data\nCompute in ms an image, and the rates at which all GPUs together would take images.",
        table(["encoder", "GPUs", "ms", "images/s", "GB/s of JPEGs"], rates),
    ]
    if unequal:
        sections += [
            f"### Balance\nThe slowest GPU over the mean, less 1, over {report['steps']:,} simulated steps of ViT-H/14 "
            "with exact masks.",
            table(["GPUs", "images a GPU", "as drawn", "dealt within hosts", "dealt among all"], unequal),
        ]
    return "\n\n".join(sections)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="simulate the balance anew")
    options = parser.parse_args(argv)
    found, masks = models(), MaskConfig()
    if options.draw:
        costs = image_flops(found["ViT-H/14"], masks, DRAWN_IMAGES, STEPS)
        balance = [
            {"gpus": gpus, "images": images, **imbalance(costs, gpus, images, STEPS)} for gpus, images in BALANCED
        ]
    else:
        balance = json.loads(FILE.read_text())["balance"] if FILE.exists() else []
    paper = [
        {"model": name, **on_paper(sizes, masks, Objective(), gpus, gpu=kind)}
        for name, sizes in found.items()
        for gpus in GPUS
        for kind in KINDS
    ]
    report = results("scale", "cpu", paper=paper, balance=balance, steps=STEPS, drawn_images=DRAWN_IMAGES)
    save(FILE, report)
    marks = "<!-- tables of scale.json -->\n", "<!-- end of tables -->"
    PAGE.write_text(between(PAGE.read_text("utf-8"), *marks, tables(report) + "\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
