"""The effect of the precision options on training and on targets, measured without a GPU.

    python -m benchmarks.precision_curves [--seeds 0 1 2] [--jobs 2] [--out runs/precision] [--json FILE]

Trains the group ``precision`` of variants.yaml as ``benchmarks.ablations`` does: the demo's networks in fp32, in bf16,
and in bf16 with each option, from the same weights on the same images and masks. Then compares the features that the
target encoder gives in FP8 with those it gives in bf16, block by block: of the encoders trained in bf16, and of
ViT-S/16 and ViT-B/16 with the weights that training starts from. ``python -m benchmarks.report`` makes table and chart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ablations
from benchmarks.ablations import ProductsInFp32
from ijepa_fast.bench.measure import save
from ijepa_fast.config import ModelConfig, RunConfig
from ijepa_fast.data.rendered import RenderedTextures
from ijepa_fast.model.blocks import CPU_HIDDEN
from ijepa_fast.model.fp8 import convert_to_fp8
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import SIZES, VisionTransformer, cast_weights
from ijepa_fast.run.environment import machine
from ijepa_fast.weights.runs import load_run

CURVES = ("loss", "rank", "knn")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "precision.json"


def curve(config: RunConfig) -> list[dict[str, Any]]:
    """What a finished run has logged, step by step."""
    lines = Path(config.output, "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}  # steps made again after a stop come last
    return [{name: rows[step][name] for name in ("step", *CURVES)} for step in sorted(rows)]


def likeness(encoder: VisionTransformer, images: Tensor) -> list[dict[str, Any]]:
    """Cosine similarities of the features after each block, with the final norm, in two precisions.

    Features are those of bf16 weights; layer-normalised, they are what the predictor learns.

    Returns:
        For each pair of precisions "a", "b" and "blocks" with "mean" and "min" over the patches of all images, and
        "centred_mean": of features less their mean over all patches, which leaves out what these have in common.
    """
    patches, hidden = encoder.grid[0] * encoder.grid[1], encoder.blocks[0].mlp.fc1.out_features
    at_once = max(1, CPU_HIDDEN // (patches * hidden))

    def features() -> list[Tensor]:
        parts = []
        with torch.no_grad(), ProductsInFp32():
            for part in images.split(at_once):
                parts.append([x.flatten(0, 1).float() for x in encoder.intermediate_layers(part, len(encoder.blocks))])
        return [torch.cat(of_block) for of_block in zip(*parts, strict=True)]

    by_precision = {"fp32": features()}
    cast_weights(encoder, torch.bfloat16)
    by_precision["bf16"] = features()
    convert_to_fp8(encoder.blocks, images.device)
    encoder.train()
    by_precision["row"] = features()

    def compared(a: str, b: str) -> dict[str, Any]:
        blocks = []
        for x, y in zip(by_precision[a], by_precision[b], strict=True):
            x, y = (F.layer_norm(z.double(), z.shape[1:]) for z in (x, y))
            values = F.cosine_similarity(x, y)
            centred = F.cosine_similarity(x - x.mean(0), y - y.mean(0))
            cosines = {"mean": values.mean(), "min": values.min(), "centred_mean": centred.mean()}
            blocks.append({name: round(float(value), 7) for name, value in cosines.items()})
        return {"a": a, "b": b, "blocks": blocks}

    return [compared("bf16", "fp32"), compared("row", "bf16")]


def rendered_images(count: int, side: int) -> Tensor:
    """uint8 [count, 3, side, side], held-out images of the embedded set, enlarged."""
    images = torch.from_numpy(RenderedTextures("test", count).images).permute(0, 3, 1, 2).float()
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 255).byte()


def trained_likeness(folder: str) -> list[dict[str, Any]]:
    model, config, _ = load_run(Path(folder))
    return likeness(model.target_encoder, rendered_images(256, config.model.img_size))


def untrained_likeness(size: str, count: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = ModelConfig(**SIZES[size]).build(Objective())
    return likeness(model.target_encoder, rendered_images(count, 224))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, help="of a run, instead of those of the group")
    parser.add_argument("--sizes", nargs="*", default=["small", "base"], choices=SIZES, help="untrained encoders")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args(argv)
    made_on = machine("cpu") | {"threads": 1}  # before hours pass, and the checkout moves on
    configs = {}
    for name, config in ablations.variants("precision").items():
        config = replace(config, train=replace(config.train, steps=options.steps or config.train.steps))
        configs[name] = [ablations.run_config(name, config, seed, options.out) for seed in options.seeds]
    report = ablations.report_of(configs, ablations.run_all(configs, options.jobs), made_on) | {"kind": "precision"}
    for entry in report["recipes"]:
        entry["runs"] = [
            of | {"curve": curve(config)} for of, config in zip(entry["runs"], configs[entry["recipe"]], strict=True)
        ]
    report["likeness"] = [
        {"encoder": f"trained in bf16, seed {seed}", "compared": trained_likeness(config.output)}
        for seed, config in zip(options.seeds, configs["bf16"], strict=True)
    ]
    report["likeness"] += [
        {"encoder": f"ViT-{size[0].upper()}/16, untrained", "compared": untrained_likeness(size, 24)}
        for size in options.sizes
    ]
    save(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
