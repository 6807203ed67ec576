"""Every setting of a run, as plain dataclasses; YAML files, command-line flags and help are made from them."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from ijepa_fast import former_settings
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.config import ModelConfig, common
from ijepa_fast.model.jepa import Objective
from ijepa_fast.optim.schedules import OptimConfig
from ijepa_fast.step.options import StepOptions


@dataclass(frozen=True)
class LoaderConfig:
    """How image files become uint8 crops.

    Args:
        crop_scale: smallest and largest share of the image's area that a crop covers.
        crop_ratio: smallest and largest width over height of a crop.
        flip: probability of a horizontal flip. The official recipe has none.
        workers: decoding processes per rank, at most as many as there are cores for it; "auto" takes that many, up to
            16; 0 decodes in the training process.
        max_pixels: width times height above which an image counts as undecodable, for it may not fit into memory.
        max_bad_share: share of undecodable images above which the run ends with an error.
        epoch_images: images that count as an epoch where shards come from URLs, which are not counted; needed there.
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    workers: int | Literal["auto"] = common("auto")
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

    def __post_init__(self) -> None:
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
        before_and_after: k-NN and linear probe of the untrained and of the trained target encoder.
        images: largest number of training images that k-NN and probe are fitted to, and of test images.
        resize_ratio: the shorter side of a test image is resized to this times img_size, then the centre is cut out.
            1 for sets whose images have the size of the crops.
        bank: training features kept for the online k-NN; 0 turns it off.
        pictures: draw masks, curves and PCA maps at the end.
    """

    data: str | None = common(None)
    before_and_after: bool = True
    images: tuple[int, int] = (10_000, 10_000)
    resize_ratio: float = 256 / 224
    bank: int = 20_000
    pictures: bool = True


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run.

    Args:
        data: folder of images (with or without class folders; train/ and val/ or test/ inside are understood),
            WebDataset shards (PATH/{000..009}.tar or URLs, see docs/data.md), or "rendered" for the embedded labelled
            set. Has no default.
        output: folder of the run: config, metrics, checkpoints, pictures.
        seed: seed of weights, data order, crops and masks.
        resume: auto continues the run in the output folder if there is one; never refuses a folder that holds one;
            overwrite removes it, but no file that no run writes; require refuses a folder that holds none.
        init: weights that a new run begins with: another run or one of its checkpoints, an encoder of export, or a file
            of the official code, timm or transformers. They must have the sizes in model.
        model: encoder and predictor.
        masks: context and target blocks.
        objective: the loss.
        loader: images to crops.
        optim: AdamW, schedules, EMA.
        train: the loop.
        step: how a step is computed.
        evaluation: k-NN, probe, pictures.
    """

    data: str | None = common(None)
    output: str = common("runs/default")
    seed: int = common(0)
    resume: Literal["auto", "never", "overwrite", "require"] = common("auto")
    init: str | None = common(None)
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    objective: Objective = field(default_factory=Objective)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    step: StepOptions = field(default_factory=StepOptions)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        train = self.train
        self.step.check(precision=train.precision, accumulate=train.accumulate, device=train.device)
        self.objective.check_masks(self.masks.per_image)
        for name, value in flatten(self).items():
            numbers = list(_numbers(value))
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} must be finite, got {value}")
            fits, words = LIMITS.get(name, (None, ""))
            if fits is not None and not all(map(fits, numbers)):
                raise ValueError(f"{name} must be {words}, got {value}")
        if self.model.img_size % self.model.patch_size:
            raise ValueError(
                f"model.img_size {self.model.img_size} px cannot be cut into patches of {self.model.patch_size} px "
                "(model.patch_size)"
            )


_SHARE = (lambda value: 0 <= value <= 1, "in [0, 1]")
_POSITIVE = (lambda value: value > 0, "positive")
LIMITS = {
    "model.img_size": _POSITIVE,
    "model.patch_size": _POSITIVE,
    "model.depth": _POSITIVE,
    "model.predictor_depth": _POSITIVE,
    "model.mlp_ratio": _POSITIVE,
    "model.predictor_mlp_ratio": _POSITIVE,
    "loader.flip": _SHARE,
    "loader.max_bad_share": _SHARE,
    "loader.max_pixels": _POSITIVE,
    "optim.warmup_epochs": (lambda value: value >= 0, "at least 0"),
    "optim.max_grad_norm": _POSITIVE,
    "evaluation.images": _POSITIVE,
    "evaluation.resize_ratio": (lambda value: value >= 1, "at least 1"),
    "evaluation.bank": (lambda value: value == 0 or 2 <= value <= 50_000, "0 or between 2 and 50,000"),
}
"""What the numbers of a setting must fulfil, and the same in words, where no section checks it."""


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a setting, one, several, or none."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


CHANGEABLE = {
    "data",
    "output",
    "resume",
    "loader.workers",
    "loader.max_bad_share",
    "train.accumulate",
    "train.device",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.deterministic",
    "evaluation",
    *(f"step.{f.name}" for f in fields(StepOptions) if f.metadata["resumes"]),
}
"""Settings (or whole sections) that a resumed run may change: but for rounding, it ends with the same weights."""


def present(settings: Mapping[str, object], base: Mapping[str, object] | None = None, strict: bool = True) -> dict:
    """``former_settings.present``, where ``base`` may leave out what is as by default."""
    return former_settings.present(settings, flatten(RunConfig()) | dict(base or {}), strict)


