import numpy as np
import pytest

from ijepa_fast.data.order import epoch_permutation, sample_indices, steps_per_epoch
from ijepa_fast.philox import Stream, random_words


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 200_001])
def test_every_image_once(n):
    order = epoch_permutation(3, 1, n)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert not order.flags.writeable


def test_order_follows_the_keys_of_its_definition():
    n, seed, epoch = 9, 2**40 + 5, 11
    keys = []
    for image in range(n):
        words = random_words(seed, Stream.ORDER, epoch, image // 2, 0)
        high, low = words[2 * (image % 2)], words[2 * (image % 2) + 1]
        keys.append((high << 32) + low)
    assert epoch_permutation(seed, epoch, n).tolist() == sorted(range(n), key=keys.__getitem__)


def test_chunks_do_not_change_the_order(monkeypatch):
    whole = epoch_permutation(0, 0, 1001).copy()
    epoch_permutation.cache_clear()
    monkeypatch.setattr("ijepa_fast.data.order._BLOCKS_PER_CHUNK", 7)
    assert np.array_equal(epoch_permutation(0, 0, 1001), whole)
    epoch_permutation.cache_clear()


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(epoch_permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_positions_are_uniform():
    n, epochs = 10, 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), epoch_permutation(1, epoch, n)] += 1
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi_square < 126.1  # 0.999 quantile at 81 degrees of freedom


def test_steps_walk_through_the_epochs_and_drop_the_rest():
    n, batch = 10, 4
    assert steps_per_epoch(n, batch) == 2
    for step in range(6):
        samples = sample_indices(step, batch, n, seed=5)
        assert (samples.epoch, samples.first_slot) == (step // 2, 4 * (step % 2))
        order = epoch_permutation(5, samples.epoch, n)
        assert samples.indices.tolist() == order[samples.first_slot : samples.first_slot + batch].tolist()
        assert samples.indices.dtype == np.int64


def test_too_few_images_names_both_numbers_and_the_way_out():
    with pytest.raises(ValueError, match="3 images cannot fill one global batch of 8: set the batch size to 3 or less"):
        sample_indices(0, 8, 3, seed=0)
    with pytest.raises(ValueError, match="got 0"):
        steps_per_epoch(3, 0)
    with pytest.raises(ValueError, match="got -1"):
        sample_indices(-1, 1, 3, seed=0)
