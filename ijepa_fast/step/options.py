"""Options of the training step: how it is computed. Each is a field of ``StepOptions`` and a branch of ``apply``.

Everything else that must know of an option (whether a resumed run may change it, how benchmarks call it, which values
``ijepa-fast fastest`` tries) reads the field's metadata.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from ijepa_fast.attention.dispatch import BACKENDS, Request, resolve
from ijepa_fast.masks.sampler import MaskConfig, Masks
from ijepa_fast.model.config import ModelConfig
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.ragged import Ragged
from ijepa_fast.side_stream import SideStream
from ijepa_fast.step.memory import needs_checkpointing
from ijepa_fast.step.sharding import shard
from ijepa_fast.step.train_step import PRECISION_DTYPES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

Blocks = Literal["auto", "plain", "compile", "fused", "fused+compile"]


UNKNOWN_IMAGES = 16
"""Images that torch.compile is shown where nobody says how many a step has: some thousand rows."""


class Machine(NamedTuple):
    """What a machine offers to the step of some networks.

    Attributes:
        gpu: whether the step runs on a GPU.
        gpus: number of GPUs of a run.
        attention: backends that run the sets of these networks. The reference is not among them: it is slow.
        auto: the backend that "auto" takes; None where that differs between encoder and predictor.
    """

    gpu: bool
    gpus: int
    attention: tuple[str, ...]
    auto: str | None


def _option(
    default: Any,
    *,
    resumes: bool = True,
    tries: Callable[[Machine], Sequence[Any]] | None = None,
    suffixes: dict[str, Any] | None = None,
    approximate: bool = False,
    no_phases: str | None = None,
) -> Any:
    """A field and what is known of it.

    Args:
        resumes: whether a resumed run may change it, because all values learn the same but for rounding.
        tries: values that ``ijepa-fast fastest`` tries on a machine; None for none.
        suffixes: what benchmarks write behind ``ours+`` -> the value that it stands for.
        approximate: whether results differ by more than rounding of the training precision.
        no_phases: why forward, backward and update cannot be timed one by one.
    """
    return field(
        default=default,
        metadata={
            "resumes": resumes,
            "tries": tries,
            "suffixes": suffixes or {},
            "approximate": approximate,
            "no_phases": no_phases,
        },
    )


@dataclass(frozen=True)
class StepOptions:
    """How a training step is computed. All but blocks are off until they are measured on a GPU (docs/step.md).

    Args:
        blocks: plain, compile (torch.compile, one code for all token counts), fused (the package's kernels: norms that
            add the residual, GELU inside products, split sums for weight gradients), fused+compile, or auto: compile on
            a GPU where a C compiler is there, else plain. Fused blocks on a GPU need bf16 or fp16, and with fp8_targets
            the target encoder keeps plain ones.
        attention: variable-length attention backend, see `ijepa-fast doctor`.
        activation_checkpointing: recompute blocks in the backward pass to save memory: true, selective (all but their
            matrix products, which are kept), false, or auto (true where the GPU would be too small without).
        capture: replay steps as CUDA graphs, one for each bucket of token counts. For one GPU, without accumulation, in
            fp32 or bf16; pays where the host cannot launch kernels fast enough: small models and batches. Takes memory
            for activations twice.
        overlap_target: run the target encoder on a second CUDA stream, beside context encoder and predictor. Its
            temporaries take memory of their own.
        fp8_targets: multiply in FP8 (e4m3, one scale per row) in the target encoder's blocks. In bf16, on GPUs of
            compute capability 8.9 or higher (docs/precision.md). The CPU emulates it, slowly.
        wide_residual: keep the sums between transformer blocks in fp32 where weights are bf16 or fp16.
    """

    blocks: Blocks = _option(
        "auto",
        tries=lambda machine: get_args(Blocks)[1:],
        suffixes={"plain": "plain", "compile": "compile", "fused": "fused"},
    )
    attention: str = _option(
        "auto",
        tries=lambda machine: ("auto", *(name for name in machine.attention if name != machine.auto)),
        suffixes={"triton": "triton"},
    )
    activation_checkpointing: bool | Literal["auto", "selective"] = _option("auto")
    capture: bool = _option(
        False,
        tries=lambda machine: (False, True) if machine.gpu and machine.gpus == 1 else (),
        suffixes={"capture": True},
        no_phases="a replayed graph is one launch",
    )
    overlap_target: bool = _option(
        False,
        tries=lambda machine: (False, True) if machine.gpu else (),
        suffixes={"overlap": True},
        no_phases="two networks run at the same time",
    )
    fp8_targets: bool = _option(False, resumes=False, suffixes={"fp8": True}, approximate=True)
    wide_residual: bool = _option(False, resumes=False, suffixes={"wide": True})

    def __post_init__(self) -> None:
        if self.blocks not in get_args(Blocks):
            raise ValueError(f"step.blocks must be one of {', '.join(get_args(Blocks))}, got {self.blocks!r}")
        if self.attention not in ("auto", *BACKENDS):
            raise ValueError(f"step.attention must be auto or one of {', '.join(BACKENDS)}, got {self.attention!r}")
        if self.fp8_targets not in (True, False):
            raise ValueError(f"step.fp8_targets must be true or false, got {self.fp8_targets!r}")
        if self.activation_checkpointing not in (True, False, "auto", "selective"):
            raise ValueError(
                "step.activation_checkpointing must be true, false, selective or auto, "
                f"got {self.activation_checkpointing!r}"
            )

    @property
    def fused(self) -> bool:
        return "fused" in self.blocks

    @property
    def compiled(self) -> bool:
        return "compile" in self.blocks

    def check(self, *, precision: str, accumulate: int, device: str, ranks: int = 1, sharded: bool = False) -> None:
        """Raise ValueError where an option excludes what else is known of a run.

        Args:
            precision, device: "auto" while they are not known.
            ranks: number of processes.
            sharded: whether they divide the weights among them.
        """
        if sharded:
            # Each of these holds on to weights past the end of a block, where those that were gathered are freed.
            held = {"capture": self.capture, f"blocks {self.blocks}": self.fused, "fp8_targets": self.fp8_targets}
            held |= {"overlap_target": self.overlap_target}
            for name in (name for name, on in held.items() if on):
                raise ValueError(f"step.{name} needs whole weights on every rank: train.parallel ddp")
            if precision == "fp16":
                raise ValueError("train.parallel fsdp and hsdp need train.precision bf16 or fp32, got fp16")
        if self.fp8_targets and precision not in ("auto", "bf16"):
            raise ValueError(f"step.fp8_targets needs train.precision bf16, got {precision}")
        if self.fused and device == "cuda" and precision == "fp32":
            raise ValueError("step.blocks fused on a GPU needs train.precision bf16 or fp16, got fp32")
        if self.capture and (accumulate > 1 or precision == "fp16" or device == "cpu" or ranks > 1):
            raise ValueError(
                "step.capture needs one GPU, train.accumulate 1 and train.precision fp32 or bf16, "
                f"got device {device}, {ranks} ranks, accumulate {accumulate}, precision {precision}"
            )
        if self.activation_checkpointing == "selective" and (self.compiled or self.fused):
            # The choice of what is kept is made op by op; a compiled block is one, and a fused one has others.
            raise ValueError(f"step.activation_checkpointing selective needs step.blocks plain, got {self.blocks}")
        if self.overlap_target and device == "cpu":
            raise ValueError(f"step.overlap_target needs a GPU, got device {device}")


def apply(
    options: StepOptions,
    model: IJEPA,
    *,
    device: torch.device,
    precision: str,
    sizes: ModelConfig | None = None,
    masks: MaskConfig | None = None,
    images: int = 0,
    mesh: DeviceMesh | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Bring networks to ``device``, in place, with weights and blocks as a step with ``options`` has them.

    Args:
        precision: a name in ``PRECISION_DTYPES``.
        sizes, masks: of the run, for the estimate of its memory where activation_checkpointing is auto.
        images: number of images of a micro-batch on this device, for the same, and for torch.compile.
        mesh, reduce_dtype: of ``sharding.shard``, for networks in shards.

    Raises:
        ValueError: the model or the device cannot do what an option asks for.
    """
    networks = (model.context_encoder, model.target_encoder, model.predictor)
    if options.fp8_targets:
        model.use_fp8_targets(device)
    if mesh is None:
        model.to(device)
        cast_weights(model, PRECISION_DTYPES[precision])
    else:
        shard(model, mesh, PRECISION_DTYPES[precision], reduce_dtype)
    checkpointing = options.activation_checkpointing
    if checkpointing == "auto":
        size = PRECISION_DTYPES[precision].itemsize
        checkpointing = needs_checkpointing(model, sizes, masks, images, size, device, captured=options.capture)
    for network in networks:
        network.use_attention(options.attention)
        network.wide_residual = options.wide_residual
        network.activation_checkpointing = network is not model.target_encoder and checkpointing
    blocks = "plain" if checkpointing == "selective" else blocks_on(options.blocks, device)
    if "fused" in blocks:
        # FP8 products are not among the fused kernels: a target encoder that multiplies so keeps its plain blocks.
        model.fuse_blocks(targets=not options.fp8_targets)
    if "compile" in blocks and mesh is None:
        _compile(model, device, images, must=options.compiled)
    elif "compile" in blocks:  # to try blocks out, all ranks would have to come here
        for network in networks:
            network.compile_blocks()
    if options.overlap_target:
        model.target_stream = SideStream(device)


