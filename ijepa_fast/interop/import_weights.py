"""``ijepa-fast import``: weights of other libraries as one of our checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ijepa_fast.config import ModelConfig, RunConfig
from ijepa_fast.interop.official.checkpoint import OfficialCheckpoint, is_official, parse
from ijepa_fast.interop.official.training_state import moments_of
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.ranks import pick_device
from ijepa_fast.run.auto import resolved
from ijepa_fast.weights.encoder_file import KEY, build_arguments, load_encoder
from ijepa_fast.weights.reading import (
    LAYER_NORM_EPS,
    WeightsError,
    architecture,
    layer_norm_eps,
    load_weights,
    plain_names,
    read_pickle,
    read_safetensors,
    square_side,
)
from ijepa_fast.weights.runs import save_run
from ijepa_fast.weights.timm import from_timm

LICENCE = "The weights that Meta published are CC-BY-NC-4.0, and stay so in this form."


@dataclass(frozen=True)
class Imported:
    """Weights of another library, and what is known of their networks.

    Attributes:
        kind: of file, in words.
        context, target: weights of the encoders under their official names; the same where there is only one.
        predictor: likewise, or None.
        build: what is known of ``VisionTransformer``'s arguments beside the weights.
        run: the whole official checkpoint, or None.
    """

    kind: str
    context: dict[str, Tensor]
    target: dict[str, Tensor]
    predictor: dict[str, Tensor] | None = None
    build: dict = field(default_factory=dict)
    run: OfficialCheckpoint | None = None


def import_weights(
    source: Path | str,
    out: Path | str,
    config: RunConfig,
    num_heads: int | None = None,
    data: str | None = None,
) -> tuple[RunConfig, str]:
    """Write weights of another library as the first checkpoint of a run.

    Args:
        source: an official .pth.tar, a state dict of timm or of an official encoder (.pth, .safetensors), a file of
            ``save_encoder``, or a folder of transformers' ``save_pretrained``.
        out: folder of the run.
        config: of the run; the sizes of its networks are replaced by those of the weights.
        num_heads: of the attention, where the size is not one of ``vit.SIZES``.
        data: fingerprint of the images to go on training with. None: a checkpoint to evaluate only.

    Returns:
        The configuration as it was written, and what was imported, in words.

    Raises:
        WeightsError: the file is refused, damaged, or not understood; or ``out`` holds a run already.
    """
    imported = read_any(source)
    config = replace(config, output=str(out), model=_model_config(imported, config.model, num_heads))
    if config.train.precision == "auto":
        config = resolved(config, pick_device(config.train.device, 0))
    torch.manual_seed(config.seed)
    model = config.model.build(config.objective)
    load_weights(model.context_encoder, imported.context, f"context encoder of {source}")
    load_weights(model.target_encoder, imported.target, f"target encoder of {source}")
    if imported.predictor is not None:
        load_weights(model.predictor, imported.predictor, f"predictor of {source}")
    step, moments = moments_of(imported.run) if imported.run is not None else (0, {})
    about = {"source": Path(source).name, "kind": imported.kind}
    path = save_run(out, model, config, step, moments=moments, data=data, about=about)
    said = [f"{path}: {imported.kind}, {architecture(imported.target)}"]
    if imported.target is imported.context:
        said.append("both encoders start from the one that is there")
    if imported.predictor is None:
        said.append("the predictor is new")
    if moments:
        said.append(f"{step} steps done; optimizer state " + ("included" if data else "left out: no data given"))
    said.append(LICENCE)
    return config, "\n".join(said)


def read_any(source: Path | str) -> Imported:
    """Read weights, whatever wrote them.

    Raises:
        WeightsError: refused, damaged, or not understood.
        OSError: cannot be opened.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}")
    if source.is_dir():
        if (source / "checkpoints").is_dir():
            raise WeightsError(f"{source} is a run of ijepa_fast and needs no import: probe, knn and export read it")
        if not (source / "config.json").is_file():
            raise WeightsError(f"{source} is a folder without config.json: not one of transformers' save_pretrained")
        from ijepa_fast.interop.huggingface import from_huggingface

        return _of_encoder("an encoder of transformers", from_huggingface(source))
    with open(source, "rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # a safetensors file: the header's length in 8 bytes, then JSON
        state, metadata = read_safetensors(source)
        if "ijepa_fast" in metadata:
            raise WeightsError(
                f"{source} needs no import: probe, knn and export read checkpoints of runs, JEPAModel.load its own"
            )
        if KEY in metadata:
            encoder, about = load_encoder(source)
            return _of_encoder(f"the {about.get('encoder', '')} encoder of a run of ijepa_fast", encoder)
        return _of_state(state, source)
    contents = read_pickle(source)
    if is_official(contents):
        run = parse(contents)
        kind = f"an official checkpoint after epoch {run.epoch}"
        return Imported(kind, run.encoder, run.target_encoder, run.predictor, run=run)
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{source} holds {type(contents).__name__}, no weights")
    if all(isinstance(contents.get(name), Mapping) for name in ("encoder", "target_encoder")):
        both = [plain_names(contents[name]) for name in ("encoder", "target_encoder")]
        return Imported("both encoders of an official checkpoint", *both)
    return _of_state(contents, source)


def _of_encoder(kind: str, encoder: VisionTransformer) -> Imported:
    state, eps = encoder.state_dict(), layer_norm_eps(encoder)
    if eps != LAYER_NORM_EPS:
        kind += f" (its layer-norm eps is {eps}; runs have {LAYER_NORM_EPS})"
    return Imported(kind, state, state, build=build_arguments(encoder))


def _of_state(state: Mapping[str, Tensor], source: Path) -> Imported:
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
    return Imported("an encoder by itself (which one, the file does not say)", weights, weights)


def _model_config(imported: Imported, config: ModelConfig, num_heads: int | None) -> ModelConfig:
    """The configuration with the sizes of the weights."""
    seen = architecture(imported.context)
    if seen.in_chans != 3:
        raise WeightsError(f"the encoder takes {seen.in_chans} channels; runs have 3")
    height, width = imported.build.get("img_size", [seen.patch_size * square_side(seen.num_patches)] * 2)
    if height != width:
        raise WeightsError(f"the encoder is for images of {height} x {width} px; runs have square ones")
    sizes = {
        "img_size": height,
        "patch_size": seen.patch_size,
        "embed_dim": seen.embed_dim,
        "depth": seen.depth,
        "num_heads": num_heads or imported.build.get("num_heads") or seen.num_heads,
        "mlp_ratio": seen.hidden / seen.embed_dim,
    }
    named = [imported.build.get(name, before) for name, before in zip(("mean", "std"), config.mean_std, strict=True)]
    sizes["mean_std"] = tuple(map(tuple, named))
    if imported.predictor is not None:
        blocks = {name.split(".")[1] for name in imported.predictor if name.startswith("predictor_blocks.")}
        if (first := "predictor_blocks.0.mlp.fc1.weight") not in imported.predictor:
            raise WeightsError(f"not the weights of a predictor: no {first}")
        hidden, width = imported.predictor[first].shape
        sizes |= {
            "predictor_embed_dim": width,
            "predictor_depth": len(blocks),
            "predictor_mlp_ratio": None if hidden / width == sizes["mlp_ratio"] else hidden / width,
        }
    return replace(config, **sizes)
