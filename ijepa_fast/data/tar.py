"""WebDataset samples in a tar file, read front to back; damaged places are told, not fatal.

A sample is what consecutive members with one key have in common, the key being a name up to the first dot of its last
part, and further if numbers follow: ``a/0001.jpg`` and ``a/0001.cls`` are one sample, ``photo.000.jpg`` and
``photo.001.jpg`` are two. It needs a member whose last extension is an image's; of several (``0001.left.jpg``), the one
without a further name counts, or one called ``image``, or the first; ``.npy`` only where there is no other. Its class,
a number or a word, is the text of its ``.cls`` or a field of its ``.json``.

Python's tarfile takes a damaged header behind the first for the end of the archive, in silence; hence a reader that
looks for the next header and says what it passed over. The format: POSIX.1-2017, pax, "ustar Interchange Format".
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from ijepa_fast.data.decode import image_extensions

_BLOCK = 512
_CHUNK = 1 << 20
_MOST_CLASS_BYTES = {"cls": 256, "json": 1 << 20}
_ARRAY = ".npy"
_IMAGE_KINDS = ("", "image", "img", "input", "rgb")
_CLASS_FIELDS = ("label", "cls", "class", "class_name", "category", "target")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's names for members that describe the shard
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")


class Damage(NamedTuple):
    """Why something in a shard cannot be used."""

    reason: str


class Member(NamedTuple):
    name: str
    offset: int  # of its content, bytes from the start of the file
    size: int
    content: bytes | None  # None where it was not wanted


class Sample(NamedTuple):
    name: str  # of the image
    offset: int
    size: int
    content: bytes | None
    label: str  # "" without a class


def read_samples(file: BinaryIO, contents: bool) -> Iterator[Sample | Damage]:
    """Samples with an image, in order; with the image's bytes or without (``contents``)."""
    extensions = image_extensions() | {_ARRAY}

    def wanted(name: str, size: int) -> bool:
        extension = os.path.splitext(name)[1].lower()
        return (contents and extension in extensions) or size <= _MOST_CLASS_BYTES.get(extension[1:], -1)

    group: dict[str, Member] = {}
    current, passed_over, classless = None, [], []
    for found in read_members(file, wanted):
        if isinstance(found, Damage):
            yield found
            continue
        key, kind, extension = _parts_of(found.name)
        if key is None or _META.match(found.name) or os.path.basename(found.name).startswith("."):
            continue
        if key != current:
            yield from _sample(group, passed_over, classless)
            current, group = key, {}
        if f".{extension}" in extensions:
            group.setdefault(f"{_ARRAY}.{kind}" if f".{extension}" == _ARRAY else kind, found)
        elif extension in _MOST_CLASS_BYTES and not kind:
            group.setdefault(f".{extension}", found)
    yield from _sample(group, passed_over, classless)
    for told in (passed_over, classless):
        if told:
            yield Damage(told[0] + (f" (and {len(told) - 1} more like it)" if len(told) > 1 else ""))


def _parts_of(name: str) -> tuple[str | None, str, str]:
    """Key, further name and extension of a member: ``a/p.000.left.jpg`` -> ``a/p.000``, ``left``, ``jpg``."""
    from webdataset.tariterators import base_plus_ext

    key, rest = base_plus_ext(name)
    parts = (rest or "").split(".")
    while len(parts) > 1 and parts[0].isdecimal():
        key += "." + parts.pop(0)
    return key, ".".join(parts[:-1]).lower(), parts[-1].lower()


