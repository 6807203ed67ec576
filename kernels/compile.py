"""``python -m ijepa_fast.kernels.compile``: every kernel ahead of time, without a GPU, and what became of it.

Each kernel is compiled in exactly the configurations its launcher uses (``compile_specs`` of its file) and
disassembled. The command fails (exit 1) where the machine code cannot be fast or cannot run: see ``judge``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ijepa_fast.kernels.sass import TMA_BITS, Disassembly, disassemble
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that one program may have (CUDA C++ programming guide, "Compute Capabilities")."""

TENSOR_MEMORY_COLUMNS = 512
SPILLS_FORBIDDEN = ("sm_90", "sm_100")

_LOAD = re.compile(r"(?:tt\.load|ttg\.async_copy_global_to_local)\b.*?tensor<((?:\d+x)+)!tt\.ptr<(\w+)")
_PENDING_PRODUCT = re.compile(r"warp_group_dot_wait\b.*\{pendings = [1-9]")
_BUFFERS = re.compile(r"ttg\.local_alloc\s*: \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
ELEMENT_BYTES = {"f8E4M3FN": 1, "f8E5M2": 1, "i8": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


@dataclass(frozen=True)
class Report:
    """One compiled kernel; ``failures`` says in words what is wrong with it."""

    name: str
    arch: str
    configuration: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    matrix_loop_spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)
    main_load_bits: int | None = None
    failures: list[str] = field(default_factory=list)


def loaded_bytes(ttgir: str) -> int:
    """Bytes of data that one program loads, each load of the code counted once. Indices (i32, i64) are no data."""
    total = 0
    for shape, element in _LOAD.findall(ttgir):
        total += ELEMENT_BYTES.get(element, 0) * prod(int(size) for size in shape.split("x") if size)
    return total


def overwritten_buffers(ttgir: str, num_stages: int) -> int:
    """Number of pipelined buffers that are filled while a product may still read them.

    Where a loop goes on with a product of Hopper under way (a wait that leaves some pending), the buffer that is filled
    next must be none that it reads: there must be as many as stages. Triton gives one less to a load that also feeds
    something else (triton-lang/triton#6691).
    """
    if not _PENDING_PRODUCT.search(ttgir):
        return 0
    return sum(int(buffers) < num_stages for buffers in _BUFFERS.findall(ttgir))


def judge(
    spec: CompileSpec,
    arch: str,
    shared: int,
    tensor_memory: int,
    traps: int,
    main_load_bits: int | None,
    code: Disassembly,
    overwritten: int = 0,
) -> list[str]:
    """Faults of a compiled kernel, in words.

    Args:
        shared: bytes of shared memory; the compiler itself does not object when they are too many.
        tensor_memory: columns of tensor memory (sm_100).
        traps: trap instructions in the PTX; a compiler that is at its wits' end leaves one. (The machine code of sm_100
            has traps of its own, behind failed allocations of tensor memory.)
        main_load_bits: width of most loads of data; None if there are none.
        overwritten: buffers, see ``overwritten_buffers``.
    """
    failures = []
    if overwritten:
        failures.append(f"{overwritten} buffers are filled while a product may still read them")
    if arch in SPILLS_FORBIDDEN and code.matrix_loop_spills:
        failures.append(f"{code.matrix_loop_spills} spill instructions in a loop with matrix instructions")
    if arch in SPILLS_FORBIDDEN and spec.memory_bound and code.spills:
        failures.append(f"{code.spills} spill instructions in a memory-bound kernel")
    if shared > SHARED_LIMIT[arch]:
        failures.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[arch]} allowed")
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        failures.append(f"{tensor_memory} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} allowed")
    if traps or not code.writes:
        failures.append("a trap stands in place of the kernel, or it writes nothing")
    if spec.product and not code.matrix:
        failures.append("no matrix instructions in a kernel of products")
    if main_load_bits is not None and main_load_bits < spec.load_bits:
        failures.append(f"main loads of {main_load_bits} bits, {spec.load_bits} wanted")
    return failures


