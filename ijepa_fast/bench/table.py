"""Check every provider of every op, time it, and put it beside its peers and the floors of the same run."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.bench.cases.attention import attention_cases
from ijepa_fast.bench.cases.optimizer import optimizer_cases
from ijepa_fast.bench.cases.products import linear_cases
from ijepa_fast.bench.cases.rows import Batch, Case, Provider, row_cases
from ijepa_fast.bench.measure import (
    Times,
    cold_sets,
    copy_times,
    cpu_times,
    event_times,
    graph_times,
    matmul_rate,
    own_stream,
)
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig

GROUPS = {"rows": row_cases, "linear": linear_cases, "attention": attention_cases, "optimizer": optimizer_cases}
"""Cases by what they work on."""
BATCH = {"cuda": 128, "cpu": 2}
SUM_ERROR = 32
"""Machine epsilons of fp32 by which a sum of some thousand terms may be off, summed in any order."""
PEER_ERROR = 8
"""Units (see ``error``) that plain torch and other libraries may be off by: they round after every operation."""
PLAIN = ("eager", "sdpa", "fused", "foreach")
"""Providers that are plain torch."""


class WrongResult(AssertionError):
    """A provider does not compute what the reference computes. It is not timed."""


def cases(batch: Batch, groups: Sequence[str] = tuple(GROUPS)) -> list[Case]:
    return [case for group in groups for case in GROUPS[group](batch)]


def prepare(case: Case, provider: Provider, mode: str, seed: int, device: torch.device) -> Callable[[], Any]:
    """A call without arguments, on data drawn from ``seed``, that does what ``mode`` says and returns its results.

    "forward" returns what the provider returns, "backward" and "both" the gradients of the case's leaves.
    """
    generator = torch.Generator(device).manual_seed(seed)
    drawn = case.draw(generator)
    arguments = [*(leaf.requires_grad_() for leaf in drawn[: case.leaves]), *drawn[case.leaves :]]
    if provider.prepare is not None:
        arguments = provider.prepare(*arguments)
    leaves = arguments[: case.leaves]

    def forward():
        with torch.no_grad():
            return provider.function(*arguments)

    if mode == "forward":
        return forward
    results = flat(provider.function(*arguments))
    # Drawn after the inputs and rounded to what every dtype can hold, so equal for all providers and the reference.
    grads = [torch.randn(r.shape, generator=generator, device=device).bfloat16().to(r.dtype) for r in results]
    if mode == "backward":
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(flat(provider.function(*arguments)), leaves, grads)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def exact_results(case: Case, mode: str, seed: int, device: torch.device) -> list[Tensor]:
    """Results of the definition in a wider dtype (fp64 on the CPU, else fp32), for the data of ``seed`` as drawn."""
    if case.in_place:
        return flat(prepare(case, Provider(case.reference), mode, seed, device)())
    wide = torch.float64 if device.type == "cpu" else torch.float32

    def widened(*arguments):
        return [x.detach().to(wide).requires_grad_(x.requires_grad) if _floating(x) else x for x in arguments]

    return flat(prepare(case, Provider(case.reference, widened), mode, seed, device)())


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def error(results: Sequence[Tensor], exact: Sequence[Tensor], independent: bool = False) -> float:
    """Largest relative L2 distance over the results, in units of what rounding explains; NaN if anything is.

    The unit is one machine epsilon of 8- and 16-bit results, and ``SUM_ERROR`` of wider ones. Wide results that come
    beside 16-bit ones (gradients of biases) were summed from values rounded to 16 bits, so they share their unit,
    unless all results are ``independent``.
    """
    largest = 0.0
    coarsest = max((unit(result.dtype) for result in results if result.dtype.itemsize == 2), default=0.0)
    for result, wanted in zip(results, exact, strict=True):
        if result.shape != wanted.shape:
            raise WrongResult(f"a result has shape {list(result.shape)} instead of {list(wanted.shape)}")
        scale = torch.linalg.vector_norm(wanted, dtype=torch.float64)
        distance = torch.linalg.vector_norm(result.to(wanted.dtype) - wanted, dtype=torch.float64)
        relative = float(distance / scale.clamp(min=torch.finfo(torch.float32).tiny))
        if relative != relative:
            return relative
        own = unit(result.dtype)
        largest = max(largest, relative / (own if independent else max(own, coarsest)))
    return largest


def unit(dtype: torch.dtype) -> float:
    if dtype.itemsize <= 2:
        return torch.finfo(dtype).eps
    return SUM_ERROR * torch.finfo(torch.float32).eps


def check(case: Case, name: str, mode: str, device: torch.device, seed: int = 1) -> tuple[float, float]:
    """(error, allowed error) of a provider in units of ``error``, on data that is not timed.

    "ours" may be off by two units, or by twice what plain torch is off by in the same dtype where that is more.

    Raises:
        WrongResult: it is off by more.
    """
    exact = exact_results(case, mode, seed, device)

    def error_of(provider: str) -> float:
        results = flat(prepare(case, case.providers[provider], mode, seed, device)())
        return error(results, exact, independent=case.in_place)

    allowed = float(PEER_ERROR)
    if name == "ours":
        allowed = 2.0
        with contextlib.suppress(Exception):  # where plain torch cannot run, ours must do without its example
            plain = error_of(next(plain for plain in PLAIN if plain in case.providers))
            allowed = 2.0 * min(max(1.0, plain), PEER_ERROR)
    off = error_of(name)
    if not off <= allowed:  # NaN is not
        raise WrongResult(f"{case.key}, {mode}: {name} is off by {off:.3g} units, {allowed:.3g} are allowed")
    return off, allowed


def time_provider(case: Case, name: str, mode: str, device: torch.device) -> tuple[dict[str, Times], str | None]:
    """Times by method, and why a CUDA graph could not be captured. A GPU gives "events" and, if it could, "graph"."""
    provider = case.providers[name]
    if device.type == "cpu":
        return {"cpu": cpu_times(prepare(case, provider, mode, 2, device))}, None
    sets = cold_sets(case.costs[mode].bytes)
    calls = [prepare(case, provider, mode, 2 + number, device) for number in range(sets)]
    times = {"events": event_times(calls[0])}
    try:
        return times | {"graph": graph_times(calls)}, None
    except Exception as problem:
        return times, in_words(problem)


class Floors:
    """Rates of this machine in this run: a plain copy of a given size, and a large matrix product."""

    def __init__(self, device: torch.device):
        self.device = device
        self.matmul = matmul_rate(device)
        self._copies: dict[int, float] = {}

    def of(self, case: Case, mode: str) -> tuple[float, str]:
        """Microseconds, and which of "copy" and "matmul" is the larger."""
        cost = case.costs[mode]
        size = int(cost.bytes)
        if size not in self._copies:
            self._copies[size] = copy_times(size, self.device).p50
        matmul = cost.flops / self.matmul * 1e6
        return max((self._copies[size], "copy"), (matmul, "matmul"))


def row(model: str, case: Case, name: str, mode: str, floors: Floors | None, device: torch.device) -> dict[str, Any]:
    """One provider of one case: checked, timed, with its rates; only checked without floors. What went wrong stands
    under "failed" in place of times.

    Nothing that a provider raises ends the run: the others' results are worth having.
    """
    entry: dict[str, Any] = {
        "model": model,
        "op": case.op,
        "case": case.name,
        "mode": mode,
        "provider": name,
        "bytes": int(case.costs[mode].bytes),
        "flops": int(case.costs[mode].flops),
    }
    if reason := case.providers[name].unavailable:
        return entry | {"unavailable": reason}
    try:
        entry["error"], entry["allowed_error"] = (round(x, 4) for x in check(case, name, mode, device))
        if floors is None:
            return entry
        times, uncaptured = time_provider(case, name, mode, device)
        floor, kind = floors.of(case, mode)
    except Exception as problem:
        return entry | {"failed": in_words(problem)}
    if uncaptured:
        entry["not_captured"] = uncaptured
    best = best_of(times)
    entry["times"] = {method: value.as_dict() for method, value in times.items()}
    entry["gb_per_s"] = round(entry["bytes"] / best.p50 / 1e3, 2)
    if entry["flops"]:
        entry["tflop_per_s"] = round(entry["flops"] / best.p50 / 1e6, 3)
    return entry | {"floor_us": round(floor, 3), "floor": kind, "of_floor": round(floor / best.p50, 4)}


def in_words(problem: Exception) -> str:
    """Type and first line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def rows(
    models: Mapping[str, ModelConfig],
    device: torch.device,
    *,
    images: int | None = None,
    masks: MaskConfig | None = None,
    groups: Sequence[str] = tuple(GROUPS),
    wanted: Callable[[Case], bool] = lambda case: True,
    modes: Sequence[str] = ("forward", "backward", "both"),
    providers: Callable[[str], bool] = lambda name: True,
    timed: bool = True,
    seconds: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """Rows of the table, as they are measured.

    Args:
        models: by the name that stands in the rows.
        images: per batch; ``BATCH`` by default.
        masks: ``MaskConfig()`` by default.
        groups: names in ``GROUPS``; of their cases the ``wanted`` ones.
        providers: which of them, by name.
        timed: whether to time what was checked.
        seconds: nothing is begun after so long; what is left out comes as rows with "left_out".
    """
    until = time.monotonic() + seconds
    with settings(), own_stream(device):
        floors = Floors(device) if timed else None
        for model, config in models.items():
            batch = Batch.draw(config, images or BATCH[device.type], device, masks)
            for case in filter(wanted, cases(batch, groups)):
                for mode in (mode for mode in modes if mode in case.costs):
                    for name in filter(providers, case.providers):
                        if time.monotonic() < until:
                            yield row(model, case, name, mode, floors, device)
                        else:
                            place = {"model": model, "op": case.op, "case": case.name, "mode": mode, "provider": name}
                            yield place | {"left_out": f"no time after {seconds:.0f} s"}
                        _tidy(device, name)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """A compiled function whose backward pass runs more than once must not give its buffers away."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def _tidy(device: torch.device, provider: str) -> None:
    if provider == "compile":
        torch.compiler.reset()  # torch.compile gives up on a piece of code that was specialised too often
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


METHODS = ("graph", "cpu", "events")
"""Device time is the best. Events include what the host takes to launch."""

MOST_SPREAD, MOST_SHARE = 2.0, 1.5
"""Limits of steady times: the 80th percentile over the 20th, and the floor's time over the measured one."""


def best_of(times: Mapping[str, Any]) -> Any:
    """The times by the best method there is."""
    return next(times[method] for method in METHODS if method in times)


def with_ratios(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of "ours" get "faster_than": peer -> its median time over ours, by the best method that both have."""

    def place(row):
        return row["model"], row["op"], row["case"], row["mode"]

    def ratio(theirs, ours):
        method = next(method for method in METHODS if method in theirs and method in ours)
        return round(theirs[method]["p50"] / ours[method]["p50"], 3)

    timed: dict[tuple, dict[str, Any]] = {}
    for row in table:
        if "times" in row:
            timed.setdefault(place(row), {})[row["provider"]] = row["times"]
    extended = []
    for row in table:
        if row["provider"] == "ours" and "times" in row:
            peers = {name: times for name, times in timed[place(row)].items() if name != "ours"}
            row = row | {"faster_than": {name: ratio(times, row["times"]) for name, times in peers.items()}}
        extended.append(row)
    return extended


def header() -> str:
    """Head of the table for a person; "floor" is the floor's time over the measured one."""
    head = f"{'op':<18}{'case':<23}{'pass':<10}{'provider':<13}{'us':>11}{'GB/s':>9}{'TFLOP/s':>9}{'floor':>8}"
    return f"{head}\n{'-' * len(head)}"


def line(row: Mapping[str, Any]) -> str:
    """A row that was measured, checked, or failed."""
    start = f"{row['op']:<18}{row['case']:<23}{row['mode']:<10}{row['provider']:<13}"
    if "failed" in row:
        return f"{start}  failed: {row['failed']}"
    if "times" not in row:
        return f"{start}  right, off by {row['error']:g} of {row['allowed_error']:g} units"
    flops = f"{row['tflop_per_s']:>9.1f}" if "tflop_per_s" in row else " " * 9
    return f"{start}{best_of(row['times'])['p50']:>11.1f}{row['gb_per_s']:>9.1f}{flops}{row['of_floor']:>8.0%}"


def remarks(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on what was not measured, with the reasons, and on how many times look disturbed."""
    reasons: dict[str, list[str]] = {}
    for row in table:
        if "unavailable" in row:
            reasons.setdefault(f"no {row['provider']}: {row['unavailable']}", []).append(row["case"])
        elif "left_out" in row:
            reasons.setdefault(f"left out: {row['left_out']}", []).append(row["op"])
    said = [f"{reason} ({', '.join(dict.fromkeys(what))})" for reason, what in reasons.items()]
    timed = [row for row in table if "times" in row]
    if disturbed := sum(map(looks_disturbed, timed)):
        said.append(
            f"{disturbed} of {len(timed)} times vary more than twofold, or are far below what can be: something else "
            "runs on this machine, measure again without it"
        )
    return said


def looks_disturbed(row: Mapping[str, Any]) -> bool:
    """Whether a row's times vary more than ``MOST_SPREAD`` from the 20th to the 80th percentile, or beat their floor by
    as much as only a floor that was measured at another speed explains."""
    times = best_of(row["times"])
    return times["p80"] > MOST_SPREAD * times["p20"] or row["of_floor"] > MOST_SHARE
