"""Exact against truncated masks: what the encoder learns in equal steps, and in equal time.

    python -m benchmarks.mask_quality DATA [--seeds 0 1 2] [--steps 200] [--json FILE] [--doc FILE]

DATA is a folder with train/ and val/ and one folder per class in each, of images of 32 px. One small encoder is
pretrained with masks of three kinds:

  exact           every visible patch of the context block
  batch_min       every context cut to the shortest of the batch, lowest patch numbers first, as the official code does
  batch_min_time  the same for as many steps as fit into the time of exact

and once without any prediction (no_prediction: the variance-covariance term alone, with exact masks). Time is processor
time of one thread, of steps of the two kinds taken in turn before anything is trained, so that it does not depend on
what else the machine does. k-NN and linear probe of the target encoder are on held-out images. Started again, the
command passes over finished runs, and takes the times that it took then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablations import machine, run, sources_of, write_into
from benchmarks.results_files import accuracies
from ijepa_fast.config import EvaluationConfig, RunConfig, from_dict, read_recipe
from ijepa_fast.data import TrainLoader
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.run.files import write_json
from ijepa_fast.step.train_step import TrainStep

BATCH = 64
TIMED_STEPS, WARM_UP = 20, 3
DOC_START, DOC_END = "<!-- table of benchmarks/mask_quality.py -->\n", "<!-- end of table of mask_quality -->"
MASKS = {"exact": {"context": "exact"}, "batch_min": {"context": "batch_min", "group_size": BATCH}}


def run_config(
    data: str, masks: str, steps: int, seed: int, out: Path, name: str, prediction: float = 1.0
) -> RunConfig:
    """The cifar10 recipe, smaller and shorter."""
    config = from_dict(read_recipe("cifar10"))
    return replace(
        config,
        data=data,
        output=str(out / name / f"seed{seed}"),
        seed=seed,
        model=replace(
            config.model,
            embed_dim=64,
            depth=2,
            num_heads=2,
            predictor_embed_dim=32,
            predictor_depth=1,
            attention="sdpa",
        ),
        masks=replace(config.masks, **MASKS[masks]),
        objective=replace(config.objective, prediction_weight=prediction, variance_weight=0.1, covariance_weight=0.01),
        loader=replace(config.loader, workers=0),
        # Shorter than an epoch: warm-up and schedules by steps.
        optim=replace(
            config.optim,
            start_lr=6e-4,
            lr=3e-3,
            warmup_epochs=BATCH * 30 / 50_000,
            momentum=0.98,
            final_weight_decay=0.04,
        ),
        train=replace(config.train, batch_size=BATCH, steps=steps, precision="fp32", device="cpu", log_every=50),
        evaluation=EvaluationConfig(
            before_and_after=False, pictures=False, bank=0, resize_ratio=1.0, train_images=2000, test_images=2000
        ),
    )


def step_seconds(data: str, out: Path) -> dict[str, float]:
    """Processor time of one step with masks of each kind, median of steps taken in turn."""
    path = out / "step_seconds.json"
    if path.exists():
        return json.loads(path.read_text())
    steps, taken = {}, {name: [] for name in MASKS}
    for name in MASKS:
        config = run_config(data, name, TIMED_STEPS, 0, out, name)
        torch.manual_seed(0)
        model = config.model.build(config.objective)
        sampler = MaskSampler(config.masks, model.context_encoder.grid)
        steps[name] = TrainStep(
            model, FusedAdamW(parameter_groups(model)), sampler, config.optim.schedules(1000, 700), seed=0
        )
    loader = TrainLoader(
        sources_of(data, None).train, image_size=32, global_batch=BATCH, seed=0, num_steps=WARM_UP + TIMED_STEPS
    )
    for number, batch in enumerate(loader):
        for name, step in steps.items():
            started = time.process_time()
            step(batch.images, number)
            if number >= WARM_UP:
                taken[name].append(time.process_time() - started)
    seconds = {name: round(statistics.median(times), 5) for name, times in taken.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, seconds)
    return seconds


def markdown_table(report: dict) -> str:
    """Means and sample standard deviations over the seeds; the last column has the seeds themselves."""
    seeds = ", ".join(str(run["seed"]) for run in report["runs"]["exact"])
    lines = [
        f"| encoder | steps | processor time of the steps | probe, % | k-NN, % | rank | probe - exact, seeds {seeds} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in report["runs"].items():
        cells = ["", ""]
        if steps := report["steps"].get(name):
            kind = "batch_min" if name.startswith("batch_min") else "exact"
            cells = [str(steps), f"{steps * report['step_seconds'][kind]:.1f} s"]
        cells += accuracies(runs)
        pairs = zip(runs, report["runs"]["exact"], strict=True)
        gaps = [f"{100 * (run['probe'] - exact['probe']):+.1f}" for run, exact in pairs]
        lines.append(f"| {' | '.join([name, *cells, '' if name == 'exact' else ', '.join(gaps)])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/, a folder per class in each")
    parser.add_argument("--name", default="", help="of the images, for the results file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/mask_quality"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/mask_quality.json"))
    parser.add_argument("--doc", type=Path, help="write the table into this file, between its comments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made_on = machine()  # before hours pass, and the checkout moves on
    data, out, steps = arguments.data, arguments.out, arguments.steps
    seconds = step_seconds(data, out)
    longer = round(steps * seconds["exact"] / seconds["batch_min"])
    kinds = {
        "exact": ("exact", steps, 1.0),
        "batch_min": ("batch_min", steps, 1.0),
        "batch_min_time": ("batch_min", longer, 1.0),
        "no_prediction": ("exact", steps, 0.0),
    }
    results = {"untrained": []} | {name: [] for name in kinds}
    for seed in arguments.seeds:
        for name, (masks, length, prediction) in kinds.items():
            config = run_config(data, masks, length, seed, out, name, prediction)
            if name == "exact":
                results["untrained"].append(run(config, "untrained"))
            results[name].append(run(config, "trained"))
            print(name, json.dumps(results[name][-1]), flush=True)
    figures = ("probe", "knn", "rank")
    report = {
        "kind": "mask_quality",
        "data": arguments.name or data,
        "machine": made_on,
        "batch": BATCH,
        "step_seconds": seconds,
        "steps": {name: length for name, (_, length, _) in kinds.items()},
        "mean": {n: {f: round(statistics.mean(r[f] for r in runs), 4) for f in figures} for n, runs in results.items()},
        "runs": results,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.json, report)
    if arguments.doc:
        write_into(arguments.doc, markdown_table(report), DOC_START, DOC_END)
    print(markdown_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
