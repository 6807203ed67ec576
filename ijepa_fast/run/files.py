"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_whole(path: Path, write: Callable[[Path], object], size: int | None = None) -> None:
    """Have ``write`` make a file beside ``path``, flush it to the disk, and give it its name.

    Args:
        path: file to make or to replace.
        write: called with the temporary path, ``path`` with ".partial" at its end.
        size: bytes to be written, for the message where there is no room for them.

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; some libraries make files for their owner alone
        write(temporary)
        with contextlib.suppress(OSError):  # file systems without permissions refuse it
            os.chmod(temporary, mode)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            needed = "" if size is None else f" {size:,} bytes are needed,"
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"{path} cannot be written: {error.strerror};{needed} {free:,} are free there") from error
        raise


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    finish: Callable[[Path], object] = lambda file: None,
) -> None:
    """Write a safetensors file, then call ``finish`` on it before it gets its name; see ``write_whole``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(file: Path) -> None:
        try:
            save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file, metadata)
        except SafetensorError as error:
            # Its writer puts the number of the system's error into the text alone.
            number = next((number for number in _NO_ROOM if f"os error {number})" in str(error)), errno.EIO)
            raise OSError(number, os.strerror(number) if number != errno.EIO else str(error)) from error
        finish(file)

    write_whole(path, write, sum(value.nbytes for value in tensors.values()))


def flush(path: Path) -> None:
    """Have a file or a folder written to the disk now, where the file system can."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:  # some network file systems have none
            raise
    finally:
        os.close(descriptor)
