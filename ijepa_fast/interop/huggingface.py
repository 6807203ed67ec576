"""Hugging Face transformers: encoders as ``IJepaModel`` and back, and our attention in its models.

Importing this module makes ``attn_implementation="ijepa_fast"`` known to transformers. Works with transformers 4.56 and
later and 5; the two name the weights of their modules differently, while the files that both write by default have the
names of 4.

Legend: B images, L tokens per image, H heads, Dh head dim.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, IJepaConfig, IJepaModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ijepa_fast.attention.dispatch import varlen_attention
from ijepa_fast.masks.geometry import pack_mask
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.ragged import Ragged
from ijepa_fast.weights.huggingface import (
    encoder_for,
    from_huggingface_names,
    read_folder,
    style_of,
    to_huggingface_names,
)
from ijepa_fast.weights.reading import encoder_in, layer_norm_eps, load_weights, unwrapped

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


def save_huggingface(
    encoder: VisionTransformer, folder: Path | str, value_range: tuple[float, float] | None = None
) -> None:
    """Write a folder that ``AutoModel.from_pretrained`` and ``AutoImageProcessor.from_pretrained`` open offline.

    The image processor resizes to the encoder's size and normalises with its mean and std, for values from 0 to 255 or
    in ``value_range``.
    """
    encoder, folder = encoder_in(encoder), Path(folder)
    to_huggingface(encoder).save_pretrained(folder)
    height, width = (side * encoder.patch_size for side in encoder.grid)
    low, high = value_range or (0, 255)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / (high - low),
        "do_normalize": True,
        "image_mean": [mean + low / (high - low) for mean in encoder.patch_embed.mean],
        "image_std": list(encoder.patch_embed.std),
    }
    if value_range is not None:
        processor["value_range"] = [low, high]  # for us: rescale_factor and image_mean do not tell it
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
    if not isinstance(model_or_path, nn.Module) and (folder := Path(model_or_path)).is_dir():
        return read_folder(folder, attention)
    named = not isinstance(model_or_path, nn.Module)
    model = IJepaModel.from_pretrained(model_or_path) if named else unwrapped(model_or_path)
    encoder = encoder_for(model.config, {}, attention)
    source = str(model_or_path) if named else type(model).__name__
    load_weights(encoder, from_huggingface_names(model.state_dict()), source)
    return encoder


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
