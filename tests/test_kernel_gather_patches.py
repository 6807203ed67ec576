"""gather_patches kernel in Triton's interpreter against the fp64 reference."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_testing import (
    INTERPRETED_DTYPES,
    LastProgram,
    allocate_huge_outputs,
    assert_close_to_reference,
    huge,
    interpreted,
    rows_beyond_int32,
)

from ijepa_fast import ops
from ijepa_fast.kernels import gather_patches as kernels

pytestmark = pytest.mark.interpreter

# In x * scale + shift the scale (twice) and the product are rounded; 1 / std is at most 4.5.
MAGNITUDE = 3 * 4.5
MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)


def draw_case(rows: int, images: int, channels: int, patch_size: int, grid: tuple[int, int], seed: int):
    """uint8 images [images, channels, ...] and indices with padding rows and repetitions among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, channels, grid[0] * patch_size, grid[1] * patch_size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    indices = torch.randint(-1, images * grid[0] * grid[1], (rows,), generator=generator, dtype=torch.int32)
    return pixels, indices, patch_size


cases = st.builds(
    draw_case,
    st.integers(0, 40),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 3, 4, 7, 8, 14, 16, 28]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 2**31),
)
EXAMPLES = [draw_case(0, 1, 3, 14, (2, 2), 0), draw_case(1, 1, 3, 14, (1, 1), 0), draw_case(21, 2, 3, 16, (3, 2), 0)]


def in_fp64(images, indices, patch_size, mean, std, dtype):
    """The reference on pixels that are already fp64 (of uint8 it computes in fp32)."""
    return ops.gather_patches.definition(images.double() / 255, indices, patch_size, mean, std, dtype)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases, st.booleans())
@example(EXAMPLES[0], True)
@example(EXAMPLES[1], True)
@example(EXAMPLES[2], True)
def test_uint8_images(dtype, case, normalise):
    images, indices, patch_size = case
    channels = images.shape[1] if normalise else 0
    arguments = [images, indices, patch_size, list(MEAN[:channels]), list(STD[:channels]), dtype]
    assert_close_to_reference(
        kernels.gather_patches,
        ops.gather_patches.definition,
        arguments,
        dtype,
        exact_reference=in_fp64,
        magnitudes=[MAGNITUDE if normalise else 0],
    )


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(EXAMPLES[0])
@example(EXAMPLES[2])
def test_floating_images(dtype, case):
    images, indices, patch_size = case
    channels = images.shape[1]
    arguments = [images / 255, indices, patch_size, list(MEAN[:channels]), list(STD[:channels]), dtype]
    assert_close_to_reference(
        kernels.gather_patches, ops.gather_patches.definition, arguments, dtype, magnitudes=[MAGNITUDE]
    )


def test_without_normalisation_pixels_are_copied_and_only_real_columns_are_filled():
    images = torch.randn(2, 3, 28, 42)
    indices = torch.tensor([5, -1, 11], dtype=torch.int32)
    rows = kernels.gather_patches(images, indices, 14, [], [], torch.float32)
    assert rows.shape == (3, 592)
    assert torch.equal(rows[0, :588].view(3, 14, 14), images[0, :, 14:, 28:])
    assert torch.equal(rows[2, :588].view(3, 14, 14), images[1, :, 14:, 28:])
    assert rows[:, 588:].eq(0).all() and rows[1].eq(0).all()


def test_non_contiguous_images():
    images, indices, patch_size = draw_case(9, 2, 3, 14, (2, 3), 0)
    rows = kernels.gather_patches(images, indices, patch_size, [], [], torch.float32)
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(kernels.gather_patches(channels_last, indices, patch_size, [], [], torch.float32), rows)


def test_offsets_beyond_int32_when_reading():
    images = huge(rows_beyond_int32(3 * 32 * 32), 3 * 32 * 32, torch.uint8).view(-1, 3, 32, 32)
    images[-1, 2, 16:, 16:] = 255
    indices = torch.tensor([4 * len(images) - 1, 0], dtype=torch.int32)
    rows = kernels.gather_patches(images, indices, 16, [], [], torch.float32)
    assert rows[0, 512:].eq(1).all() and rows[0, :512].eq(0).all() and rows[1].eq(0).all()


def test_offsets_beyond_int32_when_writing(monkeypatch):
    images, _, _ = draw_case(0, 1, 3, 14, (1, 1), 0)
    indices = torch.zeros(rows_beyond_int32(592), dtype=torch.int32)
    expected = kernels.gather_patches(images, indices[:1], 14, [], [], torch.float16)
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setattr(kernels, "gather_patches_kernel", LastProgram(kernels.gather_patches_kernel, monkeypatch))
    rows = kernels.gather_patches(images, indices, 14, [], [], torch.float16)
    assert torch.equal(rows[-1], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, "images must be bfloat16, .* got torch.int32"),
        ({"dtype": torch.int8}, "the result must be bfloat16, .* got torch.int8"),
        ({"indices": torch.zeros(2, dtype=torch.int64)}, "indices must be int32, got torch.int64"),
        ({"patch_size": 3}, "images of 8 x 8 are no multiple of the patch size 3"),
        ({"patch_size": 256}, "between 1 and 128, got 256"),
        ({"std": [0.5]}, "3 channels, but 3 means and 1 deviations"),
    ],
)
def test_unsupported_arguments_raise(change, message):
    arguments = {
        "images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        "indices": torch.zeros(2, dtype=torch.int32),
        "patch_size": 4,
        "mean": list(MEAN[:3]),
        "std": list(STD[:3]),
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        kernels.gather_patches(**{**arguments, **change})
