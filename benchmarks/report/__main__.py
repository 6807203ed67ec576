"""Results files -> every page, table and picture that shows a figure of theirs.

    python -m benchmarks.report [--check]

Reads ``benchmarks/results/*.json`` and writes ``benchmarks/RESULTS.md``, what stands between the marks in README.md,
docs/performance.md, docs/masks.md, docs/precision.md and docs/data.md, and the charts in docs/images. ``--check``
writes nothing and fails where a text is not what it would write. A section without results says that nothing was
measured yet. Times of a GPU run whose tests failed are not shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.sections import demo, loading, mask_rates, precision, results_page, speed
from benchmarks.results_files import Reports, between, load

ROOT = Path(__file__).resolve().parents[2]


def pages(root: Path, reports: Reports) -> dict[Path, str]:
    """Every text with figures, as it should be."""
    marked = (
        ("docs/performance.md", "speed", speed(reports)),
        ("README.md", "demo table", demo(reports)),
        ("docs/masks.md", "mask rates", mask_rates(reports, "../benchmarks/results")),
        ("docs/precision.md", "precision", precision(reports)),
        ("docs/data.md", "loading", loading(reports, "../benchmarks/results")),
    )
    texts: dict[Path, str] = {}
    for name, of, content in marked:
        path = root / name
        text = texts.get(path) or path.read_text("utf-8")
        start = re.search(f"<!-- {of}: written by `python -m benchmarks[^>]*-->\n", text)
        start = start[0] if start else f"<!-- {of} -->"
        texts[path] = between(text, start, f"<!-- end of {of} -->", content + "\n")
    return {root / "benchmarks" / "RESULTS.md": results_page(reports), **texts}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    options = parser.parse_args(argv)
    reports = load(ROOT / "benchmarks" / "results")
    stale = []
    for path, text in pages(ROOT, reports).items():
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(text, encoding="utf-8")
    print("\n".join(f"{'not up to date' if options.check else 'written'}: {name}" for name in stale) or "up to date")
    if options.check:
        return 1 if stale else 0
    from benchmarks.report.charts import draw

    for path in draw(reports, ROOT / "docs" / "images"):
        print(f"drawn: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
