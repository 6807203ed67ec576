"""``ijepa-fast features`` and ``neighbours``: features of any images in a file, and the images most like others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.data import Source
from ijepa_fast.data.bands import pixels_of
from ijepa_fast.data.crops import eval_crop
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.decode import open_image, opened
from ijepa_fast.data.remote import RemoteShards
from ijepa_fast.downstream.store import Features
from ijepa_fast.downstream.subject import Subject
from ijepa_fast.plots import plot_neighbours
from ijepa_fast.run.files import write_whole

FORMATS = (".npz", ".parquet")
_ROWS_AT_ONCE = 10_000


def open_images(data: str, **images) -> Source:
    """Images with or without classes; of a folder with train/ and val/ the training images.

    Raises:
        ValueError: they are URLs, which can be read in one order only.
    """
    source = open_sources(data, **images).train
    if isinstance(source, RemoteShards):
        raise ValueError(f"{data} is streamed, and an interrupted stream cannot be continued: use local shards")
    return source


def check_out(out: Path) -> None:
    """Raises ValueError for a format that is not written, ImportError without the package that writes it."""
    if out.suffix not in FORMATS:
        raise ValueError(f"features are written as {' or '.join(FORMATS)}, got {out}")
    if out.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401, now and not when there are features to lose


def write_features(out: Path, subject: Subject, patches: bool = False) -> Features:
    """Write features of ``subject.data``, with the path and the class of each image.

    npz: "features" fp32 [n, D] (with ``patches`` [n, N, D]), "paths" [n] and "labels" [n], both text. Parquet: columns
    path, label and feature, one row per image (a patch feature is flattened). What is taken so far lies in the folder
    OUT.work, from which the same call continues after a stop. Unreadable images are named in OUT.bad.txt.
    """
    work = out.with_name(out.name + ".work")
    if work.is_file():
        raise ValueError(f"{work} is in the way: the features taken so far are kept in a folder of that name")
    features = subject.extracted(subject.data, work, patches)
    source = subject.data
    paths = [_printed(source.describe(int(index))) for index in features.indices]
    labels = [source.classes[label] if source.classes and label >= 0 else "" for label in features.labels]
    write = _write_npz if out.suffix == ".npz" else _write_parquet
    write_whole(out, lambda file: write(file, features.values.numpy(), paths, labels))
    if (work / "bad.txt").exists():
        (work / "bad.txt").replace(out.with_name(out.name + ".bad.txt"))
    shutil.rmtree(work)
    return features


def _write_npz(file: Path, values: np.ndarray, paths: list[str], labels: list[str]) -> None:
    with file.open("wb") as handle:  # numpy would add its suffix to a name
        np.savez(handle, features=values, paths=np.array(paths), labels=np.array(labels))


def _write_parquet(file: Path, values: np.ndarray, paths: list[str], labels: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    width = int(np.prod(values.shape[1:]))
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("path", pa.string()), ("label", pa.string()), ("feature", kind)])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            feature = pa.FixedSizeListArray.from_arrays(pa.array(values[rows].reshape(-1)), width)
            writer.write_table(pa.table([pa.array(paths[rows]), pa.array(labels[rows]), feature], schema))


def nearest(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows int64 [Q, k] and cosine similarities [Q, k], most similar first; reads the features once, part by part."""
    unit = F.normalize(queries.float(), dim=1)
    similarity_Qn = torch.cat([unit @ F.normalize(part, dim=1).T for part in features.split(_ROWS_AT_ONCE)], dim=1)
    similarity_Qk, rows_Qk = similarity_Qn.topk(min(k, len(features)), dim=1)
    return rows_Qk, similarity_Qk


def neighbours(subject: Subject, images: Sequence[Path], out: Path, k: int) -> list[list[tuple[str, float]]]:
    """Draw each image beside the k images of ``subject.data`` most like it.

    Returns:
        For each image the path and the cosine similarity of its neighbours. An image that is one of the set is its own
        first neighbour.

    Raises:
        ValueError: k is not positive, or an image cannot be read.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    queries = torch.stack([_crop(path, subject) for path in images])
    values = subject.pooled(queries.to(subject.device)).cpu()
    features = subject.extracted(subject.data)
    rows_Qk, similarity_Qk = nearest(features.values, values, k)
    found = features.indices[rows_Qk]
    crops = [_crop(index, subject) for index in found.flatten().tolist()]
    plot_neighbours(queries, torch.stack(crops).unflatten(0, found.shape), similarity_Qk, out)
    names = [[_printed(subject.data.describe(index)) for index in row] for row in found.tolist()]
    return [list(zip(*pair, strict=True)) for pair in zip(names, similarity_Qk.tolist(), strict=True)]


def _crop(image: Path | int, subject: Subject) -> Tensor:
    """The central crop of a file, or of an image of the set."""
    try:
        pixels = pixels_of(subject.data)
        with opened(
            open_image(image, pixels) if isinstance(image, Path) else subject.data.open(image), pixels
        ) as whole:
            return eval_crop(whole, subject.image_size, resize_ratio=subject.resize_ratio, pixels=pixels)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise ValueError(f"{image} cannot be read: {error}") from error


def _printed(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
