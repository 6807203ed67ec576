"""The settings of a run, as plain dataclasses; YAML files, command-line flags and help are made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal

from ijepa_fast.config.limits import check_limits
from ijepa_fast.config.settings import flatten, nested
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.config import ModelConfig, common
from ijepa_fast.model.jepa import Objective
from ijepa_fast.optim.schedules import OptimConfig
from ijepa_fast.step.options import StepOptions


@dataclass(frozen=True)
class LoaderConfig:
    """How image files become crops.

    Args:
        crop_scale: smallest and largest share of the image's area that a crop covers.
        crop_ratio: smallest and largest width over height of a crop.
        flip: probability of a horizontal flip. The official recipe has none.
        workers: decoding processes per rank, at most as many as there are cores for it; "auto" takes that many, up to
            16; 0 decodes in the training process.
        value_range: values of the files that become 0 and 1, with 16 bits kept; what lies outside is clipped. null:
            the whole range of 8 and 16 bits, with 8 bits kept; floating-point files need a range.
        max_pixels: width times height above which an image counts as undecodable, for it may not fit into memory; of a
            tiled TIFF or a .npy file, of what a crop shows.
        max_bad_share: share of undecodable images above which the run ends with an error.
        epoch_images: images that count as an epoch where shards come from URLs, which are not counted; needed there.
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    workers: int | Literal["auto"] = common("auto")
    value_range: tuple[float, float] | None = common(None)
    max_pixels: int = 89_478_485  # Pillow's limit
    max_bad_share: float = 0.05
    epoch_images: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batches, precision, log and checkpoints.

    Args:
        batch_size: images per step on all ranks together.
        epochs: passes over the data; ignored if steps is given.
        steps: length of the run in steps instead of epochs.
        accumulate: micro-batches per step and rank; saves memory.
        precision: fp32, bf16 (bf16 weights with fp32 masters), fp16 (the same, with loss scaling) or auto (bf16 where
            the hardware multiplies it, else fp32). A run writes down which one it took.
        device: auto (a GPU if there is one), cpu or cuda.
        log_every: steps between log lines, the only moments the host waits for the device.
        save_every: steps between checkpoints; one is always written at the end.
        keep: newest checkpoints that are kept.
        deterministic: refuse operations without a fixed summation order.
        parallel: what each of several ranks holds: ddp (all of the networks), fsdp (a shard of every weight, gradient
            and moment), or hsdp (the same within groups of ranks, each of which has everything). docs/scaling.md.
        shards: ranks of a group of hsdp; by default those of a host.
        reduce: what gradients in shards are summed over ranks in.
        async_save: go on while a checkpoint is written, from copies in the host's memory.
        timeout: minutes that ranks wait for each other before the run ends.
    """

    batch_size: int = common(2048)
    epochs: float = common(300.0)
    steps: int | None = common(None)
    accumulate: int = common(1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = common("auto")
    device: Literal["auto", "cpu", "cuda"] = common("auto")
    log_every: int = 50
    save_every: int = 1000
    keep: int = 2
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp", "hsdp"] = common("ddp")
    shards: int | None = None
    reduce: Literal["fp32", "bf16"] = "fp32"
    async_save: bool = False
    timeout: float = 20.0

    def __post_init__(self) -> None:
        if self.parallel not in ("ddp", "fsdp", "hsdp"):
            raise ValueError(f"train.parallel must be ddp, fsdp or hsdp, got {self.parallel!r}")
        if self.reduce not in ("fp32", "bf16"):
            raise ValueError(f"train.reduce must be fp32 or bf16, got {self.reduce!r}")
        if self.shards is not None and self.parallel != "hsdp":
            raise ValueError(f"train.shards {self.shards} is for train.parallel hsdp, got {self.parallel}")
        for name in ("batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"train.steps must be at least 1, got {self.steps}")
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"train.epochs must be positive, got {self.epochs}")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else max(1, round(self.epochs * steps_per_epoch))


@dataclass(frozen=True)
class EvaluationConfig:
    """How frozen features are evaluated. Accuracies need labels and are left out without them.

    Args:
        data: labelled images to test on; by default the test or val folder beside the training images.
        labels: table of classes (.csv with columns path and label) of images whose folders do not tell them.
        images: largest number of training images that k-NN and probe are fitted to, and of test images.
        resize_ratio: the shorter side of a test image is resized to this times img_size, then the centre is cut out.
            1 for sets whose images have the size of the crops.
        bank: training features kept for the online k-NN; 0 turns it off.
        results: what a run ends with: figures (k-NN, linear probe and rank of the untrained and of the trained target
            encoder), pictures (masks, curves and PCA maps), all of this or none.
    """

    data: str | None = common(None)
    labels: str | None = common(None)
    images: tuple[int, int] = (10_000, 10_000)
    resize_ratio: float = 256 / 224
    bank: int = 20_000
    results: Literal["all", "figures", "pictures", "none"] = "all"

    def __post_init__(self) -> None:
        choices = ("all", "figures", "pictures", "none")
        if self.results not in choices:
            raise ValueError(f"evaluation.results must be one of {', '.join(choices)}, got {self.results!r}")

    @property
    def figures(self) -> bool:
        return self.results in ("all", "figures")

    @property
    def pictures(self) -> bool:
        return self.results in ("all", "pictures")


LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run.

    Args:
        data: folder of images (with or without class folders; train/ and val/ or test/ inside are understood),
            a list of files (.txt, or .csv with columns path and label), WebDataset shards (PATH/{000..009}.tar or
            URLs), or "rendered" for the embedded labelled set; see docs/data.md. Several of them are mixed:
            ``[{path: PATH, weight: 2}, ...]``. Has no default.
        output: folder of the run: config, metrics, checkpoints, pictures.
        seed: seed of weights, data order, crops and masks.
        resume: auto continues the run in the output folder if there is one; never refuses a folder that holds one;
            overwrite removes it, but no file that no run writes; require refuses a folder that holds none.
        init: weights that a new run begins with: another run or one of its checkpoints, an encoder of export, or a file
            of the official code, timm or transformers. They must have the sizes in model.
        log: where metrics go beside metrics.jsonl: tensorboard, csv, wandb, mlflow, several with commas, or none.
        model: encoder and predictor.
        masks: context and target blocks.
        objective: the loss.
        loader: images to crops.
        optim: AdamW, schedules, EMA.
        train: the loop.
        step: how a step is computed.
        evaluation: k-NN, probe, pictures.
    """

    data: str | list[dict[str, str | float]] | None = common(None)
    output: str = common("runs/default")
    seed: int = common(0)
    resume: Literal["auto", "never", "overwrite", "require"] = common("auto")
    init: str | None = common(None)
    log: tuple[str, ...] | str = common("tensorboard")
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    objective: Objective = field(default_factory=Objective)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    step: StepOptions = field(default_factory=StepOptions)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        names = self.log if isinstance(self.log, (list, tuple)) else str(self.log).split(",")
        names = [str(name).strip().lower() for name in names]
        object.__setattr__(self, "log", tuple(dict.fromkeys(name for name in names if name not in ("", "none"))))
        for name in self.log:
            if name not in LOGGERS:
                raise ValueError(f"log must name some of {', '.join(LOGGERS)}, or none; got {name!r}")
        if not (self.data is None or isinstance(self.data, str)):
            object.__setattr__(self, "data", _parts(self.data))
        train = self.train
        sharded = train.parallel != "ddp"
        self.step.check(precision=train.precision, accumulate=train.accumulate, device=train.device, sharded=sharded)
        self.objective.check_masks(self.masks.per_image)
        check_limits(flatten(self))
        if any(side % self.model.patch_size for side in self.model.size):
            raise ValueError(
                f"model.img_size {self.model.img_size} px cannot be cut into patches of {self.model.patch_size} px "
                "(model.patch_size)"
            )

    @property
    def images(self) -> dict:
        """Arguments of ``data.datasets.open_sources``."""
        return {
            "data": self.data,
            "evaluation_data": self.evaluation.data,
            "labels": self.evaluation.labels,
            "channels": self.model.in_chans,
            "value_range": self.loader.value_range,
            "max_pixels": self.loader.max_pixels,
        }


