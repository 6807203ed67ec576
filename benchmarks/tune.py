"""Times other rows for the kernels' tables on this GPU, and proposes those that are faster.

    python -m benchmarks.tune --kernels varlen_attention gather_add --json FILE

A launcher never tunes itself: it reads a fixed table (``kernels/specs.py``). For every row of the GPU's architecture
that a model in use reads, this script compiles the rows next to it (those that differ in two fields at most), leaves
out what breaks a rule of ``python -m ijepa_fast.kernels.compile``, and times the others: device time in a CUDA graph
over data that a cold L2 cache has to fetch. It prints the faster ones as Python, to be written into the table by hand
after the tests have passed with them. Bits may change with a row, so no table changes by itself.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import tune_workloads as workloads
from benchmarks.tune_workloads import Call, Scale
from ijepa_fast.bench.measure import SCHEMA, graph_times, machine, side_stream, write_json

LEAST_GAIN = 0.03
"""Share of the time that a new row must save: less is noise."""
SETS = 16
"""Sets of data that take turns; together they are larger than any L2 cache."""

WARPS = (1, 2, 4, 8, 16)


class Slot(NamedTuple):
    """A row's place: ``table[key]``, or the entry of one ``bound`` in it, or one ``part`` of it (a field's name)."""

    key: Any
    bound: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Tunable:
    """One table of the kernels.

    Attributes:
        table: "module.NAME", within ``ijepa_fast.kernels``.
        options: per field of a row the values it may take; None leaves the field as it is.
        workload: of a scale and a slot.
        modules: those whose ``compile_specs`` depend on the table.
        parts: fields of a row that are rows of their own.
        size: for tables with a row per size, the size that stands for a bound; None where no model in use has one.
    """

    table: str
    options: tuple[Sequence | None, ...]
    workload: Callable[[Scale, Slot], Call]
    modules: tuple[str, ...]
    parts: tuple[str | None, ...] = (None,)
    size: Callable[[int], int | None] | None = None

    @property
    def rows(self) -> dict:
        module, name = self.table.split(".")
        return getattr(import_module(f"ijepa_fast.kernels.{module}"), name)

    def slots(self, arch: str) -> Iterator[Slot]:
        """The rows of an architecture that a model in use reads; of attention's those of bf16, which fp16 shares."""
        for key, row in self.rows.items():
            if arch not in (key, key[0]):
                continue
            if self.size is None:
                if isinstance(key, str) or torch.float16 not in key:
                    yield from (Slot(key, None, part) for part in self.parts)
            elif key[1] in workloads.DTYPES:
                yield from (Slot(key, bound) for bound, _ in row if self.size(bound) is not None)


def _sized(function: Callable[..., Call], size: Callable[[int], int | None]) -> dict[str, Any]:
    """For tables whose rows are found by itemsize and size."""
    return {"workload": lambda scale, slot: function(scale, slot.key[1], size(slot.bound)), "size": size}


def _attention(scale: Scale, slot: Slot) -> Call:
    function = workloads.attention_forward if slot.part == "forward" else workloads.attention_backward
    return function(scale, *slot.key[1:])


