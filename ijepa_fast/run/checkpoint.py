"""Checkpoints: one safetensors file each, with everything that is not a tensor as JSON in its header.

A file appears under its name only when it is whole: it is written under a temporary name, flushed to the disk and
renamed. Its header holds the SHA-256 of the file, which is checked before anything in it is used. Nothing is ever
unpickled. Runs whose ranks hold shards write folders instead (``sharded.py``); they are found and read here, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_fast.run import sharded
from ijepa_fast.run.files import flush, write_tensors

log = logging.getLogger(__name__)

FORMAT = "ijepa_fast-2"
WITHOUT_CHECKSUM = "ijepa_fast-1"
"""Format of earlier versions."""
MOST_STEPS = 10**9 - 1
BEST = "best.safetensors"
"""Name of a run's best checkpoint, beside the newest ones."""
_KEY = "ijepa_fast"
_NAME = re.compile(r"step_(\d{9})(\.safetensors)?")
_CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_BLANK = "0" * 64
"""Stands in the header while the file is hashed, and then gives way to the checksum."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, not one of ours, or of another run."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint is not what was written; an older one may still be."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of one checkpoint.

    Attributes:
        step: steps done; the next one to run.
        tensors: dotted name -> tensor, on the CPU.
        extra: everything else, as JSON holds it.
    """

    step: int
    tensors: dict[str, Tensor]
    extra: dict


def path_of(folder: Path, step: int) -> Path:
    """The file or the folder of shards of a checkpoint that is there."""
    shards = folder / f"step_{step:09d}"
    return shards if (shards / sharded.ABOUT).is_file() else shards.with_suffix(".safetensors")


def save(folder: Path, checkpoint: Checkpoint, keep: int, best: bool = False) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``. Returns its path.

    Args:
        best: keep it as the best one, too, in place of the one that was.

    Raises:
        OSError: it cannot be written; the older ones are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{checkpoint.step:09d}.safetensors"
    header = json.dumps({"format": FORMAT, "step": checkpoint.step, "extra": checkpoint.extra})
    try:
        write_tensors(final, checkpoint.tensors, {_KEY: header, "sha256": _BLANK}, finish=_write_checksum)
    except OSError as error:
        raise with_newest(folder, error) from error
    tidy(folder, final, keep, best)
    return final


def with_newest(folder: Path, error: OSError) -> OSError:
    """An error of a save, and which checkpoint there is still."""
    newest = max(list_steps(folder), default=None)
    kept = "there is no older checkpoint" if newest is None else f"{path_of(folder, newest)} is untouched"
    return OSError(f"{error}; {kept}")


def tidy(folder: Path, saved: Path, keep: int, best: bool) -> None:
    """After a save: keep it as the best one, too, if it is, and remove all but the newest ``keep``."""
    if best:
        keep_as_best(saved)
    for old in list_steps(folder)[:-keep]:
        _remove(path_of(folder, old))
    for leftover in [*folder.glob("step_*.partial"), *folder.glob("best*.partial")]:
        _remove(leftover)


def _remove(path: Path) -> None:
    sharded.remove(path) if path.is_dir() else path.unlink(missing_ok=True)


def keep_as_best(saved: Path) -> None:
    """Give a checkpoint the name of the best one, too: the same files where there are hard links, else a copy."""
    named = saved.with_name(BEST if saved.is_file() else Path(BEST).stem)
    temporary = named.with_name(named.name + ".partial")
    _remove(temporary)
    if saved.is_file():
        _link(saved, temporary)
    elif sharded.is_whole(named) and sharded.about(named) == sharded.about(saved):
        return
    else:
        temporary.mkdir()
        for file in saved.iterdir():
            _link(file, temporary / file.name)
        if named.exists():
            sharded.remove(named)
    os.replace(temporary, named)
    flush(saved.parent)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
        flush(name)


def _hashed(path: Path) -> tuple[bytes | None, bytes, int]:
    """(checksum that a safetensors file names or None, the one that it has, byte where the first stands)."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > path.stat().st_size:
            raise ValueError("its header is cut off")
        header = bytearray(file.read(length))
        named, place = None, 0
        if match := _CHECKSUM.search(header):
            named, place = match[1], match.start(1)
            header[place : place + len(_BLANK)] = _BLANK.encode()
        digest = hashlib.sha256(start + header)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return named, digest.hexdigest().encode(), len(start) + place


def _write_checksum(path: Path) -> None:
    _, checksum, place = _hashed(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(checksum)


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending; empty if the folder is not there."""
    if not folder.is_dir():
        return []
    found = {int(m[1]) for entry in folder.iterdir() if (m := _NAME.fullmatch(entry.name)) and _is_checkpoint(entry)}
    return sorted(found)


def _is_checkpoint(path: Path) -> bool:
    return bool(path.suffix) or (path / sharded.ABOUT).is_file()


