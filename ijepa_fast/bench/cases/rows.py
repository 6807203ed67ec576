"""The ops as a training step calls them: their inputs, the ways to compute them, and what they cost.

Legend: T packed rows, D width, N patches per image, K values of a patch rounded up to 16.

A provider is a function of the case's tensors: "ours" is the op of this package, "eager" the same in plain torch,
"compile" that under torch.compile. Packed rows are exact here (no padding), because other libraries leave padding
undefined. Every provider gets tensors as it likes them best (``Provider.prepare``), which is not timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.bench.cases.floors import MODES, Cost, Workload, cost, hidden_width
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler
from ijepa_fast.model.predictor_layout import PredictorLayout, predictor_layout
from ijepa_fast.model.vit import sincos_positions

NORM_EPS, TARGET_EPS = 1e-6, 1e-5
LOSS = "smooth_l1"
TABLE_STD = 0.02


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        function: takes the case's arguments; returns a tensor or a tuple of them.
        prepare: changes the arguments before anything is timed, e.g. casts them; or None.
        unavailable: why it cannot run here, or None.
    """

    function: Callable[..., Any]
    prepare: Callable[..., Sequence[Any]] | None = None
    unavailable: str | None = None


@dataclass(frozen=True)
class Case:
    """An op on one part of a batch.

    Attributes:
        op: name in ``ijepa_fast.ops``.
        name: the part, and what is special.
        costs: mode -> cost. Its keys are the modes that exist: "forward", "backward", "both".
        draw: a generator -> arguments, freshly drawn. The first ``leaves`` are tensors that get gradients.
        reference: the definition, for arguments of any dtype.
        providers: by name, "ours" first.
        in_place: the arguments change, so the reference needs its own, and they are not cast.
    """

    op: str
    name: str
    costs: Mapping[str, Cost]
    draw: Callable[[torch.Generator], Sequence[Any]]
    leaves: int
    reference: Callable[..., Any]
    providers: Mapping[str, Provider]
    in_place: bool = False

    @property
    def key(self) -> str:
        return f"{self.op}, {self.name}"


