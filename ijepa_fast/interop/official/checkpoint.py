"""Checkpoints in the official format: read, checked, loaded, written; and the same state as one of ours.

A file is a ``torch.save`` of a dict: encoder, predictor, target_encoder (names under ``module.``), opt (a torch
optimizer's state_dict over four groups), scaler, epoch, loss, batch_size, world_size, lr.

Position tables are parameters there, so they are numbered in the optimizer groups 0 and 1, without a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ijepa_fast.optim import decays
from ijepa_fast.run.files import write_whole
from ijepa_fast.weights.reading import (
    WeightsError,
    check_fit,
    load_weights,
    plain_names,
    read_pickle,
    unwrapped,
)

NETWORKS = ("encoder", "predictor", "target_encoder")
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def load_checkpoint(
    device: torch.device | str,
    r_path: Path | str,
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module | None,
    opt: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> tuple:
    """Resume from a file. Unlike the official function, this raises where that one starts anew at epoch 0.

    Args:
        device: accepted for the sake of the signature; everything is copied to where it is used.
        r_path: file.
        encoder, predictor, target_encoder: wrapped in DistributedDataParallel or not. target_encoder may be None.
        opt: over ``parameter_groups(encoder, predictor)``, FusedAdamW or torch's AdamW.
        scaler: loss scaler or None.

    Returns:
        (encoder, predictor, target_encoder, opt, scaler, epochs done).

    Raises:
        WeightsError: the file is damaged or does not fit; then nothing has been loaded.
        OSError: it cannot be opened.
    """
    saved = read(r_path)
    pairs = [(encoder, saved.encoder, "encoder"), (predictor, saved.predictor, "predictor")]
    if target_encoder is not None:
        pairs.append((target_encoder, saved.target_encoder, "target_encoder"))
    for module, state, name in pairs:
        check_fit(module, state, f"{name} of {r_path}")
    check_optimizer(saved.opt, opt, r_path)
    if scaler is not None and not saved.scaler:
        raise WeightsError(f"{r_path} has no state of a loss scaler: it is from a run without use_bfloat16")
    for module, state, name in pairs:
        load_weights(module, state, f"{name} of {r_path}")
    excluded = [group.get("WD_exclude", False) for group in opt.param_groups]
    opt.load_state_dict(saved.opt)
    for group, exclude in zip(opt.param_groups, excluded, strict=True):
        # The file decides about everything but this: where it was forgotten, biases would be decayed from now on.
        if exclude:
            group |= {"WD_exclude": True, "weight_decay": 0}
    if scaler is not None:
        scaler.load_state_dict(saved.scaler)
    return encoder, predictor, target_encoder, opt, scaler, saved.epoch


def save_checkpoint(
    path: Path | str,
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    opt: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    *,
    epoch: int,
    loss: float,
    batch_size: int,
    world_size: int,
    lr: float,
) -> None:
    """Write a file that the official code, and ``load_checkpoint``, resume from after ``epoch`` epochs."""
    networks = (unwrapped(module).state_dict() for module in (encoder, predictor, target_encoder))
    scaler_state = None if scaler is None else scaler.state_dict()
    write(
        path,
        OfficialCheckpoint(*networks, opt.state_dict(), scaler_state, epoch, loss, batch_size, world_size, lr),
    )


def check_optimizer(state: object, optimizer: torch.optim.Optimizer, source: object) -> None:
    """Raises WeightsError if a state is not for this optimizer: other groups, or moments of other shapes."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        raise WeightsError(f"{source} has no optimizer state")
    sizes = [len(group["params"]) for group in state["param_groups"]]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != wanted:
        raise WeightsError(f"the optimizer groups of {source} have {sizes} parameters, the optimizer's {wanted}")
    for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(theirs["params"], ours["params"], strict=True):
            moments = state["state"].get(number, {})
            for name in MOMENTS:
                if moments and name not in moments:
                    raise WeightsError(f"parameter {number} of the optimizer state of {source} has no {name}")
                if name in moments and moments[name].shape != parameter.shape:
                    raise WeightsError(
                        f"{name} of parameter {number} of {source} is {list(moments[name].shape)}, "
                        f"the parameter {list(parameter.shape)}"
                    )


def optimizer_names(encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor]) -> list[list[str]]:
    """Which parameter each number of the optimizer state means: four lists of dotted names, in the order of numbers.

    Args:
        encoder, predictor: weights in the order of the modules' state dicts, tables included.
    """
    return [
        [f"{part}.{name}" for name, value in state.items() if decays(value) == decayed]
        for decayed in (True, False)
        for part, state in (("encoder", encoder), ("predictor", predictor))
    ]
