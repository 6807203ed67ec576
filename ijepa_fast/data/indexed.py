"""Images in tar shards at URLs, found by an index beside them: each is a byte range, so order and resume are exact.

    python -m ijepa_fast.data.indexed 'shards/{000..099}.tar' shards/train.index.npz

looks through local shards and writes their index; both are then copied to an object store, and a run reads
``--data https://HOST/shards/train.index.npz``, or any other address that fsspec knows.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijepa_fast.data.bands import Pixels
from ijepa_fast.data.shards import Index, TarShards, build_index, expand_shards

log = logging.getLogger(__name__)

SUFFIX = ".index.npz"
TRIES, FIRST_WAIT = 6, 0.5
"""How often a range is asked for, and seconds before it is asked for again, which double each time."""
_TEXTS, _COLUMNS = ("shards", "names", "labels"), ("offsets", "sizes")


def write_index(shards: Sequence[str], path: Path | str) -> int:
    """Write the index of local shards; the number of images in them.

    Args:
        path: must end in ``.index.npz``. Shards are looked for beside it, by their names.
    """
    if not str(path).endswith(SUFFIX):
        raise ValueError(f"the name of an index must end in {SUFFIX}, got {path}")
    indexes = [build_index(shard) for shard in shards]
    for shard, index in zip(shards, indexes, strict=True):
        for reason in index.damage:
            log.warning("damaged shard %s: %s", shard, reason)
    texts = {key: [text for index in indexes for text in getattr(index, key)] for key in _TEXTS[1:]}
    texts["shards"] = [os.fsencode(Path(shard).name) for shard in shards]
    joined = {key: np.frombuffer(b"".join(text + b"\0" for text in texts[key]), np.uint8) for key in texts}
    columns = {key: np.concatenate([getattr(index, key) for index in indexes]) for key in _COLUMNS}
    counts = np.array([len(index.offsets) for index in indexes])
    with open(path, "wb") as file:
        np.savez(file, counts=counts, **joined, **columns)
    return int(counts.sum())


class IndexedShards(TarShards):
    """All images of the shards of an index. A `Source` like `TarShards`, from any address that fsspec knows.

    A request that fails is made again after a while, up to ``TRIES`` times; what is not there is not asked for twice.

    Args:
        index: path or URL of the index; the shards lie beside it.
        classes, pixels: as in `TarShards`.

    Attributes:
        retries: requests of this process that were made again.
    """

    def __init__(self, index: str, *, classes: Sequence[str] | None = None, **pixels):
        self.pixels, self.retries = Pixels(**pixels), 0
        folder, slash, _ = index.rpartition("/")
        try:
            with np.load(io.BytesIO(self._read(index))) as saved:
                shards, names, labels = (saved[key].tobytes().split(b"\0")[:-1] for key in _TEXTS)
                columns, counts = [saved[key] for key in _COLUMNS], saved["counts"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is no index of shards: {error}") from error
        self.shards = [folder + slash + os.fsdecode(name) for name in shards]
        parts = [slice(end - count, end) for count, end in zip(counts, counts.cumsum(), strict=True)]
        columns = names, *columns, labels
        self._take([Index(*(column[part] for column in columns), []) for part in parts], classes)

    def _read(self, shard: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file; all of it without a size."""
        import fsspec

        end = None if size is None else offset + size
        for tried in range(1, TRIES + 1):
            try:
                # Looked up anew, because a connection does not survive the fork of a loader's worker; fsspec keeps it.
                files, path = fsspec.url_to_fs(shard)
                content = files.cat_file(path, offset, end)
                if size is None or len(content) == size:
                    return content
                error: Exception = EOFError(f"{len(content)} bytes came")
            except (FileNotFoundError, PermissionError, ImportError):
                raise
            except Exception as failure:  # each kind of store has errors of its own
                error = failure
            where = shard if size is None else f"{shard}, bytes {offset} to {end}"
            said = f"{type(error).__name__}: {str(error)[:200]}"
            if tried == TRIES:
                raise OSError(f"{where} cannot be read after {TRIES} tries: {said}") from error
            self.retries += 1
            wait = FIRST_WAIT * 2 ** (tried - 1)
            log.warning("%s: %s; again in %.1f s (%d times so far)", where, said, wait, self.retries)
            time.sleep(wait)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{write_index(expand_shards(sys.argv[1]), sys.argv[2])} images in {sys.argv[2]}")
