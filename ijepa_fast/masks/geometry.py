"""Blocks on a patch grid: their sizes from random words, the patches they cover, and packing.

Integer arithmetic only, where a choice depends on it; the formulas stand in sampling.py. Two counts are float32
matmuls of zeros and ones, whose sums are exact whatever the order and whether or not the hardware rounds the inputs.
Legend: B masks (per_image of each image), H x W patch grid, N = H * W, M target blocks, A attempts, S blocks per mask,
T rows.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ijepa_fast.philox import below
from ijepa_fast.ragged import PADDING, Ragged

FRACTION_BITS = 24


def _isqrt(value):
    """Integer square root of an int, or of an int64 tensor below 2^40 whatever way the device rounds."""
    if isinstance(value, int):
        return math.isqrt(value)
    root = value.float().sqrt().long()
    root = root - (root * root > value).long()
    return root + ((root + 1) * (root + 1) <= value).long()


def _at_most(value, limit: int):
    return min(value, limit) if isinstance(value, int) else value.clamp(max=limit)


def _fixed_point(value: float) -> int:
    return math.ceil(value * (1 << FRACTION_BITS))


@dataclass(frozen=True)
class SizeRule:
    """Block sizes from random words; scale and aspect in units of 2^-24."""

    num_patches: int
    max_height: int
    max_width: int
    scale: tuple[int, int]
    aspect: tuple[int, int]
    shared: bool

    @classmethod
    def from_ranges(
        cls,
        num_patches: int,
        extent: tuple[int, int],
        scale: tuple[float, float],
        aspect: tuple[float, float],
        shared: bool,
    ) -> "SizeRule":
        scale_fixed = _fixed_point(scale[0]), _fixed_point(scale[1])
        aspect_fixed = _fixed_point(aspect[0]), _fixed_point(aspect[1])
        return cls(num_patches, *extent, scale_fixed, aspect_fixed, shared)

    def area(self, word):
        low, high = self.scale
        return self.num_patches * (low + below(word, high - low + 1)) >> FRACTION_BITS

    def aspect_ratio(self, word):
        low, high = self.aspect
        return low + below(word, high - low + 1)

    def sides(self, area, aspect):
        """Height and width for an area in patches and an aspect in units of 2^-24."""
        height = (_isqrt(4 * area * aspect >> FRACTION_BITS) + 1) >> 1
        width = (_isqrt((4 * area << FRACTION_BITS) // aspect) + 1) >> 1
        return _at_most(height, self.max_height), _at_most(width, self.max_width)

    def draw(self, words):
        """Height and width from the words of one call: ints from ints, tensors from tensors."""
        return self.sides(self.area(words[0]), self.aspect_ratio(words[0] if self.shared else words[1]))

    def area_range(self) -> tuple[int, int]:
        """Smallest and largest area, before rounding to sides."""
        return self.area(0), self.area((1 << 32) - 1)

    def block_range(self) -> tuple[int, int]:
        """Exact smallest and largest height * width that can be drawn."""
        smallest, largest = self.area_range()
        if not self.shared:  # both sides grow with the area, so the extremes are at its ends
            return self._block_range(smallest, *self.aspect)[0], self._block_range(largest, *self.aspect)[1]
        ranges = []
        for area in range(smallest, largest + 1):
            first, last = self._first_word(area), self._first_word(area + 1) - 1
            if first <= last:
                ranges.append(self._block_range(area, self.aspect_ratio(first), self.aspect_ratio(last)))
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def _first_word(self, area: int) -> int:
        """The smallest word whose area is at least this one."""
        low, high = self.scale
        excess = max(-(-(area << FRACTION_BITS) // self.num_patches) - low, 0)
        return min(-(-(excess << 32) // (high - low + 1)), 1 << 32)

    def _block_range(self, area: int, aspect_low: int, aspect_high: int) -> tuple[int, int]:
        """Smallest and largest height * width for one area: at the ends of each interval of constant height."""
        products, aspect = [], aspect_low
        while aspect <= aspect_high:
            height, width = self.sides(area, aspect)
            products.append(height * width)
            unclipped = (math.isqrt(4 * area * aspect >> FRACTION_BITS) + 1) >> 1
            # height h holds while 4 * area * aspect < (2h + 1)^2 * 2^24
            end = (((2 * unclipped + 1) ** 2 << FRACTION_BITS) - 1) // (4 * area) if area else aspect_high
            height, width = self.sides(area, min(end, aspect_high))
            products.append(height * width)
            aspect = end + 1
        return min(products), max(products)


class Blocks(NamedTuple):
    """Rectangles on the patch grid, int64 tensors of one shape [...]."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    @property
    def area(self) -> Tensor:
        return self.height * self.width

    def rows(self, num_rows: int) -> Tensor:
        """bool [..., num_rows]: which grid rows a block covers."""
        return _covers(self.top, self.height, num_rows)

    def columns(self, num_columns: int) -> Tensor:
        return _covers(self.left, self.width, num_columns)

    def mask(self, grid: tuple[int, int]) -> Tensor:
        """bool [..., H, W]."""
        return self.rows(grid[0])[..., :, None] & self.columns(grid[1])[..., None, :]


