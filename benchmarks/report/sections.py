"""The sections of the results, and what the documentation shows of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.results_files import (
    NOT_MEASURED,
    PHASES,
    Report,
    Reports,
    accuracies,
    failures,
    gpu_checks,
    gpu_of,
    mean_and_deviation,
    of_kind,
    on,
    table,
    trusted,
)
from ijepa_fast.bench.table import best_of


def results_page(reports: Reports) -> str:
    """benchmarks/RESULTS.md."""
    head = (
        "# Results\n\nWritten by `python -m benchmarks.report` from the files in [results](results); do not edit. "
        "`benchmarks/gpu_check.sh` measures everything that needs a GPU; `python -m benchmarks.masks`, "
        "`benchmarks.step` and `benchmarks.scaling` what a CPU can do."
    )
    return "\n\n".join([head, *(part for section in (steps, scaling, accuracy, ops, masks, checks)
                                for part in section(reports))]) + "\n"  # fmt: skip


def speed(reports: Reports) -> str:
    """Whole steps on a GPU where they were measured, and masks."""
    on_gpu = [report for report in of_kind(reports, "step") if report["machine"]["device"] == "cuda"]
    steps_there = "Kernels and whole training steps have not been timed on a GPU yet."
    if on_gpu:
        steps_there = f"On {on(on_gpu[0]['machine'])}:\n\n{step_table(on_gpu)}"
    more = "More in [RESULTS.md](../benchmarks/RESULTS.md); `ijepa-fast bench` measures your machine."
    return "\n\n".join([steps_there, mask_rates(reports, "../benchmarks/results"), more])


def demo(reports: Reports) -> str:
    """What the demo learned, beside its controls: README's first table. Means over the seeds."""
    if not reports.get("demo"):
        return f"The demo: {NOT_MEASURED}."
    report = reports["demo"][-1]
    trained = {entry["recipe"]: entry["runs"] for entry in report["recipes"]}
    rows = {
        "raw pixels": [run["pixels"] for run in report["untrained"]],
        "colour histogram": [run["colours"] for run in report["untrained"]],
        "encoder before training": report["untrained"],
        "prediction loss at weight 0": trained["no_prediction"],
        "**encoder after training**": trained["demo"],
    }

    def mean(runs: Sequence[Report], figure: str, form: str) -> str:
        return format(statistics.mean(run[figure] for run in runs), form) if figure in runs[0] else ""

    figures = (("knn", ".1%"), ("probe", ".1%"), ("rank", ".1f"))
    return table(
        ["features", "k-NN", "probe", "rank"],
        [(title, *(mean(runs, *figure) for figure in figures)) for title, runs in rows.items()],
    )


def picture(name: str, words: str) -> str:
    return f"![{words}](../docs/images/{name}.png)"


def listed(title: str, lines: Iterable[str]) -> list[str]:
    """A titled list, or nothing."""
    lines = [f"- {line}" for line in lines]
    return [f"{title}:\n\n" + "\n".join(lines)] if lines else []


WANTED_STEPS = {
    "cuda": "Wanted on one H200, at batch 128 (vit_b16: 512), of the fastest variant of ours; with exact masks the "
    "ratio over eager is that of context tokens/s. With an FP8 target encoder vit_h14 shall make 740 images/s.\n\n"
    + table(
        ["model", "masks", "images/s", "times eager", "times compiled"],
        [
            ("vit_b16", "exact", "4,000", 4, 1.4),
            ("vit_l16", "exact", "1,400", 3, 1.25),
            ("vit_h14", "exact", 640, 3, 1.15),
            ("vit_h14", "batch_min", 820, 3, 1.15),
        ],
    ),
    "cpu": "Wanted of vit_small at batch 16: at most 0.87 of eager's time with batch_min masks, and 1.2 of it with "
    "exact ones. Most of a step on a CPU is matrix products, at a rate that is the same for both, so the ratio of "
    "times follows that of operations; only what is between the products can be won beside it.",
}


