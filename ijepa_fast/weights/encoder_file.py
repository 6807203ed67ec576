"""An encoder by itself in a safetensors file: fp32 weights under their usual names, and a header with its shape."""

from __future__ import annotations

import json
from pathlib import Path

from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.run.files import write_tensors
from ijepa_fast.weights.reading import (
    LAYER_NORM_EPS,
    description_in,
    encoder_in,
    layer_norm_eps,
    load_weights,
    read_safetensors,
    set_layer_norm_eps,
)
from ijepa_fast.weights.timm import to_timm

KEY = "ijepa_fast_encoder"
"""Key of the description in a file's metadata."""


def save_encoder(path: Path | str, encoder: VisionTransformer, about: dict | None = None) -> None:
    """Write an encoder; the file appears under its name only when it is whole.

    Args:
        path: file. timm reads it as well (``weights.timm.timm_arguments`` says for which model).
        encoder: any dtype.
        about: kept in the metadata: which encoder it is, after how many steps, ``value_range`` of its images.

    Raises:
        ValueError: the layer norms of the encoder have several eps.
    """
    described = {
        "build": build_arguments(encoder),
        "layer_norm_eps": layer_norm_eps(encoder_in(encoder)),
        "about": about or {},
    }
    write_tensors(Path(path), to_timm(encoder), {"format": "pt", KEY: json.dumps(described)})


def load_encoder(path: Path | str) -> tuple[VisionTransformer, dict]:
    """The encoder in a file of ``save_encoder`` (fp32, on the CPU, in evaluation mode), and what it says about itself.

    Raises:
        WeightsError: the file is damaged, or not one of these.
        OSError: it cannot be opened.
    """
    state, metadata = read_safetensors(path)
    described = description_in(metadata, KEY, ("build", "about"), path)
    encoder = VisionTransformer(**described["build"])
    # Files of earlier versions do not say it.
    set_layer_norm_eps(encoder, described.get("layer_norm_eps", LAYER_NORM_EPS))
    load_weights(encoder, state, str(path))
    return encoder.eval(), described["about"]


def build_arguments(encoder: VisionTransformer) -> dict:
    """Arguments of ``VisionTransformer`` that build one of this shape, as JSON holds them."""
    encoder = encoder_in(encoder)
    block = encoder.blocks[0]
    return {
        "img_size": [side * encoder.patch_size for side in encoder.grid],
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "mean": encoder.patch_embed.mean,
        "std": encoder.patch_embed.std,
    }
