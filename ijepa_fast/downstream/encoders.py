"""The encoder in a file or folder, whoever wrote it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ijepa_fast.data.bands import Pixels
from ijepa_fast.data.crops import EVAL_RATIO
from ijepa_fast.jepa_model import JEPAModel
from ijepa_fast.jepa_model.model import FORMAT
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.weights.any_format import Networks, read_any
from ijepa_fast.weights.encoder_file import KEY, build_arguments, load_encoder
from ijepa_fast.weights.huggingface import read_folder, value_range_of
from ijepa_fast.weights.reading import architecture, load_weights
from ijepa_fast.weights.runs import ENCODERS, load_run


@dataclass(frozen=True)
class Loaded:
    """An encoder and where it comes from.

    Attributes:
        encoder: fp32, on the CPU, in evaluation mode.
        about: path, kind of file, which encoder, steps done if known: for tables and files.
        results: folder that its results go to unless another is named.
        data: images of its run, None where the file names none.
        evaluation_data: labelled test images of its run, likewise.
        resize_ratio: see ``eval_crop``; that of its run.
        pixels: arguments of ``Pixels``: what its run made of images.
        labels: table of classes of ``data``.
    """

    encoder: VisionTransformer
    about: dict
    results: Path
    data: str | None = None
    evaluation_data: str | None = None
    resize_ratio: float = EVAL_RATIO
    pixels: dict = field(default_factory=dict)
    labels: str | None = None

    def images(self, own: bool) -> dict:
        """Further arguments of ``open_sources``, for the images of its run (``own``) or others."""
        stated = {"channels": self.encoder.in_chans} | self.pixels | ({"labels": self.labels} if own else {})
        return {name: value for name, value in stated.items() if value is not None}


def load_any(path: Path | str, which: str = "target") -> Loaded:
    """The encoder of a run (a folder or a checkpoint), of ``JEPAModel.save``, of ``ijepa-fast export``, of transformers
    (a folder), of timm or of the official code.

    Args:
        path: file or folder.
        which: "target" or "context", where the file holds both.

    Raises:
        WeightsError, CheckpointError: damaged, refused, or not understood.
        OSError: it cannot be opened.
    """
    path = Path(path)
    about = {"weights": str(path), "encoder": which}
    results = Path("evaluation") / path.name.split(".")[0]
    if path.is_dir() and (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
        about |= {"kind": "transformers", "encoder": None}
        return Loaded(read_folder(path).eval(), about, results, pixels={"value_range": value_range_of(path)})
    metadata = _metadata(path)
    if FORMAT in metadata.get("ijepa_fast", ""):
        model = JEPAModel.load(path)
        return Loaded(getattr(model, ENCODERS[which]).eval(), about | {"kind": "JEPAModel"}, results)
    if path.is_dir() or not path.exists() or "ijepa_fast" in metadata:
        file = checkpoints.find(path)
        model, config, step = load_run(file)
        folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        return Loaded(
            getattr(model, ENCODERS[which]).eval(),
            about | {"kind": "run", "step": step},
            folder / "evaluation",
            config.data,
            config.evaluation.data,
            config.evaluation.resize_ratio,
            {name: config.images[name] for name in Pixels._fields},
            config.evaluation.labels,
        )
    if KEY in metadata:
        encoder, said = load_encoder(path)
        stated = {name: said[name] for name in ("value_range",) if said.get(name)}
        return Loaded(encoder, about | {"kind": "encoder", "encoder": said.get("encoder")}, results, pixels=stated)
    imported = read_any(path)
    if imported.target is imported.context:
        about["encoder"] = None
    return Loaded(_built(imported, which, path), about | {"kind": imported.kind}, results)


def training_size(encoder: VisionTransformer) -> int | tuple[int, int]:
    """Side of the images that an encoder was trained on, or (height, width) where they differ."""
    height, width = (side * encoder.patch_size for side in encoder.grid)
    return height if height == width else (height, width)


def untrained(encoder: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """An encoder of the same shape with the weights that training would begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(**build_arguments(encoder)).eval()


def digest(encoder: VisionTransformer) -> str:
    """A hash of all weights, the same whichever file they were read from."""
    hashed = hashlib.sha256(repr(sorted(build_arguments(encoder).items())).encode())
    for value in encoder.state_dict().values():
        hashed.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def _built(imported: Networks, which: str, path: Path) -> VisionTransformer:
    state = getattr(imported, which)
    seen = architecture(state)
    sizes = {
        "img_size": seen.img_size,
        "patch_size": seen.patch_size,
        "in_chans": seen.in_chans,
        "embed_dim": seen.embed_dim,
        "depth": seen.depth,
        "num_heads": imported.build.get("num_heads") or seen.num_heads,
        "mlp_ratio": seen.hidden / seen.embed_dim,
    }
    encoder = VisionTransformer(**sizes | imported.build)
    load_weights(encoder, state, f"{which} encoder of {path}")
    return encoder.eval()


def _metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; empty for any other."""
    if not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
