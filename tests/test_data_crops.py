import io
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from image_files import coordinate_image, encoded, smooth_image, tiff
from PIL import Image, ImageOps

from ijepa_fast.data import decode
from ijepa_fast.data.bands import Pixels
from ijepa_fast.data.crops import as_height_width, check_crop, eval_crop, random_box, random_resized_crop
from ijepa_fast.data.decode import _without_rows_below, bands_of, open_image

RATIO = (3 / 4, 4 / 3)


def reopened(data: bytes) -> Image.Image:
    return open_image(io.BytesIO(data))


def crop(data: bytes, size=32, **options) -> torch.Tensor:
    return random_resized_crop(reopened(data), size, **{"seed": 0, "epoch": 0, "index": 0} | options)


def whole(data: bytes, size=32) -> torch.Tensor:
    """The image squeezed into a square: for square images, eval_crop without a border."""
    return eval_crop(reopened(data), size, resize_ratio=1.0)


def boxes(width, height, count=4000, scale=(0.3, 1.0), ratio=RATIO):
    drawn = [random_box(width, height, scale=scale, ratio=ratio, seed=7, epoch=2, index=i) for i in range(count)]
    return np.array(drawn)


def largest_gap_to_uniform(samples, low, high) -> float:
    """Kolmogorov-Smirnov distance of samples to the uniform distribution."""
    ordered = np.sort((np.asarray(samples) - low) / (high - low))
    return np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()


def test_boxes_lie_inside_and_keep_scale_and_ratio():
    left, top, right, bottom = boxes(400, 300).T
    assert left.min() == 0 and top.min() == 0
    assert right.max() == 400 and bottom.max() == 300
    share = (right - left) * (bottom - top) / (400 * 300)
    aspect = (right - left) / (bottom - top)
    assert 0.298 < share.min() < 0.31 and share.max() <= 1
    assert 0.745 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.342


def test_area_aspect_and_position_are_uniform_where_every_box_fits():
    # Shares up to 0.4 always fit a square: nothing is rejected, so the draws must be uniform.
    count, side = 4000, 1000
    left, top, right, bottom = boxes(side, side, count, scale=(0.2, 0.4)).T
    limit = 1.95 / np.sqrt(count)  # 0.999 quantile of the Kolmogorov-Smirnov distance
    width, height = right - left, bottom - top
    assert largest_gap_to_uniform(width * height / side**2, 0.2, 0.4) < limit
    assert largest_gap_to_uniform(np.log(width / height), np.log(RATIO[0]), np.log(RATIO[1])) < limit
    for start, extent in ((left, width), (top, height)):
        assert largest_gap_to_uniform((start + 0.5) / (side - extent + 1), 0, 1) < limit
    independent = np.corrcoef([width * height, width / height, left / (side - width), top / (side - height)])
    assert np.abs(independent - np.eye(4)).max() < 4 / np.sqrt(count)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1)), ((1, 900), None)],
)
def test_extreme_shapes_fall_back_to_the_largest_central_box(size, expected):
    box = random_box(*size, scale=(0.9, 1.0), ratio=RATIO, seed=0, epoch=0, index=0)
    assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
    if expected is not None:
        assert box == expected


def test_the_crop_shows_its_box():
    data = encoded(coordinate_image(200, 150))
    for index in range(20):
        left, top, right, bottom = random_box(200, 150, scale=(0.3, 1), ratio=RATIO, seed=0, epoch=0, index=index)
        pixels = crop(data, size=16, index=index).double()
        half_width, half_height = (right - left) / 32, (bottom - top) / 32
        # The centre of output pixel k lies at (k + 1/2) / 16 of the box, in pixels counted from centres.
        columns = torch.linspace(left + half_width, right - half_width, 16, dtype=torch.double) - 0.5
        rows = torch.linspace(top + half_height, bottom - half_height, 16, dtype=torch.double) - 0.5
        inner = slice(2, -2)  # near the image's border the filter's weights are cut
        assert (pixels[0, :, inner] - columns[None, inner]).abs().max() < 1.01
        assert (pixels[1, inner] - rows[inner, None]).abs().max() < 1.01


