"""Images damaged at random, with fixed seeds: each is cropped, or counted as bad with its reason, and soon.

Pillow does not notice every flipped bit, so pixels may differ from those of the whole file; what is held is that
nothing is raised, printed or hung on, and that what is left out is named.
"""

import random
import warnings

import numpy as np
import pytest
import torch
from image_files import encoded, smooth_image, tiff
from PIL import Image

from ijepa_fast.data import BadFilesError, EvalLoader, ImageFolder, TrainLoader
from ijepa_fast.data.datasets import Sources
from ijepa_fast.data.survey import announce


def whole_files() -> dict[str, bytes]:
    """Suffix -> a file of each usual kind."""
    image = smooth_image(60, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.random.default_rng(0).integers(0, 65536, (20, 20, 1), np.uint16)
    return {
        ".jpg": encoded(image, "JPEG", exif=exif),
        ".jpeg": encoded(image.convert("CMYK"), "JPEG", progressive=True),
        ".png": encoded(image.convert("RGBA")),
        ".apng": encoded(image.convert("P")),
        ".gif": encoded(image, "GIF"),
        ".webp": encoded(image, "WEBP"),
        ".bmp": encoded(image, "BMP"),
        ".tif": tiff(values, 0),
        ".tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        ".ppm": encoded(image, "PPM"),
        ".jp2": encoded(image, "JPEG2000"),
        ".ico": encoded(image, "ICO", sizes=[(16, 16)]),
    }


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut off, with flipped bits, with zeroed bytes, with another file's bytes inside, or empty."""
    kind = draw.randrange(5)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    # Headers are where most can go wrong.
    reach = len(content) if draw.random() < 0.5 else min(len(content), 64)
    if kind == 1:
        for _ in range(draw.choice([1, 3, 30])):
            changed[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        start = draw.randrange(reach)
        changed[start : start + draw.choice([1, 16, 4096])] = bytes(min(16, len(content) - start))
    elif kind == 3:
        start = draw.randrange(reach)
        changed[start : start + 16] = draw.randbytes(16)
    return bytes(changed)


def write_damaged(root, count: int, seed: int) -> None:
    """So many damaged files, a quarter of them under the suffix of another format."""
    draw, files = random.Random(seed), whole_files()
    suffixes = sorted(set(files) & {".jpg", ".jpeg", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
    for number in range(count):
        suffix = draw.choice(sorted(files))
        name = suffix if draw.random() < 0.75 else draw.choice(suffixes)
        (root / f"{number:04d}{name}").write_bytes(damaged(files[suffix], draw))


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 60), *(pytest.param(seed, 300, marks=pytest.mark.slow) for seed in range(2, 5))]
)
def test_damaged_images_are_cropped_or_named(tmp_path, capfd, seed, count):
    write_damaged(tmp_path, count, seed)
    for number in range(8):
        (tmp_path / f"good{number}.png").write_bytes(encoded(smooth_image(40, 40, number)))
    source = ImageFolder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        announce(*Sources(source, None))
        steps = len(source) // 8
        loader = TrainLoader(source, image_size=16, global_batch=8, seed=seed, num_steps=steps, max_bad_share=1)
        for batch in loader:
            assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.uint8
            assert all(reason for _, reason in batch.failures)
        evaluation = EvalLoader(source, 16, 50)
        decoded = sum(len(batch.indices) for batch in evaluation)
    assert decoded + len(evaluation.bad) == len(source) and decoded >= 8
    assert set(loader.bad) <= set(evaluation.bad)
    assert all("good" not in name and reason and "\n" not in reason for name, reason in evaluation.bad.items())
    assert len(evaluation.bad) > count / 4
    told = capfd.readouterr()  # libtiff itself prints single lines
    assert not told.out and "Traceback" not in told.err and "Warning" not in told.err


def test_too_many_damaged_images_are_one_error_with_examples(tmp_path):
    write_damaged(tmp_path, 60, seed=1)
    with pytest.raises(BadFilesError, match=r"more than the allowed 5.0% of the images are bad .*for example:\n"):
        list(TrainLoader(ImageFolder(tmp_path), image_size=16, global_batch=8, seed=1, num_steps=20))
