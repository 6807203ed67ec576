"""Architectures, launch configurations, and a record of the compilations that a launcher causes.

No launcher tunes itself while it runs: that would change bits between runs and break the capture of CUDA graphs. Each
kernel file holds a fixed table ``CONFIGS`` instead, and a function ``compile_specs(arch)`` that lists the exact
compilations its launchers ask Triton for, so that ``compile.py`` can make and judge them where no GPU is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Architectures that the tables hold rows for."""

Row = TypeVar("Row")


def architecture() -> str:
    """The architecture whose rows the current device uses; "sm_90" under Triton's interpreter.

    Consumer chips (8.6, 8.9, 12.x) have less shared memory than the data-centre ones of the same generation; they take
    the rows of sm_80.
    """
    if triton.knobs.runtime.interpret:
        return "sm_90"
    capability = driver.active.get_current_target().arch
    return {9: "sm_90", 10: "sm_100"}.get(capability // 10, "sm_80")


def configuration(table: Mapping[tuple[str, int], Sequence[tuple[int, Row]]], itemsize: int, size: int) -> Row:
    """The row for a size: of the entries under (architecture, bytes per element), the first whose bound holds it.

    Args:
        table: (architecture, itemsize) -> ((largest size, row), ...) in ascending order.
    """
    for bound, row in table[architecture(), itemsize]:
        if size <= bound:
            return row
    raise ValueError(f"size {size} is beyond the largest supported, {bound}")


@dataclass(frozen=True)
class CompileSpec:
    """One compilation of one kernel, as a launcher causes it.

    Attributes:
        name: of the kernel and the case, for people.
        kernel: the ``triton.jit`` function.
        signature: argument name -> Triton type ("*bf16", "i32", "constexpr", ...), every argument in order.
        constexprs: argument name -> value, for those of type "constexpr".
        num_warps, num_stages, maxnreg: Triton's options.
        aligned: arguments known to be divisible by 16 (addresses: in bytes).
        product: it must use the matrix unit.
        memory_bound: it must not spill anywhere.
        load_bits: width that its main loads must have; below 128 only where the addresses allow no more.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    aligned: Sequence[str] = field(default=())
    product: bool = False
    memory_bound: bool = False
    load_bits: int = 128


class _RecordingDriver:
    """Stands for a GPU of the given architecture; enough for ``kernel[grid](...)`` to get as far as compiling."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.arch  # JITFunction keeps its caches per device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _recording(arch: str, launches: list[dict[str, Any]]) -> Iterator[None]:
    """Launches inside are noted, not compiled and not run."""

    def note(**launch: Any) -> bool:
        launches.append(launch)
        return True  # "I took care of compiling": Triton then returns without a launch

    previous_driver, previous_hook = driver._active, triton.knobs.runtime.jit_cache_hook
    driver.set_active(_RecordingDriver(arch))
    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        driver._active = previous_driver
        triton.knobs.runtime.jit_cache_hook = previous_hook


def record_specs(
    arch: str, case: str, launch: Callable[..., Any], *arguments: Any, **properties: Any
) -> list[CompileSpec]:
    """The compilations that ``launch(*arguments)`` causes on an architecture, in the order of its launches.

    Triton itself specialises the arguments (types, divisibility by 16, integers equal to 1), so the result is what a
    GPU would be given. Give tensors of device "meta": they count as aligned, as torch's allocations are.

    Args:
        case: said beside the kernel's name in ``CompileSpec.name``.
        properties: ``product``, ``memory_bound`` and ``load_bits`` of every spec.

    Raises:
        RuntimeError: Triton runs in interpreter mode, in which nothing is compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled. Unset it")
    launches: list[dict[str, Any]] = []
    with _recording(arch, launches), torch.no_grad():
        launch(*arguments)
    return [_spec(launch, case, properties) for launch in launches]


def _spec(launch: dict[str, Any], case: str, properties: dict[str, Any]) -> CompileSpec:
    compiled = launch["compile"]
    kernel = launch["fn"].jit_function
    names = kernel.arg_names
    (attributes,) = compiled["configs"]
    options = json.loads(compiled["specialization_data"])["options"]
    return CompileSpec(
        name=f"{kernel.__name__.strip('_')} {case}",
        kernel=kernel,
        signature=compiled["signature"],
        constexprs={names[path[0]]: value for path, value in compiled["constants"].items()},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        maxnreg=options["maxnreg"],
        aligned=tuple(names[path[0]] for path, value in attributes.items() if ["tt.divisibility", 16] in value),
        **properties,
    )