def test_crops_are_a_function_of_their_counter():
    data = encoded(smooth_image())
    reference = crop(data)
    assert reference.shape == (3, 32, 32) and reference.dtype == torch.uint8 and reference.is_contiguous()
    assert torch.equal(reference, crop(data))
    for other in ({"seed": 1}, {"epoch": 1}, {"index": 1}, {"view": 1}):
        assert not torch.equal(reference, crop(data, **other))


def test_flip_mirrors_without_moving_the_box():
    data = encoded(smooth_image())
    assert torch.equal(crop(data, flip=1.0), crop(data).flip(2))
    flipped = sum(torch.equal(crop(data, flip=0.3, index=i), crop(data, index=i).flip(2)) for i in range(200))
    assert 35 < flipped < 86  # 60 +- 4 standard deviations


def test_rectangles():
    assert crop(encoded(smooth_image()), size=(16, 48)).shape == (3, 16, 48)
    assert eval_crop(smooth_image(), (48, 16)).shape == (3, 48, 16)


@pytest.mark.parametrize("side", [0, -3, 2.5, (8,), (8, 0), "8"])
def test_impossible_sizes(side):
    with pytest.raises(ValueError, match="image size"):
        as_height_width(side)


@pytest.mark.parametrize(
    "options",
    [((0, 1), RATIO, 0), ((0.5, 0.4), RATIO, 0), ((0.3, 1.1), RATIO, 0), ((0.3, 1), (0, 1), 0), ((0.3, 1), RATIO, 2)],
)
def test_impossible_crop_settings(options):
    with pytest.raises(ValueError, match="must"):
        check_crop(*options)


def test_eval_crop_is_resize_then_central_cut():
    image = smooth_image(300, 200)
    direct = eval_crop(image.copy(), 56, resize_ratio=8 / 7).double()
    resized = image.resize((96, 64), Image.Resampling.BICUBIC)
    cut = torch.from_numpy(np.array(resized.crop((20, 4, 76, 60)))).permute(2, 0, 1).double()
    assert (direct - cut).abs().max() <= 1


def test_eval_crop_keeps_all_of_a_square_image_of_the_right_size():
    image = smooth_image(32, 32)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(eval_crop(image, 32, resize_ratio=1.0), expected)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("size", [(1601, 1203), (997, 1500)])
def test_reduced_decoding_shows_the_same(size, subsampling):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 80, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8))
    image = Image.blend(smooth_image(*size), noise.resize(size, Image.Resampling.BICUBIC), 0.4)
    data = encoded(image, "JPEG", quality=92, subsampling=subsampling)
    makers = [lambda choice, i=i: crop(data, 96, index=i, reduced_decode=choice) for i in range(3)]
    makers.append(lambda choice: eval_crop(reopened(data), 64, reduced_decode=choice))
    for make in makers:
        reduced, full = make(True).double(), make(False).double()
        difference = reduced - full
        assert difference.abs().mean() < 1.5  # grey levels: as much as the choice between bicubic and bilinear
        for axis in (1, 2):  # least-squares shift of the picture, in pixels of the output
            (slope,) = torch.gradient(full, dim=axis)
            assert (difference * slope).sum().abs() / slope.square().sum() < 0.06


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_rows": 1}],
    ids=lambda options: next(iter(options), "baseline"),
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_rows_below_a_crop_are_not_decoded_and_change_nothing(options, mode, monkeypatch):
    image = smooth_image(901, 673).convert(mode)
    data = encoded(image, "JPEG", quality=90, **options)
    shorter = _without_rows_below
    heights = []

    def spy(image, box, size):
        result = shorter(image, box, size)
        heights.append(result.height)
        return result

    cases = [(side, index, reduced) for side in (32, 100, 224) for index in range(4) for reduced in (True, False)]

    def crops():
        return [
            crop(data, side, index=index, scale=(0.05, 0.6), reduced_decode=reduced) for side, index, reduced in cases
        ]

    monkeypatch.setattr(decode, "_without_rows_below", spy)
    some = crops()
    monkeypatch.setattr(decode, "_without_rows_below", lambda image, box, size: image)
    for one, other in zip(some, crops(), strict=True):
        assert torch.equal(one, other)
    assert sum(height < 673 for height in heights) > len(cases) / 3


