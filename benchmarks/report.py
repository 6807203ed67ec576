"""Results files -> every page, table and picture that shows a figure of theirs.

    python -m benchmarks.report [--check]

Reads ``benchmarks/results/*.json`` and writes ``benchmarks/RESULTS.md``, what stands between the marks in README.md,
docs/masks.md and docs/precision.md, and the charts in docs/images.
``--check`` writes nothing and fails where a text is not what it would write. What was not measured is said to be so; of
a GPU run whose tests failed no time is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import precision_report
from benchmarks.report_training import accuracy_section, scaling_section, step_reports, step_table, steps_section
from benchmarks.results_files import (
    NOT_MEASURED,
    Report,
    failures,
    gpu_checks,
    gpu_of,
    load,
    on,
    picture,
    table,
    target_table,
    trusted,
)
from benchmarks.targets import op_targets
from ijepa_fast.bench.rows import best_of

ROOT = Path(__file__).resolve().parents[1]


def mask_rates(reports: dict[str, list[Report]]) -> str:
    """The official recipe at 14 x 14 on one core."""
    found = [report for report in reports.get("masks", []) if report["machine"]["device"] == "cpu"]
    if not found:
        return "Rates on a CPU: not measured yet."
    names = {"extension": "C++ extension", "torch": "torch sampler", "loop": "loop over images, as in a data loader"}
    rates = {r["implementation"]: r for r in found[0]["rates"] if (r["recipe"], r["grid"]) == ("official", "14x14")}
    rows = [(title, f"{rates[name]['images_per_second']:,}") for name, title in names.items()]
    return (
        f"Official recipe at 14 x 14 on one CPU core ({on(found[0]['machine'])}), best of all rounds of "
        f"{found[0]['images']:,} images, from [{found[0]['file']}]({{results}}/{found[0]['file']}):\n\n"
        + table(["", "images/s"], rows)
    )


def masks_section(reports: dict[str, list[Report]]) -> str:
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
    for check in trusted(reports):
        times = (check["parts"].get("masks", {}).get("report") or {}).get("device_times", [])
        if times:
            rows = [(t["images"], t["recipe"], t["grid"], f"{t['times']['p50']:.1f}") for t in times]
            parts.append(f"Device time on {gpu_of(check)}:\n\n" + table(["images", "recipe", "grid", "µs"], rows))
    if not any("Device time" in part for part in parts):
        parts.append(f"Device time of the CUDA extension: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def ops_table(rows: Sequence[Report]) -> str:
    """Ours with its peers, of one model."""
    lines = []
    for row in rows:
        if row["provider"] != "ours" or "times" not in row:
            continue
        times = best_of(row["times"])
        faster = [f"{name} {ratio:.2f}" for name, ratio in row["faster_than"].items()]
        rate = f"{row['tflop_per_s']:.0f} TFLOP/s" if row["floor"] == "matmul" else f"{row['gb_per_s']:,.0f} GB/s"
        spread = f"{times['p50']:,.1f} ({times['p20']:,.1f} to {times['p80']:,.1f})"
        lines.append((row["op"], row["case"], row["mode"], spread, rate, f"{row['of_floor']:.0%}", ", ".join(faster)))
    return table(["op", "case", "pass", "µs (20 % to 80 %)", "rate", "of floor", "times faster than"], lines)


def ops_section(reports: dict[str, list[Report]]) -> str:
    parts = [
        "## Ops",
        "Device time (graph replay, cold L2 cache). The floor is the larger of a plain copy of as many bytes and a "
        "large matrix product of as many operations, both measured in the same run.",
    ]
    found = False
    for check in trusted(reports):
        entry = check["parts"].get("ops", {})
        rows = entry.get("rows", [])
        for model in dict.fromkeys(row["model"] for row in rows):
            of_model = [row for row in rows if row["model"] == model]
            parts.append(f"### {model} on {gpu_of(check)}\n\n{on(entry['machine'])}.\n\n{ops_table(of_model)}")
            found = True
        if failed := [row for row in rows if "failed" in row]:
            names = [", ".join(r[key] for key in ("provider", "op", "case", "mode", "model")) for r in failed]
            lines = [f"- {name}: {r['failed']}" for name, r in zip(names, failed, strict=True)]
            parts.append("Not timed, because they failed or gave a wrong result:\n\n" + "\n".join(lines))
        if missing := sorted({f"{r['provider']}: {r['unavailable']}" for r in rows if "unavailable" in r}):
            parts.append("Peers that could not run:\n\n" + "\n".join(f"- {line}" for line in missing))
        if rows:
            parts.append(f"Targets:\n\n{target_table(op_targets(rows))}")
    if found:
        parts.append(picture("bench_ops", "Share of the floor that each kernel reaches"))
        parts.append(picture("bench_attention", "Attention beside other libraries"))
    else:
        parts.append(f"Ops on a GPU: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def tests_section(reports: dict[str, list[Report]]) -> str:
    parts = ["## Checks on a GPU"]
    for check in gpu_checks(reports):
        entry = check["parts"].get("tests", {})
        reasons = failures(check)
        verdict = f"{entry.get('passed', 0)} tests passed" + (f", and: {'; '.join(reasons)}" if reasons else "")
        parts.append(f"{check['file']} ({gpu_of(check)}): {verdict}.")
        if reasons:
            parts.append("Times of this run are not shown.")
        drawn = check["parts"].get("masks", {})
        if "sanitizer" in drawn:
            parts.append(f"compute-sanitizer was not run: {drawn['sanitizer']['not_run']}.")
        for name, result in drawn.get("commands", {}).items():
            if "sanitizer" in name:
                verdict = ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in result.items())
                parts.append(f"{name}: {'clean' if result.get('exit_status') == 0 else f'not clean ({verdict})'}.")
    if len(parts) == 1:
        parts.append("Tests marked `gpu`, compute-sanitizer: not run yet.")
    return "\n\n".join(parts)


def results_page(reports: dict[str, list[Report]]) -> str:
    head = (
        "# Results\n\nWritten by `python -m benchmarks.report` from the files in [results](results); do not edit. "
        "`benchmarks/gpu_check.sh` measures everything that needs a GPU; `python -m benchmarks.masks`, "
        "`benchmarks.step`, `benchmarks.scaling` and `benchmarks.train_to_accuracy` what a CPU can do."
    )
    sections = (steps_section, scaling_section, accuracy_section, ops_section, masks_section, tests_section)
    return "\n\n".join([head, *(section(reports) for section in sections)]) + "\n"


def readme_table(reports: dict[str, list[Report]]) -> str:
    """Whole steps on a GPU, else what there is; and what there is not."""
    on_gpu = [report for report in step_reports(reports) if report["machine"]["device"] == "cuda"]
    parts = []
    if on_gpu:
        parts.append(f"On {on(on_gpu[0]['machine'])}:\n\n{step_table(on_gpu)}")
    else:
        parts.append("Kernels and whole training steps have not been timed on a GPU yet.")
    parts.append(mask_rates(reports).format(results="benchmarks/results"))
    parts.append("More in [benchmarks/RESULTS.md](benchmarks/RESULTS.md); `ijepa-fast bench` measures your machine.")
    return "\n\n".join(parts)


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the marks of that name.

    Raises:
        ValueError: the marks are not there.
    """
    start = f"<!-- {name}: written by `python -m benchmarks.report` -->\n"
    end = f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the marks of {name!r} must be there once: {start.strip()} ... {end}")
    head, rest = text.split(start)
    return f"{head}{start}{content}\n{rest[rest.index(end) :]}"


def pages(root: Path, reports: dict[str, list[Report]]) -> dict[Path, str]:
    """Every text with figures, as it should be."""

    def edited(path: str, edit: Callable[[str], str]) -> tuple[Path, str]:
        return root / path, edit((root / path).read_text(encoding="utf-8"))

    masks = mask_rates(reports).format(results="../benchmarks/results")
    return {
        root / "benchmarks" / "RESULTS.md": results_page(reports),
        **dict(
            [
                edited("README.md", lambda text: between(text, "speed", readme_table(reports))),
                edited("docs/masks.md", lambda text: between(text, "mask rates", masks)),
                edited("docs/precision.md", lambda text: between(text, "precision", precision_report.section(reports))),
            ]
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    options = parser.parse_args(argv)
    reports = load(ROOT / "benchmarks" / "results")
    stale = []
    for path, text in pages(ROOT, reports).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(text, encoding="utf-8")
    print("\n".join(f"{'not up to date' if options.check else 'written'}: {name}" for name in stale) or "up to date")
    if not options.check:
        from benchmarks.charts import draw

        for path in draw(reports, ROOT / "docs" / "images"):
            print(f"drawn: {path.relative_to(ROOT)}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
