"""The ops as a training step calls them: their inputs, the ways to compute them, and what they cost.

Legend: T packed rows, D width, N patches per image, K values of a patch rounded up to 16.

A provider is a function of the case's tensors: "ours" is the op of this package, "eager" what one writes in plain
torch, "compile" the same under torch.compile. Packed rows are exact here (no padding), because other libraries leave
padding undefined. Every provider gets tensors as it likes them best (``Provider.prepare``), outside of what is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.bench.cases.floors import CHANNELS, MODES, Cost, Workload, cost, hidden_width
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
        function: of the case's arguments; returns a tensor or a tuple of them.
        prepare: what becomes of the arguments before anything is timed, e.g. casts or host copies; or None.
        unavailable: why it cannot run here, or None.
    """

    function: Callable[..., Any]
    prepare: Callable[..., Sequence[Any]] | None = None
    unavailable: str | None = None


@dataclass(frozen=True)
class Case:
    """An op on one part of a batch.

    Attributes:
        op: name in ``ijepa_fast.ops``; name: the part, and what is special.
        costs: mode -> cost. Its keys are the modes that exist: "forward", "backward", "both".
        draw: a generator -> arguments, freshly drawn. The first ``leaves`` are tensors that get gradients.
        reference: what is right, of arguments in any dtype.
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
    """One batch of a model: masks drawn as in training, and everything that follows from them."""

    model: ModelConfig
    masks: Masks
    layout: PredictorLayout
    workload: Workload
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def draw(model: ModelConfig, images: int, device: torch.device, masks: MaskConfig | None = None) -> Batch:
        """bf16 on CUDA, fp32 on the CPU."""
        side = model.img_size // model.patch_size
        sampler = MaskSampler(masks or MaskConfig(), (side, side), implementation="torch")
        drawn = sampler.sample(images, seed=0, step=0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        workload = Workload.of(model, drawn, dtype.itemsize)
        layout = predictor_layout(drawn.context, drawn.targets, drawn.num_contexts, drawn.num_targets)
        moved = {field.name: getattr(layout, field.name).to(device) for field in dataclasses.fields(PredictorLayout)}
        return Batch(model, drawn.to(device), PredictorLayout(**moved), workload, device, dtype)

    def normal(self, generator: torch.Generator, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of the activations' dtype where none is given. The generator is on the device."""
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def costs(self, op: str, part: str, modes: Sequence[str] = MODES) -> dict[str, Cost]:
        return {mode: cost(op, mode, self.workload, part) for mode in modes}

    def indices(self, part: str) -> Tensor:
        """Token indices of the rows of "context" or "target encoder"."""
        if part == "context":
            return self.masks.context.indices
        return torch.arange(self.masks.num_images * self.workload.patches, dtype=torch.int32, device=self.device)


def with_compiled(ours: Callable[..., Any], eager: Provider) -> dict[str, Provider]:
    """The three providers that every row-wise op has."""
    return {
        "ours": Provider(ours),
        "eager": eager,
        "compile": Provider(torch.compile(eager.function, fullgraph=True, dynamic=False), eager.prepare),
    }


def low_precision(count: int) -> Callable[..., Sequence[Any]]:
    """Cast the fp32 vectors behind the first ``count`` arguments to the dtype of the first: torch's own norm and GELU
    want one dtype, and users of a fully cast model have it."""

    def prepare(*arguments):
        rest = [x.detach().to(arguments[0].dtype).requires_grad_(x.requires_grad) for x in arguments[count:]]
        return [*arguments[:count], *rest]

    return prepare


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


def gather_patches(batch: Batch, part: str, pixels: torch.dtype = torch.uint8) -> Case:
    model, indices, dtype = batch.model, batch.indices(part), batch.dtype
    side, size = model.img_size, model.patch_size
    per_side = side // size
    padding = ops.padded_patch_width(CHANNELS, size) - CHANNELS * size * size

    def draw(generator):
        shape = (batch.masks.num_images, CHANNELS, side, side)
        return [torch.randint(256, shape, generator=generator, dtype=torch.uint8, device=batch.device).to(pixels)]

    def ours(images):
        return ops.gather_patches(images, indices, size, model.mean, model.std, dtype)

    def exact(images):
        return ops.gather_patches.definition(images, indices, size, list(model.mean), list(model.std), torch.float64)

    rows = indices.long()
    image, patch = rows // per_side**2, rows % per_side**2
    line, column = patch // per_side, patch % per_side
    mean, std = (torch.tensor(values, device=batch.device).view(1, -1, 1, 1) for values in (model.mean, model.std))

    def eager(images):
        grid = images.view(-1, CHANNELS, per_side, size, per_side, size)
        x = (grid[image, :, line, :, column] / 255 - mean) / std
        return F.pad(x.flatten(1).to(dtype), (0, padding))

    costs = batch.costs("gather_patches", part, ["forward"])
    return Case("gather_patches", part, costs, draw, 0, exact, with_compiled(ours, Provider(eager)))


def gather_add(batch: Batch, part: str) -> Case:
    indices, width, side = batch.indices(part), batch.model.embed_dim, batch.model.img_size // batch.model.patch_size
    rows, patches = indices.long(), batch.workload.patches

    def draw(generator):
        return batch.normal(generator, len(indices), width), sincos_positions(width, (side, side)).to(batch.device)

    def ours(x, table):
        return ops.gather_add(x, table, indices)

    def exact(x, table):
        return ops.gather_add.definition(x, table, indices)

    def eager(x, table):
        return x + table.index_select(0, rows % patches)

    providers = with_compiled(ours, Provider(eager, low_precision(1)))
    return Case("gather_add", part, batch.costs("gather_add", part), draw, 1, exact, providers)


