"""A whole training run between our checkpoints and the official format, optimizer state included."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ijepa_fast.config import RunConfig
from ijepa_fast.interop.official.checkpoint import MOMENTS, optimizer_names
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.run.checkpoint import Checkpoint
from ijepa_fast.weights.official import OfficialCheckpoint
from ijepa_fast.weights.reading import POSITION_TABLES, WeightsError

_OURS = {"encoder": "context_encoder", "predictor": "predictor"}
_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
"""A fresh loss scaler. The official code wants one in the file wherever the run has use_bfloat16."""


def to_official(
    model: IJEPA, state: Checkpoint, config: RunConfig, epoch: int, loss: float = float("nan")
) -> OfficialCheckpoint:
    """One of our checkpoints in the official form.

    Args:
        model: its networks in fp32.
        state: the checkpoint. Without optimizer state in it, "opt" is None: weights alone.
        config: of the run.
        epoch: epochs done, where the official code resumes.
        loss: recorded in the file.

    Raises:
        WeightsError: the run is of a kind that the official code has not.
    """
    if config.objective.targets == "pixels":
        raise WeightsError("the official code cannot predict pixels (objective.targets)")
    if config.model.projector_dim is not None:
        raise WeightsError(
            f"the official code has no projector (model.projector_dim {config.model.projector_dim}); "
            "ijepa-fast export --to safetensors writes the encoder alone"
        )
    encoder, predictor = model.context_encoder.state_dict(), model.predictor.state_dict()
    return OfficialCheckpoint(
        encoder=encoder,
        predictor=predictor,
        target_encoder=model.target_encoder.state_dict(),
        opt=_optimizer(optimizer_names(encoder, predictor), state, config),
        scaler=state.extra["scaler"] or _SCALER,
        epoch=epoch,
        loss=loss,
        batch_size=config.train.batch_size,
        world_size=1,
        lr=config.optim.lr,
    )


def _optimizer(groups: list[list[str]], state: Checkpoint, config: RunConfig) -> dict | None:
    numbered, states = [], {}
    first = 0
    for names in groups:
        numbered.append(list(range(first, first + len(names))))
        for number, name in zip(numbered[-1], names, strict=True):
            part, _, inner = name.partition(".")
            key = f"optimizer.{_OURS[part]}.{inner}"
            if f"{key}.step" in state.tensors:
                states[number] = {kind: state.tensors[f"{key}.{kind}"].float() for kind in ("step", *MOMENTS)}
        first += len(names)
    if not states:
        return None
    optim = config.optim
    shared = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": 1e-8, "weight_decay": optim.weight_decay[0]}
    excluded = {"WD_exclude": True, "weight_decay": 0}
    options = [shared, shared, shared | excluded, shared | excluded]
    return {
        "state": states,
        "param_groups": [{**option, "params": params} for option, params in zip(options, numbered, strict=True)],
    }


def moments_of(official: OfficialCheckpoint) -> tuple[int, dict[str, Mapping[str, Tensor]]]:
    """Steps done, and exp_avg and exp_avg_sq by the names that our optimizer state has; (0, {}) without any.

    Raises:
        WeightsError: the numbering is not that of these networks.
    """
    if not official.opt or not official.opt["state"]:
        return 0, {}
    groups = optimizer_names(official.encoder, official.predictor)
    sizes = [len(group["params"]) for group in official.opt["param_groups"]]
    if sizes != [len(names) for names in groups]:
        raise WeightsError(f"the optimizer groups have {sizes} parameters, the networks {[len(n) for n in groups]}")
    weights = {"encoder": official.encoder, "predictor": official.predictor}
    moments, steps = {}, set()
    for group, names in zip(official.opt["param_groups"], groups, strict=True):
        for number, name in zip(group["params"], names, strict=True):
            part, _, inner = name.partition(".")
            if inner in POSITION_TABLES:
                continue
            state = official.opt["state"].get(number, {})
            if absent := [kind for kind in ("step", *MOMENTS) if kind not in state]:
                raise WeightsError(f"the optimizer state of {name} has no {', '.join(absent)}: not that of AdamW")
            if any(state[kind].shape != weights[part][inner].shape for kind in MOMENTS):
                raise WeightsError(f"the optimizer state of {name} has not the shape of its weights")
            moments[f"{_OURS[part]}.{inner}"] = {kind: state[kind].float() for kind in MOMENTS}
            steps.add(int(state["step"]))
    if len(steps) > 1:
        raise WeightsError(f"parameters have been stepped differently often: {sorted(steps)}")
    return steps.pop(), moments
