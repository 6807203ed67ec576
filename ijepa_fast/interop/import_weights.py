"""``ijepa-fast import``: weights of other libraries as one of our checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ijepa_fast.config import ModelConfig, RunConfig
from ijepa_fast.interop.official.training_state import moments_of
from ijepa_fast.weights.any_format import Networks, read_any
from ijepa_fast.weights.reading import WeightsError, architecture, load_weights, square_side
from ijepa_fast.weights.runs import save_run

LICENCE = "The weights that Meta published are CC-BY-NC-4.0, and stay so in this form."


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
    if imported.ours:
        raise WeightsError(f"{source} is a run of ijepa_fast and needs no import: probe, knn, export, --init read it")
    config = replace(config, output=str(out), model=_model_config(imported, config.model, num_heads))
    if imported.value_range is not None and config.loader.value_range is None:
        config = replace(config, loader=replace(config.loader, value_range=imported.value_range))
    torch.manual_seed(config.seed)
    model = config.model.build(config.objective)
    load_weights(model.context_encoder, imported.context, f"context encoder of {source}")
    load_weights(model.target_encoder, imported.target, f"target encoder of {source}")
    if imported.predictor is not None:
        load_weights(model.predictor, imported.predictor, f"predictor of {source}")
    step, moments = moments_of(imported.official) if imported.official is not None else (0, {})
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


def _model_config(imported: Networks, config: ModelConfig, num_heads: int | None) -> ModelConfig:
    """The configuration with the sizes of the weights."""
    seen = architecture(imported.context)
    height, width = imported.build.get("img_size", [seen.patch_size * square_side(seen.num_patches)] * 2)
    sizes = {
        "img_size": (height, width),
        "patch_size": seen.patch_size,
        "in_chans": seen.in_chans,
        "embed_dim": seen.embed_dim,
        "depth": seen.depth,
        "num_heads": num_heads or imported.build.get("num_heads") or seen.num_heads,
        "mlp_ratio": seen.hidden / seen.embed_dim,
    }
    before = config.normalisation if seen.in_chans == config.in_chans else ((0.5,) * seen.in_chans,) * 2
    sizes["mean_std"] = tuple(tuple(imported.build.get(n, b)) for n, b in zip(("mean", "std"), before, strict=True))
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
