"""Normalised pixels of the wanted patches, one patch a row (``ops.gather_patches`` defines it).

Legend: B images, C channels, H x W pixels, p patch size, N patches per image, T rows, K = C * p * p rounded up to 16.

One program moves a few patches, channel by channel, as tiles whose sides are rounded up to powers of two. It reads with
the lanes of a warp along the pixels of a line, then along the rows out: tokens that follow each other are mostly
neighbours in the image, so a warp reads one stretch of an image line. It writes with the lanes along the columns of
one row out; Triton turns the tile in shared memory between the two. No wider access than a line's alignment exists: at
p = 14 a line of uint8 begins on any even byte (loads of 16 bits) and its 14 bf16 results on any fourth (stores of 32);
at p = 16 both are 128 bits wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import accumulator, check
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, configuration, record_specs

MAX_PATCH_SIZE = 128

# By the square of the patch side, rounded up to a power of two: rows per program and warps.
CONFIGS = {
    (arch, itemsize): ((64, (4 * rows, 4)), (256, (rows, 4)), (1024, (rows // 4, 4)), (4096, (1, 4)), (16384, (1, 8)))
    for arch in ARCHITECTURES
    for itemsize, rows in {1: 16, 2: 16, 4: 8, 8: 8}.items()
}


@triton.jit(do_not_specialize=["num_rows"])
def gather_patches_kernel(
    images,
    indices,
    out,
    num_rows,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    SCALES: tl.constexpr,
    SHIFTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    grid_w: tl.constexpr = W // P
    patches: tl.constexpr = (H // P) * grid_w
    wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else accumulator(images)
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    rows_left = (num_rows - first).to(tl.int32)

    # Read as [y, (row, x)]: the lanes of a warp take the same line of pixels of neighbouring patches.
    row = tl.arange(0, BLOCK_T)
    token = tl.load(indices + first + row, mask=row < rows_left, other=-1)
    patch = token % patches
    first_pixel = (token // patches).to(tl.int64) * (C * H * W) + patch // grid_w * (P * W) + patch % grid_w * P
    first_pixel = tl.where(token >= 0, first_pixel, -P)
    first_pixel = tl.reshape(tl.broadcast_to(first_pixel[:, None], [BLOCK_T, BLOCK_P]), [BLOCK_T * BLOCK_P])
    # What the compiler no longer sees behind the reshape, and needs for wide loads.
    first_pixel = tl.multiple_of(tl.max_constancy(first_pixel, BLOCK_P), P & -P)
    wanted = first_pixel >= 0
    x, y = tl.arange(0, BLOCK_T * BLOCK_P) % BLOCK_P, tl.arange(0, BLOCK_P)
    source = images + (first_pixel + x)[None, :] + y[:, None] * W
    readable = (wanted & (x < P))[None, :] & (y < P)[:, None]

    # Written as [row, (y, x)]: the lanes of a warp take neighbouring columns.
    y, x = tl.arange(0, BLOCK_P * BLOCK_P) // BLOCK_P, tl.arange(0, BLOCK_P * BLOCK_P) % BLOCK_P
    destination = out + first * K + row[:, None] * K + (y * P + x)[None, :]
    writable = row[:, None] < tl.where((y < P) & (x < P), rows_left, 0)[None, :]  # one comparison per store

    for channel in tl.static_range(C):
        pixels = tl.load(source + channel * (H * W), mask=readable, other=0).to(wide)
        scale = tl.where(wanted, tl.full([], SCALES[channel], wide), 0)[None, :]
        shift = tl.where(wanted, tl.full([], SHIFTS[channel], wide), 0)[None, :]
        values = (pixels * scale + shift).to(out.dtype.element_ty)
        values = tl.permute(tl.reshape(values, [BLOCK_P, BLOCK_T, BLOCK_P]), (1, 0, 2))
        values = tl.reshape(values, [BLOCK_T, BLOCK_P * BLOCK_P])
        tl.store(destination + channel * (P * P), values, mask=writable)
    if K > C * P * P:
        behind = C * P * P + tl.arange(0, 16)[None, :]
        zeros = tl.zeros([BLOCK_T, 16], out.dtype.element_ty)
        tl.store(out + first * K + row[:, None] * K + behind, zeros, mask=(row < rows_left)[:, None] & (behind < K))


def _affine(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel what pixels are multiplied by and what is added: ``(x / 255 - mean) / std`` as one step."""
    channels = images.shape[1]
    unit = 1 / 255 if images.dtype == torch.uint8 else 1.0
    if not mean and not std:
        return (unit,) * channels, (0.0,) * channels
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"gather_patches: {channels} channels, but {len(mean)} means and {len(std)} deviations")
    return tuple(unit / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def gather_patches(
    images: Tensor,
    indices: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    _, channels, height, width = images.shape
    if not 1 <= patch_size <= MAX_PATCH_SIZE:
        raise ValueError(f"gather_patches: the patch size must be between 1 and {MAX_PATCH_SIZE}, got {patch_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(f"gather_patches: images of {height} x {width} are no multiple of the patch size {patch_size}")
    out = images.new_empty(indices.shape[0], triton.cdiv(channels * patch_size * patch_size, 16) * 16, dtype=dtype)
    floating = {"images": images} if images.dtype != torch.uint8 else {}
    check("gather_patches", {**floating, "the result": out}, {"indices": indices})
    scales, shifts = _affine(images, mean, std)
    if out.shape[0]:
        side = triton.next_power_of_2(patch_size)
        rows, num_warps = configuration(CONFIGS, images.dtype.itemsize, side * side)
        grid = (triton.cdiv(out.shape[0], rows),)
        gather_patches_kernel[grid](
            images.contiguous(),
            indices.contiguous(),
            out,
            out.shape[0],
            C=channels,
            H=height,
            W=width,
            P=patch_size,
            K=out.shape[1],
            SCALES=scales,
            SHIFTS=shifts,
            BLOCK_T=rows,
            BLOCK_P=side,
            num_warps=num_warps,
        )
    return out


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    indices = torch.empty(256, dtype=torch.int32, device="meta")
    for pixels, patch_size, size in [
        (torch.uint8, 14, 224),
        (torch.uint8, 16, 224),
        (torch.uint8, 16, 448),
        (torch.uint8, 8, 96),
        (torch.float32, 14, 224),
        (torch.float32, 16, 224),
        (torch.bfloat16, 14, 224),
        (torch.bfloat16, 16, 224),
    ]:
        case = f"{str(pixels).removeprefix('torch.')} p={patch_size} {size}px"
        images = torch.empty(8, 3, size, size, dtype=pixels, device="meta")
        # A patch begins at any multiple of its own row's length in bytes.
        row = patch_size * pixels.itemsize
        load_bits = 8 * min(16, row & -row)
        for dtype in (torch.bfloat16,) if pixels != torch.float32 else (torch.bfloat16, torch.float32):
            arguments = (images, indices, patch_size, mean, std, dtype)
            yield from record_specs(arch, case, gather_patches, *arguments, memory_bound=True, load_bits=load_bits)
