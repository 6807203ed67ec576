"""Launches over lists of tensors of any sizes and dtypes: one program per piece of one tensor.

A program finds its tensor through two tables on the device, built once and passed to the op beside the tensors:

tensor_table   int64 [P, C + 3]: per tensor the addresses of its C columns (parameter, gradient, ...; 0 where it has
               none), its number of elements, its kind, and its parameter group.
program_table  int32 [programs, 2]: the tensor, and which of its pieces of ``block`` elements the program works on.

Each table tensor carries in its attribute ``built_for`` what it was built for.

A kind is the tuple of the columns' dtypes. Kernels are compiled for the kinds that occur and hold one body for each;
in the table a kind is ``2 * number + aligned``, where aligned says that all addresses are divisible by 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ALIGNMENT = 16
"""Bytes of the widest load. Pieces whose length is a multiple of as many elements need no narrow loads either."""


class Launch(NamedTuple):
    """Elements and warps of one program; it takes ``narrow`` elements at a time where addresses are unaligned."""

    block: int
    num_warps: int
    narrow: int


class Columns(NamedTuple):
    """The lists of tensors of an op.

    Attributes:
        tensors: C lists; the first holds P tensors.
        places: C lists of P indices into them, -1 for none; or None, where the list has P tensors itself.
        groups: P parameter groups, or None.
    """

    tensors: Sequence[Sequence[Tensor]]
    places: Sequence[Sequence[int] | None]
    groups: Sequence[int] | None = None

    @property
    def device(self) -> torch.device:
        return self.tensors[0][0].device

    def flat(self) -> list[Tensor]:
        return [tensor for tensors in self.tensors for tensor in tensors]

    def sizes(self) -> list[int]:
        return list(map(Tensor.numel, self.tensors[0]))

    def key(self) -> tuple:
        """Columns with equal keys differ in addresses only. Taken at every launch, so it is a few calls per tensor."""
        flat = self.flat()
        contiguous = list(map(Tensor.is_contiguous, flat))
        return (
            list(map(Tensor.numel, flat)),
            [tensor.dtype for tensor in flat],
            contiguous,
            [tensor.stride() for tensor, plain in zip(flat, contiguous, strict=True) if not plain],
            [None if places is None else list(places) for places in self.places],
            None if self.groups is None else list(self.groups),
        )


class Layout:
    """The part of the tables that does not depend on addresses, on the host.

    Attributes:
        kinds: tuples of names of dtypes (None for no tensor), in the order of their numbers.

    Raises:
        ValueError: a dtype that the kernels do not know, or columns that do not lie in memory alike.
    """

    def __init__(self, op: str, columns: Columns, key: tuple):
        self.key = key
        count = len(columns.tensors[0])
        for column, (tensors, places) in enumerate(zip(columns.tensors, columns.places, strict=True)):
            if len(tensors if places is None else places) != count:
                raise ValueError(f"{op}: list 0 holds {count} tensors, list {column} is not as long")
        kinds: dict[tuple[str | None, ...], int] = {}
        starts = [0, *accumulate(len(tensors) for tensors in columns.tensors)]
        absent = starts[-1]
        sources, rest = [], []
        for i, first in enumerate(columns.tensors[0]):
            source, kind = [], []
            for column, (tensors, places) in enumerate(zip(columns.tensors, columns.places, strict=True)):
                place = i if places is None else places[i]
                tensor = tensors[place] if place >= 0 else None
                if tensor is not None:
                    _check(op, column, i, tensor, first)
                source.append(starts[column] + place if place >= 0 else absent)
                kind.append(None if tensor is None else NAMES[tensor.dtype])
            sources.append(source)
            number = kinds.setdefault(tuple(kind), len(kinds))
            rest.append([first.numel(), 2 * number, 0 if columns.groups is None else columns.groups[i]])
        self.kinds = tuple(kinds)
        self._sources, self._rest = torch.tensor(sources), torch.tensor(rest)

    def table(self, addresses: list[int], device: torch.device) -> Tensor:
        """Tensor table for these addresses (of all columns, one after the other)."""
        columns = torch.tensor([*addresses, 0])[self._sources]
        aligned = (columns % ALIGNMENT == 0).all(1)
        rest = self._rest.clone()
        rest[:, 1] += aligned
        table = _to(torch.cat([columns, rest], dim=1), device)
        table.built_for = (self, addresses)
        return table


def build_tables(op: str, columns: Columns, block: int) -> tuple[Tensor, Tensor]:
    """Both tables on the device of the tensors, without waiting for it.

    Raises:
        ValueError: see ``Layout``.
    """
    tensors = Layout(op, columns, columns.key()).table(list(map(Tensor.data_ptr, columns.flat())), columns.device)
    return tensors, _program_table(columns, block)


def fit(
    op: str, tensor_table: Tensor | None, program_table: Tensor | None, columns: Columns, block: int
) -> tuple[Tensor, Tensor, tuple]:
    """Both tables and the kinds for these tensors: the given tables where they fit, else new ones for this launch.

    The tables are compared with the tensors at every launch: autograd puts gradients where it likes, and torch.compile
    may pass copies of what the tables were built for.

    Raises:
        RuntimeError: they do not fit while a CUDA graph is captured, which would keep the addresses of this moment.
        ValueError: see ``Layout``.
    """
    key, addresses = columns.key(), list(map(Tensor.data_ptr, columns.flat()))
    layout, known_addresses = getattr(tensor_table, "built_for", (None, None))
    if layout is None or layout.key != key:
        layout, known_addresses = Layout(op, columns, key), None
    if addresses != known_addresses:
        if columns.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{op}: tensors lie elsewhere than when its tables were built, and a CUDA graph is being captured. Run "
                "a step before the capture and keep gradients in place (FusedAdamW(..., flat_gradients=True))"
            )
        tensor_table = layout.table(addresses, columns.device)
    if getattr(program_table, "built_for", None) != (block, columns.sizes()):
        program_table = _program_table(columns, block)
    return tensor_table, program_table, layout.kinds


def _check(op: str, column: int, i: int, tensor: Tensor, first: Tensor) -> None:
    if tensor.dtype not in NAMES:
        known = ", ".join(NAMES.values())
        raise ValueError(f"{op}: tensor {i} of list {column} is {tensor.dtype}; supported are {known}")
    if tensor.device != first.device:
        raise ValueError(f"{op}: tensor {i} is on {first.device} in list 0 and on {tensor.device} in list {column}")
    if tensor.shape != first.shape or not _lie_alike(tensor, first):
        raise ValueError(
            f"{op}: the elements of tensor {i} must lie in memory without gaps and alike in every list; list 0 has "
            f"{tuple(first.shape)} with strides {first.stride()}, list {column} {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )


def _lie_alike(tensor: Tensor, first: Tensor) -> bool:
    """Whether both fill a piece of memory without gaps, their elements in the same order."""
    if tensor.is_contiguous() and first.is_contiguous():
        return True
    # empty_like keeps the strides of tensors without gaps and of no others.
    return tensor.stride() == first.stride() == torch.empty_like(first, device="meta").stride()


def _program_table(columns: Columns, block: int) -> Tensor:
    sizes = torch.tensor(columns.sizes())
    counts = (sizes + block - 1) // block
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    table = _to(torch.stack([tensor, torch.arange(len(tensor)) - first], dim=1).int(), columns.device)
    table.built_for = (block, columns.sizes())
    return table


def _to(table: Tensor, device: torch.device) -> Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@triton.constexpr_function
def element(kinds, kind, column):
    """Type of a column's elements in one of the kinds; None where that kind has no such column."""
    return None if kinds[kind][column] is None else getattr(tl, kinds[kind][column])


@triton.constexpr_function
def present(kinds, kind, column):
    return kinds[kind][column] is not None


@triton.jit
def places(address, dtype: tl.constexpr, offsets, VECTOR: tl.constexpr, WIDTH: tl.constexpr = 4):
    """Pointers to elements of the tensor at an address, of which Triton knows nothing: it was loaded.

    Args:
        VECTOR: the address is divisible by 16 bytes.
        WIDTH: then, consecutive elements per thread. Four make 16-byte loads of fp32 and 8-byte loads of bf16, both
            without gaps between threads; with eight, kernels with fp32 among their columns would read it with gaps.
    """
    pointer = address.to(tl.pointer_type(dtype))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    pointers = pointer + offsets
    if VECTOR:
        pointers = tl.max_contiguous(pointers, WIDTH)
    return pointers
