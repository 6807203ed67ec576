"""Times other rows for the kernels' tables on this GPU, and proposes those that are faster.

    python -m benchmarks.tune --kernels varlen_attention gather_add --json FILE

A launcher never tunes itself: it reads a fixed table (``kernels/specs.py``). For every row of the GPU's architecture
that a model in use reads, this script compiles the rows next to it (those that differ in two fields at most), leaves
out what breaks a rule of ``python -m ijepa_fast.kernels.compile`` or gives a wrong result, and times the others on the
benchmarks' cases of the ops that read the row: device time in a CUDA graph over data that a cold L2 cache has to fetch.
It prints the faster ones as Python, to be written into the table by hand after the tests have passed with them. Bits
may change with a row, so no table changes by itself.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ijepa_fast.bench import table
from ijepa_fast.bench.cases import attention, optimizer, products, rows
from ijepa_fast.bench.cases.floors import MODELS
from ijepa_fast.bench.cases.rows import Batch, Case
from ijepa_fast.bench.measure import own_stream, results, save
from ijepa_fast.config import ModelConfig

LEAST_GAIN = 0.03
"""Share of the time that a new row must save: less is noise."""
WARPS = (1, 2, 4, 8, 16)
DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}
"""Dtypes in use, by itemsize."""
Work = list[tuple[Case, str]]
"""Cases, and the passes of them that read a row: "forward" or "backward"."""


class Slot(NamedTuple):
    """A row's place: ``table[key]``, or the entry of one ``bound`` in it, or one ``part`` of it (a field's name)."""

    key: Any
    bound: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Scale:
    """How much data is worked on: images of a batch, and the model whose parameters are updated."""

    device: torch.device
    images: int = 128
    model: ModelConfig = MODELS["ViT-H/14"]

    def batch(self, itemsize: int = 2, **settings: Any) -> Batch:
        """A batch of ViT-H/14 with other settings, on 16 x 16 patches."""
        settings = {"patch_size": 14} | settings
        model = replace(self.model, img_size=16 * settings["patch_size"], **settings)
        batch = Batch.draw(model, self.images, self.device)
        return replace(batch, dtype=torch.bfloat16 if itemsize < 4 else DTYPES[itemsize])


@dataclass(frozen=True)
class Tunable:
    """One table of the kernels.

    Attributes:
        table: "module.NAME", within ``ijepa_fast.kernels``.
        options: per field of a row the values it may take; None leaves the field as it is.
        work: of a scale, a slot and a size: the cases to time.
        sizes: for tables with a row per size, bound -> a size in use that reads its row.
        parts: fields of a row that are rows of their own.
    """

    table: str
    options: tuple[Sequence | None, ...]
    work: Callable[[Scale, Slot, int], Work]
    sizes: Mapping[int, int] | None = None
    parts: tuple[str | None, ...] = (None,)

    @property
    def rows(self) -> dict:
        module, name = self.table.split(".")
        return getattr(import_module(f"ijepa_fast.kernels.{module}"), name)

    def slots(self, arch: str) -> Iterator[Slot]:
        """The rows of an architecture that a model in use reads; of attention's those of bf16, which fp16 shares."""
        for key, row in self.rows.items():
            if arch not in (key, key[0]):
                continue
            if self.sizes is None:
                if isinstance(key, str) or torch.float16 not in key:
                    yield from (Slot(key, None, part) for part in self.parts)
            elif key[1] in DTYPES:
                yield from (Slot(key, bound) for bound, _ in row if bound in self.sizes)

    def workload(self, scale: Scale, slot: Slot) -> Work:
        return self.work(scale, slot, (self.sizes or {}).get(slot.bound, 0))


def passes(case: Case, *modes: str) -> Work:
    """The case forward and, where it has a gradient, backward; or in these modes."""
    return [(case, mode) for mode in modes or ("forward", "backward") if mode in case.costs]


def _rows(case: Callable[..., Case], *modes: str, width: str = "embed_dim", part: str = "") -> Callable:
    """Work on rows of a width, which is the model's setting of that name; ``part`` for cases that have several."""

    def work(scale: Scale, slot: Slot, size: int) -> Work:
        batch = scale.batch(slot.key[1], num_heads=4, **{width: size})
        return passes(case(batch, part) if part else case(batch), *modes)

    return work


def _patches(scale: Scale, slot: Slot, side: int) -> Work:
    batch = scale.batch(slot.key[1], patch_size=side)
    return passes(rows.gather_patches(batch, "context", pixels=DTYPES[slot.key[1]]))


