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
import yaml

from ijepa_fast.config import RunConfig, find_recipe, from_dict
from ijepa_fast.run.environment import machine
from ijepa_fast.train import pretrain

LEAST_PROBE = 0.60
LEAST_GAIN = 0.10
CONTROLS = ("untrained", "prediction_weight_0", "pixels", "colours")


def demo_config(output: Path, seed: int, prediction_weight: float) -> RunConfig:
    config = from_dict(yaml.safe_load(find_recipe("demo").read_text()))
    return replace(
        config,
        output=str(output),
        seed=seed,
        objective=replace(config.objective, prediction_weight=prediction_weight),
        evaluation=replace(config.evaluation, pictures=False),
    )


def train(folder: str, seed: int, prediction_weight: float) -> dict:
    return pretrain(demo_config(Path(folder) / f"{seed}-{prediction_weight}", seed, prediction_weight))


def result_of(seed: int, ours: dict, control: dict) -> dict:
    return {
        "seed": seed,
        "ours": ours["after"],
        "untrained": ours["before"],
        "prediction_weight_0": control["after"],
        "pixels": ours["pixels"],
        "colours": ours["colours"],
        "steps": ours["steps"],
        "seconds": ours["seconds"],
    }


def shortfalls(seeds: list[dict]) -> list[str]:
    """What keeps the results from the bar; empty if nothing does."""
    found = []
    for result in seeds:
        probe = result["ours"]["probe"]
        if probe < LEAST_PROBE:
            found.append(f"seed {result['seed']}: probe {probe:.1%} is below {LEAST_PROBE:.0%}")
        for control in CONTROLS:
            gain = probe - result[control]["probe"]
            if gain < LEAST_GAIN:
                found.append(f"seed {result['seed']}: only {gain:.1%} above {control}")
    return found


ROWS = (
    ("raw pixels", "pixels"),
    ("colour histogram", "colours"),
    ("encoder before training", "untrained"),
    ("prediction loss at weight 0", "prediction_weight_0"),
    ("**encoder after training**", "ours"),
)


def markdown_table(report: dict) -> str:
    """The mean figures as README shows them."""
    lines = ["| features | k-NN | probe | rank |", "|---|---|---|---|"]
    for title, name in ROWS:
        mean = report["mean"][name]
        rank = f"{mean['rank']:.1f}" if "rank" in mean else ""
        lines.append(f"| {title} | {mean['knn']:.1%} | {mean['probe']:.1%} | {rank} |")
    return "\n".join(lines) + "\n"


def write_into(readme: Path, table: str) -> None:
    """Replace the table between the two comments that mark its place."""
    start, end = "tests/test_readme.py -->\n", "<!-- end of demo table -->"
    text = readme.read_text()
    head, rest = text.split(start)
    readme.write_text(head + start + table + rest[rest.index(end) :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo.json"))
    parser.add_argument("--readme", type=Path, help="write the table into this file")
    arguments = parser.parse_args()
    made_on = machine("cpu")  # before minutes pass, and the checkout moves on
    results = []
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            arguments.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
        ) as pool,
    ):
        runs = [[pool.submit(train, folder, seed, weight) for weight in (1.0, 0.0)] for seed in arguments.seeds]
        for seed, (ours, control) in zip(arguments.seeds, runs, strict=True):
            results.append(result_of(seed, ours.result(), control.result()))
            print(json.dumps(results[-1]), flush=True)
    names = ("ours", *CONTROLS)
    report = {
        "recipe": "demo",
        "machine": made_on,
        "jobs": arguments.jobs,
        "threads_per_job": threads,
        "mean": {
            name: {
                figure: round(statistics.mean(r[name][figure] for r in results), 4)
                for figure in ("knn", "probe", "rank")
                if figure in results[0][name]
            }
            for name in names
        },
        "seeds": results,
        "shortfalls": shortfalls(results),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.readme:
        write_into(arguments.readme, markdown_table(report))
    for line in report["shortfalls"]:
        print(line, file=sys.stderr)
    return 1 if report["shortfalls"] else 0


if __name__ == "__main__":
    sys.exit(main())
