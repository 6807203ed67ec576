"""The names of an encoder's weights in transformers, and in ours; needs no transformers.

Ours are the official ones. Queries, keys and values are one matrix here and three there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

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
