"""Features of a set of images in a file: extracted once, memory-mapped, continued after a stop.

Legend: n images, N patches per image, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ijepa_fast.data import EvalLoader, Source
from ijepa_fast.data.bands import Pixels, pixels_of
from ijepa_fast.data.loader import BadFilesError
from ijepa_fast.run.files import write_json, write_text

log = logging.getLogger(__name__)

BATCH = 64
"""Images that the encoder sees at once; fixed, because products of other sizes may round differently."""
_SECONDS_BETWEEN_NOTES = 5.0


class Features(NamedTuple):
    """Features of the images that could be decoded.

    Attributes:
        values: fp32 [n, D] or, for patches, [n, N, D]: a file, of which only what is read takes memory.
        labels: int64 [n], -1 where the source has none.
        indices: int64 [n], positions in the source.
    """

    values: Tensor
    labels: Tensor
    indices: Tensor


class Part:
    """Some images of a source, as a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.classes, self.pixels = source.classes, pixels_of(source)
        self.labels = None if source.labels is None else source.labels[self.indices]

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}[{hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]}]"

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int):
        return self.source.open(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))


def at_most(source: Source, count: int | None) -> Source:
    """The source itself, or ``count`` of its images, spread evenly: folders list one class after the other."""
    return source if count is None or count >= len(source) else Part(source, spread(len(source), count))


def spread(count: int, most: int | None) -> np.ndarray:
    """int64 numbers below ``count``: all, or ``most`` of them at even distances."""
    return np.arange(count) if most is None or most >= count else np.linspace(0, count - 1, most).round().astype(int)


def extract(
    folder: Path,
    source: Source,
    function: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    image_size: int | tuple[int, int],
    resize_ratio: float,
    key: dict,
    workers: int | str = 0,
    title: str = "features",
) -> Features:
    """Features of the central crops of all images, from ``folder`` where an earlier call has left them, whole or not.

    Args:
        folder: for the features of this source and these settings alone.
        function: images [B, C, h, w] as loaders give them, on the device -> [B, ...], without gradients.
        device: where the function computes.
        image_size, resize_ratio: of the crops.
        key: whatever else decides the features: weights, layers, precision.
        title: for the progress bar.

    Raises:
        BadFilesError: no image can be decoded.
    """
    key = key | {"images": source.fingerprint, "image_size": image_size, "resize_ratio": resize_ratio, "batch": BATCH}
    if (pixels := pixels_of(source)[:2]) != Pixels()[:2]:
        key["pixels"] = pixels
    key = json.loads(json.dumps(key))
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "progress.json"
    state = json.loads(note.read_text()) if note.is_file() else {}
    if state.get("key") != key:
        note.unlink(missing_ok=True)  # its files are overwritten from here on
        state = {"key": key, "done": 0, "rows": 0, "bad": {}}
    count = len(source)
    if state["done"]:
        values, indices = (np.lib.format.open_memmap(folder / name, "r+") for name in ("features.npy", "indices.npy"))
    else:
        values, indices = None, np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int64, (count,))
    if state["done"] < count:
        if state["done"]:
            log.info("%s: %d of %d images are done already", title, state["done"], count)
        wanted = np.arange(state["done"], count)
        loader = EvalLoader(source, image_size, BATCH, workers, indices=wanted, resize_ratio=resize_ratio)
        noted = time.monotonic()
        bar = tqdm(total=count, initial=state["done"], desc=title, unit="img", disable=None)
        try:
            with bar:
                for batch in loader:
                    rows = function(batch.images.to(device, non_blocking=True)).float().cpu().numpy()
                    if values is None:
                        shape = (count, *rows.shape[1:])
                        values = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, shape)
                    start = state["rows"]
                    values[start : start + len(rows)] = rows
                    indices[start : start + len(rows)] = batch.indices.numpy()
                    state["rows"] += len(rows)
                    # A request is BATCH images, of which bad ones are missing here.
                    state["done"] = min(count, (int(batch.indices[-1]) // BATCH + 1) * BATCH)
                    bar.update(state["done"] - bar.n)
                    if time.monotonic() - noted > _SECONDS_BETWEEN_NOTES:
                        _note(note, state, values, indices)
                        noted = time.monotonic()
            state["done"] = count
        except BadFilesError:  # of the images that were left
            if not state["rows"]:
                raise
            state["done"] = count
        finally:
            state["bad"] |= loader.bad
            if values is not None:
                _note(note, state, values, indices)
    if state["bad"]:
        bad = folder / "bad.txt"
        write_text(bad, "".join(f"{name}: {reason}\n" for name, reason in state["bad"].items()))
        log.warning("%s: %d unreadable images are left out", title, len(state["bad"]))
    kept = torch.from_numpy(np.array(indices[: state["rows"]]))
    labels = np.full(count, -1, np.int64) if source.labels is None else source.labels
    return Features(torch.from_numpy(values[: state["rows"]]), torch.from_numpy(labels[kept.numpy()]), kept)


def _note(path: Path, state: dict, *arrays: np.memmap) -> None:
    """Write down how far the features are, once they are on the disk."""
    for array in arrays:
        array.flush()
    write_json(path, state)
