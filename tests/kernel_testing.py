"""How kernels are tested without a GPU: Triton's interpreter against fp64 references, with derived tolerances.

The interpreter's bf16 is wrong (dot, sum and rounding), so kernels are interpreted in fp64, fp32 and fp16 only; the
tests marked `gpu` add bf16.
"""

import mmap
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from ijepa_fast import ops

definitions = SimpleNamespace(**{name: op.definition for name, op in vars(ops).items() if hasattr(op, "definition")})
"""The plain definition of every op, for tests that run one call on ops and on definitions."""

INTERPRETED_DTYPES = (torch.float64, torch.float32, torch.float16)

interpreted = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
"""For hypothesis: a kernel takes the interpreter milliseconds per program."""


def cast(arguments, dtype: torch.dtype) -> list:
    """The arguments with every floating tensor (and dtype) among them turned into ``dtype``."""

    def turn(value):
        if isinstance(value, torch.dtype):
            return dtype
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return [turn(value) for value in arguments]


def largest(x: Tensor | None) -> float:
    return float(x.double().abs().max()) if x is not None and x.numel() else 0.0


def assert_close_to_reference(
    launch, reference, arguments, dtype: torch.dtype, *, exact_reference=None, magnitudes: Sequence[float] = ()
) -> None:
    """A kernel is at most twice as far from the fp64 reference as the reference is in the kernel's own dtype.

    Few numbers round favourably by chance, in torch or in the kernel. So what torch's error is taken for is at least
    half a unit in the last place of the largest result, or of ``magnitudes``. Of fp64 kernels the error is that of
    fp32, scaled by the ratio of the two machine epsilons. NaN is never close, so that memory nobody wrote shows
    (conftest.py poisons it).

    Args:
        exact_reference: replaces the reference in fp64.
        magnitudes: per result a bound of the sum of the values that are rounded on the way, for sums and differences
            whose result may be smaller than their terms.
    """
    exact_reference = exact_reference or reference
    inputs = cast(arguments, dtype)
    single = cast(inputs, torch.float32) if dtype == torch.float64 else inputs
    actual, exact = _outputs(launch(*inputs)), _outputs(exact_reference(*cast(inputs, torch.float64)))
    same, exact_of_same = _outputs(reference(*single)), _outputs(exact_reference(*cast(single, torch.float64)))
    magnitudes = magnitudes or [0.0] * len(exact)
    for i, (got, want, torch_got, torch_want, magnitude) in enumerate(
        zip(actual, exact, same, exact_of_same, magnitudes, strict=True)
    ):
        assert got.shape == want.shape
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch_got.dtype)
        eps = torch.finfo(torch_got.dtype).eps
        # Intermediate values are held in fp32 at least.
        rounding = max(eps / 2 * largest(torch_want), torch.finfo(torch.float32).eps / 2 * magnitude)
        allowed = 2 * max(largest(torch_got.double() - torch_want), rounding) * torch.finfo(got.dtype).eps / eps
        error = float("nan") if got.isnan().any() else largest(got.double() - want)
        assert error <= allowed, f"result {i} is {error:.3g} from the fp64 reference, {allowed:.3g} allowed"


def _outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


class LastProgram:
    """Stands for a kernel and runs only the last program of its grid."""

    def __init__(self, kernel, monkeypatch: pytest.MonkeyPatch):
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def __getitem__(self, grid):
        from triton.runtime import interpreter

        (programs,) = grid
        builder = interpreter.interpreter_builder
        program_id = type(builder).create_get_program_id

        def shifted(axis):
            handle = program_id(builder, axis)
            handle.data = handle.data + (programs - 1)
            return handle

        def launch(*args, **kwargs):
            with self.monkeypatch.context() as patch:
                patch.setattr(builder, "create_get_program_id", shifted)
                # CPU tensors are changed in place; copying them back would touch every page of a huge one.
                patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
                self.kernel[(1,)](*args, **kwargs)

        return launch


def huge(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros [rows, width] that take address space but no memory until they are written.

    As much address space lies before it, so that an offset that wrapped to a negative number reads zeros there and the
    test fails, rather than the process.
    """
    size = rows * width * dtype.itemsize
    no_reserve = 0x4000  # MAP_NORESERVE on Linux; named in mmap since Python 3.13 only
    pages = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=dtype, count=rows * width, offset=size).view(rows, width)


def rows_beyond_int32(width: int) -> int:
    """Rows of a matrix of that width whose last elements lie beyond 2 ** 31."""
    return 2**31 // width + 2


def allocate_huge_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 2^24 elements or more that launchers allocate take no memory until they are written."""
    new_empty = Tensor.new_empty

    def new(self, *size, **options):
        shape = torch.Size(size[0] if isinstance(size[0], Sequence) else size)
        if shape.numel() < 2**24:
            return new_empty(self, shape, **options)
        return huge(shape[0], shape[1:].numel(), options.get("dtype", self.dtype)).view(shape)

    monkeypatch.setattr(Tensor, "new_empty", new)
