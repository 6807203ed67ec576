"""The optional C++/CUDA library of csrc/: found, loaded, and asked for masks.

`IJEPA_FAST_BUILD_EXT=1 pip install --no-build-isolation .` or `make ext` builds it into `ijepa_fast/`. It draws the
same masks as the vectorised torch sampler, to the bit, only faster, so it is used wherever it is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ijepa_fast.masks.sampling import Plan

PLAN_FORMAT = 2
"""Number of the layout of `plan_numbers`; csrc/mask_plan.h refuses another one."""

_STRATEGIES = ("multiblock", "block", "random", "rasterized")
_CONTEXTS = ("exact", "fixed", "batch_min")
_SIZE_PER = ("block", "image", "step")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def library_path() -> Path | None:
    """The built library, None if there is none."""
    return next(iter(sorted(Path(__file__).parents[1].glob("_block_masks*.so"))), None)


@cache
def reason(device_type: str) -> str | None:
    """Why the extension does not draw masks on devices of this type ("cpu", "cuda", ...), None if it does.

    Loads the library.
    """
    path = library_path()
    if path is None:
        return "the C++/CUDA extension is not built (make ext)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded: {error.__cause__ or error}"
    key = _DISPATCH_KEYS.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("ijepa_fast::block_masks", key):
        return f"{path} has no code for {device_type}"
    return None


def plan_numbers(plan: Plan) -> list[int]:
    """The plan as csrc/mask_plan.h reads it, in its order."""
    return [
        PLAN_FORMAT,
        _STRATEGIES.index(plan.strategy),
        _CONTEXTS.index(plan.context),
        _SIZE_PER.index(plan.size_per),
        int(plan.allow_overlap),
        plan.num_targets,
        plan.num_contexts,
        plan.group_size or 1,
        *plan.grid,
        *plan.extent,
        int(plan.target_rule.shared),
        *plan.target_rule.scale,
        *plan.target_rule.aspect,
        *plan.context_rule.scale,
        *plan.context_rule.aspect,
        plan.needed,
        plan.last_level,
        plan.fixed_count or 0,
        plan.per_image,
    ]


def block_masks(
    plan: list[int],
    seed: int | Tensor,
    step: int | Tensor,
    first_image: int,
    num_images: int,
    device: torch.device,
    rows: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context indices, context cu_seqlens, target indices and target cu_seqlens, int32 on `device`, as in `Ragged`.

    Args:
        plan: from `plan_numbers`.
        seed, step: ints, or one-element int64 tensors on `device`.
        rows: of context and of targets; None, on the CPU only, for as many as there are tokens.

    Raises:
        ValueError: a number is out of range, or the tokens do not fit the rows (on CUDA a device-side assertion).
    """
    seed, step = _scalar("seed", seed, device), _scalar("step", step, device)
    with _argument_errors():
        return torch.ops.ijepa_fast.block_masks(seed, step, first_image, num_images, plan, *(rows or (None, None)))


def block_mask_counts(plan: list[int], seed: int, step: int, first_image: int, num_images: int) -> tuple[int, int]:
    """Context and target tokens of these images, drawn on the host. Raises ValueError as `block_masks` does."""
    host = torch.device("cpu")
    seed, step = _scalar("seed", seed, host), _scalar("step", step, host)
    with _argument_errors():
        return torch.ops.ijepa_fast.block_mask_counts(seed, step, first_image, num_images, plan)


def _scalar(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """One int64 on the device; made by a kernel, not by a copy, so that a CUDA graph can hold it."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device.type != device.type:
            raise ValueError(
                f"{name} must be one int64 on {device}, got {value.dtype} {tuple(value.shape)} on {value.device}"
            )
        return value
    least, end = (-(1 << 63), 1 << 64) if name == "seed" else (0, 1 << 32)
    if not least <= value < end:
        raise ValueError(f"{name} must be in [{least}, {end}), got {value}")
    return torch.full((), value if value < 1 << 63 else value - (1 << 64), dtype=torch.int64, device=device)


@contextmanager
def _argument_errors() -> Iterator[None]:
    """ValueError for what the library says of its arguments: on torch's stable ABI it can raise RuntimeError only."""
    try:
        yield
    except RuntimeError as error:
        _, mark, message = str(error).partition("block_masks: ")
        if not mark:
            raise
        raise ValueError(message) from error
