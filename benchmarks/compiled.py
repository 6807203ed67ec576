"""The I-JEPA training step of a skilled user without this package, to compare with.

Packed tokens, torch's variable-length attention (on the CPU padded SDPA) and dense SDPA for the target encoder,
torch.compile, fused AdamW, one foreach call for the EMA, bf16 autocast. Masks come ready-made, as from DataLoader
workers: ``Packed.of`` takes those of the package's sampler.

Legend: B images, N patches per image, M targets per image, D width, T packed rows, S sequences, H heads, Dh head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import AttentionWeights, BaselineStep, Block, EagerEncoder, EagerPredictor
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import Masks
from ijepa_fast.model.blocks import COMPILED_VERSIONS
from ijepa_fast.optim.schedules import Schedules


@dataclass
class Sets:
    """Packed sequences as torch's own attention takes them.

    Attributes:
        cu_seqlens: int32 [S + 1]; longest: of the sequences.
        padded_rows: int64 [S, longest], the row of every slot (0 where there is none), and valid: bool [S, longest];
            None where all sequences have the same length, or attention takes ``cu_seqlens``.
        slots: int64 [T], the slot of every row.
    """

    cu_seqlens: Tensor
    longest: int
    padded_rows: Tensor | None = None
    valid: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Sets:
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        longest = int(lengths.max())
        if device.type == "cuda" or int(lengths.min()) == longest:
            return cls(cu_seqlens.int().to(device), longest)
        place = torch.arange(longest)
        valid = place < lengths[:, None]
        rows = (cu_seqlens[:-1, None] + place).masked_fill(~valid, 0)
        return cls(cu_seqlens.int(), longest, rows, valid, valid.flatten().nonzero().squeeze(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H, Dh] three times -> [T, H, Dh]."""
        if q.is_cuda and torch.is_grad_enabled():  # without asking whether lengths are equal, which compiles anew
            return self._varlen(q, k, v)
        sequences = self.cu_seqlens.shape[0] - 1
        uniform = q.shape[0] == sequences * self.longest and self.padded_rows is None
        if q.is_cuda and not uniform:
            return self._varlen(q, k, v)
        if uniform:
            q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        q, k, v = (x[self.padded_rows].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.valid[:, None, None])
        return out.transpose(1, 2).flatten(0, 1)[self.slots]

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)