def predictor_tokens(batch: Batch) -> Case:
    layout, width = batch.layout, batch.model.predictor_embed_dim
    side = batch.model.img_size // batch.model.patch_size
    indices, sources, copies = layout.tokens.indices, layout.sources, layout.copies
    from_context, rows, taken = (sources >= 0)[:, None], indices.long() % side**2, sources.clamp(min=0).long()

    def draw(generator):
        token = TABLE_STD * batch.normal(generator, width, dtype=torch.float32)
        context = batch.normal(generator, copies.shape[0], width)
        return context, token, sincos_positions(width, (side, side)).to(batch.device)

    def ours(context, token, positions):
        return ops.predictor_tokens(context, token, positions, indices, sources, copies)

    def exact(context, token, positions):
        return ops.predictor_tokens.definition(context, token, positions, indices, sources, copies)

    def eager(context, token, positions):
        values = torch.where(from_context, context.index_select(0, taken), token)
        return values + positions.index_select(0, rows)

    providers = with_compiled(ours, Provider(eager, low_precision(1)))
    costs = batch.costs("predictor_tokens", "predictor")
    return Case("predictor_tokens", "predictor", costs, draw, 2, exact, providers)


def target_loss(batch: Batch) -> Case:
    width, rows, predicted = batch.model.embed_dim, batch.layout.target_tokens, batch.layout.predicted
    num_targets = batch.masks.num_images * batch.workload.patches
    lengths = predicted.lengths
    weight = 1 / (lengths.repeat_interleave(lengths.long()).float() * len(lengths) * width)
    taken = rows.long()

    def draw(generator):
        return batch.normal(generator, len(rows), width), batch.normal(generator, num_targets, width)

    def ours(prediction, target):
        return ops.target_loss(prediction, target, rows, predicted.cu_seqlens, LOSS, True, TARGET_EPS)

    def exact(prediction, target):
        return ops.target_loss.definition(prediction, target, rows, predicted.cu_seqlens, LOSS, True, TARGET_EPS)

    def eager(prediction, target):
        wanted = F.layer_norm(target.index_select(0, taken).float(), (width,), eps=TARGET_EPS)
        return (F.smooth_l1_loss(prediction.float(), wanted, reduction="none").sum(1) * weight).sum()

    providers = with_compiled(ours, Provider(eager))
    return Case("target_loss", "targets", batch.costs("target_loss", "context"), draw, 1, exact, providers)


def layer_norm(batch: Batch) -> Case:
    width, rows = batch.model.embed_dim, len(batch.indices("context"))

    def draw(generator):
        weight, bias = (batch.normal(generator, width, dtype=torch.float32) for _ in range(2))
        return batch.normal(generator, rows, width), 1 + TABLE_STD * weight, TABLE_STD * bias

    def ours(x, weight, bias):
        return ops.layer_norm(x, None, None, weight, bias, NORM_EPS)[0]

    def exact(x, weight, bias):
        return ops.layer_norm.definition(x, None, None, weight, bias, NORM_EPS)[0]

    def eager(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias, NORM_EPS)

    providers = with_compiled(ours, Provider(eager, low_precision(1)))
    return Case("layer_norm", "context", batch.costs("layer_norm", "context"), draw, 3, exact, providers)


def layer_norm_with_residual(batch: Batch) -> Case:
    """The step between two halves of a block: bias of the projection, residual stream, norm. Both results go on."""
    width, rows = batch.model.embed_dim, len(batch.indices("context"))

    def draw(generator):
        vectors = [TABLE_STD * batch.normal(generator, width, dtype=torch.float32) for _ in range(3)]
        vectors[1] += 1
        return *(batch.normal(generator, rows, width) for _ in range(2)), *vectors

    def ours(x, residual, x_bias, weight, bias):
        return ops.layer_norm(x, residual, x_bias, weight, bias, NORM_EPS)[:2]

    def exact(x, residual, x_bias, weight, bias):
        return ops.layer_norm.definition(x, residual, x_bias, weight, bias, NORM_EPS)[:2]

    def eager(x, residual, x_bias, weight, bias):
        h = x + x_bias + residual
        return F.layer_norm(h, (width,), weight, bias, NORM_EPS), h

    providers = with_compiled(ours, Provider(eager, low_precision(2)))
    costs = batch.costs("layer_norm with residual", "context")
    return Case("layer_norm", "context, with residual", costs, draw, 5, exact, providers)


def quantize_fp8(batch: Batch) -> Case:
    """The widest input that the target encoder's products have: the hidden layer, with a scale for each row."""
    width, rows = hidden_width(batch.model), len(batch.indices("target encoder"))

    def draw(generator):
        return [batch.normal(generator, rows, width)]

    def ours(x):
        return ops.quantize_fp8(x, True)

    def exact(x):
        return [result.double() for result in ops.quantize_fp8.definition(x, True)]

    def eager(x):
        amax = x.abs().amax(1).float().clamp(min=1e-12)
        return (x.float() * (448 / amax)[:, None]).to(ops.FP8), amax / 448

    costs = batch.costs("quantize_fp8", "target encoder", ["forward"])
    return Case("quantize_fp8", "target encoder", costs, draw, 0, exact, with_compiled(ours, Provider(eager)))