def _sample(group: dict[str, Member], passed_over: list[str], classless: list[str]) -> Iterator[Sample]:
    """The sample of members with one key, by their further names, if it has an image.

    Keys of labels are their extensions, those of arrays begin with theirs.
    """
    images = {kind: member for kind, member in group.items() if not kind.startswith(".")}
    # Arrays beside an image say something about it.
    prefix = f"{_ARRAY}."
    images = images or {kind.removeprefix(prefix): m for kind, m in group.items() if kind.startswith(prefix)}
    if not images:
        return
    kind = next((kind for kind in _IMAGE_KINDS if kind in images), next(iter(images)))
    if kind not in _IMAGE_KINDS:
        passed_over += [f"{m.name} is passed over, {images[kind].name} taken" for m in images.values()][1:]
    label = ""
    for extension, read in ((".cls", _class_in_text), (".json", _class_in_json)):
        if not label and (member := group.get(extension)) is not None:
            label = read(member.content or b"")
            if label is None:
                classless.append(f"{member.name} holds no class: {(member.content or b'')[:20]!r}")
                label = ""
    yield Sample(*images[kind], label)


def _class_in_text(content: bytes) -> str | None:
    """A whole number without leading zeros, or one line of text; None for anything else."""
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
    if not text.isprintable() or not text:
        return None
    return str(int(text)) if text.isdecimal() else text


def _class_in_json(content: bytes) -> str | None:
    """The first field of a class that there is, "" without one; None where it is no JSON."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    values = [fields[name] for name in _CLASS_FIELDS if name in fields] if isinstance(fields, dict) else []
    values = [str(value) for value in values if isinstance(value, (int, str)) and not isinstance(value, bool)]
    return (_class_in_text(values[0].encode(errors="replace")) or "") if values else ""


def read_members(file: BinaryIO, wanted: Callable[[str, int], bool]) -> Iterator[Member | Damage]:
    """Regular files of a tar, and its damaged places, where reading goes on at the next block that is a header.

    Args:
        file: at its start; content that is not wanted is passed over by seeking, if the file can seek.
        wanted: whether to read the content of a file, by name and size.
    """
    seekable = file.seekable() if hasattr(file, "seekable") else False
    length = _length(file) if seekable else None
    position, lost_from, ended = 0, None, False
    long_name, long_size = None, None
    while len(block := file.read(_BLOCK)) == _BLOCK:
        start, position = position, position + _BLOCK
        if not block.strip(b"\0"):
            ended = True
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.HeaderError(f"size {info.size}")
        except tarfile.HeaderError:
            lost_from = start if lost_from is None else lost_from
            long_name = long_size = None
            continue
        if lost_from is not None:
            yield Damage(f"bytes {lost_from} to {start} hold no readable header")
            lost_from = None
        ended = False
        extended = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        has_content = info.isreg() or extended or info.type not in tarfile.SUPPORTED_TYPES
        name = info.name if long_name is None else long_name
        size = (info.size if long_size is None or extended else long_size) if has_content else 0
        take = extended or (info.isreg() and wanted(name, size))
        content = _pass(file, size, take, seekable)
        room = -(-size // _BLOCK) * _BLOCK
        if content is None or (length is not None and position + size > length):
            yield Damage(f"is cut off in {name}")
            return
        _pass(file, room - size, False, seekable)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            records = _pax_records(content)
            long_name = records.get(b"path", b"").decode("utf-8", "surrogateescape") or long_name
            long_size = int(records[b"size"]) if records.get(b"size", b"").isdigit() else long_size
        elif not extended:
            if info.isreg():
                yield Member(name, position, size, content if take else None)
            long_name = long_size = None
        position += room
    if lost_from is not None:
        yield Damage(f"bytes {lost_from} to {position} hold no readable header")
    elif not ended:
        yield Damage("ends without an end-of-archive mark, as if it had been cut off")


def _length(file: BinaryIO) -> int:
    length = file.seek(0, 2)
    file.seek(0)
    return length


def _pass(file: BinaryIO, size: int, take: bool, seekable: bool) -> bytes | None:
    """The next ``size`` bytes; b"" where they are not to be taken; None where the file ends before."""
    if take:
        content = file.read(size)
        return content if len(content) == size else None
    if seekable:
        file.seek(size, 1)
        return b""
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            return None
        size -= len(chunk)
    return b""


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Records "length key=value\\n", the length counting all of it."""
    records, place = {}, 0
    while match := _PAX_RECORD.match(content, place):
        end = place + int(match[1])
        records[match[2]] = content[match.end() : end - 1]
        place = max(end, match.end())
    return records