@dataclass(frozen=True)
class Batch:
    """One batch of a model: masks drawn as in training, and what follows from them."""

    model: ModelConfig
    masks: Masks
    layout: PredictorLayout
    workload: Workload
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def draw(model: ModelConfig, images: int, device: torch.device, masks: MaskConfig | None = None) -> Batch:
        """A batch in bf16 on CUDA, in fp32 on the CPU."""
        sampler = MaskSampler(masks or MaskConfig(), model.grid, implementation="torch")
        drawn = sampler.sample(images, seed=0, step=0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        workload = Workload.of(model, drawn, dtype.itemsize)
        layout = predictor_layout(drawn.context, drawn.targets, drawn.num_contexts, drawn.num_targets)
        moved = {field.name: getattr(layout, field.name).to(device) for field in dataclasses.fields(PredictorLayout)}
        return Batch(model, drawn.to(device), PredictorLayout(**moved), workload, device, dtype)

    def normal(self, generator: torch.Generator, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers in the activations' dtype where none is given. The generator is on the device."""
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def costs(self, op: str, part: str, modes: Sequence[str] = MODES) -> dict[str, Cost]:
        return {mode: cost(op, mode, self.workload, part) for mode in modes}

    def indices(self, part: str) -> Tensor:
        """Token indices of the rows of a part."""
        if part != "target encoder":
            return self.masks.context.indices if part == "context" else self.layout.tokens.indices
        return torch.arange(self.masks.num_images * self.workload.patches, dtype=torch.int32, device=self.device)


def op_case(
    batch: Batch,
    op: str,
    name: str,
    draw: Callable[[torch.Generator], Sequence[Any]],
    compute: Callable[..., Any],
    eager: Callable[..., Any],
    *,
    part: str | None = None,
    special: str = "",
    modes: Sequence[str] = MODES,
    leaves: int = 0,
    cast_from: int | None = None,
) -> Case:
    """A case with three providers: ours, eager and compiled eager.

    Args:
        name: of the case; ``part`` is the part whose rows it costs, where the two differ.
        compute: calls its first argument, the op, with the others. With the op's definition it is the reference.
        special: of the op's name in the tables of costs, where it has several.
        cast_from: arguments of ``eager`` from here on are cast to the dtype of the first: torch's own norm and GELU
            want one dtype, and users of a fully cast model have it.
    """
    function = getattr(ops, op)

    def cast(*arguments):
        rest = (x.detach().to(arguments[0].dtype).requires_grad_(x.requires_grad) for x in arguments[cast_from:])
        return [*arguments[:cast_from], *rest]

    prepare = None if cast_from is None else cast
    providers = {
        "ours": Provider(partial(compute, function)),
        "eager": Provider(eager, prepare),
        "compile": Provider(torch.compile(eager, fullgraph=True, dynamic=False), prepare),
    }
    costs = batch.costs(f"{op} {special}".strip(), part or name, modes)
    name = f"{name}, {special}" if special else name
    return Case(op, name, costs, draw, leaves, partial(compute, function.definition), providers)


def row_cases(batch: Batch) -> list[Case]:
    """Every op that works on rows, in the order in which a step meets them."""
    parts = ("context", "target encoder")
    return [
        *(gather_patches(batch, part) for part in parts),
        *(gather_add(batch, part) for part in parts),
        predictor_tokens(batch),
        target_loss(batch),
        layer_norm(batch),
        layer_norm_with_residual(batch),
        quantize_fp8(batch),
    ]


def gather_patches(batch: Batch, part: str) -> Case:
    model, indices = batch.model, batch.indices(part)
    size, channels, (lines, columns) = model.patch_size, model.in_chans, model.grid
    padding = ops.padded_patch_width(channels, size) - channels * size * size
    image, patch = indices.long() // model.patches, indices.long() % model.patches
    line, column = patch // columns, patch % columns
    mean, std = (torch.tensor(values, device=batch.device).view(1, -1, 1, 1) for values in model.normalisation)

    def draw(generator):
        shape = (batch.masks.num_images, channels, *model.size)
        return [torch.randint(256, shape, generator=generator, dtype=torch.uint8, device=batch.device)]

    def compute(op, images):
        dtype = batch.dtype if op is ops.gather_patches else torch.float64
        return op(images, indices, size, *map(list, model.normalisation), dtype)

    def eager(images):
        grid = images.view(-1, channels, lines, size, columns, size)
        x = (grid[image, :, line, :, column] / 255 - mean) / std
        return F.pad(x.flatten(1).to(batch.dtype), (0, padding))

    return op_case(batch, "gather_patches", part, draw, compute, eager, modes=["forward"])


def gather_add(batch: Batch, part: str) -> Case:
    indices, width, model = batch.indices(part), batch.model.embed_dim, batch.model
    rows = indices.long() % model.patches

    def draw(generator):
        return batch.normal(generator, len(indices), width), sincos_positions(width, model.grid).to(batch.device)

    def compute(op, x, table):
        return op(x, table, indices)

    def eager(x, table):
        return x + table.index_select(0, rows)

    return op_case(batch, "gather_add", part, draw, compute, eager, leaves=1, cast_from=1)


def predictor_tokens(batch: Batch) -> Case:
    layout, model, width = batch.layout, batch.model, batch.model.predictor_embed_dim
    indices, sources, copies = layout.tokens.indices, layout.sources, layout.copies
    from_context, rows, taken = (sources >= 0)[:, None], indices.long() % model.patches, sources.clamp(min=0).long()

    def draw(generator):
        token = TABLE_STD * batch.normal(generator, width, dtype=torch.float32)
        context = batch.normal(generator, copies.shape[0], width)
        return context, token, sincos_positions(width, model.grid).to(batch.device)

    def compute(op, context, token, positions):
        return op(context, token, positions, indices, sources, copies)

    def eager(context, token, positions):
        values = torch.where(from_context, context.index_select(0, taken), token)
        return values + positions.index_select(0, rows)

    return op_case(batch, "predictor_tokens", "predictor", draw, compute, eager, leaves=2, cast_from=1)


def target_loss(batch: Batch) -> Case:
    width, rows, predicted = batch.model.embed_dim, batch.layout.target_tokens, batch.layout.predicted
    num_targets = batch.masks.num_images * batch.workload.patches
    lengths, taken = predicted.lengths, rows.long()
    weight = 1 / (lengths.repeat_interleave(lengths.long()).float() * len(lengths) * width)

    def draw(generator):
        return batch.normal(generator, len(rows), width), batch.normal(generator, num_targets, width)

    def compute(op, prediction, target):
        return op(prediction, target, rows, predicted.cu_seqlens, LOSS, True, TARGET_EPS)

    def eager(prediction, target):
        wanted = F.layer_norm(target.index_select(0, taken).float(), (width,), eps=TARGET_EPS)
        return (F.smooth_l1_loss(prediction.float(), wanted, reduction="none").sum(1) * weight).sum()

    return op_case(batch, "target_loss", "targets", draw, compute, eager, part="context", leaves=1)


def layer_norm(batch: Batch) -> Case:
    width, rows = batch.model.embed_dim, len(batch.indices("context"))

    def draw(generator):
        weight, bias = (TABLE_STD * batch.normal(generator, width, dtype=torch.float32) for _ in range(2))
        return batch.normal(generator, rows, width), 1 + weight, bias

    def compute(op, x, weight, bias):
        return op(x, None, None, weight, bias, NORM_EPS)[0]

    def eager(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias, NORM_EPS)

    return op_case(batch, "layer_norm", "context", draw, compute, eager, leaves=3, cast_from=1)


def layer_norm_with_residual(batch: Batch) -> Case:
    """The step between two halves of a block: bias of the projection, residual, norm. Both results go on."""
    width, rows = batch.model.embed_dim, len(batch.indices("context"))

    def draw(generator):
        x_bias, weight, bias = (TABLE_STD * batch.normal(generator, width, dtype=torch.float32) for _ in range(3))
        return *(batch.normal(generator, rows, width) for _ in range(2)), x_bias, 1 + weight, bias

    def compute(op, x, residual, x_bias, weight, bias):
        return op(x, residual, x_bias, weight, bias, NORM_EPS)[:2]

    def eager(x, residual, x_bias, weight, bias):
        h = x + x_bias + residual
        return F.layer_norm(h, (width,), weight, bias, NORM_EPS), h

    more = {"special": "with residual", "leaves": 5, "cast_from": 2}
    return op_case(batch, "layer_norm", "context", draw, compute, eager, **more)


def quantize_fp8(batch: Batch) -> Case:
    """The widest input that the target encoder's products have: the hidden layer, with a scale for each row."""
    width, rows = hidden_width(batch.model), len(batch.indices("target encoder"))

    def draw(generator):
        return [batch.normal(generator, rows, width)]

    def compute(op, x):
        results = op(x, True)
        return results if op is ops.quantize_fp8 else [result.double() for result in results]

    def eager(x):
        amax = x.abs().amax(1).float().clamp(min=1e-12)
        return (x.float() * (448 / amax)[:, None]).to(ops.FP8), amax / 448

    return op_case(batch, "quantize_fp8", "target encoder", draw, compute, eager, modes=["forward"])
