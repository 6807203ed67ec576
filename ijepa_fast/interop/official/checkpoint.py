"""The official code's functions that load and save a checkpoint, and the numbering of its optimizer state.

Position tables are parameters there, so they are numbered in the optimizer groups 0 and 1, without a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ijepa_fast.optim import decays
from ijepa_fast.weights.official import OfficialCheckpoint, read, write
from ijepa_fast.weights.reading import WeightsError, check_fit, load_weights, unwrapped

MOMENTS = ("exp_avg", "exp_avg_sq")


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
