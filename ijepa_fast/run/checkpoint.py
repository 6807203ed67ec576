"""Checkpoints: one safetensors file each, with everything that is not a tensor as JSON in its header.

A file appears under its name only when it is whole: it is written under a temporary name, flushed to the disk and
renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_fast.run.files import write_tensors

FORMAT = "ijepa_fast-1"
_KEY = "ijepa_fast"
_NAME = re.compile(r"step_(\d{9})\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not one of ours."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of one file.

    Attributes:
        step: steps done; the next one to run.
        tensors: dotted name -> tensor, on the CPU.
        extra: everything else, as JSON holds it.
    """

    step: int
    tensors: dict[str, Tensor]
    extra: dict


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}.safetensors"


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = path_of(folder, checkpoint.step)
    header = {_KEY: json.dumps({"format": FORMAT, "step": checkpoint.step, "extra": checkpoint.extra})}
    write_tensors(final, checkpoint.tensors, header)
    for old in list_steps(folder)[:-keep]:
        path_of(folder, old).unlink()
    for leftover in folder.glob("step_*.partial"):
        leftover.unlink()
    return final


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending; empty if the folder is not there."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for entry in folder.iterdir() if (m := _NAME.fullmatch(entry.name)))


def find(path: Path) -> Path:
    """The checkpoint file that ``path`` means: itself, or the newest in a run's or a checkpoint folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        if steps := list_steps(folder):
            return path_of(folder, steps[-1])
    raise CheckpointError(f"no checkpoint at {path}" + ("" if path.exists() else ": it does not exist"))


def load(path: Path) -> Checkpoint:
    """Read one checkpoint file.

    Raises:
        CheckpointError: the file is missing, truncated, or was not written by this package; the message says which, and
            names an older one beside it that is whole.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(_KEY)
            if header is None:
                raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of ijepa_fast")
            about = json.loads(header)
            if about.get("format") != FORMAT:
                raise CheckpointError(f"{path} has format {about.get('format')!r}; this version reads {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        message = f"{path} is damaged or not a safetensors file: {error}"
        if (older := _older_intact(path)) is not None:
            message += f"; {older.name} beside it is whole: remove or rename the damaged file to continue from that"
        raise CheckpointError(message) from error
    return Checkpoint(about["step"], tensors, about["extra"])


def _older_intact(path: Path) -> Path | None:
    """The newest checkpoint before the one at ``path``, in the same folder, that has its whole length."""
    if not (match := _NAME.fullmatch(path.name)):
        return None
    for step in reversed(list_steps(path.parent)):
        if step < int(match[1]):
            older = path_of(path.parent, step)
            with contextlib.suppress(SafetensorError, OSError), safe_open(older, framework="pt") as file:
                if _KEY in (file.metadata() or {}):
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
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``.

    Raises:
        CheckpointError: a parameter has no state in the file, or one of another shape.
    """
    groups = optimizer.state_dict()["param_groups"]
    state = {}
    for group, numbered in zip(optimizer.param_groups, groups, strict=True):
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            found = select(tensors, f"optimizer.{names[parameter]}")
            if not found:
                raise CheckpointError(f"the checkpoint has no optimizer state for {names[parameter]}")
            for key, value in found.items():
                if value.dim() and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"optimizer state {key} of {names[parameter]} is {tuple(value.shape)}, "
                        f"the parameter {tuple(parameter.shape)}"
                    )
            state[number] = found
    optimizer.load_state_dict({"state": state, "param_groups": groups})
