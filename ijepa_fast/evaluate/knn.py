"""Weighted k-nearest-neighbour classification of frozen features.

Legend: Q queries, n bank entries, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.evaluate.features import UNLABELLED, labelled
from ijepa_fast.evaluate.ring_buffer import RingBuffer

_SIMILARITIES_AT_ONCE = 1 << 25
_BANK_AT_ONCE = 1 << 26
MAX_BANK = 50_000


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    bank_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
) -> Tensor:
    """Label of every query by a vote of its k most similar bank entries, each weighted exp(cosine / temperature).

    The usual classifier for self-supervised features (Wu et al., arXiv 1805.01978, section 3.4). Among equal votes
    the class of the nearest neighbour wins.

    Args:
        bank, queries: features [n, D] and [Q, D]; need not be normalised.
        bank_labels: int64 [n].
        k: neighbours, at most n are used.
        temperature: of the weights.
        bank_ids, query_ids: int64 [n] and [Q]. Entries with a query's own id, if that is not negative, have no vote.

    Returns:
        int64 [Q], on the bank's device.

    Raises:
        ValueError: k or temperature is not positive, or the bank is empty.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k and temperature must be positive, got {k} and {temperature}")
    if not len(bank):
        raise ValueError("the bank of neighbours is empty")
    k = min(k, len(bank))
    part = max(k, _BANK_AT_ONCE // bank.shape[1])
    chunk = max(1, min(1024, _SIMILARITIES_AT_ONCE // min(part, len(bank))))
    predictions = []
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        queries_QD = F.normalize(queries[rows].to(bank.device).float(), dim=1)
        best: list[tuple[Tensor, Tensor]] = []
        # A bank may be a file that is larger than memory: no more than a part of it is there at once.
        for first in range(0, len(bank), part):
            similarity_Qn = queries_QD @ F.normalize(bank[first : first + part].float(), dim=1).T
            if query_ids is not None and bank_ids is not None:
                ids_Q1, ids_n = query_ids[rows, None], bank_ids[first : first + part]
                similarity_Qn.masked_fill_((ids_Q1 == ids_n) & (ids_Q1 >= 0), float("-inf"))
            nearest_Qk, places_Qk = similarity_Qn.topk(min(k, similarity_Qn.shape[1]), dim=1)
            best.append((nearest_Qk, places_Qk + first))
        nearest_Qk, neighbours_Qk = (torch.cat(found, dim=1) for found in zip(*best, strict=True))
        if len(best) > 1:
            nearest_Qk, places_Qk = nearest_Qk.topk(k, dim=1)
            neighbours_Qk = neighbours_Qk.gather(1, places_Qk)
        labels_Qk = bank_labels[neighbours_Qk]
        # Relative to similarity 1, which changes no vote and cannot overflow.
        weights_Qk = ((nearest_Qk - 1) / temperature).exp()
        # Every neighbour collects the votes for its own class: no table of all classes, no atomics.
        same_Qkk = labels_Qk[:, :, None] == labels_Qk[:, None, :]
        votes_Qk = (same_Qkk * weights_Qk[:, None, :]).sum(2)
        predictions.append(labels_Qk.gather(1, votes_Qk.argmax(1, keepdim=True)).squeeze(1))
    return torch.cat(predictions) if predictions else bank_labels.new_empty(0)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the test images that ``knn_predict`` gets right from the training images, in [0, 1].

    Args:
        train_features, test_features: [n, D].
        train_labels, test_labels: int64 [n]; images with label -1 are left out.
        k, temperature: as in ``knn_predict``.

    Raises:
        ValueError: shapes do not fit, a side has no labelled image, or features are not finite.
    """
    bank, bank_labels = labelled(train_features, train_labels, "training")
    queries, answers = labelled(test_features, test_labels, "test")
    predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature)
    return float((predicted == answers.to(predicted.device)).double().mean())


class OnlineKNN:
    """k-NN accuracy while training, from a bank of the most recent features.

    The newest entries are classified by the older ones; entries of the same image, from an earlier epoch, have no
    vote. Older entries come from older weights and from training crops, so this is a trend to watch, not a result.
    Pushing never waits for the device; ``accuracy`` does.

    Args:
        dim: D.
        capacity: entries kept, at most 50,000 (with 1,280 fp32 features 256 MB).
        queries: newest entries that are classified.
        k, temperature: as in ``knn_predict``.
        device, dtype: of the bank.
    """

    def __init__(
        self,
        dim: int,
        *,
        capacity: int = MAX_BANK,
        queries: int = 512,
        k: int = 20,
        temperature: float = 0.07,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 2 <= capacity <= MAX_BANK:
            raise ValueError(f"capacity must be between 2 and {MAX_BANK}, got {capacity}")
        if queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self.queries, self.k, self.temperature = queries, k, temperature
        columns = {"features": ((dim,), dtype), "labels": ((), torch.int64), "ids": ((), torch.int64)}
        self._ring = RingBuffer(capacity, columns, device)

    def push(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Append pooled features [B, D], labels int64 [B] (-1: none) and, if known, the images' indices int64 [B]."""
        ids = torch.full_like(labels, -1) if indices is None else indices
        self._ring.push(features=features, labels=labels, ids=ids)

    def accuracy(self) -> float | None:
        """Share of the newest labelled entries (at most half of all) that the others get right.

        None without at least two labelled entries whose features are finite.
        """
        rows = self.rows()
        usable = (rows["labels"] != UNLABELLED) & rows["features"].isfinite().all(1)
        features, labels, ids = (rows[name][usable] for name in ("features", "labels", "ids"))
        count = min(self.queries, len(labels) // 2)
        if not count:
            return None
        predicted = knn_predict(
            features[:-count],
            labels[:-count],
            features[-count:],
            k=self.k,
            temperature=self.temperature,
            bank_ids=ids[:-count],
            query_ids=ids[-count:],
        )
        return float((predicted == labels[-count:]).double().mean())

    def rows(self) -> dict[str, Tensor]:
        """Copies of "features", "labels" and "ids", oldest first: what ``push`` takes. Waits for the device."""
        return self._ring.rows()

    def clear(self) -> None:
        self._ring.clear()
