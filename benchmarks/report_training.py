"""The sections of the results that are about training: whole steps, time per token, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.results_files import NOT_MEASURED, PHASES, Report, accuracies, on, picture, table, target_table, trusted
from benchmarks.targets import cpu_step_targets, scaling_targets, step_targets


def of_kind(reports: dict[str, list[Report]], kind: str, part: str) -> list[Report]:
    """Reports of a kind: those inside GPU runs whose tests passed, and those in files of their own, if of a GPU then of
    one that passed the tests with the same commit."""
    runs = trusted(reports)
    inside = [found for check in runs for found in check["parts"].get(part, {}).get("reports", [])]
    tested = [check["parts"]["tests"]["machine"] for check in runs]
    passed = {(machine["gpu"], machine["commit"]) for machine in tested}
    alone = [
        report
        for report in reports.get(kind, [])
        if report["machine"]["device"] == "cpu" or (report["machine"]["gpu"], report["machine"]["commit"]) in passed
    ]
    return [*inside, *alone]


def step_reports(reports: dict[str, list[Report]]) -> list[Report]:
    return of_kind(reports, "step", "step")


def by_machine(found: Sequence[Report]) -> dict[str, list[Report]]:
    grouped: dict[str, list[Report]] = {}
    for report in found:
        grouped.setdefault(on(report["machine"]), []).append(report)
    return grouped


def step_table(found: Sequence[Report]) -> str:
    lines = []
    for report in found:
        settings, results = report["settings"], report["implementations"]
        for name, result in results.items():
            memory = result.get("peak_memory_bytes")
            lines.append(
                (
                    settings["model"],
                    settings["batch"],
                    settings["masks"] if name != "eager" else "batch_min",
                    name,
                    f"{result['images_per_second']:,.1f}",
                    f"{result['ms']:,.1f}",
                    f"{result['context_tokens']:.1f}",
                    f"{result['useful_tflops']:.1f} ({result['share_of_matmul_peak']:.0%})",
                    f"{memory / 2**30:.1f}" if memory else "",
                    f"{ratio:.3f}" if (ratio := report["ratio"].get(f"ours/{name}")) else "",
                )
            )
    head = ["model", "batch", "masks", "implementation", "images/s", "ms", "context tokens", "TFLOP/s (of peak)", "GiB"]
    return table([*head, "ours over its time"], lines)


def phase_table(found: Sequence[Report]) -> str:
    lines, reasons = [], {}
    for report in found:
        settings = report["settings"]
        for name, result in report["implementations"].items():
            if result.get("no_phases"):
                reasons[name] = result["no_phases"]
            if spent := result.get("phases_ms"):
                times = [f"{spent[phase]:,.1f}" for phase in PHASES]
                lines.append((settings["model"], settings["batch"], settings["masks"], name, *times))
    shown = table(["model", "batch", "masks", "implementation", *PHASES], lines)
    return shown + "".join(f"\n\nNo phases of {name}: {reason}." for name, reason in reasons.items())


def steps_section(reports: dict[str, list[Report]]) -> str:
    found = step_reports(reports)
    parts = ["## Whole steps"]
    for machine, here in by_machine(found).items():
        parts.append(f"On {machine}:\n\n{step_table(here)}")
        parts.append(
            "The last column is the median over rounds of a ratio within each round, so not quite that of the times "
            "beside it. `eager` runs the official truncated masks whatever the others run. TFLOP/s are of what an "
            "implementation computes; the baselines also compute rows that nobody reads."
        )
        parts.append(f"Milliseconds by phase, of other steps than those above:\n\n{phase_table(here)}")
        failed = {
            (r["settings"]["model"], r["settings"]["masks"], *f) for r in here for f in r.get("failed", {}).items()
        }
        if failed:
            lines = [f"- {name} ({model}, {masks}): {reason}" for model, masks, name, reason in sorted(failed)]
            parts.append("Not timed:\n\n" + "\n".join(lines))
        on_gpu = here[0]["machine"]["device"] == "cuda"
        targets = list((step_targets if on_gpu else cpu_step_targets)(here))
        if targets:
            parts.append(f"Targets:\n\n{target_table(targets)}")
        if targets and not on_gpu:
            parts.append(
                "Most of a step on a CPU is matrix products, at a rate that is the same for both, so the ratio of "
                "times follows that of operations; only what is between the products can be won beside it."
            )
    if any(report["machine"]["device"] == "cuda" for report in found):
        parts.append(picture("bench_steps", "Images per second of whole steps"))
    else:
        parts.append(f"Whole steps on a GPU: {NOT_MEASURED}.")
    parts += [fairness_of_eager(report) for report in reports.get("fairness", [])]
    return "\n\n".join(parts)


def fairness_of_eager(report: Report) -> str:
    """What ``benchmarks/fairness.py`` found, in a sentence."""
    settings, ratio, losses = report["settings"], report["eager_over_official"], report["losses"]
    apart = max(abs(a - b) for a, b in zip(losses["official"], losses["eager"], strict=True))
    return (
        f"`eager` stands for the official code, whose own training loop ran beside it ({settings['model']}, batch "
        f"{settings['batch']}, {settings['steps']} steps on {on(report['machine'])}): {ratio['flops']:.3f} times its "
        f"operations, {ratio['time']:.3f} times its time, {ratio['cpu_time']:.3f} times its processor time; losses "
        + (f"at most {apart:g} apart." if apart else "equal in every digit that it prints.")
    )


def scaling_reports(reports: dict[str, list[Report]]) -> list[Report]:
    return of_kind(reports, "scaling", "scaling")


def scaling_section(reports: dict[str, list[Report]]) -> str:
    parts = [
        "## Time per token",
        "A step's time without its update and its attention (timed by itself), over the rows that its three networks "
        "compute. Where it is the same everywhere, cost grows linearly with tokens.",
    ]
    found = scaling_reports(reports)
    for report in found:
        settings = report["settings"]
        lines = []
        for point in report["points"]:
            cells = [point["img_size"], point["batch"]]
            if "not_run" in point:
                cells += [point["not_run"], "", "", "", ""]
            else:
                cells += [f"{point['tokens_per_image']:.1f}"]
                cells += [f"{point[name]:,.1f}" for name in ("ms", "update_ms", "attention_ms")]
                cells += [f"{point['us_per_token']:.4g}"]
            lines.append(cells)
        head = ["px", "batch", "tokens per image", "step, ms", "update, ms", "attention, ms", "µs per token"]
        spread = "" if report["spread"] is None else f"\n\nLargest over smallest: {report['spread']:.1%} more."
        where = f"{settings['model']}, {settings['impl']}, {settings['precision']}, on {on(report['machine'])}"
        parts.append(f"{where}:\n\n{table(head, lines)}{spread}")
    if found:
        parts.append(picture("bench_scaling", "Time per token over the tokens of a step"))
    on_gpu = [report for report in found if report["machine"]["device"] == "cuda"]
    if on_gpu:
        parts.append(f"Targets:\n\n{target_table(scaling_targets(on_gpu))}")
    else:
        parts.append(f"Time per token on a GPU: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def accuracy_reports(reports: dict[str, list[Report]]) -> list[Report]:
    return of_kind(reports, "train_to_accuracy", "accuracy")


TITLES = {"time": "At equal time", "epochs": "At equal epochs"}


def accuracy_table(report: Report, comparison: str) -> str:
    """Means and sample standard deviations over seeds; the last column has the seeds themselves."""
    steps, first = report["steps"][comparison], next(iter(report["steps"][comparison]))
    lines = [("untrained", "", "", "", *accuracies(report["untrained"]), "")]
    baseline = {run["seed"]: run["probe"] for run in of_contender(report, comparison, first)}
    for name, count in steps.items():
        runs = of_contender(report, comparison, name)
        gaps = [f"{100 * (run['probe'] - baseline[run['seed']]):+.1f}" for run in runs if run["seed"] in baseline]
        minutes = f"{count * report['step_seconds'][name] / 60:.1f}"
        epochs = f"{count / report['steps_per_epoch']:.2f}"
        lines.append((name, count, epochs, minutes, *accuracies(runs), "" if name == first else ", ".join(gaps)))
    head = [
        "encoder",
        "steps",
        "epochs",
        "minutes of steps",
        "probe, %",
        "k-NN, %",
        "rank",
        f"probe - {first}, by seed",
    ]
    return table(head, lines)


def of_contender(report: Report, comparison: str, name: str) -> list[dict[str, Any]]:
    """Its runs in a comparison, one per seed."""
    steps = report["steps"][comparison][name]
    return [run for run in report["runs"] if (run["contender"], run["steps"]) == (name, steps)]


def accuracy_section(reports: dict[str, list[Report]]) -> str:
    parts = ["## Accuracy at equal time and at equal epochs"]
    found = accuracy_reports(reports)
    for report in found:
        settings, model = report["settings"], report["settings"]["model"]
        clock = "processor time" if settings["device"] == "cpu" else "time"
        objective = (
            "the prediction loss and the variance-covariance term"
            if settings["regularised"]
            else ("the prediction loss alone")
        )
        parts.append(
            f"{settings['data']}, {model['img_size']} px, patches of {model['patch_size']} px, width "
            f"{model['embed_dim']}, {model['depth']} blocks; steps of {settings['batch']} images in "
            f"{settings['precision']}; everyone minimises {objective}. Judged on held-out images by the target "
            f"encoder's features; minutes are {clock} of the steps alone, on {on(report['machine'])}."
        )
        parts += [f"{TITLES[comparison]}:\n\n{accuracy_table(report, comparison)}" for comparison in report["steps"]]
    if found:
        parts.append(picture("bench_accuracy", "Linear probe at equal time and at equal epochs"))
    else:
        parts.append(f"Accuracy: {NOT_MEASURED}.")
    return "\n\n".join(parts)
