"""Which settings give the best frozen features from an hour of a CPU: variants of a recipe at equal processor time.

    python -m benchmarks.quality DATA --variants benchmarks/quality.yaml [--only NAME ...] [--json FILE] [--doc FILE]

DATA is a folder with train/ and val/ and a folder per class in each. The YAML file holds groups; a group has a recipe
(`base`), `settings` that differ from it in all of its variants, a budget in processor `seconds` per run, `seeds`, and
`variants`: a name and what differs, by dotted names of settings. Three names are no settings: `teacher` (a variant
whose encoder, trained for half of the budget, is the frozen target encoder for the other half), `untrained`, and
`steps` (instead of the budget: a busy machine makes the processor time of a step longer).

The seconds that a step takes (decoding, step and all) are measured first; the number of steps and with it the schedules
follow from the budget. k-NN and linear probe of the encoder are on held-out images; judging is not counted. Each run is
added to the results file as it ends; started again, the command passes over runs that are there with the same settings.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import yaml

from benchmarks.ablations import doc_start, draw, write_into
from benchmarks.results_files import accuracies, table
from ijepa_fast.bench.measure import save
from ijepa_fast.config import RunConfig, flatten, from_dict, present, read_recipe
from ijepa_fast.data.datasets import Sources, open_sources, train_loader
from ijepa_fast.evaluate.encoder import evaluate
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.run.build import make_optimizer, make_step, prepare
from ijepa_fast.run.environment import machine

TIMED_STEPS, WARM_UP = 9, 2
WARM_UP_SHARE = 0.1
NO_SETTINGS = ("teacher", "untrained", "steps")
CONTROL, FIGURES = "no_prediction", ("probe", "knn")
BASELINES = {"pixels": "raw pixels", "colours": "colour histogram"}


def nested(changes: dict[str, object], base: dict) -> dict:
    """Nested settings: ``base`` with ``changes`` by dotted names."""
    result = json.loads(json.dumps(base))
    for name, value in changes.items():
        *sections, last = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def config_of(group: dict, name: str, data: str, seed: int) -> RunConfig:
    changes = group.get("settings", {}) | group["variants"][name]
    changes = {key: value for key, value in changes.items() if key not in NO_SETTINGS}
    fixed = {"data": data, "seed": seed, "loader.workers": 0, "train.device": "cpu", "train.precision": "fp32"}
    return from_dict(nested(changes | fixed, read_recipe(group["base"])))


@cache
def sources_of(data: str) -> Sources:
    return open_sources(data)


def new_model(config: RunConfig, teacher: dict | None) -> IJEPA:
    torch.manual_seed(config.seed)  # as pretrain does
    model = config.model.build(config.objective)
    prepare(model, config, config.train.batch_size, torch.device("cpu"))
    if teacher is not None:
        model.target_encoder.load_state_dict(teacher)
    return model


def train(config: RunConfig, steps: int, teacher: dict | None = None, each_step=lambda done, model: None) -> IJEPA:
    """Networks after ``steps`` steps, with a warm-up of a tenth. ``each_step`` is called after every one."""
    model = new_model(config, teacher)
    config = replace(config, optim=replace(config.optim, warmup_epochs=WARM_UP_SHARE * steps))
    step_once = make_step(
        model,
        make_optimizer(model, config),
        MaskSampler(config.masks, model.context_encoder.grid, channels=config.model.in_chans),
        config.optim.schedules(steps, 1),
        config,
    )
    loader = train_loader(
        sources_of(config.data).train,
        epoch_images=None,
        image_size=config.model.img_size,
        global_batch=config.train.batch_size,
        seed=config.seed,
        scale=config.loader.crop_scale,
        ratio=config.loader.crop_ratio,
        flip=config.loader.flip,
        num_steps=steps,
    )
    for step, batch in enumerate(loader):
        train.losses = step_once(batch.images, step).losses
        each_step(step + 1, model)
    return model


def seconds_per_step(config: RunConfig, teacher: dict | None) -> float:
    """Processor time, median."""
    times = []
    train(config, TIMED_STEPS, teacher, lambda done, model: times.append(time.process_time()))
    return statistics.median(
        after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)
    )


def run(group: dict, name: str, data: str, seed: int) -> dict:
    """One variant with one seed, as it stands in the results file."""
    changes, seconds, teacher, spent = group["variants"][name], group["seconds"], None, 0.0
    config = config_of(group, name, data, seed)
    if changes.get("teacher"):
        seconds /= 2
        started = time.process_time()
        of = config_of(group, changes["teacher"], data, seed)
        teacher = train(of, round(seconds / seconds_per_step(of, None))).target_encoder.state_dict()
        spent = time.process_time() - started
        config = replace(config, optim=replace(config.optim, momentum=(1.0, 1.0)))
    result = {"settings": {k: v for k, v in flatten(config).items() if k not in ("data", "output", "seed")}}
    curve, judging, steps, per_step = [], 0.0, 0, 0.0

    def judged(model: IJEPA) -> dict:
        encoder = model.target_encoder if teacher is None else model.context_encoder
        return evaluate(encoder, sources_of(data), config)

    if changes.get("untrained"):
        figures = evaluate(new_model(config, None).target_encoder, sources_of(data), config, baselines=True)
    else:
        per_step = seconds_per_step(config, teacher)
        steps = changes.get("steps") or max(1, round(seconds / per_step))
        points = {round(steps * share) for share in group.get("curve", [])} - {steps}
        started = time.process_time()

        def each_step(done: int, model: IJEPA) -> None:
            nonlocal judging
            if done % max(1, steps // 20) == 0:
                print(f"  {done}/{steps}", *(f"{value:.4f}" for value in train.losses), file=sys.stderr, flush=True)
            if done in points:
                before = time.process_time()
                curve.append({"seconds": round(before - started - judging + spent, 1), "steps": done} | judged(model))
                judging += time.process_time() - before

        model = train(config, steps, teacher, each_step)
        spent += time.process_time() - started - judging
        figures = judged(model)
    return result | {
        "seed": seed,
        "seconds_per_step": round(per_step, 5),
        "steps": steps,
        "images": steps * config.train.batch_size,
        "processor_seconds": round(spent, 1),
        "figures": figures,
        "curve": curve,
    }


def markdown_table(runs: list[dict]) -> str:
    """A row per variant, over its seeds; gaps are to the control, verdicts on the first variant's figures."""
    head = "variant | changed | steps | images | probe, % | k-NN, % | rank | probe, k-NN - control | against the first"
    rows, first = [], runs[0]["variant"] if runs else None
    for name in dict.fromkeys(run["variant"] for run in runs):
        of = [run for run in runs if run["variant"] == name]
        figures = [run["figures"] for run in of]
        changed = ", ".join(f"{setting} {value}" for setting, value in of[0]["changes"].items())
        gaps = [_gaps(runs, of, CONTROL, figure) for figure in FIGURES]
        gap = " / ".join(f"{statistics.mean(gap):+.1f}" for gap in gaps if gap) if name != CONTROL else ""
        verdict = "" if name == first else ", ".join(_verdict(runs, of, first, figure) for figure in FIGURES)
        counts = [of[0]["steps"] or "", of[0]["images"] or ""]
        rows.append([name, changed, *counts, *accuracies(figures), gap, verdict])
        for baseline, title in BASELINES.items():
            if found := figures[0].get(baseline):
                rows.append([title, "", "", "", *(f"{100 * found[figure]:.1f}" for figure in FIGURES), "", "", ""])
    return table(head.split(" | "), rows) + "\n"


