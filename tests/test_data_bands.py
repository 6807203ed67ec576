"""Images that are not 8-bit RGB: other numbers of bands, 16 bits, floating point, arrays, very large files."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_files import encoded, smooth_image, tiff
from PIL import Image
from torch.testing import assert_close

from ijepa_fast.data import EvalLoader, ImageFolder, TrainLoader
from ijepa_fast.data.bands import ArrayBands, Pixels, StoredBands
from ijepa_fast.data.crops import eval_crop, random_resized_crop
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.decode import open_image, stored
from ijepa_fast.data.survey import announce, measured
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.run.auto import look_at

RNG = np.random.default_rng(0)


def values(*shape, dtype=np.uint8, high=None):
    return RNG.integers(0, np.iinfo(dtype).max if high is None else high, shape, dtype, endpoint=True)


def whole(image, **pixels):
    """All of a square image: [C, side, side]."""
    pixels = Pixels(**pixels)
    opened = open_image(io.BytesIO(image), pixels) if isinstance(image, bytes) else image
    side = opened.shape[0] if isinstance(opened, np.ndarray) else opened.size[0]
    return eval_crop(opened, side, pixels=pixels, resize_ratio=1.0)


def tiff_by(package, array, **options) -> bytes:
    file = io.BytesIO()
    pytest.importorskip(package).imwrite(file, array, **options)
    return file.getvalue()


def test_transparency_is_a_fourth_band_or_laid_on_white_as_in_chans_says():
    array = values(16, 16, 4)
    data = encoded(Image.fromarray(array))
    assert np.array_equal(whole(data, channels=4), array.transpose(2, 0, 1))
    share = array[..., 3:] / 255
    on_white = (array[..., :3] * share + 255 * (1 - share)).transpose(2, 0, 1)
    assert np.abs(whole(data, channels=3).numpy() - on_white).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "1", "RGBA"])
def test_one_channel_is_grey(mode):
    image = smooth_image(32, 32).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB").convert("L"))
    assert np.abs(whole(data, channels=1)[0].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "bands"), [("LA", 2), ("CMYK", 4), ("RGBA", 4)])
def test_as_many_bands_as_channels_stay_as_they_are(mode, bands):
    array = values(16, 16, bands)
    data = encoded(Image.fromarray(array, mode) if mode != "CMYK" else Image.frombytes(mode, (16, 16), array.tobytes()),
                   "TIFF" if mode == "CMYK" else "PNG")  # fmt: skip
    assert np.array_equal(whole(data, channels=bands), array.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_a_stated_range_keeps_sixteen_bits(channels, file_format):
    array = values(16, 16, dtype=np.uint16, high=4095)
    got = whole(encoded(Image.fromarray(array), file_format), channels=channels, value_range=(0, 4095))
    assert got.dtype == torch.uint16 and got.shape == (channels, 16, 16)
    assert np.array_equal(got[-1], np.rint(array * (65535 / 4095)))


def test_values_beyond_the_range_are_clipped_and_no_numbers_are_the_lowest():
    array = np.linspace(-2, 2, 64, dtype=np.float32).reshape(8, 8)
    array[0, 1] = np.nan
    got = whole(encoded(Image.fromarray(array), "TIFF"), channels=1, value_range=(-1, 1))[0].numpy()
    expected = np.where(np.isnan(array), 0, ((array + 1) / 2).clip(0, 1) * 65535)
    assert np.abs(got - expected).max() <= 0.51


def test_marks_outside_the_range_do_not_spread_over_their_neighbours():
    array = np.full((32, 32), 500, np.int16)
    array[:, 17:] = -9999
    array[:, :3] = 30000
    got = whole(array, channels=1, value_range=(0, 1000))[0, 0].long()
    assert got[8] == 32768 and got[17] == 0 and got[0] == 65535
    small = eval_crop(array, 16, pixels=Pixels(1, (0, 1000)), resize_ratio=1.0)[0, 0].long()
    assert 0 < small[8] < 32768 < small[1] < 65535  # pixels of both sorts
    infinite = np.where(array == 30000, np.inf, array.astype(np.float32))
    assert torch.equal(whole(infinite, channels=1, value_range=(0, 1000))[0, 0].long(), got)


def test_floats_without_a_range_are_refused():
    data = encoded(Image.new("F", (8, 8), 0.5), "TIFF")
    for channels in (1, 2, 3):
        with pytest.raises(ValueError, match=r"range|bands?"):
            whole(data, channels=channels)
    with pytest.raises(ValueError, match=r"float32 have no agreed range: .*--loader.value_range '\[LOW, HIGH\]'"):
        whole(np.zeros((8, 8, 2), np.float32), channels=2)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_have_their_bands_last_or_first(tmp_path, dtype, first):
    array = values(16, 16, 5, dtype=dtype)
    np.save(tmp_path / "a.npy", np.moveaxis(array, -1, 0) if first else array)
    with open_image(tmp_path / "a.npy", Pixels(channels=5)) as image:
        assert isinstance(image, ArrayBands) and image.size == (16, 16) and image.bands == 5
        got = eval_crop(image, 16, pixels=Pixels(channels=5), resize_ratio=1.0)
    assert got.dtype == torch.uint8
    assert np.array_equal(got, np.rint(array.transpose(2, 0, 1) / (257 if dtype == np.uint16 else 1)))


@pytest.mark.parametrize("shape", [(8,), (2, 8, 8, 3), (0, 8, 3)])
def test_arrays_that_are_no_images(shape):
    with pytest.raises(ValueError, match="an image is an array"):
        ArrayBands(np.zeros(shape, np.uint8), 3)
    with pytest.raises(ValueError, match="complex64 are none of an image"):
        ArrayBands(np.zeros((8, 8), np.complex64), 1)


def test_bands_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="the image has 3 bands, and model.in_chans is 5"):
        whole(encoded(smooth_image(16, 16)), channels=5)
    with pytest.raises(ValueError, match="the image has 5 bands, and model.in_chans is 3"):
        whole(values(8, 8, 5), channels=3)


@pytest.mark.parametrize("box", [(0, 0, 60, 50), (3, 7, 41, 30), (20.5, 11.25, 58.5, 49.75), (10, 10, 18, 18)])
def test_arrays_are_resampled_to_the_bit_as_pillow_does(box):
    image = smooth_image(60, 50)
    expected = np.array(stored(image, Pixels()).resample(box, (16, 12), True))
    array = StoredBands(ArrayBands(np.array(image), 3), Pixels())
    assert np.abs(array.resample(box, (16, 12), True).astype(int) - expected).max() <= 1
    stated = StoredBands(ArrayBands(np.array(image), 3), Pixels(value_range=(0, 255)))
    assert np.abs(stated.resample(box, (16, 12), True) / 257 - expected).max() <= 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_hold_for_any_number_of_bands(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth_image(24, 24)
    image.putalpha(Image.fromarray(values(24, 24)))
    data = encoded(image, exif=exif)
    assert np.array_equal(whole(data, channels=4)[:3], whole(encoded(image.convert("RGB"), exif=exif)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_of_tiffs_are_those_of_pillow(orientation):
    array = values(24, 40, dtype=np.uint16)
    data = tiff_by("tifffile", array, tile=(16, 16), extratags=[(274, 3, 1, orientation, True)])
    expected = np.asarray(Image.open(io.BytesIO(data)))
    pixels = Pixels(1, (0, 65535))
    with open_image(io.BytesIO(data), pixels) as image:
        assert image.size == expected.shape[::-1] and isinstance(image, ArrayBands)
        got = stored(image, pixels).resample((3, 5, 20, 22), (17, 17), True)
    assert np.array_equal(got[..., 0], expected[5:22, 3:20])


def test_crops_of_bands_are_functions_of_their_counter_and_flip():
    array, pixels = values(40, 30, 4), Pixels(channels=4)
    options = {"pixels": pixels, "seed": 1, "epoch": 2, "index": 3}
    one, mirrored = (random_resized_crop(array, (16, 24), flip=flip, **options) for flip in (0.0, 1.0))
    assert one.shape == (4, 16, 24)
    assert torch.equal(one.flip(2), mirrored)


LAYOUTS = [
    ("pages", {"photometric": "minisblack"}, (0, 1, 2)),
    ("planar", {"photometric": "minisblack", "planarconfig": "separate"}, (0, 1, 2)),
    ("interleaved", {"photometric": "minisblack", "planarconfig": "contig"}, (1, 2, 0)),
    ("tiled", {"photometric": "minisblack", "planarconfig": "separate", "tile": (32, 16)}, (0, 1, 2)),
    ("strips", {"photometric": "minisblack", "planarconfig": "contig", "rowsperstrip": 7}, (1, 2, 0)),
    ("imagej", {"imagej": True}, (0, 1, 2)),
]


@pytest.mark.parametrize(("layout", "options", "order"), LAYOUTS, ids=[name for name, *_ in LAYOUTS])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs_of_five_bands_in_every_layout(layout, options, order, dtype):
    array = values(5, 64, 64, dtype=dtype)
    data = tiff_by("tifffile", array.transpose(order), **options)
    assert np.array_equal(whole(data, channels=5), np.rint(array / (257 if dtype == np.uint16 else 1)))
    pixels = Pixels(channels=5, value_range=(0, np.iinfo(dtype).max))
    part = stored(open_image(io.BytesIO(data), pixels), pixels).resample((5, 20, 37, 52), (32, 32), True)
    got, expected = part.transpose(2, 0, 1) / 65535, array[:, 20:52, 5:37] / np.iinfo(dtype).max
    assert np.abs(got - expected).max() < 1e-4


def test_of_a_tiff_the_first_three_bands_are_used_where_a_range_is_stated_too():
    array = values(24, 24, 5, dtype=np.uint16)
    data = tiff_by("tifffile", array, photometric="minisblack", planarconfig="contig")
    got = whole(data, channels=3, value_range=(0, 65535)).numpy()
    assert np.abs(got.astype(int) - array.transpose(2, 0, 1)[:3]).max() <= 1
    with pytest.raises(ValueError, match="the image has 5 bands, and model.in_chans is 3"):
        whole(array, channels=3, value_range=(0, 65535))


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_zero(bits):
    pytest.importorskip("tifffile")
    array = values(8, 8, 1, dtype=np.uint8 if bits == 8 else np.uint16)
    top = 2**bits - 1
    got = whole(tiff(array, 0, bits=bits), channels=1, value_range=(0, top))
    assert np.abs(got[0].numpy() / 65535 - (1 - array[..., 0] / top)).max() < 1e-4


def test_of_large_tiffs_only_tiles_under_the_crop_are_read(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    array = values(512, 512, 3)
    for kind, options in {"tiles": {"tile": (64, 64)}, "whole": {"rowsperstrip": 512}}.items():
        tifffile.imwrite(tmp_path / f"{kind}.tif", array, photometric="rgb", **options)
    pixels, read = Pixels(max_pixels=10_000), []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1: read.append(size) or original(self, size))
    with open_image(tmp_path / "tiles.tif", pixels) as image:
        read.clear()
        got = stored(image, pixels).resample((140, 140, 180, 180), (40, 40), True)
        assert sum(read) == 64 * 64 * 3
        assert np.array_equal(got, array[140:180, 140:180])
        with pytest.raises(
            ValueError, match=r"a crop of 512x512 pixels is more than loader.max_pixels \(10000\) allows"
        ):
            stored(image, pixels).resample((0, 0, 512, 512), (50, 50), True)
    with open_image(tmp_path / "tiles.tif", pixels) as image:
        middle = eval_crop(image, 80, pixels=pixels, resize_ratio=1.0)
    side = (0.8 * 10_000) ** 0.5
    box = (256 - side / 2, 256 - side / 2, 256 + side / 2, 256 + side / 2)
    expected = Image.fromarray(array).resize((80, 80), Image.Resampling.BICUBIC, box=box)
    assert np.abs(middle.permute(1, 2, 0).numpy().astype(int) - np.array(expected)).max() <= 1


def test_tiles_that_were_never_written_are_zero(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    array = values(32, 32, dtype=np.uint16)
    tiles = (array[:16, :16], None, None, array[16:, 16:])
    tifffile.imwrite(tmp_path / "x.tif", iter(tiles), shape=(32, 32), dtype=np.uint16, tile=(16, 16), compression=8)
    array[:16, 16:] = array[16:, :16] = 0
    assert np.array_equal(whole((tmp_path / "x.tif").read_bytes(), channels=1, value_range=(0, 65535))[0], array)


def test_the_reduced_images_of_a_pyramid_are_used(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    full = np.array(smooth_image(512, 512))
    with tifffile.TiffWriter(tmp_path / "slide.svs") as file:
        file.write(full, tile=(64, 64), photometric="rgb", subifds=2)
        for step in (4, 16):
            file.write(full[::step, ::step], tile=(64, 64), photometric="rgb", subfiletype=1)
    pixels = Pixels(max_pixels=150 * 150)
    with open_image(tmp_path / "slide.svs", pixels) as image:
        assert image.levels == [(512, 512), (128, 128), (32, 32)]
        reduced = eval_crop(image, 64, pixels=pixels, resize_ratio=1.0)
    exact = eval_crop(Image.fromarray(full), 64, resize_ratio=1.0)
    assert (reduced.int() - exact.int()).abs().max() < 12
    assert ImageFolder(tmp_path).path(0).endswith("slide.svs")


def test_a_tiff_that_only_tifffile_reads_says_so(tmp_path, monkeypatch):
    data = tiff(values(8, 8, 7, dtype=np.uint16), 1, (0,) * 6)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"tifffile may read this TIFF: pip install 'ijepa_fast\[images\]'"):
        open_image(io.BytesIO(data))


def test_colours_of_sixteen_bits_keep_what_pillow_reads_of_them():
    array = np.full((8, 8, 3), 0x8040, np.uint16)
    data = tiff(array, 2)
    pixels = Pixels(value_range=(0, 65535))
    got = whole(data, channels=3, value_range=(0, 65535))
    assert (
        np.abs(got.numpy() / 65535 - 0x8040 / 65535).max() < 1 / 255 and pixels.empty(1, (8, 8)).dtype == torch.uint16
    )


def test_damaged_arrays_do_not_keep_settings_from_being_chosen(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", values(8, 9, 2))
    (tmp_path / "1.npy").write_bytes(b"\x93NUMPY, cut off")
    assert look_at(ImageFolder(tmp_path, channels=2)) == (3, 8)


def test_arrays_are_images_where_there_are_no_others(tmp_path):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, values(8, 8, 4))
    assert [os.path.basename(path) for path in ImageFolder(tmp_path).relative_paths()] == ["a.npy", "b.npy"]
    (tmp_path / "c.png").write_bytes(encoded(smooth_image(8, 8)))
    folder = ImageFolder(tmp_path)
    assert folder.relative_paths() == ["c.png"] and folder.passed_over == {".npy": 2}


@pytest.mark.parametrize(("name", "package"), [("a.avif", None), ("a.heic", "pillow_heif")])
def test_avif_and_heic_are_read_where_they_can_be(tmp_path, name, package):
    if package is not None:
        pytest.importorskip(package).register_heif_opener()
    image = smooth_image(32, 32)
    image.save(tmp_path / name, quality=95)
    with ImageFolder(tmp_path).open(0) as opened:
        got = eval_crop(opened, 32, resize_ratio=1.0)
    assert (got.double() - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs().mean() < 6


def folder_of(tmp_path, *arrays):
    tmp_path.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number:02}.npy", array)
    return tmp_path


def announced(caplog, root, **pixels):
    caplog.clear()
    with caplog.at_level("INFO"):
        announce(*open_sources(str(root), **pixels))
    lines = [record.getMessage() for record in caplog.records if record.name == "ijepa_fast.data.survey"]
    return lines[0], lines[1:]


def test_what_the_images_hold_is_said_at_the_start(tmp_path, caplog):
    root = folder_of(tmp_path / "five", *values(3, 8, 8, 5, dtype=np.uint16))
    line, warnings = announced(caplog, root, channels=5)
    assert "array, 5 x uint16, values " in line and not warnings
    with pytest.raises(
        ValueError, match="the image has 5 bands, and model.in_chans is 4; values .* in the 3 looked at"
    ):
        announced(caplog, root, channels=4)
    root = folder_of(tmp_path / "float", *np.linspace(-999.0, 1999.0, 192).reshape(3, 8, 8))
    with pytest.raises(ValueError, match="float64 have no agreed range: .*; values -999 to 1999 in the 3"):
        announced(caplog, root, channels=1)
    assert "are clipped: they are -9" in announced(caplog, root, channels=1, value_range=(0, 500))[1][0]
    assert "fill little of loader.value_range" in announced(caplog, root, channels=1, value_range=(-1e5, 1e5))[1][0]
    root = folder_of(tmp_path / "mixed", values(8, 8, 4), values(8, 8, 4), values(8, 8, 5))
    _, (warning,) = announced(caplog, root, channels=4)
    assert warning == "1 of the 3 images looked at cannot be used: the image has 5 bands, and model.in_chans is 4"


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"channels": 0}, "model.in_chans must be at least 1, got 0"),
        ({"value_range": (5, 5)}, r"loader.value_range must be \[low, high\], low below high, got \[5, 5\]"),
    ],
)
def test_wrong_settings(pixels, message):
    with pytest.raises(ValueError, match=message):
        open_sources("rendered", **pixels)


def test_mean_and_deviation_are_measured_per_channel(tmp_path):
    arrays = [np.stack([np.full((8, 8), level), np.eye(8) * 2000], -1).astype(np.uint16) for level in (0, 500, 1000)]
    source = ImageFolder(folder_of(tmp_path / "a", *arrays), channels=2, value_range=(0, 1000))
    mean, std = measured(source, 8)
    assert_close(
        torch.tensor([mean, std]), torch.tensor([[0.5, 1 / 8], [(1 / 6) ** 0.5, (7 / 64) ** 0.5]]), atol=2e-4, rtol=0
    )
    constant = ImageFolder(folder_of(tmp_path / "b", np.full((8, 8, 2), 7, np.uint8)), channels=2)
    with pytest.raises(ValueError, match=r"channel 0 of the images is 0.02745 .* everywhere.* state model.mean_std"):
        measured(constant, 8)


class InMemory:
    """A user's source of arrays."""

    labels = classes = None
    fingerprint = "arrays"
    pixels = Pixels(channels=4, value_range=(0.0, 1.0))

    def __len__(self):
        return 8

    def open(self, index):
        return np.full((4, 20, 24), index / 8)

    def describe(self, index):
        return f"array {index}"


