"""``ijepa-fast export``: one of our checkpoints as files of other libraries, or an encoder by itself."""

from __future__ import annotations

import json
from pathlib import Path

from ijepa_fast.config import RunConfig
from ijepa_fast.interop.model_card import hub_account, write_card
from ijepa_fast.interop.model_card import push as upload
from ijepa_fast.interop.official.training_state import to_official
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.run.checkpoint import Checkpoint, find, load
from ijepa_fast.weights.encoder_file import save_encoder
from ijepa_fast.weights.official import write
from ijepa_fast.weights.reading import WeightsError
from ijepa_fast.weights.runs import ENCODERS, networks_of, of_networks
from ijepa_fast.weights.timm import timm_call

OF_FORMATS = {
    "image_size": ("onnx", "torch"),
    "batch": ("onnx", "torch"),
    "license": ("huggingface",),
    "push": ("huggingface",),
}
"""The formats that an argument is for."""
FORMATS = ("huggingface", "timm", "onnx", "torch", "official", "safetensors")


def export(
    checkpoint: Path | str,
    to: str,
    out: Path | str,
    encoder: str = "target",
    steps_per_epoch: int | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    batch: int | None = None,
    license: str = "unknown",
    push: str | None = None,
) -> str:
    """Write a checkpoint in another format; what was written and how to load it, in words.

    Args:
        checkpoint: file, or the folder of a run (its newest).
        to: huggingface (a folder for ``AutoModel.from_pretrained``, with a model card), timm (safetensors for
            ``timm.create_model``), onnx, torch (a program of ``torch.export``), official (a .pth.tar that the official
            code resumes from) or safetensors (for ``load_encoder``).
        out: file or folder to write; must not exist.
        encoder: target (which the paper evaluates) or context. The official format holds both.
        steps_per_epoch: for the official format, which counts epochs; by default from the run's metrics.jsonl.
        image_size: height and width for onnx and torch, to which the positions are interpolated.
        batch: number of images of every call, for onnx and torch; any number by default.
        license: for the model card of huggingface, an identifier of the Hub such as apache-2.0.
        push: repository of the Hub to which the folder of huggingface is uploaded, such as NAME/vit-mine.

    Raises:
        ValueError: an unknown format or encoder, an argument of another format, ``out`` exists, or nobody is logged in
            to push.
        CheckpointError, WeightsError: the checkpoint is missing, damaged, or has no counterpart in the format.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {to!r}")
    if encoder not in ENCODERS:
        raise ValueError(f"the encoder must be target or context, got {encoder!r}")
    given = {"image_size": image_size, "batch": batch, "push": push}
    given["license"] = None if license == "unknown" else license
    for name, formats in OF_FORMATS.items():
        if given[name] is not None and to not in formats:
            raise ValueError(f"{name} is for the format {' or '.join(formats)}, not for {to}")
    if out.exists():
        raise ValueError(f"{out} exists already")
    if push is not None:
        hub_account()  # now, and not when there is something to upload
    path = find(Path(checkpoint))
    # The official format has the optimizer's moments, too.
    state = load(path, values=(lambda name: True) if to == "official" else of_networks)
    model, config = networks_of(state, path)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "official":
        return _official(path, out, model, state, config, steps_per_epoch)
    network = getattr(model, ENCODERS[encoder])
    if to == "huggingface":
        from ijepa_fast.interop.huggingface import save_huggingface

        save_huggingface(network, out, config.loader.value_range)
        write_card(out, push or out.name, encoder, path.parent.parent, state, config, license)
        use = f'transformers.AutoModel.from_pretrained("{push or out}")'
        if push is not None:
            use += f"\nuploaded to {upload(out, push)}"
    elif to in ("onnx", "torch"):
        from ijepa_fast.interop.graph import save_graph

        use = save_graph(network, to, out, image_size, batch, config.loader.value_range)
    else:
        stated = {} if config.loader.value_range is None else {"value_range": config.loader.value_range}
        save_encoder(out, network, {"encoder": encoder, "step": state.step} | stated)
        use = f'ijepa_fast.weights.encoder_file.load_encoder("{out}")'
        if to == "timm":
            use = timm_call(network, out)
    return f"{out}: the {encoder} encoder after step {state.step}\nload it with {use}"


def _official(
    checkpoint: Path, out: Path, model: IJEPA, state: Checkpoint, config: RunConfig, steps_per_epoch: int | None
) -> str:
    metrics = _last_metrics(checkpoint, state.step)
    if steps_per_epoch is None:
        if "epoch" not in metrics:
            raise WeightsError(
                f"cannot tell how many epochs {state.step} steps are (no metrics.jsonl beside {checkpoint}): "
                "give steps_per_epoch"
            )
        steps_per_epoch = round(metrics["step"] / metrics["epoch"])
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
    epoch, rest = divmod(state.step, steps_per_epoch)
    official = to_official(model, state, config, epoch, metrics.get("loss", float("nan")))
    write(out, official)
    said = [f"{out}: both encoders and the predictor after step {state.step}, epoch {epoch}"]
    if official.opt is None:
        said.append("without optimizer state: there is none in the checkpoint")
    if rest:
        said.append(f"the official code will go on from the start of epoch {epoch + 1}: {rest} steps are repeated")
    said.append("load it as the read_checkpoint of a configuration, with load_checkpoint: true")
    return "\n".join(said)


def _last_metrics(checkpoint: Path, step: int) -> dict:
    """The run's last line of metrics up to a step; empty without any."""
    path = checkpoint.parent.parent / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((m for line in reversed(lines) if 0 < (m := json.loads(line))["step"] <= step), {})
