"""Every setting of a run, as plain dataclasses; YAML files, command-line flags and help are made from them."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Literal, get_args

from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.fp8 import Scaling
from ijepa_fast.model.jepa import IJEPA, Objective
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, Predictor, VisionTransformer
from ijepa_fast.optim.schedules import Schedules


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and predictor.

    Args:
        img_size: side of the training crops in pixels.
        patch_size: side of a patch in pixels; divides img_size.
        embed_dim: width of the encoder, a multiple of 4.
        depth: blocks of the encoder.
        num_heads: attention heads of encoder and predictor; divides both widths.
        mlp_ratio: hidden width of the encoder's MLPs over its width.
        predictor_embed_dim: width of the predictor, a multiple of 4.
        predictor_depth: blocks of the predictor.
        predictor_mlp_ratio: of the predictor; null for the encoder's. The official code always has 4.
        init: flat (std 0.02 at all depths, as the published models were trained) or depth_scaled.
        attention: variable-length attention backend, see `ijepa-fast doctor`.
        target_attention: another backend for whole images in the target encoder, such as cudnn or sdpa; null for that
            of attention. At most steps its last block computes only some rows, and takes that of attention there. Not
            measured yet (docs/streams.md).
        activation_checkpointing: recompute blocks in the backward pass to save memory: true, false, or auto (only
            where the GPU would be too small without).
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
    """

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = 384
    predictor_depth: int = 6
    predictor_mlp_ratio: float | None = None
    init: Literal["flat", "depth_scaled"] = "flat"
    attention: str = "auto"
    target_attention: str | None = None
    activation_checkpointing: bool | Literal["auto"] = "auto"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, network in (("embed_dim", "encoder"), ("predictor_embed_dim", "predictor")):
            width = getattr(self, name)
            if self.num_heads < 1 or width % self.num_heads:
                raise ValueError(
                    f"model.{name} {width}, the width of the {network}, cannot be split into {self.num_heads} heads "
                    "(model.num_heads)"
                )

    def build(self, objective: Objective) -> IJEPA:
        """The networks, with fresh weights from torch's global generator."""
        shared = {
            "num_heads": self.num_heads,
            "init": self.init,
            "attention": self.attention,
            "activation_checkpointing": self.activation_checkpointing is True,
        }
        encoder = VisionTransformer(
            self.img_size,
            self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            mlp_ratio=self.mlp_ratio,
            mean=self.mean,
            std=self.std,
            **shared,
        )
        predictor = Predictor(
            encoder.grid,
            self.embed_dim,
            predictor_embed_dim=self.predictor_embed_dim,
            depth=self.predictor_depth,
            mlp_ratio=self.mlp_ratio if self.predictor_mlp_ratio is None else self.predictor_mlp_ratio,
            target_dim=3 * self.patch_size**2 if objective.targets == "pixels" else None,
            **shared,
        )
        return IJEPA(encoder, predictor, objective, self.target_attention)

    def anywhere(self) -> ModelConfig:
        """The same networks, with attention that runs on any device in any precision: for use after training."""
        return replace(self, attention="auto", target_attention=None)


