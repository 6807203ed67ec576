"""Philox4x32-10 against the known answers of Random123, and one result from ints, numpy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_fast.philox import Stream, below, philox4x32, random_words

WORDS = st.integers(0, 2**32 - 1)

# Random123, tests/kat_vectors, rows "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected


@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=8), WORDS, WORDS)
@settings(max_examples=50, deadline=None)
def test_ints_numpy_and_torch_agree(counters, key_low, key_high):
    expected = [philox4x32(counter, (key_low, key_high)) for counter in counters]
    columns = np.array(counters, dtype=np.int64).T
    from_numpy = np.stack(philox4x32(tuple(columns), (key_low, key_high)), axis=1)
    key_tensors = (torch.tensor(key_low), torch.tensor(key_high))
    from_torch = torch.stack(philox4x32(tuple(torch.from_numpy(columns.copy())), key_tensors), dim=1)
    assert from_numpy.tolist() == from_torch.tolist() == [list(words) for words in expected]


def test_counter_layout():
    seed = 0x299F31D0A4093822
    assert random_words(seed, 0x03707344, 0x13198A2E, 0x85A308D3, 0x243F6A88) == KNOWN_ANSWERS[2][2]
    negative = random_words(-1, Stream.ORDER, 7, 3, 1)
    assert negative == random_words(2**64 - 1, Stream.ORDER, 7, 3, 1)
    as_tensors = random_words(torch.tensor(-1), Stream.ORDER, torch.tensor(7), torch.arange(5), 1)
    assert [int(words[3]) for words in as_tensors] == list(negative)


def test_arguments_broadcast():
    words = random_words(5, Stream.CROP, 2, torch.arange(3)[:, None], torch.arange(4))
    assert all(word.shape == (3, 4) and word.dtype == torch.int64 for word in words)
    assert tuple(int(word[2, 1]) for word in words) == random_words(5, Stream.CROP, 2, np.int64(2), np.int64(1))


@pytest.mark.parametrize(
    ("name", "value"), [("index", -1), ("draw", 2**32), ("step", -5), ("seed", 2**64), ("seed", -(2**63) - 1)]
)
def test_out_of_range_integers_raise(name, value):
    arguments = {"seed": 0, "stream": Stream.CROP, "step": 0, "index": 0, "draw": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
        random_words(**arguments)


def test_below_covers_its_range_uniformly():
    assert below(0, 13) == 0
    assert below(2**32 - 1, 13) == 12
    words = torch.stack(random_words(11, Stream.ORDER, 0, torch.arange(65_000), 0)).flatten()
    counts = torch.bincount(below(words, 13), minlength=13)
    expected = words.numel() / 13
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert counts.numel() == 13
    assert chi_square < 32.9  # 0.999 quantile at 12 degrees of freedom


def test_streams_are_numbered_once():
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)