def _quantize(scale: Scale, slot: Slot, width: int) -> Work:
    return passes(rows.quantize_fp8(scale.batch(slot.key[1], embed_dim=width // 4, num_heads=4)))


def _product(case: Callable[..., Case], *more: tuple) -> Callable:
    """A product on rows of the predictor or of the context encoder, which have the two widths in use."""

    def work(scale: Scale, slot: Slot, width: int) -> Work:
        batch, part = scale.batch(slot.key[1]), "predictor" if width == 384 else "context"
        return [each for arguments in more or ((),) for each in passes(case(batch, part, *arguments))]

    return work


def _weight_gradients(scale: Scale, slot: Slot, _: int) -> Work:
    batch = scale.batch()
    return [each for part in ("context", "predictor") for each in passes(products.weight_gradient(batch, part))]


def _attention(scale: Scale, slot: Slot, _: int) -> Work:
    _, dtype, head_dim, lengths = slot.key
    batch = scale.batch(dtype.itemsize, embed_dim=16 * head_dim, num_heads=16)
    case = attention.attention_case(batch, "context" if lengths == "short" else "target encoder", peers={})
    return passes(case, "forward" if slot.part == "forward" else "backward")


def _parameters(case: Callable[..., Case]) -> Callable:
    def work(scale: Scale, slot: Slot, _: int) -> Work:
        batch = scale.batch()
        return passes(case(batch, optimizer.Parameters.of(batch)))

    return work


COLUMN_TILE = ((4, 8, 16, 32, 64, 128), None, WARPS)
LAUNCH = ((512, 1024, 2048, 4096, 8192, 16384), (4, 8, 16), None)
PRODUCT_TILE = ((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), (None, 128))
COLUMNS = {64: 192, 128: 384, 256: 1280}  # widths that are cut into so many columns
ROWS = {512: 384, 1024: 768, 1536: 1280, 2048: 1280}  # widths of whole rows, in the first bound that holds them
INNER = {512: 384, 65536: 1280}  # widths of the predictor's and ViT-H's rows that are multiplied
ATTENTION_TILE = ((32, 64, 128), (32, 64, 128), (4, 8), (None, 128, 168), (1, 2, 3))
_norm = rows.layer_norm_with_residual
TUNABLES = {
    "gather_patches": Tunable("gather_patches.CONFIGS", ((4, 8, 16, 32, 64), WARPS), _patches, {64: 8, 256: 14}),
    "gather_add": Tunable("gather_add.CONFIGS", COLUMN_TILE, _rows(rows.gather_add, part="context"), COLUMNS),
    "predictor_tokens": Tunable(
        "predictor_tokens.CONFIGS", COLUMN_TILE, _rows(rows.predictor_tokens, width="predictor_embed_dim"), COLUMNS
    ),
    "target_loss": Tunable("target_loss.CONFIGS", (WARPS,), _rows(rows.target_loss), ROWS),
    "layer_norm": Tunable("layer_norm.CONFIGS", (WARPS,), _rows(_norm, "forward"), ROWS),
    "layer_norm_backward": Tunable(
        "layer_norm.BACKWARD_CONFIGS", (WARPS, (1, 2, 3, 4)), _rows(_norm, "backward"), ROWS
    ),
    "quantize_fp8": Tunable("quantize_fp8.CONFIGS", (WARPS,), _quantize, {1536: 1280, 8192: 5120}),
    "linear_gelu": Tunable(
        "linear_tiles.GELU_CONFIGS", PRODUCT_TILE, _product(products.linear_gelu, (True,), (False,)), INNER
    ),
    "hidden_gradient": Tunable(
        "linear_tiles.HIDDEN_GRADIENT_CONFIGS", PRODUCT_TILE, _product(products.hidden_gradient), INNER
    ),
    "weight_gradient": Tunable("weight_gradient.CONFIGS", PRODUCT_TILE, _weight_gradients),
    "varlen_attention": Tunable(
        "varlen_attention_launch.CONFIGS", ATTENTION_TILE, _attention, None, ("forward", "dq", "dkdv")
    ),
    "grad_norm": Tunable("grad_norm.CONFIGS", LAUNCH, _parameters(optimizer.grad_norm)),
    "ema_": Tunable("ema.CONFIGS", LAUNCH, _parameters(optimizer.ema)),
    "adamw_ema_": Tunable("adamw_ema.CONFIGS", LAUNCH, _parameters(optimizer.adamw_ema)),
}
MODULES = {
    "linear_tiles": ("linear_gelu",),
    "varlen_attention_launch": ("varlen_attention", "varlen_attention_backward"),
}
"""Modules whose ``compile_specs`` depend on a table that is not their own."""


def row_at(rows: Mapping, slot: Slot) -> Any:
    row = rows[slot.key]
    if slot.bound is not None:
        row = dict(row)[slot.bound]
    return row if slot.part is None else getattr(row, slot.part)


@contextmanager
def row_in_place(rows: dict, slot: Slot, row: Any) -> Iterator[None]:
    """``row`` stands in the slot while this lasts."""
    before = rows[slot.key]
    if slot.part is not None:
        row = before._replace(**{slot.part: row})
    elif slot.bound is not None:
        row = tuple((bound, row if bound == slot.bound else other) for bound, other in before)
    rows[slot.key] = row
    try:
        yield
    finally:
        rows[slot.key] = before


def candidates(row: Any, options: Sequence[Sequence | None]) -> list:
    """The rows that differ from this one in two fields at most, this one first. A row of one field is a number."""
    fields = row if isinstance(row, tuple) else (row,)
    if len(fields) != len(options):
        raise ValueError(f"{row!r} has {len(fields)} fields, {len(options)} options were given")
    values = [dict.fromkeys((field, *(choices or ()))) for field, choices in zip(fields, options, strict=True)]
    near = [
        chosen
        for chosen in itertools.product(*values)
        if sum(new != old for new, old in zip(chosen, fields, strict=True)) <= 2
    ]
    if not isinstance(row, tuple):
        return [chosen[0] for chosen in near]
    return [row._make(chosen) if hasattr(row, "_make") else chosen for chosen in near]


def broken_rules(tunable: Tunable, slot: Slot, row: Any, arch: str) -> list[str]:
    """Objections of ``ijepa_fast.kernels.compile`` to the kernels that a row changes; needs no GPU."""
    from ijepa_fast.kernels.compile import compile_spec

    def specs() -> dict[str, Any]:
        own, _ = tunable.table.split(".")
        modules = (import_module(f"ijepa_fast.kernels.{name}") for name in MODULES.get(own, (own,)))
        return {repr(spec): spec for module in modules for spec in module.compile_specs(arch)}

    known = specs()
    with row_in_place(tunable.rows, slot, row):
        changed = [spec for text, spec in specs().items() if text not in known]
    return [f"{spec.name}: {failure}" for spec in changed for failure in compile_spec(spec, arch).failures]


def time_row(tunable: Tunable, slot: Slot, row: Any, work: Work, device: torch.device) -> float:
    """Median microseconds of the work on the device, once its results are right.

    Raises:
        table.WrongResult: they are not.
    """
    total = 0.0
    # Data is drawn while the row stands in its table, because pointer tables depend on it.
    with row_in_place(tunable.rows, slot, row), table.settings(), own_stream(device):
        for case, mode in work:
            table.check(case, "ours", mode, device)
            times, _ = table.time_provider(case, "ours", mode, device)
            total += table.best_of(times).p50
    return total


def fastest(times: Mapping[Any, float], current: Any) -> Any:
    """The row with the least time; the current one unless another saves ``LEAST_GAIN`` of its time."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - LEAST_GAIN) * times[current] else current


def place_of(name: str, slot: Slot) -> str:
    """A row's place in the table of that name, for people: ``gather_add.CONFIGS['sm_90', 2], up to 256``."""
    key = repr(slot.key).strip("()")
    place = f"{name}[{key}]"
    place += f", up to {slot.bound}" if slot.bound is not None else ""
    return place + (f", {slot.part}" if slot.part is not None else "")


def tune(tunable: Tunable, slot: Slot, arch: str, time: Callable[[Any], float]) -> dict[str, Any]:
    """Compile the rows next to the one in a slot, time those that break no rule, and propose one."""
    current = row_at(tunable.rows, slot)
    times, left_out = {current: time(current)}, {}
    for row in candidates(current, tunable.options)[1:]:
        left_out[row] = broken_rules(tunable, slot, row, arch)
        if not left_out[row]:
            try:
                times[row] = time(row)
            except table.WrongResult as problem:
                left_out[row] = [str(problem)]
    return {
        "place": place_of(tunable.table, slot),
        "row": repr(current),
        "proposed": repr(fastest(times, current)),
        "times_us": {repr(row): round(time, 3) for row, time in times.items()},
        "left_out": {repr(row): reasons for row, reasons in left_out.items() if reasons},
    }


def line(proposal: Mapping[str, Any]) -> str:
    """A proposal as Python, with what it saves."""
    place, row, proposed, times = (proposal[name] for name in ("place", "row", "proposed", "times_us"))
    if proposed == row:
        return f"{place}: {row} stays, {times[row]:.1f} us"
    return f"{place}: {proposed}  # {times[proposed]:.1f} us, {row} took {times[row]:.1f}"


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
    report = results("tune", "cuda", proposals=[])
    for name in options.kernels:
        tunable = TUNABLES[name]
        for slot in tunable.slots(arch):
            if options.match not in place_of(tunable.table, slot):
                continue
            work = tunable.workload(scale, slot)
            time = partial(time_row, tunable, slot, work=work, device=scale.device)
            report["proposals"].append(tune(tunable, slot, arch, time))
            print(line(report["proposals"][-1]), flush=True)
            save(options.json, report)


if __name__ == "__main__":
    main()
