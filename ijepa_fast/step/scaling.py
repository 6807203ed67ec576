"""What training on many GPUs needs, on paper: memory by part, bytes on the wire, and how unequal masks make ranks.

All of it follows from the sizes of the networks, the masks, and the figures of a GPU; nothing is measured.

Legend: N ranks, S ranks of a shard group, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.config import ModelConfig
from ijepa_fast.model.jepa import Objective
from ijepa_fast.step.flops import TokenCounts, step_flops
from ijepa_fast.step.memory import USABLE, activation_bytes, gathered_bytes

HOST = 8
"""GPUs of a host."""
NVLINK, NETWORK = 450e9, 50e9
"""Bytes per second that a GPU sends within its host (NVLink 4), and to others (400 Gbit/s each), by the data sheets."""
REACHED = 0.7
"""Share of these that large collectives are taken to reach."""
PEAK, UTILISATION = 989e12, 0.4
"""bf16 operations per second of an H100 or H200, and the share that a step is taken to reach."""
MEMORY = {"h100": 80e9, "h200": 141e9}
JPEG_BYTES = 110e3
"""Mean size of an image of ImageNet-1k."""
CHECKPOINTING = {"none": False, "selective": "selective", "whole": True}


class Parameters(NamedTuple):
    """Numbers of parameters: trained, averaged into the target encoder, and of the model's ``gathered_bytes``."""

    trained: int
    averaged: int
    gathered: int

    @classmethod
    def of(cls, sizes: ModelConfig, objective: Objective, size: int = 2) -> Parameters:
        with torch.device("meta"):
            model = sizes.build(objective)
        encoder, predictor = (
            sum(p.numel() for p in network.parameters()) for network in (model.context_encoder, model.predictor)
        )
        return cls(encoder + predictor, encoder, gathered_bytes(model, size))


