"""The embedded set: reproducible, balanced, and without a short cut to the class."""

import pickle

import numpy as np
import pytest

from ijepa_fast.data import Source
from ijepa_fast.data.rendered import DIRECTIONS, RenderedTextures


@pytest.fixture(scope="module")
def images():
    return RenderedTextures("train", 1600)


def test_is_a_source(images):
    assert isinstance(images, Source)
    assert len(images) == len(images.labels) == 1600
    assert images.open(3).size == (32, 32)
    assert np.array_equal(np.asarray(images.open(3)), images.images[3])
    assert len(images.classes) == DIRECTIONS
    assert "train image 3" in images.describe(3)
    assert np.array_equal(pickle.loads(pickle.dumps(images)).images, images.images)


def test_images_depend_on_seed_split_and_index_alone(images):
    assert np.array_equal(RenderedTextures("train", 333).images, images.images[:333])
    assert not np.array_equal(RenderedTextures("train", 8, seed=1).images, images.images[:8])
    assert not np.array_equal(RenderedTextures("test", 8).images, images.images[:8])
    # A change of the set must be made on purpose: with a new name in the fingerprint.
    # (Sines may be rounded otherwise elsewhere, which moves a few values by one.)
    assert abs(int(images.images[:4].sum(dtype=np.int64)) - EXPECTED_SUM) < 50
    assert images.fingerprint == "rendered-textures-1-train-1600-32-0"


EXPECTED_SUM = 1566027


def test_no_image_is_in_both_splits(images):
    seen = {image.tobytes() for image in images.images}
    assert len(seen) == len(images)
    assert not seen & {image.tobytes() for image in RenderedTextures("test", 1600).images}


def test_classes_are_balanced(images):
    assert np.bincount(images.labels).tolist() == [200] * DIRECTIONS


def test_mean_image_and_colours_do_not_give_the_class_away(images):
    """Class means of pixels and of colour moments differ by no more than sampling allows."""
    pixels = images.images.astype(float)
    for statistic in (pixels.reshape(len(pixels), -1), pixels.mean((1, 2)), pixels.std((1, 2))):
        means = np.stack([statistic[images.labels == c].mean(0) for c in range(DIRECTIONS)])
        error = statistic.std(0) / np.sqrt(len(statistic) / DIRECTIONS)
        deviation = np.abs(means - statistic.mean(0)) / error
        # About 24,000 comparisons: 5 standard errors are not passed by chance.
        assert deviation.max() < 5


def test_strokes_run_in_the_direction_of_the_class(images):
    """The brightness changes fastest across the strokes."""
    grey = images.images.astype(float).mean(-1)
    spectrum = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    y, x = np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32), indexing="ij")
    turn = 2 * np.arctan2(y, x)
    for number in range(DIRECTIONS):
        power = spectrum[images.labels == number].mean(0)
        angle = np.angle((power * np.exp(1j * turn)).sum()) / 2
        difference = (angle - number * np.pi / DIRECTIONS + np.pi / 2) % np.pi - np.pi / 2
        assert abs(np.rad2deg(difference)) < 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "val"}, "train or test, got 'val'"),
        ({"num_images": 0}, "got 0, 32"),
        ({"image_size": 65}, "between 1 and 64, got 4000, 65"),
    ],
)
def test_impossible_sets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RenderedTextures(**settings)
