"""Hugging Face transformers: encoders as ``IJepaModel`` and back, and our attention in its models.

Importing this module makes ``attn_implementation="ijepa_fast"`` known to transformers. Works with transformers 4.56 and
later and 5; the two name the weights of their modules differently, while the files that both write by default have the
names of 4.

Legend: B images, L tokens per image, H heads, Dh head dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, IJepaConfig, IJepaModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ijepa_fast.attention.dispatch import varlen_attention
from ijepa_fast.masks.geometry import pack_mask
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from ijepa_fast.ragged import Ragged
from ijepa_fast.weights.huggingface_names import from_huggingface_names, style_of, to_huggingface_names
from ijepa_fast.weights.reading import (
    WeightsError,
    encoder_in,
    layer_norm_eps,
    load_weights,
    plain_names,
    read_pickle,
    read_safetensors,
    set_layer_norm_eps,
    unwrapped,
)

ATTENTION = "ijepa_fast"
_BICUBIC = 3
"""Number of the filter in Pillow."""


def to_huggingface(encoder: VisionTransformer) -> IJepaModel:
    """The same encoder as an ``IJepaModel``, in eval mode, with weights of its own.

    ``to_huggingface(encoder)(pixel_values).last_hidden_state`` is ``encoder(pixel_values)`` for normalised float
    images; the layer-norm eps of the encoder is in the config. The positions, fixed here, are a parameter there.

    Raises:
        ValueError: the layer norms of the encoder have several eps.
    """
    encoder = encoder_in(encoder)
    block = encoder.blocks[0]
    height, width = (side * encoder.patch_size for side in encoder.grid)
    config = IJepaConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",
        layer_norm_eps=layer_norm_eps(encoder),
        image_size=height if height == width else [height, width],
        patch_size=encoder.patch_size,
        num_channels=encoder.in_chans,
        qkv_bias=block.attn.qkv.bias is not None,
    )
    with torch.device("meta"):  # every weight is replaced: none needs to be drawn
        model = IJepaModel(config)
    state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    model.load_state_dict(to_huggingface_names(state, style_of(model.state_dict())), assign=True)
    return model.eval()


def save_huggingface(encoder: VisionTransformer, folder: Path | str) -> None:
    """Write a folder that ``AutoModel.from_pretrained`` and ``AutoImageProcessor.from_pretrained`` open offline.

    The image processor resizes to the encoder's size and normalises with its mean and std.
    """
    encoder, folder = encoder_in(encoder), Path(folder)
    to_huggingface(encoder).save_pretrained(folder)
    height, width = (side * encoder.patch_size for side in encoder.grid)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.patch_embed.mean),
        "image_std": list(encoder.patch_embed.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def from_huggingface(model_or_path: nn.Module | Path | str, attention: str = "auto") -> VisionTransformer:
    """The encoder of an ``IJepaModel`` (or ``IJepaForImageClassification``) with weights of its own, in fp32.

    Args:
        model_or_path: a model, a folder written by ``save_pretrained`` (transformers 4 or 5, whichever is installed),
            or a name that ``IJepaModel.from_pretrained`` understands. Mean and std for uint8 images come from a
            folder's preprocessor_config.json, otherwise they are ImageNet's.
        attention: backend of ``ijepa_fast.attention.dispatch``.

    Raises:
        WeightsError: the weights are damaged, or those of another architecture.
        ValueError: the config has something that ``VisionTransformer`` has not.
    """
    processor: dict = {}
    if isinstance(model_or_path, nn.Module):
        model = unwrapped(model_or_path)
        source, config, state = type(model).__name__, model.config, model.state_dict()
    elif (folder := Path(model_or_path)).is_dir():
        source, state = str(folder), _read_folder(folder)
        config = IJepaConfig.from_pretrained(folder)
        if (file := folder / "preprocessor_config.json").is_file():
            processor = json.loads(file.read_text())
    else:
        model = IJepaModel.from_pretrained(model_or_path)
        source, config, state = str(model_or_path), model.config, model.state_dict()
    encoder = _encoder_for(config, processor, attention)
    load_weights(encoder, from_huggingface_names(state), source)
    return encoder


def _encoder_for(config: IJepaConfig, processor: dict, attention: str) -> VisionTransformer:
    if config.model_type != "ijepa":
        raise ValueError(f"the config is that of a {config.model_type} model, not of ijepa")
    if config.hidden_act != "gelu":
        raise ValueError(f"VisionTransformer computes gelu, but the config has hidden_act={config.hidden_act!r}")
    patch_size = config.patch_size
    if not isinstance(patch_size, int):
        if len(set(patch_size)) > 1:
            raise ValueError(f"VisionTransformer has square patches, but the config has patch_size={patch_size}")
        patch_size = patch_size[0]
    rgb = config.num_channels == 3
    encoder = VisionTransformer(
        config.image_size,
        patch_size,
        config.num_channels,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size / config.hidden_size,
        config.qkv_bias,
        mean=processor.get("image_mean", IMAGENET_MEAN if rgb else [0.5] * config.num_channels),
        std=processor.get("image_std", IMAGENET_STD if rgb else [0.5] * config.num_channels),
        attention=attention,
    )
    set_layer_norm_eps(encoder, config.layer_norm_eps)
    return encoder


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, whether in one file or in several."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
        if (folder / name).is_file():
            return read(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for file in files for key, value in read(folder / file).items()}
    raise WeightsError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path)[0]


def _read_pickle(path: Path) -> dict[str, Tensor]:
    contents = read_pickle(path)
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path} holds {type(contents).__name__}, no weights")
    return plain_names(contents)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **other,
) -> tuple[Tensor, None]:
    """Attention of transformers models by ``varlen_attention``.

    Args:
        query, key, value: [B, H, L, Dh].
        attention_mask: bool [B, L], True for tokens that are there; None: all are.

    Returns:
        [B, L, H, Dh], zeros at tokens that are not there; and None for the attention weights.

    Raises:
        ValueError: dropout, causal attention, another kind of mask, fewer heads of keys than of queries, or a wish for
            the attention weights.
    """
    batch, heads, length, head_dim = query.shape
    if other.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError(f"attn_implementation={ATTENTION!r} has no attention weights to give: use 'eager' for them")
    if is_causal or (is_causal is None and getattr(module, "is_causal", False)):
        raise ValueError(f"attn_implementation={ATTENTION!r} is not for causal attention")
    if dropout:
        raise ValueError(f"attn_implementation={ATTENTION!r} has no dropout, got dropout={dropout}")
    if key.shape != query.shape:
        raise ValueError(
            f"attn_implementation={ATTENTION!r} is for self-attention with as many heads of keys as of "
            f"queries, got queries {list(query.shape)} and keys {list(key.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"attn_implementation={ATTENTION!r} takes masks [{batch}, {length}] of tokens, "
            f"got {list(attention_mask.shape)}"
        )
    if scaling is not None:
        query = query * (scaling * head_dim**0.5)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if attention_mask is None:
        tokens = Ragged.full(batch, length, query.device)
    else:
        there = attention_mask.bool()
        tokens = pack_mask(there[:, None], there.sum(1, dtype=torch.int32)[:, None], length, None)
        rows = tokens.indices.long()
        q, k, v = (x.index_select(0, rows) for x in (q, k, v))
    cu, longest = tokens.cu_seqlens, tokens.max_seqlen
    out = varlen_attention(q, k, v, cu, cu, longest, longest, uniform=tokens.uniform)
    if attention_mask is not None:
        out = out.new_zeros(batch * length, heads, head_dim).index_copy(0, rows, out)
    return out.unflatten(0, (batch, length)), None


def register_attention() -> None:
    """Make ``attn_implementation="ijepa_fast"`` known to transformers. Called when this module is imported."""
    AttentionInterface.register(ATTENTION, attention_forward)
    # Without an entry of its own, transformers would leave padding masks out in silence. This one hands them on.
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


register_attention()
