"""Checkpoints in the official format: read, checked and written.

A file is a ``torch.save`` of a dict: encoder, predictor, target_encoder (names under ``module.``), opt (a torch
optimizer's state_dict over four groups), scaler, epoch, loss, batch_size, world_size, lr.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ijepa_fast.run.files import write_whole
from ijepa_fast.weights.reading import WeightsError, plain_names, read_pickle

NETWORKS = ("encoder", "predictor", "target_encoder")


@dataclass(frozen=True)
class OfficialCheckpoint:
    """Contents of a file, checked, on the CPU.

    Attributes:
        encoder, predictor, target_encoder: weights, names without ``module.``.
        opt: state_dict of the optimizer, or None.
        scaler: state_dict of the loss scaler, or None.
        epoch: epochs done.
        loss: mean of the last epoch.
        batch_size: per process.
        world_size: processes.
        lr: the reference learning rate of the run.
    """

    encoder: dict[str, Tensor]
    predictor: dict[str, Tensor]
    target_encoder: dict[str, Tensor]
    opt: dict | None
    scaler: dict | None
    epoch: int
    loss: float
    batch_size: int
    world_size: int
    lr: float


def read(path: Path | str) -> OfficialCheckpoint:
    """Read a file without running code from it.

    Raises:
        WeightsError: it is damaged, holds code, or is no official checkpoint.
        OSError: it cannot be opened.
    """
    contents = read_pickle(path)
    if not is_official(contents):
        names = ", ".join(map(str, list(contents)[:8])) if isinstance(contents, Mapping) else type(contents).__name__
        raise WeightsError(f"{path} is no official I-JEPA checkpoint: it needs {', '.join(NETWORKS)}, and has {names}")
    return parse(contents)


def parse(contents: Mapping) -> OfficialCheckpoint:
    """The contents of a file for which ``is_official`` holds. Raises WeightsError for what is no state_dict."""
    networks = {name: plain_names(contents[name]) for name in NETWORKS}
    opt = contents.get("opt") or None
    parts = [opt.get(name) for name in ("state", "param_groups")] if isinstance(opt, Mapping) else []
    if opt is not None and not (parts and isinstance(parts[0], Mapping) and isinstance(parts[1], list)):
        raise WeightsError('"opt" of the official checkpoint is no state_dict of an optimizer')
    return OfficialCheckpoint(
        **networks,
        opt=opt,
        scaler=contents.get("scaler"),
        epoch=int(contents.get("epoch", 0)),
        loss=float(contents.get("loss", float("nan"))),
        batch_size=int(contents.get("batch_size", 0)),
        world_size=int(contents.get("world_size", 1)),
        lr=float(contents.get("lr", 0.0)),
    )


def is_official(contents: object) -> bool:
    """Whether this is what an official file holds."""
    return isinstance(contents, Mapping) and all(isinstance(contents.get(name), Mapping) for name in NETWORKS)


def write(path: Path | str, checkpoint: OfficialCheckpoint) -> None:
    """Write a file that the official code resumes from; it appears under its name only when it is whole."""
    contents = {name: getattr(checkpoint, name) for name in OfficialCheckpoint.__dataclass_fields__}
    for name in NETWORKS:
        contents[name] = {f"module.{key}": value.detach().cpu().clone() for key, value in contents[name].items()}
    if checkpoint.opt is not None:
        contents["opt"] = {
            "state": {
                number: {key: torch.as_tensor(value).detach().cpu().clone() for key, value in state.items()}
                for number, state in checkpoint.opt["state"].items()
            },
            "param_groups": checkpoint.opt["param_groups"],
        }
    write_whole(Path(path), lambda file: torch.save(contents, file))