COLUMN_TILE = ((4, 8, 16, 32, 64, 128), None, WARPS)
LAUNCH = ((512, 1024, 2048, 4096, 8192, 16384), (4, 8, 16), None)
PRODUCT_TILE = ((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), (None, 128))
TUNABLES = {
    "gather_patches": Tunable(
        "gather_patches.CONFIGS",
        ((4, 8, 16, 32, 64), WARPS),
        modules=("gather_patches",),
        **_sized(workloads.gather_patches, workloads.patch_side),
    ),
    "gather_add": Tunable(
        "gather_add.CONFIGS",
        COLUMN_TILE,
        modules=("gather_add",),
        **_sized(workloads.gather_add, workloads.column_width),
    ),
    "predictor_tokens": Tunable(
        "predictor_tokens.CONFIGS",
        COLUMN_TILE,
        modules=("predictor_tokens",),
        **_sized(workloads.predictor_tokens, workloads.column_width),
    ),
    "target_loss": Tunable(
        "target_loss.CONFIGS",
        (WARPS,),
        modules=("target_loss",),
        **_sized(workloads.target_loss, workloads.row_width),
    ),
    "layer_norm": Tunable(
        "layer_norm.CONFIGS",
        (WARPS,),
        modules=("layer_norm",),
        **_sized(workloads.layer_norm, workloads.row_width),
    ),
    "layer_norm_backward": Tunable(
        "layer_norm.BACKWARD_CONFIGS",
        (WARPS, (1, 2, 3, 4)),
        modules=("layer_norm",),
        **_sized(workloads.layer_norm_backward, workloads.row_width),
    ),
    "quantize_fp8": Tunable(
        "quantize_fp8.CONFIGS",
        (WARPS,),
        modules=("quantize_fp8",),
        **_sized(workloads.quantize_fp8, workloads.quantized_width),
    ),
    "linear_gelu": Tunable(
        "linear_tiles.GELU_CONFIGS",
        PRODUCT_TILE,
        modules=("linear_gelu",),
        **_sized(workloads.linear_gelu, workloads.inner_width),
    ),
    "hidden_gradient": Tunable(
        "linear_tiles.HIDDEN_GRADIENT_CONFIGS",
        PRODUCT_TILE,
        modules=("linear_gelu",),
        **_sized(workloads.hidden_gradient, workloads.inner_width),
    ),
    "weight_gradient": Tunable(
        "weight_gradient.CONFIGS",
        PRODUCT_TILE,
        lambda scale, _: workloads.weight_gradient(scale),
        ("weight_gradient",),
    ),
    "varlen_attention": Tunable(
        "varlen_attention_launch.CONFIGS",
        ((32, 64, 128), (32, 64, 128), (4, 8), (None, 128, 168), (1, 2, 3)),
        _attention,
        ("varlen_attention", "varlen_attention_backward"),
        parts=("forward", "dq", "dkdv"),
    ),
    "grad_norm": Tunable("grad_norm.CONFIGS", LAUNCH, lambda scale, _: workloads.grad_norm(scale), ("grad_norm",)),
    "ema_": Tunable("ema.CONFIGS", LAUNCH, lambda scale, _: workloads.ema_(scale), ("ema",)),
    "adamw_ema_": Tunable("adamw_ema.CONFIGS", LAUNCH, lambda scale, _: workloads.adamw_ema_(scale), ("adamw_ema",)),
}


def row_at(table: Mapping, slot: Slot) -> Any:
    row = table[slot.key]
    if slot.bound is not None:
        row = dict(row)[slot.bound]
    return row if slot.part is None else getattr(row, slot.part)


@contextmanager
def row_in_place(table: dict, slot: Slot, row: Any) -> Iterator[None]:
    """``row`` stands in the slot while this lasts."""
    before = table[slot.key]
    if slot.part is not None:
        table[slot.key] = before._replace(**{slot.part: row})
    elif slot.bound is not None:
        table[slot.key] = tuple((bound, row if bound == slot.bound else other) for bound, other in before)
    else:
        table[slot.key] = row
    try:
        yield
    finally:
        table[slot.key] = before


def candidates(row: Any, options: Sequence[Sequence | None]) -> list:
    """The rows that differ from this one in two fields at most, this one first. A row of one field is a number."""
    fields = row if isinstance(row, tuple) else (row,)
    if len(fields) != len(options):
        raise ValueError(f"{row!r} has {len(fields)} fields, {len(options)} options were given")
    values = [dict.fromkeys((field, *(choices or ()))) for field, choices in zip(fields, options, strict=True)]
    found = [
        chosen
        for chosen in itertools.product(*values)
        if sum(new != old for new, old in zip(chosen, fields, strict=True)) <= 2
    ]
    if not isinstance(row, tuple):
        return [chosen[0] for chosen in found]
    return [row._make(chosen) if hasattr(row, "_make") else chosen for chosen in found]


