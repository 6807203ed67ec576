"""Every op beside its peers, written after each row.

    python -m benchmarks.ops --models ViT-H/14 --device cuda --json FILE
    python -m benchmarks.ops --models tiny --device cpu

``ijepa_fast/bench/`` says what is measured and how; ``ijepa-fast bench`` shows the same for a recipe's model.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.bench import table as ops_table
from ijepa_fast.bench.cases.floors import MODELS, MODES, TINY
from ijepa_fast.bench.measure import results, save


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    known = {**MODELS, **TINY}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=known, default=list(MODELS))
    parser.add_argument("--groups", nargs="+", choices=ops_table.GROUPS, default=list(ops_table.GROUPS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--providers", nargs="+", help="only these")
    parser.add_argument("--without", nargs="+", default=[], help="not these providers")
    parser.add_argument("--images", type=int, help="per batch; 128 on CUDA, 2 on the CPU by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write, whole after every row")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    report = results("ops", device, rows=[])
    gc.freeze()  # what was imported stays; collecting after every row need not look at it
    measured: list[dict[str, Any]] = []
    for row in ops_table.rows(
        {name: known[name] for name in options.models},
        device,
        images=options.images,
        groups=options.groups,
        modes=options.modes,
        providers=lambda name: name in (options.providers or [name]) and name not in options.without,
        seconds=options.seconds,
    ):
        if not measured:
            print(ops_table.header())
        measured.append(row)
        report["rows"] = ops_table.with_ratios(measured)
        save(options.json, report)
        if "times" in row or "failed" in row:
            print(ops_table.line(row), flush=True)
    print("\n".join(ops_table.remarks(measured)))
    return report


if __name__ == "__main__":
    main()