def compile_spec(spec: CompileSpec, arch: str) -> Report:
    attributes = {(spec.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned}
    source = ASTSource(spec.kernel, dict(spec.signature), dict(spec.constexprs), attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.maxnreg is not None:
        options["maxnreg"] = spec.maxnreg
    constants = {name: value for name, value in spec.constexprs.items() if value is not None}
    configuration = " ".join(f"{name}={value}" for name, value in {**constants, **options}.items())
    report = Report(spec.name, arch, configuration)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)
    except Exception as error:  # each stage of the compiler raises its own
        first_line = next(iter(str(error).splitlines()), "")
        return replace(report, failures=[f"does not compile: {type(error).__name__} {first_line}"])
    code = disassemble(compiled.asm["cubin"])
    shared, tensor_memory = compiled.metadata.shared + code.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    traps = len(re.findall(r"^\s*trap;", compiled.asm["ptx"], re.MULTILINE))
    data = loaded_bytes(compiled.asm["ttgir"])
    overwritten = overwritten_buffers(compiled.asm["ttgir"], spec.num_stages)
    main_load_bits = code.main_load_bits(data, 32 * spec.num_warps) if data else None
    return replace(
        report,
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        matrix_loop_spills=code.matrix_loop_spills,
        shared=shared,
        tensor_memory=tensor_memory,
        matrix=code.matrix,
        loads=code.loads,
        main_load_bits=main_load_bits,
        failures=judge(spec, arch, shared, tensor_memory, traps, main_load_bits, code, overwritten),
    )


def module_names() -> list[str]:
    """Every module of this package but the command itself."""
    package = importlib.import_module(__package__)
    return [info.name for info in pkgutil.iter_modules(package.__path__) if info.name != "compile"]


def load(names: Sequence[str]) -> list[ModuleType]:
    return [importlib.import_module(f"{__package__}.{name}") for name in names]


def unlisted_kernels(names: Sequence[str], specs: Sequence[CompileSpec]) -> list[str]:
    """Kernels (``..._kernel`` functions) of the named modules that no specification compiles."""
    listed = {spec.kernel for spec in specs}
    return sorted(
        f"{module.__name__}.{name}"
        for module in load(names)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
        and name.endswith("_kernel")
        and value.fn.__module__ == module.__name__
        and value not in listed
    )


@cache
def specs_of(names: tuple[str, ...], arch: str) -> tuple[CompileSpec, ...]:
    """The specifications of the named modules; those that different launches have in common once."""
    distinct: dict[tuple, CompileSpec] = {}
    for module in load(names):
        for spec in getattr(module, "compile_specs", lambda _: ())(arch):
            options = (spec.num_warps, spec.num_stages, spec.maxnreg)
            key = (spec.kernel, repr(spec.signature), repr(spec.constexprs), tuple(spec.aligned), options)
            distinct.setdefault(key, spec)
    return tuple(distinct.values())


def _compile_one(names: tuple[str, ...], arch: str, position: int) -> Report:
    """For worker processes: a Triton function cannot be sent to them, its position can."""
    return compile_spec(specs_of(names, arch)[position], arch)


def table(reports: Sequence[Report]) -> str:
    header = ("kernel", "arch", "configuration", "regs", "stack", "spills", "shared", "matrix", "loads", "")
    rows = [
        (
            report.name,
            report.arch,
            report.configuration,
            str(report.registers),
            str(report.stack),
            f"{report.spills} ({report.matrix_loop_spills} in loops)" if report.spills else "0",
            str(report.shared),
            " ".join(f"{count} {name}" for name, count in report.matrix.items()) or "-",
            " ".join(f"{count}x{'TMA' if bits == TMA_BITS else bits}" for bits, count in report.loads.items()) or "-",
            "; ".join(report.failures) and "FAILS: " + "; ".join(report.failures),
        )
        for report in reports
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ijepa_fast.kernels.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--modules", nargs="+", default=module_names(), choices=module_names(), metavar="NAME")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--jobs", type=int, default=None, help="processes; by default one per core")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled. Unset it")
    names = tuple(options.modules)
    work = [(names, arch, position) for arch in options.arch for position in range(len(specs_of(names, arch)))]
    if not work:
        parser.error(f"no kernels in {', '.join(names)}")
    with ProcessPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(_compile_one, *zip(*work, strict=True)))
    print(table(reports))
    # Of all architectures: a kernel may be for some of them alone.
    unlisted = unlisted_kernels(names, [spec for arch in ARCHITECTURES for spec in specs_of(names, arch)])
    for name in unlisted:
        print(f"{name} stands in no compile_specs", file=sys.stderr)
    failed = sum(bool(report.failures) for report in reports)
    print(f"\n{len(reports)} kernels compiled by Triton {triton.__version__}, {failed} with failures")
    if options.json:
        found = {"triton": triton.__version__, "kernels": [asdict(report) for report in reports]}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or unlisted else 0


if __name__ == "__main__":
    sys.exit(main())