@dataclass
class Packed:
    """Masks as a DataLoader worker hands them over, everything that depends on lengths included.

    Attributes:
        context, targets: int64 token indices b * N + n of the packed blocks.
        context_sets, predictor_sets: their sequences; a sequence of the predictor is a context and one target block.
        predictor_rows: int64 [Tp], rows of the projected context followed by the mask tokens.
        predicted: int64 [Tt], the predictor's rows that are mask tokens.
        weights: fp32 [Tt], of every target row in the loss.
    """

    context: Tensor
    targets: Tensor
    context_sets: Sets
    predictor_sets: Sets
    predictor_rows: Tensor
    predicted: Tensor
    weights: Tensor

    @classmethod
    def of(cls, masks: Masks, device: torch.device | str = "cpu") -> Packed:
        """Pack the package's masks, which are on the host and have one context per image."""
        device, blocks = torch.device(device), masks.num_targets
        context_lengths, target_lengths = masks.context.lengths.long(), masks.targets.lengths.long()
        context_rows = torch.arange(int(context_lengths.sum())).split(context_lengths.tolist())
        first_target = len(masks.context.indices)
        target_rows = (first_target + torch.arange(int(target_lengths.sum()))).split(target_lengths.tolist())
        rows = torch.cat([part for s, target in enumerate(target_rows) for part in (context_rows[s // blocks], target)])
        context_of_each = context_lengths.repeat_interleave(blocks)
        weights = (1 / (target_lengths * len(target_lengths))).repeat_interleave(target_lengths)
        return cls(
            masks.context.indices.long().to(device),
            masks.targets.indices.long().to(device),
            Sets.of(context_lengths, device),
            Sets.of(context_of_each + target_lengths, device),
            rows.to(device),
            (rows >= first_target).nonzero().squeeze(1).to(device),
            weights.to(device),
        )


class PackedAttention(AttentionWeights):
    """[T, D] -> [T, D] over the sequences of ``sets``."""

    def forward(self, x: Tensor, sets: Sets) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.proj(sets.attend(q, k, v).flatten(1))


# Compiled block by block, which is how large models are compiled: all blocks of a network share their code, where one
# graph of 32 of them would take minutes, and norms and residual sums fuse within a block either way.
_block = torch.compile(Block.forward, fullgraph=True, dynamic=True)


class CompiledEncoder(EagerEncoder):
    """Packed tokens [T] -> features [T, D]; the arithmetic is compiled."""

    attention = PackedAttention

    def forward(self, patches: Tensor, tokens: Tensor, sets: Sets) -> Tensor:
        x = self._embed(patches, tokens)
        for block in self.blocks:
            x = _block(block, x, sets)
        return self.norm(x)

    @torch.compile(dynamic=True)
    def _embed(self, patches: Tensor, tokens: Tensor) -> Tensor:
        x = F.linear(patches[tokens], self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
        return x + self.pos_embed[0][tokens % self.pos_embed.shape[1]]


class CompiledPredictor(EagerPredictor):
    attention = PackedAttention

    def forward(self, context: Tensor, packed: Packed) -> Tensor:
        x = self._embed(context, packed)
        for block in self.predictor_blocks:
            x = _block(block, x, packed.predictor_sets)
        return self._predictions(x, packed)

    @torch.compile(dynamic=True)
    def _embed(self, context: Tensor, packed: Packed) -> Tensor:
        positions = self.predictor_pos_embed[0]
        x = self.predictor_embed(context) + positions[packed.context % positions.shape[0]]
        queries = self.mask_token[0] + positions[packed.targets % positions.shape[0]]
        return torch.cat([x, queries.to(x.dtype)])[packed.predictor_rows]

    @torch.compile(dynamic=True)
    def _predictions(self, x: Tensor, packed: Packed) -> Tensor:
        return self.predictor_proj(self.predictor_norm(x[packed.predicted]))


class Compiled(BaselineStep):
    """The step of a skilled user. Images are normalised floats, masks are ``Packed``."""

    def __init__(self, model: ModelConfig, schedules: Schedules, precision: str = "fp32"):
        super().__init__(CompiledEncoder(model), CompiledPredictor(model), schedules, precision, fused=True)
        # Each width, with gradients and without, is a version of a block.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VERSIONS)
        self.patch_size = model.patch_size
        self._ema = None

    def loss(self, images: Tensor, packed: Packed) -> Tensor:
        side = self.patch_size
        patches = F.unfold(images, side, stride=side).mT.flatten(0, 1)
        batch = images.shape[0]
        with self.autocast():
            with torch.no_grad():
                everything = torch.arange(patches.shape[0], device=images.device)
                per_image = patches.shape[0] // batch
                lengths = torch.full((batch,), per_image)
                wanted = self.target_encoder(patches, everything, Sets.of(lengths, images.device))
                wanted = F.layer_norm(wanted[packed.targets].float(), wanted.shape[-1:])
            predicted = self.predictor(self.context_encoder(patches, packed.context, packed.context_sets), packed)
        return (F.smooth_l1_loss(predicted.float(), wanted, reduction="none").mean(1) * packed.weights).sum()

    def forward(self, images: Tensor, packed: Packed, step: int) -> Tensor:
        self.set_schedules(step)
        loss = self.loss(images, packed)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            if self._ema is None:
                self._ema = list(self.target_encoder.parameters()), list(self.context_encoder.parameters())
            torch._foreach_lerp_(*self._ema, 1 - self.schedules.momentum_at(step))
        return loss.detach()
