"""Mask collators with the official constructor: dense index masks beside each batch.

Legend: B images, K kept patches, C context blocks, M target blocks.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler

_TOTAL, _EPOCH, _EPOCH_START = range(3)


class MaskCollator:
    """Collate function that draws context and target blocks: ``(batch, masks_enc, masks_pred)``.

    The masks of a batch are a function of (seed, number of the batch, rank): however many loader workers there are,
    and after a resume that calls ``step`` once per batch already seen, they are the same. An iterator over the loader
    must be used up before the next one is made, as a loop over epochs does. (With persistent workers they are the same
    only where the number of workers divides that of the batches of an epoch.)

    By default the blocks are drawn with all habits of the official code (``MaskConfig.official``), contexts truncated
    to the shortest of the batch included. That distribution is the official one; the draws themselves are not.

    Args:
        input_size: side of the images in pixels, or (height, width).
        patch_size: pixels.
        enc_mask_scale, pred_mask_scale: share of the image that a context and a target block cover.
        aspect_ratio: height over width of target blocks.
        nenc, npred: C and M.
        min_keep: a block has more patches than this.
        allow_overlap: contexts keep the patches that are targets.
        seed: of all draws.
        rank: this process among those that train together. None: asks torch.distributed.
        options: further settings of ``MaskConfig``, for example ``draw_last_row_col=True`` or ``context="fixed"``.

    Raises:
        ValueError: blocks that cannot be drawn on this grid, or masks that would not be dense.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = (224, 224),
        patch_size: int = 16,
        enc_mask_scale: tuple[float, float] = (0.2, 0.8),
        pred_mask_scale: tuple[float, float] = (0.2, 0.8),
        aspect_ratio: tuple[float, float] = (0.3, 3.0),
        nenc: int = 1,
        npred: int = 2,
        min_keep: int = 4,
        allow_overlap: bool = False,
        *,
        seed: int = 0,
        rank: int | None = None,
        **options,
    ):
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.config = MaskConfig.official(
            group_size=1,
            num_contexts=nenc,
            num_targets=npred,
            context_scale=tuple(enc_mask_scale),
            target_scale=tuple(pred_mask_scale),
            target_aspect=tuple(aspect_ratio),
            min_keep=min_keep,
            allow_overlap=allow_overlap,
            **options,
        )
        if self.config.context == "exact" or self.config.size_per != "step":
            raise ValueError(
                "masks [B, K] need context batch_min or fixed and size_per step, "
                f"got {self.config.context} and {self.config.size_per}"
            )
        if self.config.per_image != 1:
            raise ValueError(f"masks [B, K] are one per image, got per_image={self.config.per_image}")
        if self.config.color_jitter:
            raise ValueError(f"masks [B, K] have no colours, got color_jitter={self.config.color_jitter}")
        self.grid = (height // patch_size, width // patch_size)
        self.seed = seed
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
        self.rank = rank
        self._samplers: dict[int, MaskSampler] = {}
        self._sampler(1)  # refuses what cannot be drawn
        # Shared by the processes of a loader: batches drawn so far, and which epoch began after how many of them. A
        # lock of the spawn context also works under fork; the reverse is refused.
        self._counts = multiprocessing.get_context("spawn").Array("q", 3)
        self._drawn_here = (0, 0)

    def _sampler(self, batch_size: int) -> MaskSampler:
        if batch_size not in self._samplers:
            self._samplers[batch_size] = MaskSampler(replace(self.config, group_size=batch_size), self.grid)
        return self._samplers[batch_size]

    def step(self) -> int:
        """Count one batch as drawn; its number. A resume calls this once per batch of the epochs already done."""
        with self._counts.get_lock():
            self._counts[_TOTAL] += 1
            return self._counts[_TOTAL] - 1

    def masks(
        self, batch_size: int, step: int, device: torch.device | str = "cpu"
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of one batch, as a function of its number: C tensors [B, K] and M tensors [B, K'], int64."""
        sampler = self._sampler(batch_size)
        first_image = self.rank * batch_size
        drawn = sampler.sample(
            batch_size, seed=self.seed, step=step, first_image=first_image, device=device, round_rows=1
        )
        first = torch.arange(batch_size, device=device)[:, None, None] * sampler.num_patches
        lists = []
        for blocks, packed in ((drawn.num_contexts, drawn.context), (drawn.num_targets, drawn.targets)):
            dense_BmK = packed.indices.view(batch_size, blocks, -1).long() - first
            lists.append(list(dense_BmK.unbind(1)))
        return lists[0], lists[1]

    def __call__(self, batch: list) -> tuple[object, list[Tensor], list[Tensor]]:
        """Samples -> (collated batch, C context masks [B, K], M target masks [B, K'])."""
        return (default_collate(batch), *self.masks(len(batch), self._next()))

    def _next(self) -> int:
        """Number of the batch that this process collates now."""
        worker = get_worker_info()
        if worker is None:
            return self.step()
        # A loader deals its batches to its workers in turn, and gives all workers of one iterator one base seed.
        epoch = worker.seed - worker.id
        with self._counts.get_lock():
            if self._counts[_EPOCH] != epoch:
                self._counts[_EPOCH], self._counts[_EPOCH_START] = epoch, self._counts[_TOTAL]
            start = self._counts[_EPOCH_START]
            self._counts[_TOTAL] += 1
        seen = self._drawn_here[1] if self._drawn_here[0] == epoch else 0
        self._drawn_here = (epoch, seen + 1)
        return start + seen * worker.num_workers + worker.id


class DeviceMaskCollator(MaskCollator):
    """The same masks drawn on the device of the images, by the process that trains.

    Call it on a batch that is there already: ``images, masks_enc, masks_pred = collator(images)``.
    """

    def __call__(self, batch: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Images [B, ...] -> (the same images, C context masks [B, K], M target masks [B, K']), on their device."""
        return (batch, *self.masks(batch.shape[0], self.step(), batch.device))