def steps(reports: Reports) -> list[str]:
    matching = of_kind(reports, "step")
    parts, machines = ["## Whole steps"], dict.fromkeys(on(report["machine"]) for report in matching)
    for machine in machines:
        here = [report for report in matching if on(report["machine"]) == machine]
        parts += [
            f"On {machine}:\n\n{step_table(here)}",
            "The last column is the median over rounds of a ratio within each round, so not quite that of the times "
            "beside it. `eager` runs the official truncated masks whatever the others run. TFLOP/s are of what an "
            "implementation computes; the baselines also compute rows that nobody reads.",
            f"Milliseconds by phase, of other steps than those above:\n\n{phase_table(here)}",
        ]
        failed = {(r["settings"]["model"], r["settings"]["masks"], *f) for r in here for f in r["failed"].items()}
        parts += listed("Not timed", (f"{name} ({model}, {kind}): {why}" for model, kind, name, why in sorted(failed)))
        parts.append(WANTED_STEPS[here[0]["machine"]["device"]])
    if not any(report["machine"]["device"] == "cuda" for report in matching):
        parts += [f"Whole steps on a GPU: {NOT_MEASURED}.", WANTED_STEPS["cuda"]]
    return parts + [fairness_of_eager(report) for report in reports.get("fairness", [])]


def step_table(matching: Sequence[Report]) -> str:
    def cells(report: Report, name: str, result: Report) -> tuple:
        settings, memory = report["settings"], result.get("peak_memory_bytes")
        ratio = report["ratio"].get(f"ours/{name}")
        return (
            settings["model"],
            settings["batch"],
            settings["masks"] if name != "eager" else "batch_min",
            name,
            f"{result['images_per_second']:,.1f}",
            f"{result['ms']:,.1f}",
            f"{result['context_tokens']:.1f}",
            f"{result['useful_tflops']:.1f} ({result['share_of_matmul_peak']:.0%})",
            f"{memory / 2**30:.1f}" if memory else "",
            f"{ratio:.3f}" if ratio else "",
        )

    head = ["model", "batch", "masks", "implementation", "images/s", "ms", "context tokens", "TFLOP/s (of peak)", "GiB"]
    lines = [cells(report, *result) for report in matching for result in report["implementations"].items()]
    return table([*head, "ours over its time"], lines)


def phase_table(matching: Sequence[Report]) -> str:
    lines, reasons = [], {}
    for settings, implementations in ((report["settings"], report["implementations"]) for report in matching):
        for name, result in implementations.items():
            if result.get("no_phases"):
                reasons[name] = result["no_phases"]
            if spent := result.get("phases_ms"):
                times = [f"{spent[phase]:,.1f}" for phase in PHASES]
                lines.append((settings["model"], settings["batch"], settings["masks"], name, *times))
    shown = table(["model", "batch", "masks", "implementation", *PHASES], lines)
    return shown + "".join(f"\n\nNo phases of {name}: {reason}." for name, reason in reasons.items())


def fairness_of_eager(report: Report) -> str:
    """What came of ``eager`` beside the official code, in a sentence. The script is in the commit that it names."""
    settings, ratio, losses = report["settings"], report["eager_over_official"], report["losses"]
    apart = max(abs(a - b) for a, b in zip(losses["official"], losses["eager"], strict=True))
    return (
        f"`eager` stands for the official code, whose own training loop ran beside it ({settings['model']}, batch "
        f"{settings['batch']}, {settings['steps']} steps on {on(report['machine'])}): {ratio['flops']:.3f} times its "
        f"operations, {ratio['time']:.3f} times its time, {ratio['cpu_time']:.3f} times its processor time; losses "
        + (f"at most {apart:g} apart." if apart else "equal in every digit that it prints.")
    )


def scaling(reports: Reports) -> list[str]:
    parts = [
        "## Time per token",
        "A step's time without its update and its attention (timed by itself), over the rows that its three networks "
        "compute. Where it is the same everywhere, cost grows linearly with tokens. Wanted: within 10 %.",
    ]
    matching = of_kind(reports, "scaling")
    head = ["px", "batch", "tokens per image", "step, ms", "update, ms", "attention, ms", "µs per token"]
    for report in matching:
        settings, lines = report["settings"], []
        for point in report["points"]:
            cells = [point.get("not_run"), *[""] * 4]
            if "not_run" not in point:
                times = [f"{point[name]:,.1f}" for name in ("ms", "update_ms", "attention_ms")]
                cells = [f"{point['tokens_per_image']:.1f}", *times, f"{point['us_per_token']:.4g}"]
            lines.append([point["img_size"], point["batch"], *cells])
        spread = "" if report["spread"] is None else f"\n\nLargest over smallest: {report['spread']:.1%} more."
        where = f"{settings['model']}, {settings['impl']}, {settings['precision']}, on {on(report['machine'])}"
        parts.append(f"{where}:\n\n{table(head, lines)}{spread}")
    on_gpu = [report for report in matching if report["machine"]["device"] == "cuda"]
    return parts + ([] if on_gpu else [f"Time per token on a GPU: {NOT_MEASURED}."])


TITLES = {"time": "At equal time", "epochs": "At equal epochs"}


