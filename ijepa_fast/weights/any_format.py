"""Weights in whatever form they come: of our runs and encoders, the official code, timm and Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ijepa_fast.model.config import ModelConfig
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.weights.encoder_file import KEY, build_arguments, load_encoder
from ijepa_fast.weights.huggingface import read_folder, value_range_of
from ijepa_fast.weights.official import OfficialCheckpoint, is_official, parse
from ijepa_fast.weights.reading import (
    LAYER_NORM_EPS,
    WeightsError,
    architecture,
    layer_norm_eps,
    load_weights,
    plain_names,
    read_pickle,
    read_safetensors,
)
from ijepa_fast.weights.runs import load_run
from ijepa_fast.weights.timm import from_timm


@dataclass(frozen=True)
class Networks:
    """Weights of the networks in a file, and what it tells of them.

    Attributes:
        kind: of file, in words.
        context, target: weights of the encoders under their official names; the same where there is only one.
        predictor: likewise, or None.
        build: what is known of ``VisionTransformer``'s arguments beside the weights.
        value_range: see ``data.bands.Pixels``.
        official: the whole official checkpoint, or None.
        ours: whether this is a checkpoint of one of our runs.
    """

    kind: str
    context: dict[str, Tensor]
    target: dict[str, Tensor]
    predictor: dict[str, Tensor] | None = None
    build: dict = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    official: OfficialCheckpoint | None = None
    ours: bool = False


def read_any(source: Path | str) -> Networks:
    """Read weights, whatever wrote them: a run or its checkpoint, a file of an encoder, an official checkpoint, a state
    dict of timm or of an official encoder, or a folder of transformers.

    Raises:
        WeightsError: refused, damaged, or not understood.
        CheckpointError: a damaged checkpoint of ours.
        OSError: cannot be opened.
    """
    source = Path(source)
    try:
        file = checkpoints.find(source)
    except CheckpointError:
        if not source.is_dir():
            raise FileNotFoundError(f"there is no file or folder {source}") from None
        return _of_encoder("an encoder of transformers", read_folder(source), value_range_of(source))
    if file.is_dir():  # a checkpoint in shards
        return _of_run(file)
    with open(file, "rb") as opened:
        start = opened.read(9)
    if start[8:9] == b"{":  # a safetensors file: the header's length in 8 bytes, then JSON
        state, metadata = read_safetensors(file)
        if "ijepa_fast" in metadata:
            return _of_run(file)
        if KEY in metadata:
            encoder, about = load_encoder(file)
            kind = f"the {about.get('encoder', '')} encoder of a run of ijepa_fast"
            return _of_encoder(kind, encoder, about.get("value_range"))
        return _of_state(state, file)
    contents = read_pickle(file)
    if is_official(contents):
        run = parse(contents)
        kind = f"an official checkpoint after epoch {run.epoch}"
        return Networks(kind, run.encoder, run.target_encoder, run.predictor, official=run)
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{file} holds {type(contents).__name__}, no weights")
    if all(isinstance(contents.get(name), Mapping) for name in ("encoder", "target_encoder")):
        both = [plain_names(contents[name]) for name in ("encoder", "target_encoder")]
        return Networks("both encoders of an official checkpoint", *both)
    return _of_state(contents, file)


def _of_run(file: Path) -> Networks:
    model, _, step = load_run(file)
    states = (network.state_dict() for network in (model.context_encoder, model.target_encoder, model.predictor))
    return Networks(
        f"a run of ijepa_fast after step {step}", *states, build_arguments(model.context_encoder), ours=True
    )


def _of_encoder(kind: str, encoder: VisionTransformer, value_range: Sequence[float] | None) -> Networks:
    state, eps = encoder.state_dict(), layer_norm_eps(encoder)
    if eps != LAYER_NORM_EPS:
        kind += f" (its layer-norm eps is {eps}; runs have {LAYER_NORM_EPS})"
    stated = None if value_range is None else tuple(value_range)
    return Networks(kind, state, state, build=build_arguments(encoder), value_range=stated)


def _of_state(state: Mapping[str, Tensor], source: Path) -> Networks:
    for nested in ("state_dict", "model", "encoder"):
        if isinstance(state.get(nested), Mapping):
            state = state[nested]
    weights = from_timm(state)
    if any("embeddings.patch_embeddings." in name for name in weights):
        raise WeightsError(f"{source} has the names of transformers: give its folder, with config.json")
    try:
        architecture(weights)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    return Networks("an encoder by itself (which one, the file does not say)", weights, weights)


def start_from(model: IJEPA, config: ModelConfig, source: Path | str) -> str:
    """Load weights into fresh fp32 networks, all that fit or none; what was loaded, in words.

    An encoder by itself becomes both encoders, beside the predictor as it is.

    Args:
        model: as ``config.build`` makes it.
        config: sizes of ``model``.
        source: as for ``read_any``.

    Raises:
        WeightsError, CheckpointError, OSError: as ``read_any``; or the weights are those of another architecture.
    """
    found = read_any(source)
    here = build_arguments(model.context_encoder)
    differ = [
        f"{name} {_plain(found.build[name])}, and the model {_plain(here[name])}"
        for name in ("patch_size", "num_heads", "mean", "std")
        if name in found.build and _plain(found.build[name]) != _plain(here[name])
    ]
    try:
        load_weights(model.context_encoder, found.context, f"the context encoder of {source}")
        load_weights(model.target_encoder, found.target, f"the target encoder of {source}")
        if differ:
            raise WeightsError(f"{source} has {'; '.join(differ)}")
    except WeightsError as error:
        raise WeightsError(f"{error}\nset model.* of the run to what the weights have ({found.kind})") from None
    if found.predictor is None:
        return f"both encoders start from {source}, {found.kind}; the predictor is new"
    try:
        load_weights(model.predictor, found.predictor, f"the predictor of {source}")
    except WeightsError as error:
        raise WeightsError(
            f"{error}\nset model.predictor_* to what the weights have; or begin with the encoder alone and a new "
            f"predictor, from the file that ijepa-fast export {source} --to safetensors writes"
        ) from None
    return f"encoders and predictor start from {source}, {found.kind}"


def _plain(value: object) -> object:
    return [round(float(v), 6) for v in value] if isinstance(value, (list, tuple)) else value
