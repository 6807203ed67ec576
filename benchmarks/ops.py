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

from ijepa_fast.bench import table
from ijepa_fast.bench.cases.floors import MODELS, MODES, TINY
from ijepa_fast.bench.measure import results, save


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    known = {**MODELS, **TINY}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=known, help="by default all real ones on a GPU, tiny on the CPU")
    parser.add_argument("--groups", nargs="+", choices=table.GROUPS, default=list(table.GROUPS))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help='only these, such as "layer_norm, context"')
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--providers", nargs="+", help="only these")
    parser.add_argument("--without", nargs="+", default=[], help="not these providers")
    parser.add_argument("--check-only", action="store_true", help="compare with the definition and time nothing")
    parser.add_argument("--images", type=int, help="per batch; 128 on CUDA, 2 on the CPU by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write, whole after every row")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    report = results("ops", device, rows=[])
    gc.freeze()  # what was imported stays; collecting after every row need not look at it
    print(table.header())
    measured: list[dict[str, Any]] = []
    for row in table.rows(
        {name: known[name] for name in options.models or (TINY if device.type == "cpu" else MODELS)},
        device,
        images=options.images,
        groups=options.groups,
        wanted=lambda case: case.key in (options.cases or [case.key]),
        modes=options.modes,
        providers=lambda name: name in (options.providers or [name]) and name not in options.without,
        timed=not options.check_only,
        seconds=options.seconds,
    ):
        measured.append(row)
        report["rows"] = table.with_ratios(measured)
        save(options.json, report)
        if "error" in row or "failed" in row:
            print(table.line(row), flush=True)
    print("\n".join(table.remarks(measured)))
    return report


if __name__ == "__main__":
    main()
