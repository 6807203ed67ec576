"""Encoders of transformers in files, and the names of their weights there and here. Needs no transformers.

Our names are the official ones. Queries, keys and values are one matrix here and three there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from ijepa_fast.weights.reading import (
    WeightsError,
    load_weights,
    plain_names,
    read_pickle,
    read_safetensors,
    set_layer_norm_eps,
)

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
"""What ``IJepaConfig`` takes for settings that a config.json does not name."""

Style = Literal["4", "5"]

_AROUND = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_POSITIONS = "embeddings.position_embeddings"
_LAYERS: dict[Style, str] = {"4": "encoder.layer", "5": "layers"}
_QKV: dict[Style, tuple[str, str, str]] = {
    "4": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "5": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
}
_BLOCK: dict[Style, dict[str, str]] = {
    "4": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "5": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}
_NOT_OF_THE_ENCODER = re.compile(r"(pooler\.|classifier\.|embeddings\.mask_token$)")


def style_of(state: Mapping[str, Tensor]) -> Style:
    """Which transformers named these weights, 4 or 5."""
    return "4" if any(name.removeprefix("ijepa.").startswith(_LAYERS["4"]) for name in state) else "5"


def to_huggingface_names(state: Mapping[str, Tensor], style: Style) -> dict[str, Tensor]:
    """An encoder's state dict under the names of ``IJepaModel``. A folder of weights holds those of style "4"."""
    renamed = {}
    for name, value in state.items():
        if name == "pos_embed":
            renamed[_POSITIONS] = value
            continue
        module, kind = name.rsplit(".", 1)
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if match is None:
            renamed[f"{_AROUND[module]}.{kind}"] = value
        elif match[2] == "attn.qkv":
            for there, part in zip(_QKV[style], value.chunk(3), strict=True):
                renamed[f"{_LAYERS[style]}.{match[1]}.{there}.{kind}"] = part.clone()
        else:
            renamed[f"{_LAYERS[style]}.{match[1]}.{_BLOCK[style][match[2]]}.{kind}"] = value
    return renamed


def from_huggingface_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``IJepaModel`` or ``IJepaForImageClassification`` (of transformers 4 or 5) under our names.

    Pooler, classifier and mask token are left out. Names that are not understood are left as they are, so that
    loading reports them.
    """
    style = style_of(state)
    around = {there: here for here, there in _AROUND.items()}
    block = {there: here for here, there in _BLOCK[style].items()}
    layer = re.compile(rf"{re.escape(_LAYERS[style])}\.(\d+)\.(.+)")
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for full_name, value in state.items():
        name = full_name.removeprefix("ijepa.")
        if _NOT_OF_THE_ENCODER.match(name):
            continue
        module, _, kind = name.rpartition(".")
        match = layer.fullmatch(module)
        if name == _POSITIONS:
            renamed["pos_embed"] = value
        elif module in around:
            renamed[f"{around[module]}.{kind}"] = value
        elif match and match[2] in _QKV[style]:
            place = _QKV[style].index(match[2])
            thirds.setdefault(f"blocks.{match[1]}.attn.qkv.{kind}", {})[place] = (name, value)
        elif match and match[2] in block:
            renamed[f"blocks.{match[1]}.{block[match[2]]}.{kind}"] = value
        else:
            renamed[name] = value
    for name, parts in thirds.items():
        if len(parts) == 3:
            renamed[name] = torch.cat([parts[place][1] for place in range(3)])
        else:
            renamed |= dict(parts.values())
    return renamed


def read_folder(folder: Path, attention: str = "auto") -> VisionTransformer:
    """The encoder in a folder of ``save_pretrained`` (of transformers 4 or 5), in fp32.

    Raises:
        WeightsError: files are missing or damaged, or hold another architecture.
        ValueError: the config has something that ``VisionTransformer`` has not.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is a folder without config.json: not one of transformers' save_pretrained")
    config = DEFAULTS | _read_json(folder / "config.json")
    encoder = encoder_for(SimpleNamespace(**config), _processor_in(folder), attention)
    load_weights(encoder, from_huggingface_names(_weights_of(folder)), str(folder))
    return encoder


def value_range_of(folder: Path) -> tuple[float, float] | None:
    """``loader.value_range`` of the run that such a folder was exported from; None where none is stated."""
    stated = _processor_in(folder).get("value_range")
    return None if stated is None else tuple(stated)


def _processor_in(folder: Path) -> dict:
    path = folder / "preprocessor_config.json"
    return _read_json(path) if path.is_file() else {}


def encoder_for(config: Any, processor: Mapping, attention: str = "auto") -> VisionTransformer:
    """An encoder of the shape that an ``IJepaConfig`` describes; its weights are random.

    Args:
        config: with the attributes in ``DEFAULTS``.
        processor: settings of the image processor; ImageNet's mean and std where it names none.
        attention: backend of ``ijepa_fast.attention.dispatch``.

    Raises:
        ValueError: the config has something that ``VisionTransformer`` has not.
    """
    if (kind := getattr(config, "model_type", None)) != "ijepa":
        raise ValueError(f"the config is that of a {kind} model, not of ijepa")
    if config.hidden_act != "gelu":
        raise ValueError(f"VisionTransformer computes gelu, but the config has hidden_act={config.hidden_act!r}")
    patch_size = config.patch_size
    if not isinstance(patch_size, int):
        if len(set(patch_size)) > 1:
            raise ValueError(f"VisionTransformer has square patches, but the config has patch_size={patch_size}")
        patch_size = patch_size[0]
    rgb = config.num_channels == 3
    mean = processor.get("image_mean", IMAGENET_MEAN if rgb else [0.5] * config.num_channels)
    if stated := processor.get("value_range"):  # of an export, whose processor has the lower end in its mean
        mean = [value - stated[0] / (stated[1] - stated[0]) for value in mean]
    encoder = VisionTransformer(
        config.image_size,
        patch_size,
        config.num_channels,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size / config.hidden_size,
        config.qkv_bias,
        mean=mean,
        std=processor.get("image_std", IMAGENET_STD if rgb else [0.5] * config.num_channels),
        attention=attention,
    )
    set_layer_norm_eps(encoder, config.layer_norm_eps)
    return encoder


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no settings, but {str(value)[:80]!r}")
    return value


def _weights_of(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, whether in one file or in several."""
    for name, read in (("model.safetensors", lambda path: read_safetensors(path)[0]), ("pytorch_model.bin", _read_bin)):
        if (folder / name).is_file():
            return read(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            files = sorted(set(_read_json(index)["weight_map"].values()))
            return {key: value for file in files for key, value in read(folder / file).items()}
    raise WeightsError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def _read_bin(path: Path) -> dict[str, Tensor]:
    contents = read_pickle(path)
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path} holds {type(contents).__name__}, no weights")
    return plain_names(contents)
