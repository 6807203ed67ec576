"""The networks and the optimizer in one of our checkpoints, in full precision, and the same put together anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ijepa_fast.config import RunConfig, as_dict, flatten, from_dict
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.model.vit import VisionTransformer, cast_weights
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.step_tensors import local
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run import sharded
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointDamaged, CheckpointError
from ijepa_fast.step.sharding import is_sharded
from ijepa_fast.step.train_step import PRECISION_DTYPES
from ijepa_fast.weights.reading import WeightsError, load_weights

ENCODERS = {"target": "target_encoder", "context": "context_encoder"}
NETWORKS = ("context_encoder", "predictor", "target_encoder")


def load_run(path: Path | str) -> tuple[IJEPA, RunConfig, int]:
    """The networks of a run in fp32, their configuration, and the steps done.

    Where a run keeps bf16 or fp16 weights, these are the optimizer's fp32 masters and averages, not the rounded copies.

    Args:
        path: a checkpoint of ours, or the folder of a run (its newest).

    Raises:
        CheckpointError: there is none, or it is damaged.
        WeightsError: its weights do not fit its configuration.
    """
    path = checkpoints.find(Path(path))
    state = checkpoints.load(path, values=of_networks)
    return *networks_of(state, path), state.step


def of_networks(name: str) -> bool:
    """Whether ``networks_of`` reads the tensor of this name in a checkpoint."""
    return name.startswith("model.") or name.endswith((".master", ".ema"))


def networks_of(state: Checkpoint, path: Path | str) -> tuple[IJEPA, RunConfig]:
    """The fp32 networks in a checkpoint that is read already, and their configuration; ``path`` is for messages."""
    checkpoints.check_run(state, Path(path))
    try:
        config = from_dict(state.extra["config"], strict=False)
        model = config.model.build(config.objective)
    except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise CheckpointError(f"the settings in {path} do not fit this version: {error}") from error
    for part in NETWORKS:
        weights = full_precision(state.tensors, part)
        for name, value in weights.items():
            if not value.is_floating_point():
                raise CheckpointDamaged(f"{path} is damaged: {part}.{name} holds {value.dtype}")
        load_weights(getattr(model, part), weights, f"{part} of {path}")
    return model, config


def full_precision(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Weights of one of ``NETWORKS``, from the optimizer's masters and averages where it has them.

    Args:
        tensors: networks and optimizer, named as in a checkpoint.
    """
    kept, source = ("ema", "context_encoder") if part == "target_encoder" else ("master", part)
    weights = checkpoints.select(tensors, f"model.{part}")
    return {name: tensors.get(f"optimizer.{source}.{name}.{kept}", value) for name, value in weights.items()}