def test_a_jpeg_that_ends_early_is_damaged_wherever_the_crop_lies():
    data = encoded(smooth_image(640, 640), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        random_resized_crop(reopened(data[:-200]), 32, seed=0, epoch=0, index=1, scale=(0.01, 0.02))


def test_large_boxes_are_cut_out_and_resized_as_pillow_does():
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 400), Image.Resampling.BICUBIC)
    for index in range(5):
        box = random_box(500, 400, scale=(0.3, 1), ratio=RATIO, seed=0, epoch=0, index=index)
        expected = np.array(image.crop(box).resize((128, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        difference = crop(encoded(image), (96, 128), index=index).numpy() - expected.astype(int)
        assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01


@pytest.mark.parametrize("side", [31, 32, 33, 63, 64, 65, 127, 128, 255, 257, 600])
def test_reduced_decoding_never_leaves_fewer_pixels_than_the_output(side, monkeypatch):
    seen = []
    resize = Image.Image.resize

    def spy(self, size, resample, box):
        seen.append((box[2] - box[0], box[3] - box[1], self.size))
        return resize(self, size, resample, box=box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    data = encoded(Image.new("RGB", (side, side)), "JPEG")
    whole(data, 32)
    width, height, stored = seen[0]
    assert width == height and width >= min(side, 32)
    assert width < 64 or side / width == 8  # and reduced as far as that allows
    assert stored[0] == -(-side // round(side / width))


def test_reduced_decoding_saves_time():
    data = encoded(smooth_image(2400, 1800), "JPEG")

    def seconds(reduced_decode):
        start = time.process_time()
        crop(data, 64, reduced_decode=reduced_decode)
        return time.process_time() - start

    assert min(seconds(True) for _ in range(3)) < 0.7 * min(seconds(False) for _ in range(3))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag_is_honoured(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    data = encoded(smooth_image(240, 160), file_format, exif=exif, **lossless)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((160, 240) if orientation >= 5 else (240, 160))
    for index in range(3):
        expected = crop(encoded(upright), (24, 40), index=index).int()
        got = crop(data, (24, 40), index=index).int()
        # Rows and columns are filtered in the other order; JPEG is decoded at reduced scale, too. A wrong turn: > 20.
        assert (got - expected).abs().max() <= (4 if file_format == "JPEG" else 2)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_broken_exif_counts_as_upright(exif):
    plain = smooth_image(64, 64)
    assert torch.equal(whole(encoded(plain, "JPEG", exif=exif)), whole(encoded(plain, "JPEG")))


def test_orientation_out_of_range_counts_as_upright():
    exif = Image.Exif()
    exif[0x0112] = 9
    plain = smooth_image(64, 64)
    assert torch.equal(whole(encoded(plain, exif=exif)), whole(encoded(plain)))


def as_pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "file_format"), [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("YCbCr", "TIFF")]
)
def test_modes_become_rgb(mode, file_format):
    image = smooth_image(32, 32).convert(mode)
    data = encoded(image, file_format)
    assert torch.equal(whole(data), as_pixels(reopened(data)))
    shrunk = whole(data, 8).double()
    expected = as_pixels(reopened(data)).double().reshape(3, 8, 4, 8, 4).mean((2, 4))
    assert (shrunk - expected).abs().mean() < (40 if mode == "1" else 6)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk(file_format):
    image = smooth_image(32, 32)
    options = {"quality": 100} if file_format == "JPEG" else {}
    got = whole(encoded(image.convert("CMYK"), file_format, **options))
    assert (got.int() - as_pixels(image).int()).abs().max() <= 12  # JPEG of four channels; inverted would be ~100


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(file_format):
    ramp = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    got = whole(encoded(Image.fromarray(ramp), file_format))
    expected = torch.from_numpy(np.rint(ramp * (255 / 65535)))
    assert torch.equal(got.double(), expected.expand(3, 32, 32).double())


def test_big_endian_sixteen_bit_grey():
    ramp = np.linspace(0, 65535, 32 * 32).astype(">u2").reshape(32, 32)
    image = Image.frombytes("I;16B", (32, 32), ramp.tobytes())
    got = eval_crop(image, 32, resize_ratio=1.0)
    assert got[0, 0, 0] == 0 and got[0, -1, -1] == 255 and abs(int(got[0, 16, 0]) - 128) <= 1


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_grey_outside_16_bits_is_refused(value):
    with pytest.raises(ValueError, match="32-bit grey"):
        eval_crop(Image.new("I", (32, 32), value), 32)


def test_floating_point_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        crop(encoded(Image.new("F", (32, 32), 0.5), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_pixels_become_white(mode):
    colours = Image.new("RGB", (32, 32), (10, 10, 10))
    colours.paste((80, 80, 80), (0, 0, 16, 32))
    if mode in ("RGBA", "LA"):
        image = colours.convert(mode)
        alpha = Image.new("L", (32, 32), 255)
        alpha.paste(0, (0, 0, 16, 32))
        image.putalpha(alpha)
        data = encoded(image)
    else:
        image = colours.convert(mode, palette=Image.Palette.ADAPTIVE)
        transparent = image.getpixel((0, 0))
        data = encoded(image, transparency=transparent)
    got = whole(data)
    assert (got[:, :, :16] == 255).all()
    assert (got[:, :, 16:] == 10).all()


def test_half_transparent_pixels_are_mixed_with_white():
    got = whole(encoded(Image.new("RGBA", (16, 16), (55, 55, 55, 128))), 8)
    assert (got.int() - 155).abs().max() <= 1


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 200, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert whole(data, 8)[:, 4, 4].tolist() == [200, 0, 0]


@pytest.mark.parametrize("limit", [15 * 15, 24 * 24 - 1])
def test_too_many_pixels_are_an_error_before_decoding_unless_they_are_allowed(limit, monkeypatch):
    data = encoded(smooth_image(24, 24))
    words = rf"24x24 pixels are more than loader.max_pixels \({limit}\) allows"
    with pytest.raises(ValueError, match=words):
        open_image(io.BytesIO(data), Pixels(max_pixels=limit))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=words):
        open_image(io.BytesIO(data))
    with open_image(io.BytesIO(data), Pixels(max_pixels=24 * 24)) as image:
        image.load()
    assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("bands", [4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bands_of_a_tiff_beyond_the_third_change_nothing(extra, bands, dtype):
    if bands == 5 and (not extra or dtype == np.uint16):
        pytest.skip("Pillow refuses this one")
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (8, 8, bands), dtype, endpoint=True)
    data = tiff(values, 2, (*extra, 0)[: bands - 3] if extra else ())
    expected = values[..., :3] >> (8 if dtype == np.uint16 else 0)  # Pillow takes the high byte
    assert np.array_equal(whole(data, 8).permute(1, 2, 0).numpy(), expected)
    assert bands_of(reopened(data)) == bands


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_grey_tiff_of_any_depth_and_sense(bits, white_is_zero):
    values = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint8 if bits == 8 else np.uint16).reshape(8, 8, 1)
    data = tiff(values, 0 if white_is_zero else 1, bits=bits)
    if bits == 12 and white_is_zero and not (find_spec("tifffile") and find_spec("imagecodecs")):
        with pytest.raises((ValueError, NotImplementedError), match="tifffile may read this TIFF|imagecodecs"):
            whole(data, 8)
        return
    expected = values[..., 0].astype(float) * 255 / (2**bits - 1)
    expected = 255 - expected if white_is_zero else expected
    assert np.abs(whole(data, 8)[0].numpy() - expected).max() <= 0.5


def test_an_image_in_memory_is_cropped_like_its_file():
    image = smooth_image()
    in_memory = random_resized_crop(image.copy(), 32, seed=0, epoch=0, index=0)
    assert torch.equal(in_memory, crop(encoded(image)))


def test_a_jpeg_decoded_already_is_cropped_too():
    data = encoded(smooth_image(640, 480), "JPEG")
    image = reopened(data)
    image.load()
    loaded = random_resized_crop(image, 32, seed=0, epoch=0, index=0)
    assert torch.equal(loaded, crop(data, reduced_decode=False))
