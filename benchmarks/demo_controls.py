"""The demo with its controls: is it the prediction that teaches?

    python -m benchmarks.demo_controls [--seeds 0 1 2] [--jobs 2] [--json FILE] [--readme README.md]

For each seed the demo recipe is trained as shipped, and once more with the prediction loss at weight 0, so that only
the variance-covariance term is left. Reported are k-NN and linear-probe accuracy on held-out images and feature rank
of the trained target encoder (ours), the untrained one, the control, and the accuracies from raw pixels and colour
histograms. Exits with an error if the probe misses the bar: at least 60 %, and 10 points above each control.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablations import write_into
from benchmarks.results_files import table
from ijepa_fast.bench.measure import save
from ijepa_fast.config import from_dict, read_recipe
from ijepa_fast.run.environment import machine
from ijepa_fast.train import pretrain

LEAST_PROBE = 0.60
LEAST_GAIN = 0.10
ROWS = {
    "pixels": "raw pixels",
    "colours": "colour histogram",
    "untrained": "encoder before training",
    "prediction_weight_0": "prediction loss at weight 0",
    "ours": "**encoder after training**",
}
"""Name in the results -> title in the table. All but the last are controls."""
MARKS = "tests/test_readme.py -->\n", "<!-- end of demo table -->"


def train(folder: str, seed: int, prediction_weight: float) -> dict:
    config = from_dict(read_recipe("demo"))
    return pretrain(
        replace(
            config,
            output=str(Path(folder) / f"{seed}-{prediction_weight}"),
            seed=seed,
            objective=replace(config.objective, prediction_weight=prediction_weight),
            evaluation=replace(config.evaluation, results="figures"),
        )
    )


def shortfalls(seeds: list[dict]) -> list[str]:
    """The results that miss the bar, in words; empty if none does."""
    missed = []
    for result in seeds:
        probe = result["ours"]["probe"]
        if probe < LEAST_PROBE:
            missed.append(f"seed {result['seed']}: probe {probe:.1%} is below {LEAST_PROBE:.0%}")
        for control in ("untrained", "prediction_weight_0", "pixels", "colours"):
            gain = probe - result[control]["probe"]
            if gain < LEAST_GAIN:
                missed.append(f"seed {result['seed']}: only {gain:.1%} above {control}")
    return missed


def markdown_table(report: dict) -> str:
    """The mean figures as README shows them."""
    lines = []
    for name, title in ROWS.items():
        mean = report["mean"][name]
        lines.append(
            (title, f"{mean['knn']:.1%}", f"{mean['probe']:.1%}", f"{mean['rank']:.1f}" if "rank" in mean else "")
        )
    return table(["features", "k-NN", "probe", "rank"], lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo.json"))
    parser.add_argument("--readme", type=Path, help="write the table into this file")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    # The machine is described before minutes pass and the checkout moves on.
    report = {"recipe": "demo", "machine": machine("cpu"), "jobs": arguments.jobs, "threads_per_job": threads}
    results = []
    processes = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(arguments.jobs, processes, torch.set_num_threads, (threads,)) as pool,
    ):
        runs = [[pool.submit(train, folder, seed, weight) for weight in (1.0, 0.0)] for seed in arguments.seeds]
        for seed, pair in zip(arguments.seeds, runs, strict=True):
            ours, control = (future.result() for future in pair)
            figures = {"ours": ours["after"], "untrained": ours["before"], "prediction_weight_0": control["after"]}
            others = {name: ours[name] for name in ("pixels", "colours", "steps", "seconds")}
            results.append({"seed": seed, **figures, **others})
            print(json.dumps(results[-1]), flush=True)
    report["mean"] = {
        name: {
            figure: round(statistics.mean(result[name][figure] for result in results), 4)
            for figure in ("knn", "probe", "rank")
            if figure in results[0][name]
        }
        for name in ROWS
    }
    report |= {"seeds": results, "shortfalls": shortfalls(results)}
    save(arguments.json, report)
    if arguments.readme:
        write_into(arguments.readme, markdown_table(report), *MARKS)
    print("\n".join(report["shortfalls"]), file=sys.stderr)
    return 1 if report["shortfalls"] else 0


if __name__ == "__main__":
    sys.exit(main())
