"""Ragged against Python lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_fast.ragged import PADDING, Ragged

sequences_of_tokens = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows_of(ragged):
    """(sequence, token) of every row, by walking the prefix sums; (S, PADDING) behind the last sequence."""
    rows = [(s, token) for s, tokens in enumerate(ragged.to_lists()) for token in tokens]
    return rows + [(ragged.num_sequences, PADDING)] * (ragged.num_rows - len(rows))


@given(sequences_of_tokens, st.integers(0, 3))
def test_lists_survive_packing_and_padding(sequences, padding):
    packed = Ragged.from_lists(sequences)
    padded = packed.padded(packed.num_rows + padding)
    total = sum(len(tokens) for tokens in sequences)
    for ragged, num_rows in ((packed, total), (padded, total + padding)):
        assert ragged.to_lists() == sequences
        assert (ragged.num_sequences, ragged.num_rows) == (len(sequences), num_rows)
        assert ragged.max_seqlen == max(map(len, sequences), default=0)
        assert ragged.lengths.tolist() == [len(tokens) for tokens in sequences]
        assert (ragged.indices.dtype, ragged.cu_seqlens.dtype, ragged.lengths.dtype) == (torch.int32,) * 3
        assert list(zip(ragged.sequence_ids().tolist(), ragged.indices.tolist(), strict=True)) == rows_of(ragged)
        assert ragged.valid.tolist() == [row < total for row in range(num_rows)]


@given(sequences_of_tokens, st.integers(1, 3), st.integers(0, 2))
def test_every_joins_neighbours(sequences, step, padding):
    sequences = sequences[: len(sequences) // step * step]
    ragged = Ragged.from_lists(sequences)
    joined = ragged.padded(ragged.num_rows + padding).every(step)
    assert joined.to_lists() == [sum(sequences[s : s + step], []) for s in range(0, len(sequences), step)]
    assert joined.num_rows == ragged.num_rows + padding
    assert joined.max_seqlen >= max(joined.lengths.tolist(), default=0)


def test_every_rejects_runs_that_do_not_divide():
    ragged = Ragged.full(6, 2)
    with pytest.raises(ValueError, match="6 sequences cannot be joined in runs of 4"):
        ragged.every(4)
    with pytest.raises(ValueError, match="runs of 0"):
        ragged.every(0)


def test_full_is_every_patch_of_every_image():
    full = Ragged.full(3, 4)
    assert full.to_lists() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert full.uniform and full.max_seqlen == 4
    assert full.every(3).uniform and full.every(3).max_seqlen == 12
    assert full.padded(12).uniform
    assert not full.padded(13).uniform


def test_from_masks_is_mask_major():
    masks = [torch.tensor([[0, 2], [3, 1]]), torch.tensor([[5, 4], [0, 5]])]
    ragged = Ragged.from_masks(masks, num_patches=6)
    assert ragged.to_lists() == [[0, 2], [9, 7], [5, 4], [6, 11]]
    assert ragged.uniform and ragged.max_seqlen == 2
    unequal = Ragged.from_masks([masks[0], masks[1][:, :1]], num_patches=6)
    assert unequal.to_lists() == [[0, 2], [9, 7], [5], [6]]
    assert not unequal.uniform and unequal.max_seqlen == 2


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], "empty list"),
        ([torch.zeros(2, 3)], "float32"),
        ([torch.zeros(3, dtype=torch.int64)], r"\(3,\)"),
        ([torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)], r"\(1, 3\)"),
        ([torch.ones(2, 16, dtype=torch.bool)], "bool"),
        ([torch.tensor([[0, 16]])], "patches from 0 to 15, got from 0 to 16"),
        ([torch.tensor([[-1, 3]])], "got from -1 to 3"),
    ],
)
def test_from_masks_rejects(masks, message):
    with pytest.raises(ValueError, match=message):
        Ragged.from_masks(masks, num_patches=16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ragged(int32(0, 1).long(), int32(0, 2), 2), r"indices must be int32 and 1-D, got torch.int64 \(2,\)"),
        (lambda: Ragged(int32(0, 1), int32(0, 2).long(), 2), "cu_seqlens must be int32"),
        (lambda: Ragged(int32(0, 1)[None], int32(0, 2), 2), r"\(1, 2\)"),
        (lambda: Ragged(int32(), int32(), 0), "leading 0"),
        (lambda: Ragged(int32(0, 1, 2), int32(0, 2, 3), 2, uniform=True), "2 uniform sequences of 2 tokens .* 3 rows"),
        (lambda: Ragged.full(2, 3).padded(5), "6 rows to 5"),
    ],
)
def test_malformed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_to_moves_every_part():
    moved = Ragged.full(2, 3).to("meta")
    assert moved.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.uniform and moved.max_seqlen == 3