@dataclass(frozen=True)
class LoaderConfig:
    """From image files to uint8 crops.

    Args:
        crop_scale: smallest and largest share of the image's area that a crop covers.
        crop_ratio: smallest and largest width over height of a crop.
        flip: probability of a horizontal flip. The official recipe has none.
        workers: decoding processes per rank, at most as many as there are cores for it; "auto" takes that many, up to
            16; 0 decodes in the training process.
        timeout: seconds after which waiting for a batch is given up and the run ends.
        max_pixels: width times height above which an image counts as undecodable, for it may not fit into memory.
        max_bad_share: share of undecodable images above which the run ends with an error.
        epoch_images: images that count as an epoch where shards come from URLs, which are not counted; needed there.
        shuffle: images in each worker's shuffle buffer, for shards from URLs.
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    workers: int | Literal["auto"] = "auto"
    timeout: float = 600.0
    max_pixels: int = 89_478_485  # Pillow's limit
    max_bad_share: float = 0.05
    epoch_images: int | None = None
    shuffle: int = 1000


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedules and the EMA; the defaults are the official recipe.

    Args:
        start_lr: learning rate at the start of the warm-up.
        lr: learning rate after the warm-up.
        final_lr: learning rate at the end of the schedule.
        warmup_epochs: length of the linear warm-up; fractions are allowed.
        weight_decay: at the start; biases and norms are not decayed.
        final_weight_decay: at the end of the schedule.
        weight_decay_shape: cosine (official code) or linear (paper).
        momentum: of the EMA of the target encoder, at the start.
        final_momentum: of the EMA, at the end of the schedule.
        momentum_shape: linear (official) or cosine.
        schedule_stretch: length of the schedules over that of the run (the official ipe_scale).
        betas: of Adam.
        eps: of Adam.
        max_grad_norm: clip the total gradient norm to this; null for no clipping.
        layer_decay: learning rate multiplier from one encoder layer to the one below.
    """

    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    warmup_epochs: float = 40.0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    weight_decay_shape: Literal["cosine", "linear"] = "cosine"
    momentum: float = 0.996
    final_momentum: float = 1.0
    momentum_shape: Literal["linear", "cosine"] = "linear"
    schedule_stretch: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    layer_decay: float = 1.0

    def schedules(self, total_steps: int, steps_per_epoch: int) -> Schedules:
        if not self.schedule_stretch >= 1:
            raise ValueError(f"optim.schedule_stretch must be at least 1, got {self.schedule_stretch}")
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if warmup_steps >= int(total_steps * self.schedule_stretch):
            raise ValueError(
                f"optim.warmup_epochs {self.warmup_epochs} ({warmup_steps} steps, with {steps_per_epoch} in an epoch) "
                f"does not fit into the {total_steps} steps of the run: lower it, or raise train.steps or train.epochs"
            )
        return Schedules(
            total_steps=int(total_steps * self.schedule_stretch),
            warmup_steps=warmup_steps,
            start_lr=self.start_lr,
            lr=self.lr,
            final_lr=self.final_lr,
            weight_decay=self.weight_decay,
            final_weight_decay=self.final_weight_decay,
            momentum=self.momentum,
            final_momentum=self.final_momentum,
            weight_decay_shape=self.weight_decay_shape,
            momentum_shape=self.momentum_shape,
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        batch_size: images per step on all ranks together.
        epochs: passes over the data; ignored if steps is given.
        steps: length of the run in steps instead of epochs.
        accumulate: micro-batches per step and rank; saves memory.
        precision: fp32, bf16 (bf16 weights with fp32 masters) or fp16 (the same, with loss scaling).
        wide_residual: keep the sums between transformer blocks in fp32 where weights are bf16 or fp16; without effect
            in fp32.
        fp8_targets: multiply in FP8 (e4m3) in the target encoder's blocks, with one scale per tensor, or one per row;
            off for the training precision. In bf16, on GPUs of compute capability 8.9 or higher (docs/precision.md);
            what it gains is not measured yet. The CPU emulates it, slowly.
        compile: run transformer blocks through torch.compile. Not measured on a GPU yet.
        fused: run transformer blocks on the package's fused kernels (docs/kernels.md): norms that add the residual,
            GELU inside products, split sums for weight gradients. Goes with compile or without. On a GPU it needs
            bf16 or fp16, and with fp8_targets the target encoder keeps its plain blocks. Whether it is faster has not
            been measured yet.
        capture: replay steps as CUDA graphs, one for each bucket of token counts. For one GPU, without accumulation, in
            fp32 or bf16; pays where the host cannot launch kernels fast enough: small models and batches. Takes memory
            for activations twice. Not measured yet.
        overlap_target: run the target encoder on a second stream, beside context encoder and predictor. For GPUs; the
            target encoder's temporaries take memory of their own. What it gains is not measured yet.
        device: auto (a GPU if there is one), cpu or cuda.
        log_every: steps between log lines, the only moments the host waits for the device.
        save_every: steps between checkpoints; one is always written at the end.
        keep: newest checkpoints that are kept.
        deterministic: refuse operations without a fixed summation order.
    """

    batch_size: int = 2048
    epochs: float = 300.0
    steps: int | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    wide_residual: bool = False
    fp8_targets: Scaling = "off"
    compile: bool = False
    fused: bool = False
    capture: bool = False
    overlap_target: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
        if self.fp8_targets not in get_args(Scaling):
            choices = ", ".join(get_args(Scaling))
            raise ValueError(f"train.fp8_targets must be one of {choices}, got {self.fp8_targets!r}")
        if self.fp8_targets != "off" and self.precision != "bf16":
            raise ValueError(f"train.fp8_targets {self.fp8_targets} needs precision bf16, got {self.precision}")
        if self.fused and self.device == "cuda" and self.precision == "fp32":
            raise ValueError("train.fused on a GPU needs train.precision bf16 or fp16, got fp32")
        if self.capture and (self.accumulate > 1 or self.precision == "fp16" or self.device == "cpu"):
            raise ValueError(
                "train.capture needs a GPU, accumulate 1 and precision fp32 or bf16, "
                f"got device {self.device}, accumulate {self.accumulate}, precision {self.precision}"
            )
        if self.overlap_target and self.device == "cpu":
            raise ValueError(f"train.overlap_target needs a GPU, got device {self.device}")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else max(1, round(self.epochs * steps_per_epoch))


@dataclass(frozen=True)
class EvaluationConfig:
    """Judging frozen features. Everything here needs labels and is left out without them.

    Args:
        data: labelled images to test on; by default the test or val folder beside the training images.
        before_and_after: k-NN and linear probe of the untrained and of the trained target encoder.
        train_images: at most so many training images are used to fit k-NN and probe.
        test_images: at most so many images are tested.
        layers: features of the last block, or of the last four concatenated.
        resize_ratio: the shorter side of a test image is resized to this times img_size, then the centre is cut out.
            1 for sets whose images have the size of the crops.
        bank: training features kept for the online k-NN; 0 turns it off.
        monitor_every: steps from one whose target features are kept for the online rank and k-NN to the next. The
            others leave out the rows of the target encoder's last block that no prediction reads; 1 leaves out none.
        pictures: draw masks, curves and PCA maps at the end.
    """

    data: str | None = None
    before_and_after: bool = True
    train_images: int = 10_000
    test_images: int = 10_000
    layers: Literal["last", "last4"] = "last"
    resize_ratio: float = 256 / 224
    bank: int = 20_000
    monitor_every: int = 8
    pictures: bool = True

    def __post_init__(self) -> None:
        if self.monitor_every < 1:
            raise ValueError(f"evaluation.monitor_every must be at least 1, got {self.monitor_every}")


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run.

    Args:
        data: folder of images (with or without class folders; train/ and val/ or test/ inside are understood),
            WebDataset shards (PATH/{000..009}.tar or URLs, see docs/data.md), or "rendered" for the embedded labelled
            set. Has no default.
        output: folder of the run: config, metrics, checkpoints, pictures.
        seed: of weights, data order, crops and masks.
        resume: auto continues the run in the output folder if there is one; never refuses a folder that holds one;
            require refuses one that does not.
        overwrite: with resume never: remove the run that is in the output folder; files that no run writes stay.
        model: encoder and predictor.
        masks: context and target blocks.
        objective: the loss.
        loader: images to crops.
        optim: AdamW, schedules, EMA.
        train: the loop.
        evaluation: k-NN, probe, pictures.
    """

    data: str | None = None
    output: str = "runs/default"
    seed: int = 0
    resume: Literal["auto", "never", "require"] = "auto"
    overwrite: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    objective: Objective = field(default_factory=Objective)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.evaluation.layers == "last4" and self.model.depth < 4:
            raise ValueError(
                f"evaluation.layers last4 needs an encoder of 4 blocks, got model.depth {self.model.depth}"
            )


CHANGEABLE = {
    "data",
    "output",
    "resume",
    "overwrite",
    "model.attention",
    "model.target_attention",
    "model.activation_checkpointing",
    "loader.workers",
    "loader.timeout",
    "loader.max_bad_share",
    "train.accumulate",
    "train.compile",
    "train.fused",
    "train.capture",
    "train.overlap_target",
    "train.device",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.deterministic",
    "evaluation",
}
"""Settings (or whole sections) that a resumed run may change: but for rounding, it ends with the same weights."""


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


def from_dict(values: dict, kind: type = RunConfig, where: str = "") -> RunConfig:
    """Inverse of ``as_dict``.

    Raises:
        ValueError: an unknown setting, with the nearest name, or a value that its section refuses.
    """
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown setting {where}{name}{_nearest(name, list(known))}")
    arguments = {}
    for name, value in values.items():
        default = known[name].default_factory
        if isinstance(value, dict) and is_dataclass(default):
            value = from_dict(value, default, f"{where}{name}.")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