def blocks_on(blocks: Blocks, device: torch.device) -> Blocks:
    """``blocks`` with what auto stands for on ``device``; on a GPU a log line says which and why."""
    if blocks != "auto" or device.type != "cuda":
        return "plain" if blocks == "auto" else blocks
    reason = _why_not_compiled(device)
    log.info("step.blocks %s", "compile" if reason is None else f"plain, without torch.compile: {reason}")
    return "compile" if reason is None else "plain"


def _why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile would lack on a GPU: Triton, and what Triton builds its launchers with."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs compute capability 7.0"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC"), "gcc", "clang") if compiler):
        return "there is no C compiler (CC, gcc or clang)"
    headers = sysconfig.get_paths()["include"]
    return None if Path(headers, "Python.h").exists() else f"Python's headers are missing: {headers}/Python.h"


def _compile(model: IJEPA, device: torch.device, images: int, must: bool) -> None:
    """Compile the blocks, now instead of in the first step, so that it is known how long it takes and whether it works.

    Args:
        must: raise where the compiler fails, instead of going on with plain blocks.
    """
    networks, started = (model.context_encoder, model.target_encoder, model.predictor), time.monotonic()
    for network in networks:
        network.compile_blocks()
    log.info("torch.compile compiles the transformer blocks; this can take minutes")
    try:
        _try_out(model, device, images)
    except Exception as error:  # each of the compiler's stages raises its own
        if must:
            raise
        for network in networks:
            network.compile_blocks(None)
        _try_out(model, device, images)  # raises where it is not the compiler that fails
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        log.warning("torch.compile FAILED, so blocks run without it, slower: %s", said)
    else:
        log.info("blocks were compiled in %.0f s", time.monotonic() - started)