def _covers(first: Tensor, length: Tensor, size: int) -> Tensor:
    place = torch.arange(size, device=first.device)
    return (place >= first[..., None]) & (place < (first + length)[..., None])


def place(words, height, width, extent: tuple[int, int]) -> Blocks:
    """Blocks at uniform places within the extent (H', W'); sizes are ints, or tensors that broadcast to the words."""
    top = below(words[0], extent[0] + 1 - height)
    left = below(words[1], extent[1] + 1 - width)
    return Blocks(top, left, _filled(height, top), _filled(width, top))


def _filled(value, like: Tensor) -> Tensor:
    return torch.full_like(like, value) if isinstance(value, int) else value.expand_as(like)


def uncovered(blocks_BM: Blocks, grid: tuple[int, int]) -> Tensor:
    """bool [B, H, W]: patches in no block."""
    rows_BHM = blocks_BM.rows(grid[0]).float().transpose(1, 2)
    return torch.bmm(rows_BHM, blocks_BM.columns(grid[1]).float()) == 0


def count_within(visible_BHW: Tensor, blocks_BA: Blocks) -> Tensor:
    """int64 [B, A]: visible patches inside each block."""
    _, num_rows, num_columns = visible_BHW.shape
    per_column = torch.bmm(blocks_BA.rows(num_rows).float(), visible_BHW.float())
    return (per_column * blocks_BA.columns(num_columns)).sum(-1).long()


def pack_mask(
    mask_BSN: Tensor, lengths_BS: Tensor, max_seqlen: int, num_rows: int | None, per_image: int = 1
) -> Ragged:
    """The True patches of each [N] of a mask as sequences, image-major.

    With `num_rows` the shapes are static and a CUDA device is never waited for; without it, it is.

    Raises:
        ValueError: more tokens than rows (on CUDA a device-side assertion, which the next synchronisation reports).
    """
    _, num_blocks, num_patches = mask_BSN.shape
    cu_seqlens = _prefix_sums(lengths_BS, num_rows)
    if num_rows is None:
        flat = mask_BSN.flatten().nonzero()
    else:
        flat = mask_BSN.flatten().nonzero_static(size=num_rows, fill_value=PADDING)
    token = flat.squeeze(1).to(torch.int32)
    if num_blocks * per_image > 1:  # ((image * K + k) * S + s) * N + n -> image * N + n
        image = token // (per_image * num_blocks * num_patches)
        token = torch.where(token < 0, PADDING, token % num_patches + image * num_patches)
    return Ragged(token, cu_seqlens, max_seqlen)


def pack_blocks(
    blocks_BS: Blocks, grid: tuple[int, int], max_seqlen: int, num_rows: int | None, per_image: int = 1
) -> Ragged:
    """Pack rectangles as runs of consecutive tokens, one per grid row: `pack_mask` without a mask being built."""
    height, width = grid
    cu_seqlens = _prefix_sums(blocks_BS.area, num_rows)
    total = cu_seqlens[-1:]
    num_rows = int(total) if num_rows is None else num_rows
    images_B, rows_H = (torch.arange(size, device=total.device) for size in (blocks_BS.top.shape[0], height))
    first_token_BSH = ((images_B // per_image)[:, None, None] * height + rows_H) * width + blocks_BS.left[..., None]
    run_lengths = (blocks_BS.rows(height) * blocks_BS.width[..., None]).flatten()  # 0 where a block misses a grid row
    token_minus_row = first_token_BSH.flatten() - run_lengths.cumsum(0) + run_lengths
    # The rows that are left over form one more run.
    run_lengths = torch.cat([run_lengths, num_rows - total])
    token_minus_row = functional.pad(token_minus_row.to(torch.int32), (0, 1))
    row_T = torch.arange(num_rows, dtype=torch.int32, device=total.device)
    token_T = token_minus_row.repeat_interleave(run_lengths, output_size=num_rows) + row_T
    return Ragged(torch.where(row_T < total, token_T, PADDING), cu_seqlens, max_seqlen)


def each_once(tokens_T: Tensor, num_images: int, num_patches: int, num_rows: int | None) -> Ragged:
    """Every token b * N + n of a packed set once, however often it is there: one sequence per image, by n."""
    nowhere = num_images * num_patches  # where rows of no token go
    held = torch.zeros(nowhere + 1, dtype=torch.bool, device=tokens_T.device)
    held.index_fill_(0, torch.where(tokens_T < 0, nowhere, tokens_T).long(), True)
    held_B1N = held[:-1].view(num_images, 1, num_patches)
    return pack_mask(held_B1N, held_B1N.sum(-1), num_patches, num_rows)


def _prefix_sums(lengths: Tensor, num_rows: int | None) -> Tensor:
    """int32 [S + 1], checked to fit the rows."""
    cu_seqlens = functional.pad(lengths.flatten().cumsum(0), (1, 0)).to(torch.int32)
    if num_rows is not None:
        message = f"tokens do not fit a capacity of {num_rows} rows"
        if cu_seqlens.device.type != "cpu":
            torch._assert_async(cu_seqlens[-1] <= num_rows, message)
        elif cu_seqlens[-1] > num_rows:
            raise ValueError(f"{int(cu_seqlens[-1])} {message}")
    return cu_seqlens
