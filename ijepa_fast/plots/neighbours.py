"""Images beside those whose features are most similar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.plots.sheet import COLOURS, INK, Sheet, aspect, numbered, pictures_of, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME_LENGTH = 15


def plot_neighbours(
    queries: Tensor,
    neighbours: Tensor,
    similarities: Tensor,
    out: str | Path | None = None,
    *,
    query_names: Sequence[str] | None = None,
    neighbour_names: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """One row per query: the query at the left, then its neighbours, most similar first, with their similarities.

    Where classes are named, a neighbour of the query's class has a tick and a blue frame, another one a cross and a
    broken orange one.

    Args:
        queries: images [Q, 3, h, w], uint8 or float in [0, 1].
        neighbours: images [Q, k, 3, h, w].
        similarities: [Q, k].
        out: where to write the figure.
        query_names, neighbour_names: class names, Q of them and Q times k; both or none.

    Raises:
        ValueError: shapes or numbers of names do not fit.
    """
    count = len(queries)
    if neighbours.dim() != 5 or similarities.shape != neighbours.shape[:2] or len(neighbours) != count:
        raise ValueError(
            f"{count} queries need neighbours [{count}, k, 3, h, w] and similarities [{count}, k], "
            f"got {list(neighbours.shape)} and {list(similarities.shape)}"
        )
    k = neighbours.shape[1]
    if (query_names is None) != (neighbour_names is None):
        raise ValueError("classes of queries and of neighbours must be named together")
    if query_names is not None and (
        len(query_names) != count or [len(names) for names in neighbour_names] != [k] * count
    ):
        raise ValueError(f"{count} queries with {k} neighbours each need as many class names")
    pictures = pictures_of(queries)
    found = pictures_of(neighbours.flatten(0, 1)).reshape(count, k, *pictures.shape[1:])
    whole = np.ones((1, 1), dtype=bool)

    sheet = Sheet(count, 1 + k, aspect(pictures), top=0.24, row_gap=0.22 if query_names is None else 0.36)
    for column, title in enumerate(["query", *numbered("neighbour", k)]):
        sheet.title(column, title)
    for row in range(count):
        sheet.panel(row, 0, pictures[row])
        sheet.outline(row, 0, whole, INK)
        if query_names is not None:
            sheet.caption(row, 0, _short(query_names[row]))
        for place in range(k):
            sheet.panel(row, 1 + place, found[row, place])
            caption = f"{similarities[row, place]:.2f}"
            if query_names is not None:
                name = neighbour_names[row][place]
                same = name == query_names[row]
                sheet.outline(row, 1 + place, whole, COLOURS[0] if same else COLOURS[1], dashed=not same)
                caption = f"{'✓' if same else '✗'} {_short(name)}\n{caption}"
            sheet.caption(row, 1 + place, caption)
    return written(sheet.figure, out)


def nearest_neighbours(features: Tensor, queries: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """The k rows most similar by cosine to each query row, itself left out; the first of equals comes first.

    Args:
        features: [n, D]; need not be normalised.
        queries: Q rows.
        k: between 1 and n - 1.

    Returns:
        Rows int64 [Q, k] and their similarities fp32 [Q, k], on the CPU.

    Raises:
        ValueError: k or a query is out of range, or features are not finite.
    """
    count = len(features)
    if not 1 <= k < count:
        raise ValueError(f"k must be between 1 and {count - 1}, the number of other images, got {k}")
    if not all(0 <= query < count for query in queries):
        raise ValueError(f"queries must be rows of the {count} features, got {list(queries)}")
    x = features.detach().cpu().double()
    if not x.isfinite().all():
        raise ValueError("features must be finite")
    x = F.normalize(x, dim=1)
    rows = torch.as_tensor(queries, dtype=torch.int64)
    similarity = x[rows] @ x.T
    similarity.scatter_(1, rows[:, None], -torch.inf)
    ordered, order = similarity.sort(dim=1, descending=True, stable=True)
    return order[:, :k], ordered[:, :k].float()


def _short(name: str) -> str:
    # Bytes of a folder's name that are not UTF-8 cannot be drawn.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