def _try_out(model: IJEPA, device: torch.device, count: int) -> None:
    """Forward and backward passes of all networks as a step has them, on black images; gradients are dropped.

    As many as a micro-batch has: the code is for any number of rows, but the compiler decides by the first that it sees
    into how many parts a sum over rows is split, and that of few rows would leave most of a GPU idle in later steps.
    """
    encoder, count = model.context_encoder, max(count or UNKNOWN_IMAGES, 2)
    height, width = (side * encoder.patch_size for side in encoder.grid)
    images = torch.zeros(count, encoder.in_chans, height, width, dtype=torch.uint8, device=device)
    patches = encoder.grid[0] * encoder.grid[1]
    context, targets = [], []
    for first in range(0, count * patches, patches):  # of each image half of the patches, and two target blocks
        half, last = first + patches // 2, first + patches
        context.append(range(first, half))
        targets += [range(half, (half + last) // 2), range((half + last) // 2, last)]
    masks = Masks(*(Ragged.from_lists(sets, device) for sets in (context, targets)))
    try:
        for all_targets in (False, True):
            predicted = IJEPA.predict(model, images, masks, all_targets=all_targets)
            (predicted.values.float().sum() + predicted.context.float().sum()).backward()
    finally:
        model.zero_grad(set_to_none=True)


class Suffix(NamedTuple):
    """What a suffix of a benchmark's ``ours`` stands for; the last two as in ``_option``."""

    field: str
    value: Any
    approximate: bool
    no_phases: str | None


SUFFIXES = {
    suffix: Suffix(f.name, value, f.metadata["approximate"], f.metadata["no_phases"])
    for f in fields(StepOptions)
    for suffix, value in f.metadata["suffixes"].items()
}


def with_suffixes(suffixes: Sequence[str], options: StepOptions | None = None) -> StepOptions:
    """``options`` with those on that the suffixes stand for.

    Raises:
        ValueError: an unknown or a repeated suffix.
    """
    options = options or StepOptions()
    for suffix in suffixes:
        if suffix not in SUFFIXES or suffixes.count(suffix) > 1:
            raise ValueError(f"suffixes of ours are {', '.join(SUFFIXES)}, each at most once, got {suffix!r}")
        name, value, *_ = SUFFIXES[suffix]
        if name == "blocks" and {options.blocks, value} == {"compile", "fused"}:
            value = "fused+compile"
        options = replace(options, **{name: value})
    return options


def machine_of(
    device: torch.device, dtype: torch.dtype, head_dims: Sequence[int], patches: int, gpus: int = 1
) -> Machine:
    """What ``device`` offers to networks with heads of these widths, and at most ``patches`` tokens in a set."""
    requests = [Request(device, dtype, head_dim, patches) for head_dim in head_dims]
    names = [name for name in BACKENDS if name != "reference"]
    able = tuple(name for name in names if all(BACKENDS[name].reason(request) is None for request in requests))
    taken = {resolve("auto", request) for request in requests}
    return Machine(device.type == "cuda", gpus, able, taken.pop() if len(taken) == 1 else None)


def alternatives(machine: Machine) -> list[tuple[str, tuple[Any, ...]]]:
    """Fields with the values that ``fastest`` tries on a machine, in the order in which it tries them."""
    tries = [(f.name, f.metadata["tries"]) for f in fields(StepOptions)]
    return [(name, tuple(values(machine))) for name, values in tries if values is not None]
