"""Parameter groups of I-JEPA for any optimizer."""

from __future__ import annotations

import re

from torch import Tensor, nn


class Twins(list):
    """Target encoder parameters under the "ema" of a group. Where their ``model`` has a ``follow``, as ``JEPAModel``,
    ``FusedAdamW`` hands itself to it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        if hasattr(model, "follow"):
            self.model = model


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to everything but biases and norms, which are 1-D (the mask token is 3-D)."""
    return parameter.ndim > 1


def parameter_groups(model: nn.Module, layer_decay: float = 1.0, *, norm_is_a_layer: bool = False) -> list[dict]:
    """The four groups of the official recipe: decayed and not, of context encoder and predictor.

    Encoder parameters bring their target encoder twin under the key "ema".

    Args:
        model: an ``IJEPA``, or anything with its parts ``context_encoder``, ``target_encoder`` and ``predictor``.
        layer_decay: factor of the learning rate from one encoder layer to the one below. The last block and the final
            norm have factor 1, the block below ``layer_decay``, the patch embedding ``layer_decay ** blocks``. 1 keeps
            four groups; otherwise there is one pair of groups per layer.
        norm_is_a_layer: count the final norm as a layer above the last block, which then has the factor ``layer_decay``
            (arXiv 2106.08254, appendix); all below have one power more as well.

    Returns:
        Groups with "params", "ema" (encoder only), "name", "decays" (bool) and "lr_scale".
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
    depth = len(model.context_encoder.blocks)
    groups: dict[str, dict] = {}
    for part, module in (("encoder", model.context_encoder), ("predictor", model.predictor)):
        for wanted in (True, False):
            for name, parameter in module.named_parameters():
                if decays(parameter) != wanted:
                    continue
                key, scale = f"{part}-{'decay' if wanted else 'nodecay'}", 1.0
                if part == "encoder" and layer_decay < 1:
                    layer = layer_of(name, depth)
                    key, scale = f"{key}-{layer}", layer_decay ** max(depth + norm_is_a_layer - layer, 0)
                group = groups.setdefault(key, {"params": [], "name": key, "decays": wanted, "lr_scale": scale})
                group["params"].append(parameter)
                if part == "encoder":
                    group.setdefault("ema", Twins(model)).append(model.target_encoder.get_parameter(name))
    order = ("encoder-decay", "predictor-decay", "encoder-nodecay", "predictor-nodecay")
    return sorted(groups.values(), key=lambda g: [g["name"].startswith(prefix) for prefix in order].index(True))


def layer_of(name: str, depth: int) -> int:
    """Layer of an encoder's parameter: 0 for the patch embedding, then the blocks, and depth + 1 for the final norm."""
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if name.startswith("patch_embed.") else depth + 1
