"""Train and probe recipes, or variants of one, for several seeds, and put the results into one table.

    python -m benchmarks.ablations [--recipes 'ablations/*'] [--seeds 0 1 2] [--out runs/ablations] [--jobs 2]
    python -m benchmarks.ablations --group demo --out runs/demo_controls --json benchmarks/results/demo.json

A recipe is a name (or a pattern of names) of the shipped ones, or a YAML file; a group stands in ``variants.yaml``.
Every run has a folder of its own below --out. Started again, the command continues an unfinished run and passes over
the finished ones. Jobs are processes of one thread each, so that figures do not depend on their number.

Reported are k-NN and linear-probe accuracy of the target encoder on held-out images, and the rank of its features: the
results file (OUT/ablations.json) holds every run, OUT/ablations.md and OUT/ablations.png show the means over the seeds.
The first recipe is what the others are compared with, seed by seed.

    python -m benchmarks.ablations --table benchmarks/results/ablations.json --doc docs/ablations.md --png FILE

writes table and picture of a results file anew, the table between the comments in FILE that mark the place of that file
by its name.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch.overrides import TorchFunctionMode

from benchmarks.results_files import accuracies, between, table
from ijepa_fast.bench.measure import save
from ijepa_fast.config import RunConfig, flatten, from_dict, present, read_recipe, recipes, with_settings
from ijepa_fast.data.datasets import Sources, open_sources
from ijepa_fast.evaluate.encoder import evaluate
from ijepa_fast.run.environment import machine
from ijepa_fast.train import pretrain
from ijepa_fast.weights.runs import load_run

DOC_END = "<!-- end of table -->"
GROUPS = Path(__file__).with_name("variants.yaml")


class ProductsInFp32(TorchFunctionMode):
    """bf16 linear layers as a GPU computes them, by fp32 products and one rounding of each result.

    Where a CPU has no bf16 instructions, torch's own bf16 products take more than ten times as long.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is F.linear and arguments[0].dtype == torch.bfloat16:
            return F.linear(*(a if a is None else a.float() for a in arguments), **(keywords or {})).bfloat16()
        return function(*arguments, **(keywords or {}))


def chosen_recipes(wanted: list[str]) -> list[str]:
    """Names that the patterns stand for, each once; files stay as they are. A baseline comes first.

    Raises:
        ValueError: a pattern fits no recipe and names no file, or two names end alike (runs are filed by that end).
    """
    chosen = []
    for pattern in wanted:
        matching = fnmatch.filter(recipes(), pattern) or ([pattern] if Path(pattern).is_file() else [])
        if not matching:
            raise ValueError(f"{pattern!r} fits no recipe and is no file; recipes: {', '.join(recipes())}")
        chosen += sorted(matching, key=lambda name: (not name.endswith("/baseline"), name))
    chosen = list(dict.fromkeys(chosen))
    if len(set(map(short, chosen))) < len(chosen):
        raise ValueError(f"recipes must differ in the last part of their names: {', '.join(chosen)}")
    return chosen


def variants(name: str) -> dict[str, RunConfig]:
    """The variants of a group: its base, with settings of the group, and with their own."""
    group = yaml.safe_load(GROUPS.read_text())[name]
    base, common = from_dict(read_recipe(group["base"])), group.get("settings", {})
    return {variant: with_settings(base, common | changes) for variant, changes in group["variants"].items()}


def run_config(recipe: str, config: RunConfig, seed: int, out: Path, data: str | None = None) -> RunConfig:
    """A recipe in its folder below ``out``. It is judged here, not by ``pretrain``: once, and without pictures."""
    return replace(
        config,
        data=data or config.data,
        output=str(out / short(recipe) / f"seed{seed}"),
        seed=seed,
        resume="auto",
        evaluation=replace(config.evaluation, results="none"),
    )


def finished(config: RunConfig, kind: str) -> dict | None:
    """The figures of this run, if they were taken before with the same settings."""
    path = Path(config.output, f"{kind}.json")
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    return saved["figures"] if present(saved["settings"], strict=False) == flatten(config) else None


def run(config: RunConfig, kind: str) -> dict:
    """Figures of the "trained" or "untrained" target encoder of a run, made now where there are none yet."""
    if figures := finished(config, kind):
        return figures
    sources = sources_of(config.data, config.evaluation.data)
    if sources.test is None:
        raise ValueError(f"{config.data} has no labelled test images, which ablations are judged by")
    figures = {"seed": config.seed}
    if kind == "trained":
        with ProductsInFp32() if config.train.precision == "bf16" else nullcontext():
            summary = pretrain(config)
        figures |= {"steps": summary["steps"], "seconds": summary["seconds"]}
        model, *_ = load_run(Path(config.output))
    else:
        torch.manual_seed(config.seed)  # as pretrain does
        model = config.model.build(config.objective)
    figures |= evaluate(model.target_encoder, sources, config, baselines=kind == "untrained")
    save(Path(config.output, f"{kind}.json"), {"settings": flatten(config), "figures": figures})
    return figures


@cache
def sources_of(data: str | None, evaluation_data: str | None) -> Sources:
    return open_sources(data, evaluation_data)