def _gaps(runs: list[dict], of: list[dict], other: str, figure: str) -> list[float]:
    """Points by which runs are above those of another variant, for the seeds that both have."""
    others = {run["seed"]: run["figures"][figure] for run in runs if run["variant"] == other}
    return [100 * (run["figures"][figure] - others[run["seed"]]) for run in of if run["seed"] in others]


def _verdict(runs: list[dict], of: list[dict], first: str, figure: str) -> str:
    """Above or below, if three seeds agree or, with fewer, if the test images alone cannot explain the gap."""
    gaps = _gaps(runs, of, first, figure)
    share, images = of[0]["figures"][figure], present(of[0]["settings"], strict=False)["evaluation.images"][1]
    noise = 0.0 if len(gaps) > 2 else 200 * math.sqrt(2 * share * (1 - share) / images)  # two standard errors
    for word, sign in (("above", 1), ("below", -1)):
        if gaps and all(sign * gap > noise for gap in gaps):
            return f"{figure} {word}"
    return f"{figure} inconclusive"


def page(runs: list[dict]) -> str:
    """A table for every group, with its budget and its base."""
    parts = []
    for group in dict.fromkeys(run["group"] for run in runs):
        of = [run for run in runs if run["group"] == group]
        parts.append(f"**{group}**: {of[0]['seconds']} s of one core per run\n\n{markdown_table(of)}{curves(of)}")
    return "\n".join(parts)


def curves(runs: list[dict]) -> str:
    """Figures on the way, in words."""
    lines = [
        f"\n{run['variant']}, seed {run['seed']}, after {point['seconds']:.0f} s ({point['steps']} steps): "
        f"probe {100 * point['probe']:.1f}, k-NN {100 * point['knn']:.1f}, rank {point['rank']:.1f}\n"
        for run in runs
        for point in run["curve"]
    ]
    return "".join(lines)


def draw_runs(runs: list[dict], path: Path) -> None:
    """Probe and k-NN of every variant; lines at the first one and, dotted, at the untrained encoders."""
    by_name = {}
    for run in runs:
        by_name.setdefault(f"{run['variant']} ({run['group']}, {run['seconds']} s)", []).append(run["figures"])
    untrained = [run["figures"] for run in runs if run["variant"] == "untrained"]
    draw({"recipes": [{"recipe": n, "runs": of} for n, of in by_name.items()], "untrained": untrained}, path)


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"kind": "quality", "runs": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder with train/ and val/; without it nothing is trained")
    parser.add_argument("--variants", type=Path, default=Path("benchmarks/quality.yaml"))
    parser.add_argument("--group", default="screening", help="of the YAML file")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--doc", type=Path, help="write the tables into this file, between their comments")
    parser.add_argument("--png", type=Path, help="draw all runs into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made_on = machine("cpu")  # before hours pass, and the checkout moves on
    group = yaml.safe_load(arguments.variants.read_text())[arguments.group]
    report = read(arguments.json)
    wanted = [(seed, name) for seed in group.get("seeds", [0]) for name in arguments.only or group["variants"]]
    for seed, name in wanted if arguments.data else ():
        key = {"group": arguments.group, "variant": name, "seed": seed, "changes": group["variants"][name]}
        key |= {"seconds": group["seconds"]}
        if not any(key.items() <= found.items() for found in report["runs"]):
            found = key | run(group, name, arguments.data, seed) | {"machine": made_on}
            report = read(arguments.json)  # others may have added to it
            report["runs"].append(found)
            save(arguments.json, report)
            print(name, seed, report["runs"][-1]["steps"], report["runs"][-1]["figures"], flush=True)
    if arguments.doc:
        write_into(arguments.doc, page(report["runs"]), doc_start(arguments.json.name))
    if arguments.png:
        draw_runs(report["runs"], arguments.png)
    print(page([found for found in report["runs"] if found["group"] == arguments.group]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