def accuracy(reports: Reports) -> list[str]:
    parts = ["## Accuracy at equal time and at equal epochs"]
    matching = of_kind(reports, "train_to_accuracy")
    for report in matching:
        settings, model = report["settings"], report["settings"]["model"]
        clock = "processor time" if settings["device"] == "cpu" else "time"
        term = "and the variance-covariance term" if settings["regularised"] else "alone"
        parts.append(
            f"{settings['data']}, {model['img_size']} px, patches of {model['patch_size']} px, width "
            f"{model['embed_dim']}, {model['depth']} blocks; steps of {settings['batch']} images in "
            f"{settings['precision']}; everyone minimises the prediction loss {term}. Judged on held-out images by the "
            f"target encoder's features; minutes are {clock} of the steps alone, on {on(report['machine'])}, by "
            "the script of that commit."
        )
        parts += [f"{TITLES[comparison]}:\n\n{accuracy_table(report, comparison)}" for comparison in report["steps"]]
    shown = picture("bench_accuracy", "Linear probe at equal time and at equal epochs")
    return [*parts, shown if matching else f"Accuracy: {NOT_MEASURED}."]


def accuracy_table(report: Report, comparison: str) -> str:
    """Means and sample standard deviations over seeds; the last column has the seeds themselves."""
    counts = report["steps"][comparison]
    first = next(iter(counts))
    lines = [("untrained", "", "", "", *accuracies(report["untrained"]), "")]
    baseline = {run["seed"]: run["probe"] for run in of_contender(report, comparison, first)}
    for name, count in counts.items():
        runs = of_contender(report, comparison, name)
        gaps = [f"{100 * (run['probe'] - baseline[run['seed']]):+.1f}" for run in runs if run["seed"] in baseline]
        minutes = f"{count * report['step_seconds'][name] / 60:.1f}"
        epochs = f"{count / report['steps_per_epoch']:.2f}"
        lines.append((name, count, epochs, minutes, *accuracies(runs), "" if name == first else ", ".join(gaps)))
    head = ["encoder", "steps", "epochs", "minutes of steps", "probe, %", "k-NN, %", "rank"]
    return table([*head, f"probe - {first}, by seed"], lines)


def of_contender(report: Report, comparison: str, name: str) -> list[dict[str, Any]]:
    """Its runs in a comparison, one per seed."""
    count = report["steps"][comparison][name]
    return [run for run in report["runs"] if (run["contender"], run["steps"]) == (name, count)]


def ops(reports: Reports) -> list[str]:
    parts = [
        "## Ops",
        "Device time (graph replay, cold L2 cache). The floor is the larger of a plain copy of as many bytes and a "
        "large matrix product of as many operations, both measured in the same run. Wanted for ViT-H/14: 85 % of the "
        "floor where it is a copy; `adamw_ema_` 1.4 times as fast as torch's fused AdamW with an EMA and casts, `ema_` "
        "1.5 times as fast as a loop and no slower than `_foreach_lerp_`; attention no slower than torch's.",
    ]
    for check in trusted(reports):
        entry = check["parts"].get("ops", {})
        rows = entry.get("rows", [])
        for model in dict.fromkeys(row["model"] for row in rows):
            shown = ops_table([row for row in rows if row["model"] == model])
            parts.append(f"### {model} on {gpu_of(check)}\n\n{on(entry['machine'])}.\n\n{shown}")
        place = ("provider", "op", "case", "mode", "model")
        failed = (f"{', '.join(row[key] for key in place)}: {row['failed']}" for row in rows if "failed" in row)
        parts += listed("Not timed, because they failed or gave a wrong result", failed)
        missing = {f"{row['provider']}: {row['unavailable']}" for row in rows if "unavailable" in row}
        parts += listed("Peers that could not run", sorted(missing))
    return parts if len(parts) > 2 else [*parts, f"Ops on a GPU: {NOT_MEASURED}."]


def ops_table(rows: Sequence[Report]) -> str:
    """Ours beside its peers, for one model."""
    lines = []
    for row in (row for row in rows if row["provider"] == "ours" and "times" in row):
        times = best_of(row["times"])
        faster = [f"{name} {ratio:.2f}" for name, ratio in row["faster_than"].items()]
        rate = f"{row['tflop_per_s']:.0f} TFLOP/s" if row["floor"] == "matmul" else f"{row['gb_per_s']:,.0f} GB/s"
        spread = f"{times['p50']:,.1f} ({times['p20']:,.1f} to {times['p80']:,.1f})"
        lines.append((row["op"], row["case"], row["mode"], spread, rate, f"{row['of_floor']:.0%}", ", ".join(faster)))
    return table(["op", "case", "pass", "µs (20 % to 80 %)", "rate", "of floor", "times faster than"], lines)