def test_loaders_take_arrays_of_a_users_source():
    options = {"image_size": (8, 16), "global_batch": 4, "seed": 0}
    batch = next(iter(TrainLoader(InMemory(), **options)))
    assert batch.images.shape == (4, 4, 8, 16) and batch.images.dtype == torch.uint16 and not batch.failures
    assert np.abs(batch.images[:, 0, 0, 0].numpy() / 65535 - batch.indices.numpy() / 8).max() < 1e-4
    assert len(list(EvalLoader(InMemory(), 8, 3))) == 3


def test_sixteen_bit_crops_are_normalised_like_floats():
    torch.manual_seed(0)
    encoder = VisionTransformer((16, 24), 8, 4, 16, 1, 2, mean=[0.1, 0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7, 0.8])
    crops = torch.from_numpy(values(2, 4, 16, 24, dtype=np.uint16))
    shape = (1, 4, 1, 1)
    mean, std = torch.tensor(encoder.patch_embed.mean).view(shape), torch.tensor(encoder.patch_embed.std).view(shape)
    assert_close(encoder(crops), encoder((crops.float() / 65535 - mean) / std), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_sources_and_crops_pass_to_spawned_processes(tmp_path):
    """What macOS and Windows start workers with: no module state of the parent, everything pickled."""
    folder_of(tmp_path, *values(4, 16, 16, 5, dtype=np.uint16))
    source = ImageFolder(tmp_path, channels=5, value_range=(0, 65535))
    loader = TrainLoader(source, image_size=8, global_batch=4, seed=0)
    expected = next(iter(loader))
    (tmp_path / "samples").write_bytes(pickle.dumps((loader._samples, next(iter(loader._requests)))))
    code = (
        "import pickle, sys; samples, request = pickle.load(open(sys.argv[1], 'rb')); batch = samples[request];"
        "print(batch.images.dtype, int(batch.images.long().sum()), len(batch.failures))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "samples")], capture_output=True, text=True)
    assert result.stdout.split() == ["torch.uint16", str(int(expected.images.long().sum())), "0"], result.stderr
