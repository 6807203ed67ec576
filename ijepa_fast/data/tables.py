"""Images in tables: data sets of Hugging Face on the disk, and folders of parquet files, by the package datasets.

It maps Arrow files into memory, so that rows are read in any order and only where they are asked for. Parquet files are
written once as Arrow files into its cache.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ijepa_fast.data.bands import ArrayBands, Pixels
from ijepa_fast.data.decode import open_image
from ijepa_fast.data.folder import holds_images, in_order

_IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_LABEL = ("label", "labels", "cls", "class", "class_name", "category", "target", "fine_label")
_SPLITS = {
    kind: re.compile(rf"(^|[^a-z])({names})([^a-z]|$)", re.IGNORECASE)
    for kind, names in (("train", "train|training"), ("val", "val|valid|validation|dev"), ("test", "test|testing"))
}


def names_table(data: str) -> bool:
    """Whether a setting names a folder of ``save_to_disk``, or one of parquet files and no images or shards."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return False
    if _is_saved(folder):
        return True
    return bool(_parquet(folder)) and not holds_images(folder) and not any(folder.glob("*.tar"))


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has left its files beside a data set, or beside several by their splits."""
    one = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    return one or (folder / "dataset_dict.json").is_file()


def _parquet(folder: Path) -> list[Path]:
    """Parquet files in a folder, in its folder ``data``, and in those named as splits."""
    with os.scandir(folder) as entries:  # which knows folders without asking the disk for each of a million files
        below = [Path(e.path) for e in entries if e.is_dir() and (e.name == "data" or _kind(e.name))]
    return sorted(path for place in (folder, *below) for path in place.glob("*.parquet") if path.name[0] != ".")


def open_table(data: str, training: bool) -> tuple:
    """The data set of training (or else of test) images, and whether there are test images beside training images.

    Splits go by the names of files, folders or saved sets: train; val, validation or test. Without any, all is both.

    Raises:
        RuntimeError: the package datasets is not installed.
        ValueError: there is no training split among others, or several.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{data} holds tables, which need the package datasets; in the checkout: pip install -e '.[datasets]' "
            f"({error})"
        ) from error

    folder = Path(data).expanduser()
    if _is_saved(folder):
        saved = datasets.load_from_disk(str(folder))
        parts = dict(saved) if isinstance(saved, dict) else {"": saved}
    else:
        parts = {str(path.relative_to(folder)): path for path in _parquet(folder)}
    found = {kind: [name for name in parts if _kind(name) == kind] for kind in (*_SPLITS, None)}
    wanted = ("train", None) if training else ("val", "test", "train", None)
    names = next((found[kind] for kind in wanted if found[kind]), [])
    chosen = [parts[name] for name in names]
    if not chosen or (len(chosen) > 1 and not isinstance(chosen[0], Path)):
        raise ValueError(f"{data} has no split train, or several to choose from: {', '.join(parts)}")
    if isinstance(chosen[0], Path):
        chosen = [datasets.load_dataset("parquet", data_files=[str(path) for path in chosen], split="train")]
    return chosen[0], bool(found["train"] and (found["val"] or found["test"]))


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _SPLITS.items() if pattern.search(name)), None)


class TableImages:
    """The rows of a ``datasets.Dataset`` with an image each. A `Source`.

    Args:
        dataset: has a column of images: of the type Image, or called image, img or the like, with encoded files.
        classes: names and order of the classes, such as those of the training images when these are the test images.
        name: what to call it in messages.
        pixels: see `Pixels`.

    Attributes:
        labels: int64 [n], -1 where a row has none, from a column called label, class or the like. None without one, and
            where no two classes (of test images: no class at all) occur in it.
        classes: names of the ClassLabel type; else the distinct values, in order; None without labels.

    Raises:
        ValueError: it has no rows, not one column of images, or a class that ``classes`` lacks.
    """

    def __init__(self, dataset, *, classes: Sequence[str] | None = None, name: str = "the data set", **pixels):
        import datasets

        self.pixels, self._name = Pixels(**pixels), name
        if not len(dataset):
            raise ValueError(f"{name} has no rows")
        self._column = _image_column(dataset.features, name)
        if isinstance(dataset.features[self._column], datasets.Image):
            dataset = dataset.cast_column(self._column, datasets.Image(decode=False))
        self._images = dataset.select_columns([self._column]).with_format(None)
        self.labels = self.classes = None
        column = next((label for label in _LABEL if label in dataset.features), None)
        if column is not None:
            self._label(dataset, column, classes)

    def _label(self, dataset, column: str, wanted: Sequence[str] | None) -> None:
        values = dataset.with_format(None)[column][:]
        names = getattr(dataset.features[column], "names", None)
        if names is None:
            texts = [None if value is None else str(value) for value in values]
            names = in_order(set(texts) - {None})
        else:
            texts = [None if value is None or value < 0 else names[value] for value in values]
        # Sets without classes often have the column all the same, with -1 in every row.
        if len(set(texts) - {None}) < (2 if wanted is None else 1):
            return
        self.classes = list(names) if wanted is None else list(wanted)
        label_of = {name: label for label, name in enumerate(self.classes)}
        if strangers := sorted({text for text in texts if text is not None and text not in label_of}):
            raise ValueError(f"{self._name} has images outside the classes {self.classes[:10]}: in {strangers[:10]}")
        self.labels = np.array([-1 if text is None else label_of[text] for text in texts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        classes = "no classes" if self.classes is None else f"{len(self.classes)} classes"
        return f"TableImages({self._name!r}: {len(self)} images, {classes})"

    def open(self, index: int) -> Image.Image | ArrayBands:
        """The image, not decoded yet."""
        value = self._value(index)
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None and not path:
            raise ValueError("the row has no image")
        return open_image(path if content is None else io.BytesIO(content), self.pixels)

    def _value(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self._images[int(index)][self._column]

    def describe(self, index: int) -> str:
        value = self._value(index)
        path = value.get("path") if isinstance(value, dict) else None
        return f"{self._name}: row {index}{f' ({path})' if path else ''}"

    @cached_property
    def fingerprint(self) -> str:
        """Count of images and a hash of the sizes of their files, in order; of a path, where a row holds no file."""
        import pyarrow as pa
        import pyarrow.compute as compute

        digest = hashlib.sha256()
        images = self._images.flatten_indices() if self._images._indices is not None else self._images
        for chunk in images.data.column(self._column).chunks:
            content = chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk
            digest.update(compute.binary_length(content).fill_null(-1).cast(pa.int64()).to_numpy().tobytes())
            if content.null_count and chunk is not content and chunk.type.get_field_index("path") >= 0:
                paths = chunk.field("path").filter(content.is_null())
                digest.update("".join(f"{path}\0" for path in paths.to_pylist()).encode())
        return f"table:{len(self)}:{digest.hexdigest()[:32]}"


def _image_column(features, name: str) -> str:
    """The column of images."""
    import datasets

    found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [c for c, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    found = found or [c for c in _IMAGE if c in features and getattr(features[c], "dtype", "").endswith("binary")]
    named = [column for column in _IMAGE if column in found]
    if len(found) > 1 and not named or not found:
        which = f"several columns of images ({', '.join(found)}), none called image" if found else "no column of images"
        raise ValueError(f"{name} has {which}; its columns are {', '.join(features)}")
    return named[0] if named else found[0]