def mask_rates(reports: Reports, results: str) -> str:
    """Rates of the official recipe at 14 x 14 on one core; ``results`` is the path to the folder of results files."""
    matching = [report for report in reports.get("masks", []) if report["machine"]["device"] == "cpu"]
    if not matching:
        return "Rates on a CPU: not measured yet."
    names = {"extension": "C++ extension", "torch": "torch sampler", "loop": "loop over images, as in a data loader"}
    rates = {r["implementation"]: r for r in matching[0]["rates"] if (r["recipe"], r["grid"]) == ("official", "14x14")}
    rows = [(title, f"{rates[name]['images_per_second']:,}") for name, title in names.items()]
    return (
        f"Official recipe at 14 x 14 on one CPU core ({on(matching[0]['machine'])}), best of all rounds of "
        f"{matching[0]['images']:,} images, from [{matching[0]['file']}]({results}/{matching[0]['file']}):\n\n"
        + table(["", "images/s"], rows)
    )


def loading(reports: Reports, results: str) -> str:
    """Images per second of processor time of loaders, and the memory of a worker; ``results`` as above."""
    if not reports.get("loading"):
        return f"Rates of loading: {NOT_MEASURED}."
    report = reports["loading"][-1]
    cells: dict[str, dict[tuple[str, int], float]] = {}
    for row in report["rates"]:
        cells.setdefault(row["contender"], {})[row["images"], row["crop"]] = row["images_per_second"]
    heads = list(dict.fromkeys(place for row in cells.values() for place in row))
    rows = [[name, *(f"{row[place]:.0f}" if place in row else "" for place in heads)] for name, row in cells.items()]
    ours = cells["ijepa_fast"]
    ratios = {
        other: " and ".join(f"{ours[place] / cells[other][place]:.2f}" for place in heads if place[0] == "photographs")
        for other in ("plain Pillow", "plain Pillow, uint8")
    }
    of = {
        name: "{count} {name} (in the middle {0} x {1}, {mean_kb:.0f} kB)".format(
            *each["median_size"], name=name, **each
        )
        for name, each in report["images"].items()
    }
    memory = [row["private_mb"] for row in report["memory"]]
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    return (
        f"Decoded and cropped images per second of processor time, workers and the process that takes the batches "
        f"together: {' and '.join(of.values())}, from [{report['file']}]({results}/{report['file']}) "
        f"({on(report['machine'])}; {packages}). {' '.join(report['notes'])}\n\n"
        + table(["", *(f"{name}, {side} px" for name, side in heads)], rows)
        + f"\n\nOn untouched photographs: {ratios['plain Pillow']} times plain Pillow (aimed at: {report['bar']})"
        f", and {ratios['plain Pillow, uint8']} times it without the normalised floats. A worker's own memory was "
        f"{min(memory)} to {max(memory)} MB over {report['memory'][-1]['samples']:,} samples."
    )


def masks(reports: Reports) -> list[str]:
    parts = ["## Masks"]
    for report in reports.get("masks", []):
        grids = list(dict.fromkeys(r["grid"] for r in report["rates"]))
        kinds = list(dict.fromkeys((r["implementation"], r["recipe"]) for r in report["rates"]))
        rates = {(r["implementation"], r["recipe"], r["grid"]): f"{r['images_per_second']:,}" for r in report["rates"]}
        rows = [[*kind, *(rates.get((*kind, grid), "") for grid in grids)] for kind in kinds]
        equal = report["equal"]
        parts.append(
            f"Images per second on one CPU core, best of all rounds ({report['file']}: {on(report['machine'])}). "
            f"Before that, {equal['comparisons']} batches of {', '.join(equal['implementations'])} were equal to the "
            "bit.\n\n" + table(["drawn by", "recipe", *grids], rows)
        )
    if any(report["machine"]["device"] == "cpu" for report in reports.get("masks", [])):
        parts.append(picture("bench_masks", "Images per second of three ways to draw masks"))
    times = {
        gpu_of(check): (check["parts"].get("masks", {}).get("report") or {}).get("device_times", [])
        for check in trusted(reports)
    }
    for gpu, measured in times.items():
        if rows := [(t["images"], t["recipe"], t["grid"], f"{t['times']['p50']:.1f}") for t in measured]:
            parts.append(f"Device time on {gpu}:\n\n" + table(["images", "recipe", "grid", "µs"], rows))
    return parts if any(times.values()) else [*parts, f"Device time of the CUDA extension: {NOT_MEASURED}."]