def training_tensors(model: IJEPA, optimizer: FusedAdamW) -> dict[str, Tensor]:
    """Every tensor that training continues from, by its name in a checkpoint."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    return tensors | checkpoints.optimizer_tensors(optimizer, names) | {"optimizer_skipped": optimizer.skipped}


def about_run(config: RunConfig, data: str | None, scaler: torch.amp.GradScaler | None) -> dict:
    """What a checkpoint holds beside tensors and counts."""
    return {
        "settings": flatten(config),
        "config": as_dict(config),
        "data": data,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def whole_encoder(model: IJEPA, config: RunConfig) -> VisionTransformer | None:
    """The target encoder with all its weights, on the first of the ranks that share them; all must come here."""
    if not is_sharded(model):
        return model.target_encoder
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model.target_encoder, options=options)
    if not weights:
        return None
    with torch.device("meta"):
        encoder = config.model.build(config.objective).target_encoder
    encoder.load_state_dict(weights, assign=True)
    cast_weights(encoder, PRECISION_DTYPES[config.train.precision])
    encoder.use_attention(config.step.attention)
    encoder.wide_residual = config.step.wide_residual
    return encoder.to(next(model.parameters()).device)


def check_training(
    state: Checkpoint,
    path: Path,
    model: IJEPA,
    optimizer: FusedAdamW,
    scaler: torch.amp.GradScaler | None,
    total_steps: int,
) -> None:
    """CheckpointDamaged unless ``restore_training`` can continue from the checkpoint; nothing is changed."""
    state = _in_precision_of(optimizer, state, model, scaler)
    width = model.target_encoder.embed_dim
    health = state.tensors.get("health.features", torch.zeros(()))
    if health.dim() != 2 or health.shape[1] != width or health.dtype != torch.float32:
        raise CheckpointDamaged(f"{path} does not fit its run: its health.features are no rows of {width} features")
    checkpoints.check_tensors(state.tensors, training_tensors(model, optimizer), path)
    # Weights that were imported may come from a longer run: nothing is left to do then.
    if state.step > total_steps and "imported" not in state.extra:
        raise CheckpointDamaged(f"{path} says that it was written after step {state.step} of {total_steps}")
    if scaler is not None:
        kept, wanted = state.extra["scaler"] or {}, scaler.state_dict()
        if kept.keys() != wanted.keys() or not all(type(value) in (int, float) for value in kept.values()):
            raise CheckpointDamaged(f"{path} is damaged: its scaler is {kept!r:.80}")


def restore_training(
    state: Checkpoint, model: IJEPA, optimizer: FusedAdamW, scaler: torch.amp.GradScaler | None
) -> None:
    """Continue from a checkpoint that ``check_training`` has let pass."""
    state = _in_precision_of(optimizer, state, model, scaler)
    if is_sharded(model):
        with torch.no_grad():
            for name, tensor in training_tensors(model, optimizer).items():
                local(tensor).copy_(_share(state.tensors[name], tensor))
        return  # without a scaler, which fp16 alone has
    names = {parameter: name for name, parameter in model.named_parameters()}
    model.load_state_dict(checkpoints.select(state.tensors, "model"))
    checkpoints.load_optimizer_tensors(optimizer, names, state.tensors)
    optimizer.skipped.copy_(state.tensors["optimizer_skipped"])
    if scaler is not None:
        scaler.load_state_dict(state.extra["scaler"])


def restore(
    path: Path, model: IJEPA, optimizer: FusedAdamW, scaler: torch.amp.GradScaler | None, state: Checkpoint | None
) -> Checkpoint:
    """Continue from a checkpoint that ``check_training`` has let pass, as ranks hold it now.

    Of shards, each rank reads its own share alone, unless the run that wrote them did not divide its weights, or this
    one does not.

    Args:
        state: the checkpoint, if it is read already.

    Returns:
        The checkpoint; of its tensors, at least those that are not of training.
    """
    state = state or checkpoints.load(path, values=lambda _: False)
    if not path.is_dir():
        restore_training(state, model, optimizer, scaler)
        return state
    if in_shards(state.extra) != is_sharded(model) or "imported" in state.extra:
        state = checkpoints.load(path)
        restore_training(state, model, optimizer, scaler)
        return state
    tensors = training_tensors(model, optimizer)
    others = {name: torch.empty_like(t, device="cpu") for name, t in state.tensors.items() if name not in tensors}
    with torch.no_grad():
        sharded.read_into(path, tensors | others)
    if scaler is not None:
        scaler.load_state_dict(state.extra["scaler"])
    return Checkpoint(state.step, others, state.extra)


def in_shards(extra: Mapping) -> bool:
    """Whether the run that wrote a checkpoint kept its weights in shards, which are in full precision."""
    return extra["settings"].get("train.parallel", "ddp") != "ddp"


def _share(value: Tensor, tensor: Tensor) -> Tensor:
    """What this rank holds of a whole value that is divided like ``tensor``."""
    if not hasattr(tensor, "to_local"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()


def _in_precision_of(
    optimizer: FusedAdamW, state: Checkpoint, model: IJEPA, scaler: torch.amp.GradScaler | None
) -> Checkpoint:
    """A checkpoint whose weights are fp32 alone, or have masters, as this run has them; any other as it is.

    Imported weights and those of shards are fp32, and shards have no masters because they are such.
    """
    if "imported" not in state.extra and in_shards(state.extra) == is_sharded(model):
        return state
    tensors = dict(state.tensors)
    for part in NETWORKS:
        tensors |= {f"model.{part}.{name}": value for name, value in full_precision(state.tensors, part).items()}
    whole = dict(tensors)
    for name, wanted in training_tensors(model, optimizer).items():
        of, _, kind = name.removeprefix("optimizer.").rpartition(".")
        if kind in ("master", "ema") and name not in tensors:
            of = of if kind == "master" else of.replace("context_encoder", "target_encoder", 1)
            tensors[name] = whole[f"model.{of}"]
        if name in tensors and wanted.is_floating_point():
            tensors[name] = tensors[name].to(wanted.dtype)
    fresh = None if scaler is None else scaler.state_dict()
    return Checkpoint(state.step, tensors, state.extra | {"scaler": state.extra["scaler"] or fresh})


def save_run(
    folder: Path | str,
    model: IJEPA,
    config: RunConfig,
    step: int,
    *,
    moments: Mapping[str, Mapping[str, Tensor]] | None = None,
    data: str | None = None,
    about: Mapping[str, object] | None = None,
) -> Path:
    """Write fp32 networks as a checkpoint that ``load_run`` reads, and that training continues from.

    Args:
        folder: of the run; the file goes to its checkpoints/.
        model: fp32, on the CPU.
        config: of the run, which casts the weights to its precision when it begins: there, not here, if that is auto.
        step: steps done.
        moments: dotted parameter name -> exp_avg and exp_avg_sq; by default zero, as at the start of a run.
        data: fingerprint of the training images. None: a checkpoint to evaluate, without optimizer state.
        about: where the weights are from, kept in the file as "imported".

    Returns:
        Path of the file.

    Raises:
        WeightsError: the folder already holds checkpoints.
    """
    folder = Path(folder)
    if checkpoints.list_steps(folder / "checkpoints"):
        raise WeightsError(f"{folder} already holds a run; give another folder")
    extra = about_run(config, data, None) | {"bad_files": {}, "imported": dict(about or {})}
    state = {} if data is None else _training_state(model, config, step, moments or {})
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()} | state
    return checkpoints.save(folder / "checkpoints", Checkpoint(step, tensors, extra), keep=1)


def _training_state(
    model: IJEPA, config: RunConfig, step: int, moments: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """What a checkpoint holds beside fp32 networks."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = FusedAdamW(parameter_groups(model))
    tensors = {"health.features": torch.zeros(0, config.model.embed_dim), "optimizer_skipped": torch.zeros(())}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        values = {**state, "step": torch.tensor(float(step)), **moments.get(name, {})}
        tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return tensors