@dataclass(frozen=True)
class Layout:
    """How N ranks hold the networks: in groups of S shards each (1: every rank has all, as under ddp)."""

    ranks: int
    shards: int

    @property
    def name(self) -> str:
        return "ddp" if self.shards == 1 else "fsdp" if self.shards == self.ranks else f"hsdp {self.shards}"

    def state(self, count: Parameters, size: int = 2) -> dict[str, float]:
        """Bytes of a rank beside activations, by part; ``size`` is that of a number in products.

        Shards are fp32: they are the masters, and what is multiplied is gathered from them.
        """
        trained, averaged, gathered = count
        if self.shards > 1:
            trained, averaged = trained / self.shards, averaged / self.shards
            return {
                "weights": 4.0 * trained,
                "gradients": 4.0 * trained,
                "moments": 8.0 * trained,
                "target": 4.0 * averaged,
                "gathered": float(gathered),
            }
        masters = 4 if size < 4 else 0
        return {
            "weights": float(size + masters) * trained,
            "gradients": float(size) * trained,
            "moments": 8.0 * trained,
            "target": float(size + masters) * averaged,
            "gathered": 0.0,
        }

    def wire(self, count: Parameters, size: int = 2, reduce_size: int = 4) -> dict[str, float]:
        """Bytes that a rank sends in a step, by what for, in rings: a gather of B bytes by n ranks sends B (n - 1) / n.

        Weights are gathered for the forward pass, and but for the target encoder's again for the backward pass.
        """
        trained, averaged, _ = count
        groups, of_group = self.ranks // self.shards, (self.shards - 1) / self.shards
        reduced = trained * (reduce_size if self.shards > 1 else size)
        return {
            "gather": (2 * trained + averaged) * size * of_group,
            "scatter": reduced * of_group,
            "all_reduce": 2 * reduced / self.shards * (groups - 1) / groups,
        }

    def wire_seconds(self, count: Parameters, size: int = 2, reduce_size: int = 4) -> float:
        sent = self.wire(count, size, reduce_size)
        of_shards = _ring_speed(self.shards, min(self.shards, HOST))
        of_copies = _ring_speed(self.ranks // self.shards, max(1, HOST // self.shards))
        return ((sent["gather"] + sent["scatter"]) / of_shards + sent["all_reduce"] / of_copies) / REACHED


def _ring_speed(ranks: int, of_host: int) -> float:
    """Bytes per second that each of ``ranks`` sends to the next. Where they are on several hosts, those of one make as
    many rings, each of which leaves the host by the network of another."""
    return NVLINK if ranks <= of_host else min(NVLINK, of_host * NETWORK)


def on_paper(
    sizes: ModelConfig,
    masks: MaskConfig,
    objective: Objective,
    ranks: int,
    *,
    gpu: str = "h100",
    images: int | None = None,
    size: int = 2,
    reduce_size: int = 4,
) -> dict:
    """Memory, wire, compute and data of a step, for ddp, fsdp and hsdp by hosts.

    Args:
        gpu: a name in ``MEMORY``.
        images: of a rank's micro-batch; None where it is open.
        size, reduce_size: bytes of a number in products, and in sums of sharded gradients over ranks.

    Returns:
        What JSON holds: "parameters", "seconds_per_image", "images_per_second" (bound by compute), "data_bytes" (per
        second), and for each layout of "modes" its "state", "wire", "wire_seconds", "hidden_from" (images of a rank
        from which the wire is hidden behind compute), "fits" (images of a micro-batch that fit, by checkpointing) and
        with ``images`` "activations" (bytes, by checkpointing).
    """
    count = Parameters.of(sizes, objective, size)
    flops = step_flops(sizes, TokenCounts.expected(masks, sizes.grid, draws=32))
    seconds = flops.total / (PEAK * UTILISATION)
    per_image = {
        name: activation_bytes(sizes, masks, 1024, size, checkpointing=kind) / 1024
        for name, kind in CHECKPOINTING.items()
    }
    layouts = [Layout(ranks, 1)]
    layouts += [Layout(ranks, ranks)] if ranks > 1 else []
    layouts += [Layout(ranks, HOST)] if ranks > HOST and ranks % HOST == 0 else []
    modes = {}
    for layout in layouts:
        state, wire = layout.state(count, size), layout.wire_seconds(count, size, reduce_size)
        left = USABLE * MEMORY[gpu] - sum(state.values())
        modes[layout.name] = {
            "state": state,
            "wire": layout.wire(count, size, reduce_size),
            "wire_seconds": wire,
            "hidden_from": wire / seconds,
            "fits": {name: max(0, int(left / each)) for name, each in per_image.items()},
        }
        if images is not None:
            modes[layout.name]["activations"] = {name: images * each for name, each in per_image.items()}
    rate = ranks / seconds
    return {
        "gpus": ranks,
        "gpu": gpu,
        "parameters": {"trained": count.trained, "averaged": count.averaged},
        "seconds_per_image": seconds,
        "images_per_second": rate,
        "data_bytes": rate * JPEG_BYTES,
        "modes": modes,
    }


def image_flops(sizes: ModelConfig, masks: MaskConfig, images: int, steps: int) -> Tensor:
    """Operations of every image of ``steps`` steps of ``images`` images, by the masks that the sampler draws: [N]."""
    sampler = MaskSampler(masks, sizes.grid)
    none = TokenCounts(0, 0, 0, 0, 0, 0, sampler.num_contexts, sampler.num_targets)
    # The operations are linear in these sums over an image's blocks, so each has its price.
    fixed = step_flops(sizes, none, all_targets=True).total
    names = ("context", "targets", "context_squares", "target_squares", "products")
    prices = [step_flops(sizes, replace(none, **{name: 1}), all_targets=True).total - fixed for name in names]
    costs = []
    for step in range(steps):
        drawn = sampler.sample(images, seed=0, step=step)
        context = drawn.context.lengths.view(images, drawn.per_image, -1).double()
        targets = drawn.targets.lengths.view(images, drawn.per_image, -1).double()
        products = (context.sum(2) * targets.sum(2)).sum(1)
        sums = [t.sum((1, 2)) for t in (context, targets, context.square(), targets.square())]
        costs.append(fixed + sum(price * s for price, s in zip(prices, [*sums, products], strict=True)))
    return torch.cat(costs)


def imbalance(costs: Tensor, ranks: int, images: int, steps: int, seed: int = 0) -> dict[str, float]:
    """Mean over steps of the slowest rank's operations over the mean rank's, less 1.

    Args:
        costs: operations of single images, from which each step draws its own anew.
        images: of a rank.

    Returns:
        "drawn": each rank takes its images as they come. "dealt": the masks of the global batch are sorted by cost and
        dealt out in turns, back and forth. "dealt in hosts": the same among the ranks of a host alone.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(("drawn", "dealt", "dealt in hosts"), 0.0)
    for _ in range(steps):
        picked = torch.randint(len(costs), (ranks * images,), generator=generator)
        step = costs[picked].view(ranks, images)
        mean = step.sum(1).mean()
        host = min(ranks, HOST)
        totals["drawn"] += float(step.sum(1).max() / mean)
        totals["dealt"] += float(_dealt(step.view(1, ranks, images)).max() / mean)
        totals["dealt in hosts"] += float(_dealt(step.view(-1, host, images)).max() / mean)
    return {name: total / steps - 1 for name, total in totals.items()}


def _dealt(costs: Tensor) -> Tensor:
    """[groups, ranks, images] -> [groups, ranks]: sums when each group's images are sorted and dealt back and forth."""
    groups, ranks, images = costs.shape
    rounds = costs.flatten(1).sort(descending=True).values.view(groups, images, ranks)
    rounds[:, 1::2] = rounds[:, 1::2].flip(2)
    return rounds.sum(1)