def broken_rules(tunable: Tunable, slot: Slot, row: Any, arch: str) -> list[str]:
    """What ``ijepa_fast.kernels.compile`` says against the kernels that a row changes; needs no GPU."""
    from ijepa_fast.kernels.compile import compile_spec

    def specs() -> dict[str, Any]:
        modules = (import_module(f"ijepa_fast.kernels.{name}") for name in tunable.modules)
        return {repr(spec): spec for module in modules for spec in module.compile_specs(arch)}

    known = specs()
    with row_in_place(tunable.rows, slot, row):
        changed = [spec for text, spec in specs().items() if text not in known]
    return [f"{spec.name}: {failure}" for spec in changed for failure in compile_spec(spec, arch).failures]


def time_row(tunable: Tunable, slot: Slot, row: Any, scale: Scale) -> float:
    """Median microseconds of the workload on the device."""
    with row_in_place(tunable.rows, slot, row), side_stream(scale.device):
        sets = [Scale(scale.device, scale.images, scale.parameters, seed) for seed in range(SETS)]
        return graph_times([tunable.workload(each, slot) for each in sets]).p50


def fastest(times: Mapping[Any, float], current: Any) -> Any:
    """The row with the least time; the current one unless another saves ``LEAST_GAIN`` of its time."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - LEAST_GAIN) * times[current] else current


def place_of(table: str, slot: Slot) -> str:
    """Where a row stands, for people: ``gather_add.CONFIGS['sm_90', 2], up to 256``."""
    key = repr(slot.key).strip("()")
    place = f"{table}[{key}]"
    place += f", up to {slot.bound}" if slot.bound is not None else ""
    return place + (f", {slot.part}" if slot.part is not None else "")


@dataclass(frozen=True)
class Proposal:
    table: str
    slot: Slot
    row: Any
    times: Mapping[Any, float]
    left_out: Mapping[Any, Sequence[str]]
    chosen: Any

    def as_python(self) -> str:
        place = place_of(self.table, self.slot)
        if self.chosen == self.row:
            return f"{place}: {self.row!r} stays, {self.times[self.row]:.1f} us"
        before, after = self.times[self.row], self.times[self.chosen]
        return f"{place}: {self.chosen!r}  # {after:.1f} us, {self.row!r} took {before:.1f}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "slot": {name: repr(value) for name, value in self.slot._asdict().items()},
            "row": repr(self.row),
            "proposed": repr(self.chosen),
            "times_us": {repr(row): round(time, 3) for row, time in self.times.items()},
            "left_out": {repr(row): list(reasons) for row, reasons in self.left_out.items()},
        }


def tune(tunable: Tunable, slot: Slot, arch: str, time: Callable[[Any], float]) -> Proposal:
    """Compile the rows next to the one in a slot, time those that break no rule, and choose."""
    current = row_at(tunable.rows, slot)
    times, left_out = {current: time(current)}, {}
    for row in candidates(current, tunable.options)[1:]:
        if broken := broken_rules(tunable, slot, row, arch):
            left_out[row] = broken
        else:
            times[row] = time(row)
    return Proposal(tunable.table, slot, current, times, left_out, fastest(times, current))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=TUNABLES, default=list(TUNABLES))
    parser.add_argument("--match", default="", help="only rows whose place has this in it, such as \"80, 'short'\"")
    parser.add_argument("--images", type=int, default=128, help="per batch; 128 if not given")
    parser.add_argument("--json", type=Path, help="file to write, whole after every row")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, and only one can say which row is faster")
    from ijepa_fast.kernels.specs import architecture

    arch, scale = architecture(), Scale(torch.device("cuda"), options.images)
    report: dict[str, Any] = {"schema": SCHEMA, "kind": "tune", "machine": machine("cuda"), "proposals": []}
    for name in options.kernels:
        tunable = TUNABLES[name]
        for slot in tunable.slots(arch):
            if options.match not in place_of(tunable.table, slot):
                continue

            def time(row: Any, tunable: Tunable = tunable, slot: Slot = slot) -> float:
                return time_row(tunable, slot, row, scale)

            proposal = tune(tunable, slot, arch, time)
            print(proposal.as_python(), flush=True)
            report["proposals"].append(proposal.as_dict())
            if options.json:
                write_json(options.json, report)


if __name__ == "__main__":
    main()