def _parts(parts: object) -> tuple[dict[str, str | float], ...]:
    """Places of images with their weights; those are checked by ``data.mixture`` before any place is looked at."""
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"data must be a place, or a list of {{path: PLACE, weight: NUMBER}}, got {parts!r}")
    for part in parts:
        if not isinstance(part, Mapping) or not {"path"} <= part.keys() <= {"path", "weight"}:
            raise ValueError(f"each part of data must be {{path: PLACE, weight: NUMBER}}, got {part!r}")
        path = part["path"]
        if not isinstance(path, str) or path == "rendered":
            raise ValueError(f"data can mix folders, lists, shards and their indexes, not {path!r}")
    paths = [part["path"] for part in parts]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"data names {path} twice")
    return tuple({"path": part["path"], "weight": part.get("weight", 1)} for part in parts)


CHANGEABLE = {
    "data",
    "output",
    "resume",
    "log",
    "loader.workers",
    "loader.max_bad_share",
    "train.accumulate",
    "train.device",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.deterministic",
    "train.parallel",
    "train.shards",
    "train.reduce",
    "train.async_save",
    "train.timeout",
    "evaluation",
    *(f"step.{f.name}" for f in fields(StepOptions) if f.metadata["resumes"]),
}
"""Settings (or whole sections) that a resumed run may change: but for rounding, it ends with the same weights."""


def changes(old: dict[str, object], new: dict[str, object]) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Settings that differ between two flat configs, as name -> (old, new): those a resume may change, and the rest."""
    allowed, refused = {}, {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before != after:
            section = name.partition(".")[0]
            (allowed if name in CHANGEABLE or section in CHANGEABLE else refused)[name] = (before, after)
    return allowed, refused


def common_settings(kind: type = RunConfig, prefix: str = "") -> set[str]:
    """Dotted names of the settings that ``--help`` shows."""
    names = set()
    for f in fields(kind):
        if is_dataclass(f.default_factory):
            names |= common_settings(f.default_factory, f"{prefix}{f.name}.")
        elif f.metadata.get("common"):
            names.add(prefix + f.name)
    return names


def with_settings(config: RunConfig, settings: dict[str, object]) -> RunConfig:
    """``config`` with some settings changed. Raises ValueError where they do not fit together."""
    changed = nested(settings).items()
    return replace(config, **{section: replace(getattr(config, section), **values) for section, values in changed})
