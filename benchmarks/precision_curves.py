"""The effect of the precision options on training and on targets, measured without a GPU.

    python -m benchmarks.precision_curves [--seeds 0 1 2] [--jobs 2] [--out runs/precision] [--json FILE]

Trains the demo's networks on the embedded set in fp32, in bf16, and in bf16 with each option, from the same weights on
the same images and masks, and records curves, k-NN, linear probe and rank. Then compares the features that the target
encoder gives in FP8 with those it gives in bf16, block by block: of the encoders trained in bf16, and of ViT-S/16 and
ViT-B/16 with the weights that training starts from. ``python -m benchmarks.report`` makes table and chart of FILE.

Started again, the command continues unfinished runs and passes over the finished ones. Jobs are processes of one thread
each, so that figures do not depend on their number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import ablations
from ijepa_fast.config import ModelConfig, RunConfig, flatten
from ijepa_fast.data.rendered import NUM_IMAGES, RenderedTextures
from ijepa_fast.model.blocks import CPU_HIDDEN
from ijepa_fast.model.fp8 import convert_to_fp8
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import SIZES, VisionTransformer, cast_weights
from ijepa_fast.run.environment import machine
from ijepa_fast.run.files import write_json
from ijepa_fast.step.options import StepOptions
from ijepa_fast.weights.runs import load_run

RECIPE = "ablations/baseline"
BATCH, STEPS, LOG_EVERY = 32, 400, 10
WARMUP = 0.13
"""Share of the steps, as in the demo."""
VARIANTS = {
    "fp32": ("fp32", StepOptions()),
    "bf16": ("bf16", StepOptions()),
    "bf16, fp32 residual": ("bf16", StepOptions(wide_residual=True)),
    "bf16, FP8 targets, row": ("bf16", StepOptions(fp8_targets=True)),
}
CURVES = ("loss", "rank", "knn")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "precision.json"


class ProductsInFp32(TorchFunctionMode):
    """bf16 linear layers as a GPU computes them, by fp32 products and one rounding of each result.

    Where a CPU has no bf16 instructions, torch's own bf16 products take more than ten times as long.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is F.linear and arguments[0].dtype == torch.bfloat16:
            return F.linear(*(a if a is None else a.float() for a in arguments), **(keywords or {})).bfloat16()
        return function(*arguments, **(keywords or {}))


def run_config(variant: str, seed: int, out: Path, steps: int) -> RunConfig:
    config = ablations.run_config(RECIPE, seed, out)
    precision, options = VARIANTS[variant]
    train = replace(config.train, batch_size=BATCH, steps=steps, log_every=LOG_EVERY, precision=precision)
    folder = variant.replace(", ", "_").replace(" ", "_")
    return replace(
        config,
        output=str(out / folder / f"seed{seed}"),
        train=train,
        step=options,
        optim=replace(config.optim, warmup_epochs=WARMUP * steps * BATCH / NUM_IMAGES["train"]),
        evaluation=replace(config.evaluation, bank=4000),
    )


def run(config: RunConfig) -> dict[str, Any]:
    """Figures and curves of a run, trained now where it is not finished."""
    with ProductsInFp32():
        figures = ablations.run(config, "trained")
    lines = Path(config.output, "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}  # steps made again after a stop come last
    return figures | {"curve": [{name: rows[step][name] for name in ("step", *CURVES)} for step in sorted(rows)]}


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


def measure(seeds: list[int], out: Path, jobs: int, steps: int, sizes: list[str]) -> dict[str, Any]:
    """The contents of the results file."""
    made_on = machine("cpu") | {"threads": 1}  # before hours pass, and the checkout moves on
    configs = {name: [run_config(name, seed, out, steps) for seed in seeds] for name in VARIANTS}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pending = {name: [] for name in VARIANTS}
        for number in range(len(seeds)):  # so that a broken-off command leaves whole comparisons
            for name, of in configs.items():
                pending[name].append(pool.submit(run, of[number]))
        widths = {size: pool.submit(untrained_likeness, size, 24) for size in sizes}
        runs = {}
        for name, futures in pending.items():
            runs[name] = [future.result() for future in futures]
            print(name, [{key: value for key, value in r.items() if key != "curve"} for r in runs[name]], flush=True)
        trained = [pool.submit(trained_likeness, config.output) for config in configs["bf16"]]
        compared = [
            {"encoder": f"trained in bf16, seed {seed}", "compared": future.result()}
            for seed, future in zip(seeds, trained, strict=True)
        ]
        compared += [
            {"encoder": f"ViT-{size[0].upper()}/16, untrained", "compared": future.result()}
            for size, future in widths.items()
        ]
    first = configs["fp32"][0]
    return {
        "kind": "precision",
        "machine": made_on,
        "settings": {name: value for name, value in flatten(first).items() if name not in ("output", "seed")},
        "variants": [
            {"variant": name, "changes": ablations.changes(first, configs[name][0]), "runs": runs[name]}
            for name in VARIANTS
        ],
        "likeness": compared,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sizes", nargs="*", default=["small", "base"], choices=SIZES, help="untrained encoders")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args(argv)
    report = measure(options.seeds, options.out, options.jobs, options.steps, options.sizes)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