def run_all(configs: dict[str, list[RunConfig]], jobs: int) -> dict[tuple[str, str], list[dict]]:
    """Figures by recipe and kind, in the order of the seeds; untrained ones of the first recipe alone."""
    wanted = [(next(iter(configs)), "untrained"), *((name, "trained") for name in configs)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pending, results = {key: [] for key in wanted}, {}
        for seed in range(len(configs[wanted[0][0]])):  # so that a broken-off command leaves whole comparisons
            for name, kind in wanted:
                pending[name, kind].append(pool.submit(run, configs[name][seed], kind))
        for key, futures in pending.items():
            results[key] = [future.result() for future in futures]
            print(*key, json.dumps(results[key]), flush=True)
    return results


def report_of(configs: dict[str, list[RunConfig]], results: dict[tuple[str, str], list[dict]], made_on: dict) -> dict:
    """The contents of the results file."""
    baseline = next(iter(configs))
    first = configs[baseline][0]
    recipes = [
        {"recipe": name, "changes": changes(first, of[0]), "runs": results[name, "trained"]}
        for name, of in configs.items()
    ]
    settings = {name: value for name, value in flatten(first).items() if name not in ("output", "seed")}
    head = {"kind": "ablations", "data": first.data, "machine": made_on, "settings": settings}
    return head | {"untrained": results[baseline, "untrained"], "recipes": recipes}


def changes(baseline: RunConfig, other: RunConfig) -> dict[str, object]:
    """Settings of ``other`` that ``baseline`` has not, the place of the results apart."""
    before = flatten(baseline)
    return {k: v for k, v in flatten(other).items() if v != before[k] and k not in ("output", "seed")}


def short(recipe: str) -> str:
    return recipe.rpartition("/")[2].removesuffix(".yaml").replace(", ", "_").replace(" ", "_")


def markdown_table(report: dict) -> str:
    """Means and sample standard deviations over the seeds; the last column has the seeds themselves."""
    baseline = report["recipes"][0]["runs"]
    entries = [("untrained", {}, report["untrained"])]
    entries += [(short(entry["recipe"]), entry["changes"], entry["runs"]) for entry in report["recipes"]]
    lines = []
    for name, changed, runs in entries:
        changed = present(changed, present(report.get("settings", {}), strict=False), strict=False)
        settings = ", ".join(f"{setting} {value}" for setting, value in changed.items())
        gaps = [f"{100 * (run['probe'] - base['probe']):+.1f}" for run, base in zip(runs, baseline, strict=True)]
        lines.append((name, settings, *accuracies(runs), "" if runs is baseline else ", ".join(gaps)))
    seeds = ", ".join(str(run["seed"]) for run in baseline)
    head = ["recipe", "changed", "probe, %", "k-NN, %", "rank", f"probe - baseline, seeds {seeds}"]
    return table(head, lines) + "\n"


def draw(report: dict, path: Path) -> None:
    """Probe and k-NN accuracy of every recipe: a dot per seed, a bar at their mean."""
    from matplotlib.figure import Figure

    entries = report["recipes"][::-1]
    figure = Figure(figsize=(8, 0.9 + 0.27 * len(entries)), dpi=160)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, (("probe", "Linear probe, %"), ("knn", "k-NN, %")), strict=True):
        for runs, style in ((report["recipes"][0]["runs"], "-"), (report["untrained"], ":")):
            axes.axvline(100 * statistics.mean(r[name] for r in runs), color="#6b7280", lw=1, ls=style, zorder=0)
        for row, entry in enumerate(entries):
            values = [100 * r[name] for r in entry["runs"]]
            axes.plot(values, [row] * len(values), "o", color="#2563eb", markersize=3.5, alpha=0.55, markeredgewidth=0)
            axes.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color="#1f2328", linewidth=1.6)
        axes.set_title(title, fontsize=9, loc="left", color="#1f2328")
        axes.tick_params(labelsize=7.5, length=0, colors="#1f2328")
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    panels[0].set_yticks(range(len(entries)), [short(e["recipe"]) for e in entries])
    figure.tight_layout(pad=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def doc_start(results: str) -> str:
    """The comment before the table of a results file."""
    return f"<!-- table of {results} -->\n"


def write_into(document: Path, table: str, start: str, end: str = DOC_END) -> None:
    """Replace what stands between the two comments that mark the table's place."""
    document.write_text(between(document.read_text(), start, end, table))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["ablations/*"], help="names, patterns of names, or YAML files")
    parser.add_argument("--group", help="a group of variants.yaml, instead of recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of runs and results")
    parser.add_argument("--data", help="images instead of the recipes' own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, help="write the results here instead of OUT/ablations.json")
    parser.add_argument("--table", type=Path, help="train nothing: take the results of this file")
    parser.add_argument("--doc", type=Path, help="write the table into this file, too")
    parser.add_argument("--png", type=Path, help="write the picture here instead of OUT/ablations.png")
    arguments = parser.parse_args(argv)
    if arguments.table:
        report = json.loads(arguments.table.read_text())
    else:
        if arguments.group:
            wanted = variants(arguments.group)
        else:
            wanted = {name: from_dict(read_recipe(name)) for name in chosen_recipes(arguments.recipes)}
        configs = {
            name: [run_config(name, config, seed, arguments.out, arguments.data) for seed in arguments.seeds]
            for name, config in wanted.items()
        }
        made_on = machine("cpu") | {"threads": 1}  # before hours pass, and the checkout moves on
        report = report_of(configs, run_all(configs, arguments.jobs), made_on)
        report["kind"] = arguments.group or "ablations"
        save(arguments.json or arguments.out / "ablations.json", report)
    shown = markdown_table(report)
    if arguments.doc:
        write_into(arguments.doc, shown, doc_start(arguments.table.name if arguments.table else "ablations.json"))
    if not arguments.table:
        (arguments.out / "ablations.md").write_text(shown)
    draw(report, arguments.png or arguments.out / "ablations.png")
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
