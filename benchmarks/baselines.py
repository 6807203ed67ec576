"""The I-JEPA training step as its authors published it, to compare with.

Attention by two matrix products and a softmax, the whole image embedded and patches picked afterwards by lists of
indices, contexts cut to the shortest of the batch, the projected context repeated for every target block, AdamW as
torch ships it, an EMA loop over parameters, gradient statistics and ``float(loss)`` in every step.

Written from the paper (arXiv 2301.08243) and from descriptions of that code; ``results/fairness.json`` has the two
beside each other. Parameters have the package's names, so its weights load. Masks come ready-made, as from loaders:
``mask_lists`` takes those of the package's sampler, ``draw_masks`` is the published loop over images.

Legend: B images, N patches per image, K patches of a mask, C contexts and M targets per image, D width, H heads.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.config import ModelConfig
from ijepa_fast.model.vit import sincos_positions
from ijepa_fast.optim import decays
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.ragged import Ragged


def mask_lists(ragged: Ragged, blocks: int, num_patches: int) -> list[Tensor]:
    """One int64 [B, K] of patch numbers per block. Raises ValueError if lengths differ within the batch."""
    lengths = set(ragged.lengths.tolist())
    if len(lengths) != 1:
        raise ValueError(f"masks of different lengths {sorted(lengths)} cannot be stacked")
    indices = ragged.indices[: ragged.num_sequences * lengths.pop()].long() % num_patches
    return list(indices.view(-1, blocks, indices.shape[0] // ragged.num_sequences).unbind(1))


def draw_masks(batch: int, grid: tuple[int, int], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Context and target masks of a batch by a loop over images: the published procedure with its habits."""
    height, width = grid

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        u = torch.rand(1, generator=generator).item()
        area = int(height * width * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        return min(round(math.sqrt(area * ratio)), height - 1), min(round(math.sqrt(area / ratio)), width - 1)

    def block(size: tuple[int, int], allowed: list[Tensor]) -> tuple[Tensor, Tensor]:
        while True:
            top = int(torch.randint(0, height - size[0], (1,), generator=generator))
            left = int(torch.randint(0, width - size[1], (1,), generator=generator))
            mask = torch.zeros(height, width, dtype=torch.bool)
            mask[top : top + size[0], left : left + size[1]] = True
            outside = ~mask
            for region in allowed:
                mask &= region
            patches = mask.flatten().nonzero().squeeze(1)
            if len(patches) > 10:
                return patches, outside

    target_size, context_size = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(batch):
        blocks, free = zip(*(block(target_size, []) for _ in range(4)), strict=True)
        targets.append(blocks)
        contexts.append(block(context_size, list(free))[0])
    shortest = min(len(patches) for patches in contexts)
    context = torch.stack([patches[:shortest] for patches in contexts])
    return [context], [torch.stack(blocks) for blocks in zip(*targets, strict=True)]


class AttentionWeights(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class NaiveAttention(AttentionWeights):
    """[B, N, D] -> [B, N, D] with the whole [B, H, N, N] matrix of weights in memory."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, attention: type[AttentionWeights]):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, *sets) -> Tensor:
        x = x + self.attn(self.norm1(x), *sets)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


def _take(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Rows of x [B, N, D] that the masks [B, K] name, one mask after another: [len(masks) * B, K, D]."""
    return torch.cat([torch.gather(x, 1, mask[..., None].expand(-1, -1, x.shape[-1])) for mask in masks])


class EagerEncoder(nn.Module):
    attention: type[AttentionWeights] = NaiveAttention

    def __init__(self, model: ModelConfig):
        super().__init__()
        dim, side = model.embed_dim, model.img_size // model.patch_size
        self.patch_embed = PatchEmbed(model.patch_size, dim)
        self.register_buffer("pos_embed", sincos_positions(dim, (side, side))[None])
        self.blocks = nn.ModuleList(
            Block(dim, model.num_heads, model.mlp_ratio, self.attention) for _ in range(model.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = _take(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class EagerPredictor(nn.Module):
    attention: type[AttentionWeights] = NaiveAttention

    def __init__(self, model: ModelConfig):
        super().__init__()
        dim, side = model.predictor_embed_dim, model.img_size // model.patch_size
        self.predictor_embed = nn.Linear(model.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("predictor_pos_embed", sincos_positions(dim, (side, side))[None])
        self.predictor_blocks = nn.ModuleList(
            Block(dim, model.num_heads, model.mlp_ratio, self.attention) for _ in range(model.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, model.embed_dim)

    def forward(self, context: Tensor, context_masks: list[Tensor], target_masks: list[Tensor]) -> Tensor:
        """[C * B, K, D] -> [M * C * B, K', D], targets outermost."""
        batch, contexts = context_masks[0].shape[0], len(context_masks)
        positions = self.predictor_pos_embed.expand(batch, -1, -1)
        x = self.predictor_embed(context) + _take(positions, context_masks)
        queries = self.mask_token + torch.cat([_take(positions, [mask] * contexts) for mask in target_masks])
        x = torch.cat([x.repeat(len(target_masks), 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, -target_masks[0].shape[1] :])


def _groups(encoder: nn.Module, predictor: nn.Module) -> list[dict]:
    """Decayed and undecayed parameters of both networks."""
    return [
        {"params": [p for p in module.parameters() if decays(p) == decayed], "decayed": decayed}
        for decayed in (True, False)
        for module in (encoder, predictor)
    ]


class BaselineStep(nn.Module):
    """Networks and optimizer of a baseline; ``__call__(images, masks, step)`` trains on one batch."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, schedules: Schedules, precision: str, **adamw):
        super().__init__()
        self.context_encoder, self.predictor = encoder, predictor
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(_groups(encoder, predictor), **adamw)
        self.schedules, self.precision = schedules, precision

    def set_schedules(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedules.lr_at(step)
            group["weight_decay"] = self.schedules.weight_decay_at(step) if group["decayed"] else 0.0

    def autocast(self) -> torch.autocast:
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")


class Eager(BaselineStep):
    """The published step. Images are normalised floats; masks are lists of int64 [B, K] of contexts and targets."""

    def __init__(self, model: ModelConfig, schedules: Schedules, precision: str = "fp32"):
        super().__init__(EagerEncoder(model), EagerPredictor(model), schedules, precision)
        self.scaler = None

    def loss(self, images: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> Tensor:
        with self.autocast():
            with torch.no_grad():
                wanted = self.target_encoder(images)
                wanted = F.layer_norm(wanted, wanted.shape[-1:])
                wanted = torch.cat([_take(wanted, [mask] * len(contexts)) for mask in targets])
            context = self.context_encoder(images, contexts)
            return F.smooth_l1_loss(self.predictor(context, contexts, targets), wanted)

    def forward(self, images: Tensor, masks: tuple[list[Tensor], list[Tensor]], step: int) -> float:
        self.set_schedules(step)
        device = images.device
        if self.scaler is None:
            # The published code scales bf16 losses too, without need.
            self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "bf16")
        loss = self.loss(images, *([mask.to(device, non_blocking=True) for mask in part] for part in masks))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for parameter in self.context_encoder.parameters():
            if parameter.ndim > 1:
                float(parameter.grad.norm())
        self.optimizer.zero_grad()
        momentum = self.schedules.momentum_at(step)
        with torch.no_grad():
            for mine, target in zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True):
                target.mul_(momentum).add_((1 - momentum) * mine)
        return float(loss.detach())


def load_weights(step: BaselineStep, state: dict[str, Tensor]) -> None:
    """Load the state of an ``ijepa_fast.model.jepa.IJEPA``, whose parameters have the same names."""
    step.load_state_dict({name: value.float() for name, value in state.items()})
