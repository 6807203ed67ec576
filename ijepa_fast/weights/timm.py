"""timm: encoder weights as state dicts of its ``vit_*_gap_*`` models, and back.

The names are those of ``VisionTransformer`` already. What has to match beside them is the model: no class token,
average pooling, no norm after the pooling, and the right number of heads (timm's ``vit_base_patch16_gap_224`` has 16,
I-JEPA's ViT-B/16 has 12; weights of one load into the other without an error and give other features).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.weights.reading import LAYER_NORM_EPS, WeightsError, encoder_in, layer_norm_eps, plain_names

BASE_MODEL = "vit_base_patch16_gap_224"
"""The timm model whose arguments ``timm_arguments`` overrides."""


def timm_arguments(encoder: VisionTransformer, file: Path | str | None = None) -> dict:
    """Arguments of ``timm.create_model`` for a model of the encoder's shape, which returns features.

    ``timm.create_model(**timm_arguments(encoder))``; the model's ``forward_features`` is the encoder's forward, and
    its forward the average over patches. Numbers and text, but for the ``norm_layer`` of an encoder whose layer-norm
    eps is not timm's 1e-6. ``num_classes`` and ``img_size`` may be changed: timm then makes a new head, and
    interpolates the positions.

    Args:
        encoder: the one that the model is for.
        file: weights of ``to_timm`` (``save_encoder`` writes them) that the model shall be loaded with. Its transforms
            (``timm.data.resolve_model_data_config``) then are those of the encoder, too.

    Raises:
        ValueError: the layer norms of the encoder have several eps.
    """
    encoder = encoder_in(encoder)
    height, width = (side * encoder.patch_size for side in encoder.grid)
    block = encoder.blocks[0]
    eps = layer_norm_eps(encoder)
    norm = {} if eps == LAYER_NORM_EPS else {"norm_layer": partial(nn.LayerNorm, eps=eps)}
    pretrained = {}
    if file is not None:
        overlay = {
            "file": str(file),
            "num_classes": 0,
            "mean": tuple(encoder.patch_embed.mean),
            "std": tuple(encoder.patch_embed.std),
            "input_size": (encoder.in_chans, height, width),
        }
        if encoder.in_chans != 3:
            overlay["first_conv"] = None  # timm would convert it from three channels
        pretrained = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    return {
        "model_name": BASE_MODEL,
        "img_size": height if height == width else (height, width),
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "num_classes": 0,
        **norm,
        **pretrained,
    }


def timm_call(encoder: VisionTransformer, file: Path | str) -> str:
    """The call that loads ``file`` into a timm model, as Python text."""

    def text(value: object) -> str:
        is_norm = isinstance(value, partial)
        return f"functools.partial(torch.nn.LayerNorm, eps={value.keywords['eps']})" if is_norm else repr(value)

    arguments = timm_arguments(encoder, file).items()
    return f"timm.create_model({', '.join(f'{name}={text(value)}' for name, value in arguments)})"


def to_timm(encoder: VisionTransformer) -> dict[str, Tensor]:
    """fp32 weights that a timm model made by ``timm_arguments(encoder)`` loads, all of them. Copies, on the CPU."""
    return {name: value.detach().float().cpu().clone() for name, value in encoder_in(encoder).state_dict().items()}


def from_timm(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for ``VisionTransformer`` from a timm model or its state dict; a classification head is left out.

    Raises:
        WeightsError: the model has parts that an I-JEPA encoder has not, which are named.
    """
    state = plain_names(model.state_dict() if isinstance(model, nn.Module) else model)
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    for name, what in (
        ("cls_token", "a class token"),
        ("reg_token", "register tokens"),
        ("fc_norm.weight", "a norm after the pooling"),
        ("attn_pool.latent", "attention pooling"),
        ("blocks.0.ls1.gamma", "layer scale"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
    ):
        if name in state:
            raise WeightsError(f"these timm weights have {what} ({name}); I-JEPA's encoders, vit_*_gap_*, have none")
    return state
