"""The demo with its controls: is it the prediction that teaches?

    python -m benchmarks.demo_controls [--seeds 0 1 2] [--json benchmarks/results/demo.json]

For each seed the demo recipe is trained as shipped, and once more with the prediction loss at weight 0, so that only
the variance-covariance term is left. Reported are k-NN and linear-probe accuracy on held-out images and feature rank
of the trained target encoder (ours), the untrained one, the control, and the accuracies from raw pixels and colour
histograms. Exits with an error if the probe misses the bar: at least 60 %, and 10 points above each control.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import yaml

import ijepa_fast
from ijepa_fast.config import RunConfig, find_recipe, from_dict
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


def run_seed(seed: int, folder: Path) -> dict:
    ours = pretrain(demo_config(folder / f"ours-{seed}", seed, 1.0))
    control = pretrain(demo_config(folder / f"control-{seed}", seed, 0.0))
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo.json"))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            results.append(run_seed(seed, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    names = ("ours", *CONTROLS)
    report = {
        "recipe": "demo",
        "versions": {"ijepa_fast": ijepa_fast.__version__, "torch": torch.__version__},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
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
    for line in report["shortfalls"]:
        print(line, file=sys.stderr)
    return 1 if report["shortfalls"] else 0


if __name__ == "__main__":
    sys.exit(main())