def find(path: Path, which: str = "newest") -> Path:
    """The checkpoint that ``path`` means: itself, or the newest or best one in a run's or a checkpoint folder.

    RUN/checkpoints/best is understood as well, without the suffix of the file.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file() or (path / sharded.ABOUT).is_file():
        return path
    if not path.exists() and (named := Path(f"{path}.safetensors")).is_file():  # never in place of a folder
        return named
    for folder in (path / "checkpoints", path):
        best = [name for name in (folder / BEST, folder / Path(BEST).stem) if name.exists()]
        if which == "best" and best:
            return max(best, key=lambda name: name.stat().st_mtime)  # a run may have changed from files to shards
        if steps := list_steps(folder):
            if which == "best":
                raise CheckpointError(f"{folder} holds no {BEST}: a run keeps one from its first regular save on")
            return path_of(folder, steps[-1])
    raise CheckpointError(f"no checkpoint at {path}" + ("" if path.exists() else ": it does not exist"))


def load(path: Path, *, name_older: bool = True, values: Callable[[str], bool] = lambda name: True) -> Checkpoint:
    """Read one checkpoint.

    Args:
        values: tells by its name whether the values of a tensor in shards are wanted; those of a file are there in any
            case.

    Raises:
        CheckpointDamaged: the file is not what was written; with ``name_older`` the message names the newest one beside
            it that is older and whole.
        CheckpointError: it is missing, may not be read, or was not written by this package.
    """
    try:
        return _load_shards(path, values) if path.is_dir() else _load(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read: {error.strerror}") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        kind = "a checkpoint in shards" if path.is_dir() else "a safetensors file"
        message = f"{path} is damaged or not {kind}: {error}"
        if name_older and (older := _older_intact(path)) is not None:
            message += f"; {older.name} beside it is whole: remove or rename the damaged file to continue from that"
        raise CheckpointDamaged(message) from error


def _load(path: Path) -> Checkpoint:
    named, actual, _ = _hashed(path)
    if named is not None and named != actual:
        raise ValueError("its checksum is another, so it has changed since it was written")
    with safe_open(path, framework="pt", device="cpu") as file:
        header = (file.metadata() or {}).get(_KEY)
        if header is None:
            raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of ijepa_fast")
        about = json.loads(header)
        if not isinstance(about, dict) or not isinstance(about.get("format"), str):
            raise ValueError(f"its metadata are none of a checkpoint, but {header[:80]}")
        if about.get("format") not in (FORMAT, WITHOUT_CHECKSUM):
            raise CheckpointError(f"{path} has format {about.get('format')!r}; this version reads {FORMAT!r}")
        if named is None and about["format"] == FORMAT:
            raise ValueError("it has no checksum")
        step, extra = _step_and_extra(about, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if named is None:
        log.info("%s is of an earlier version and has no checksum: whether it is damaged cannot be told", path)
    return Checkpoint(step, tensors, extra)


def _step_and_extra(about: dict, path: Path) -> tuple[int, dict]:
    step, extra = about.get("step"), about.get("extra")
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise ValueError(f"its step is no number of steps, but {step!r}")
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != step:
        raise ValueError(f"it says that it was written after step {step}")
    if not isinstance(extra, dict):
        raise ValueError(f"it holds no settings, but {str(extra)[:80]!r}")
    return step, extra


def _load_shards(path: Path, values: Callable[[str], bool]) -> Checkpoint:
    step, extra = _step_and_extra(sharded.about(path), path)
    tensors = sharded.empty_tensors(path)
    wanted = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items() if values(name)}
    if wanted:
        if changed := sharded.changed(path):
            raise ValueError(f"the checksum of {changed[0]} is another, so it has changed since it was written")
        sharded.read_into(path, wanted)
    return Checkpoint(step, tensors | wanted, extra)


def check_run(state: Checkpoint, path: Path) -> None:
    """CheckpointDamaged if the settings and counts of a run are missing from a checkpoint, or are of other types."""
    kinds = {"settings": dict, "config": dict, "data": str | None, "scaler": dict | None, "bad_files": dict}
    for name, kind in kinds.items():
        if name not in state.extra or not isinstance(state.extra[name], kind):
            raise CheckpointDamaged(f"{path} is damaged: its {name} is {state.extra.get(name)!r:.80}")
    seconds = state.extra.get("seconds", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
        raise CheckpointDamaged(f"{path} is damaged: its seconds are {seconds!r:.80}")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """CheckpointDamaged unless there is a tensor of the same shape and dtype for each that is expected."""
    wrong = []
    for name, wanted in expected.items():
        there = tensors.get(name)
        if there is None:
            wrong.append(f"there is no {name}")
        elif there.shape != wanted.shape or there.dtype != wanted.dtype:
            wrong.append(f"{name} is {_described(there)}, not {_described(wanted)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointDamaged(f"{path} does not fit its run: {'; '.join(wrong[:3])}{more}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _older_intact(path: Path) -> Path | None:
    """The newest whole checkpoint before the one at ``path``, in the same folder."""
    if not (match := _NAME.fullmatch(path.name)):
        return None
    for step in reversed(list_steps(path.parent)):
        older = path_of(path.parent, step)
        if step < int(match[1]):
            with contextlib.suppress(SafetensorError, OSError, ValueError, TypeError, KeyError, CheckpointError):
                load(older, name_older=False, values=lambda _: False)
                return older
    return None


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries whose name starts with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """``optimizer.<parameter name>.<state name>`` -> tensor."""
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``.

    Raises:
        CheckpointDamaged: a tensor of the optimizer is missing, or has another shape or dtype.
    """
    check_tensors(tensors, optimizer_tensors(optimizer, names), Path("the checkpoint"))
    groups = optimizer.state_dict()["param_groups"]
    state = {}
    for group, numbered in zip(optimizer.param_groups, groups, strict=True):
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            kept = optimizer.state.get(parameter, {})
            state[number] = {key: tensors[f"optimizer.{names[parameter]}.{key}"] for key in kept}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