def checks(reports: Reports) -> list[str]:
    parts = ["## Checks on a GPU"]
    for check in gpu_checks(reports):
        entry = check["parts"].get("tests", {})
        reasons = failures(check)
        verdict = f"{entry.get('passed', 0)} tests passed" + (f", and: {'; '.join(reasons)}" if reasons else "")
        parts.append(f"{check['file']} ({gpu_of(check)}): {verdict}.")
        if reasons:
            parts.append("Times of this run are not shown.")
        for part in check["parts"].values():
            if "sanitizer" in part:
                parts.append(f"compute-sanitizer was not run: {part['sanitizer']['not_run']}.")
            for name, result in part["commands"].items():
                if "sanitizer" in name:
                    verdict = ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in result.items())
                    parts.append(f"{name}: {'clean' if result.get('exit_status') == 0 else f'not clean ({verdict})'}.")
    return parts if len(parts) > 1 else [*parts, "Tests marked `gpu`, compute-sanitizer: not run yet."]


LAST_POINTS = 5
"""Points of a curve whose mean stands for its end: one alone swings with its masks."""
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "tensor": "FP8, tensor", "row": "FP8, row"}


def precision(reports: Reports) -> str:
    """The tables of docs/precision.md, of the newest results of ``benchmarks/precision_curves.py``."""
    if not reports.get("precision"):
        return "Training curves and the likeness of FP8 targets: not measured yet."
    report = reports["precision"][-1]
    settings, file = report["settings"], report["file"]
    about_curves = (
        f"The demo's networks ({settings['model.depth']} encoder blocks of width {settings['model.embed_dim']}) on the "
        f"embedded set, {settings['train.steps']} steps of {settings['train.batch_size']} images, from "
        f"[{file}](../benchmarks/results/{file}) ({on(report['machine'])}): mean and sample standard deviation over "
        f"{len(report['recipes'][0]['runs'])} seeds, also of what each seed differs by from bf16 with the same seed. "
        f"The loss is the mean over the last {LAST_POINTS} points of the curve. Accuracy is that of the target "
        "encoder on held-out images, without FP8; chance is 12.5 %."
    )
    about_likeness = (
        "Cosine similarity of the target encoder's features in two precisions, layer-normalised as in the loss, from "
        "the same bf16 weights: after the first and after the last block, mean and least over all patches. *Centred* "
        "is the mean after the last block for features less their mean over patches, which leaves out what all "
        "patches have in common."
    )
    curves = "![Loss over steps, the same less that of bf16, and probe accuracy of each seed](images/precision.png)"
    return "\n\n".join([about_curves, curves, curves_table(report), about_likeness, likeness_table(report)])


def curves_table(report: Report) -> str:
    runs = {entry["recipe"]: entry["runs"] for entry in report["recipes"]}

    def less_bf16(name: str, value: Callable[[Report], float], digits: int) -> str:
        if name == "bf16":
            return ""
        differences = [value(run) - value(other) for run, other in zip(runs[name], runs["bf16"], strict=True)]
        above = sum(difference > 0 for difference in differences)
        return f"{mean_and_deviation(differences, digits)} ({above} of {len(differences)} above)"

    def loss(run: Report) -> float:
        return statistics.mean(point["loss"] for point in run["curve"][-LAST_POINTS:])

    def probe(run: Report) -> float:
        return 100 * run["probe"]

    rows = []
    for name, of in runs.items():
        cells = [mean_and_deviation(map(loss, of), 4), less_bf16(name, loss, 4)]
        right, neighbours, rank = accuracies(of)
        rows.append((name, *cells, right, less_bf16(name, probe, 1), neighbours, rank))
    head = ["precision", "loss", "loss - bf16", "probe, %", "probe - bf16, points", "k-NN, %", "rank"]
    return table(head, rows)


def likeness_table(report: Report) -> str:
    rows = []
    for encoder, pair in ((entry["encoder"], pair) for entry in report["likeness"] for pair in entry["compared"]):
        first, last = pair["blocks"][0], pair["blocks"][-1]
        cosines = [f"{block['mean']:.5f} ({block['min']:.5f})" for block in (first, last)]
        between = f"{PRECISIONS[pair['a']]} and {PRECISIONS[pair['b']]}"
        rows.append((encoder, len(pair["blocks"]), between, *cosines, f"{last['centred_mean']:.5f}"))
    return table(["encoder", "blocks", "between", "after the first (least)", "after the last (least)", "centred"], rows)
