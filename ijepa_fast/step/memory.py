"""How much memory a training step needs, in closed form, and whether blocks should be recomputed to fit.

Legend: D width, r MLP ratio. Norms of plain blocks keep their input in fp32 (fused ones keep less), everything else is
of the training precision.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.config import ModelConfig
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.optim.step_tensors import local
from ijepa_fast.step.flops import TokenCounts
from ijepa_fast.step.sharding import is_sharded

log = logging.getLogger(__name__)

USABLE = 0.85
"""Share of a GPU's memory that the estimate may fill; temporaries, fragments and the libraries take the rest."""


def state_bytes(model: IJEPA) -> int:
    """Weights, gradients, moments, fp32 masters and averages of ``FusedAdamW`` on this rank."""
    trained = [p for part in (model.context_encoder, model.predictor) for p in part.parameters()]
    averaged = list(model.target_encoder.parameters())

    def wide(parameter: torch.Tensor) -> int:
        return 0 if parameter.element_size() >= 4 else 4

    return sum(local(p).numel() * (2 * p.element_size() + 8 + wide(p)) for p in trained) + sum(
        local(p).numel() * (p.element_size() + wide(p)) for p in averaged
    )


def gathered_bytes(model: IJEPA, size: int, reduce_size: int = 4) -> int:
    """What a step with shards holds beside them: the largest block that runs and the one that is gathered meanwhile.

    Of the first its weights, the buffer that they came in, its gradients, and what these are summed over ranks in, of
    it and of the block before; of the second the buffer.

    Args:
        size: bytes of a gathered number.
        reduce_size: bytes of a number in sums over ranks.
    """
    blocks = (*model.context_encoder.blocks, *model.predictor.predictor_blocks)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return largest * (4 * size + 2 * reduce_size)


def activation_bytes(
    model: ModelConfig,
    masks: MaskConfig,
    images: int,
    size: int,
    *,
    checkpointing: bool | Literal["selective"],
    wide_residual: bool = False,
) -> int:
    """Bytes that the forward pass keeps for the backward pass of ``images`` images, on average over masks.

    Args:
        size: bytes of a number in the training precision.
        checkpointing: whether blocks are computed again in the backward pass; "selective": but for their products.
        wide_residual: whether the sums between blocks are fp32.
    """
    tokens, patches = TokenCounts.expected(masks, model.grid, draws=32), model.patches
    predicted = tokens.num_contexts * tokens.targets
    rows = tokens.num_targets * tokens.context + predicted

    def blocks(dim: int, ratio: float, depth: int, rows: float, last_rows: float) -> float:
        """Kept: the inputs of both norms (fp32) and their outputs, q, k, v, the attention's output, the MLP's hidden
        layer before and after GELU."""
        keys, others = 4 + 3 * size, 4 + (3 + 2 * ratio) * size  # bytes of a row over D
        whole = rows * dim * (keys + others)
        last = rows * dim * (keys - size) + last_rows * dim * (others + 2 * size)
        if checkpointing:  # the input of every block, and all of the one that is being recomputed
            products = (5 + ratio) * size if checkpointing == "selective" else 0  # q, k, v, both branches, hidden
            return depth * rows * dim * ((4 if wide_residual else size) + products) + whole
        return (depth - 1) * whole + last

    width, narrow = model.embed_dim, model.predictor_embed_dim
    ratio = model.mlp_ratio if model.predictor_mlp_ratio is None else model.predictor_mlp_ratio
    encoder = blocks(width, model.mlp_ratio, model.depth, tokens.context, tokens.context)
    predictor = blocks(narrow, ratio, model.predictor_depth, rows, predicted)
    # Pixels, final norms, predictions, and the targets they are compared with.
    pixels = model.in_chans * model.patch_size**2
    ends = tokens.context * (pixels * size + width * (4 + size)) + predicted * narrow * (4 + size)
    ends += (predicted + patches) * width * size
    return int(images * (encoder + predictor + ends))


def needs_checkpointing(
    model: IJEPA,
    sizes: ModelConfig,
    masks: MaskConfig,
    images: int,
    size: int,
    device: torch.device,
    *,
    captured: bool,
) -> bool:
    """Whether a step would not fit into the memory of a GPU unless it computes activations again. Never on the CPU.

    Args:
        sizes: those of ``model``.
        images: number of images of a micro-batch on this device.
        size: bytes of a number in the training precision.
        captured: whether steps are replayed as CUDA graphs.
    """
    if device.type != "cuda":
        return False
    available = USABLE * torch.cuda.get_device_properties(device).total_memory
    activations = activation_bytes(sizes, masks, images, size, checkpointing=False)
    # The pool of CUDA graphs keeps its activations while steps that are not captured take theirs beside it.
    needed = state_bytes(model) + (2 if captured else 1) * activations
    if is_sharded(model):
        needed += gathered_bytes(model, size)
    log.info(
        "activation checkpointing %s: a step needs about %.1f of %.1f GiB without",
        "on" if needed > available else "off",
        needed / 2**30,
        available / 2**30,
    )
    return needed > available