def present_flags(arguments: list[str], base: Mapping[str, object] | None = None) -> list[str]:
    """Command-line arguments with the settings of earlier versions under their present names, where the last one stood.

    Args:
        base: as in ``present``.

    Raises:
        ValueError: one of them has no value, or one that is in ``former_settings.FIXED`` another one.
    """
    kept, old, place, rest = [], {}, 0, list(arguments)
    names = former_settings.RENAMED.keys() | former_settings.FIXED.keys() | former_settings.GONE.keys()
    if any(argument.partition("=")[0] == "--overwrite" for argument in arguments):
        names |= {"resume"}  # which says half of it
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in names:
            kept.append(argument)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = rest.pop(0)
        try:
            old[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except json.JSONDecodeError:
            old[name] = value
        place = len(kept)
    renamed = [part for name, value in present(old, base).items() for part in (f"--{name}", value_text(value))]
    return kept[:place] + renamed + kept[place:]


def common_settings(kind: type = RunConfig, prefix: str = "") -> set[str]:
    """Dotted names of the settings that ``--help`` shows."""
    names = set()
    for f in fields(kind):
        if is_dataclass(f.default_factory):
            names |= common_settings(f.default_factory, f"{prefix}{f.name}.")
        elif f.metadata.get("common"):
            names.add(prefix + f.name)
    return names


def flatten(config: RunConfig | dict, prefix: str = "") -> dict[str, object]:
    """Dotted name -> value of every setting of a configuration, or of nested settings as ``as_dict`` gives them."""
    flat = {}
    for name, value in (config if isinstance(config, dict) else as_dict(config)).items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def changes(old: dict[str, object], new: dict[str, object]) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Settings that differ between two flat configs, as name -> (old, new): those a resume may change, and the rest."""
    allowed, refused = {}, {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before != after:
            section = name.partition(".")[0]
            (allowed if name in CHANGEABLE or section in CHANGEABLE else refused)[name] = (before, after)
    return allowed, refused


def as_dict(config: RunConfig) -> dict:
    """Nested plain dict, tuples as lists: what YAML and JSON hold."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def from_dict(values: dict, strict: bool = True) -> RunConfig:
    """Inverse of ``as_dict``; ``strict`` as in ``present``.

    Raises:
        ValueError: an unknown setting, with the nearest name, or a value that its section refuses.
    """
    return _section(RunConfig, present_sections(values, strict=strict), "")


def _section(kind: type, values: dict, where: str):
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown setting {where}{name}{did_you_mean(name, known)}")
    arguments = {}
    for name, value in values.items():
        default = known[name].default_factory
        if isinstance(value, dict) and is_dataclass(default):
            value = _section(default, value, f"{where}{name}.")
        arguments[name] = _tuples(value)
    return kind(**arguments)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one of those there are, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def present_sections(values: dict, base: Mapping[str, object] | None = None, strict: bool = True) -> dict:
    """``present`` of settings as a YAML file holds them."""
    return nested(present(flatten(values), base, strict))


def nested(settings: dict[str, object]) -> dict:
    """Settings by their dotted names, as a YAML file holds them."""
    sections: dict = {}
    for dotted, value in settings.items():
        section, dot, name = dotted.partition(".")
        if dot:
            # An empty section of a YAML file is null.
            sections[section] = (sections.get(section) or {}) | {name: value}
        else:
            sections[section] = value
    return sections


def with_settings(config: RunConfig, settings: dict[str, object]) -> RunConfig:
    """``config`` with some settings changed. Raises ValueError where they do not fit together."""
    changed = nested(settings).items()
    return replace(config, **{section: replace(getattr(config, section), **values) for section, values in changed})


def flags(settings: dict[str, object]) -> str:
    """Settings as they are typed behind ``ijepa-fast pretrain``."""
    return " ".join(f"--{name} {value_text(value)}" for name, value in settings.items())


def value_text(value: object) -> str:
    """A value as YAML and flags have it."""
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe shipped with the package; ablations are named ``ablations/...``."""
    root = Path(str(resources.files("ijepa_fast") / "recipes"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that ``--config NAME`` means: an existing file, or a shipped recipe.

    Raises:
        ValueError: neither, with the nearest recipe names.
    """
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(shipped)}"
    raise ValueError(f"{name!r} is neither a file nor a recipe; {hint}")


def read_recipe(name: str, above: tuple[Path, ...] = (), onto: Mapping[str, object] | None = None) -> dict:
    """Nested settings of a YAML file or shipped recipe: what ``from_dict`` takes.

    A file may name a recipe, or another file (relative to its own folder), as its ``base``: it then holds only what
    differs from that.

    Args:
        above: files that this one is a base of.
        onto: settings by their dotted names that it is to change, if it has no base.

    Raises:
        ValueError: there is no such file or recipe, it is not YAML with settings, or it is its own base.
    """
    import yaml

    path = find_recipe(name).resolve()
    if path in above:
        raise ValueError(f"{name!r} is its own base: {' <- '.join(map(str, (*above, path)))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings (name: value), got {type(values).__name__}")
    base = values.pop("base", None)
    below = {}
    if base is not None:
        below = read_recipe(base if base in recipes() else str(path.parent / base), (*above, path), onto)
    # Before it is merged: a setting's old name in one file and its new one in the other are the same setting.
    return _merged(below, present_sections(values, {**(onto or {}), **flatten(below)}))


def _merged(base: dict, changed: dict) -> dict:
    """``base`` with the settings of ``changed``, section by section."""

    def value_of(name: str):
        old, new = base.get(name), changed.get(name)
        return _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else changed.get(name, old)

    return {name: value_of(name) for name in base | changed}
