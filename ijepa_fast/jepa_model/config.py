"""Settings of ``JEPAModel``, and the values of those that are not given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ijepa_fast.jepa_model.metrics import Encoder
from ijepa_fast.masks.config import MaskConfig
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, PREDICTOR_DEPTH, SIZES, Predictor


@dataclass(frozen=True)
class JEPAConfig:
    """Every key of ``JEPAModel``; all are optional.

    Args:
        img_size: side of the square images in pixels, or (height, width).
        patch_size: side of a patch in pixels; divides img_size.
        in_chans: channels of the images.
        encoder_dim: width of the two encoders, a multiple of 4.
        encoder_depth: their transformer blocks. By default as many as in the paper's encoder with the nearest width
            (tiny 192, small 384, base 768: 12; large 1024: 24; huge 1280: 32; giant 1408: 40).
        encoder_heads: their attention heads. By default as in the paper at its widths, otherwise as many as give a
            head dim near 64.
        predictor_dim: width of the predictor, a multiple of 4.
        predictor_depth: its transformer blocks. By default as many as go with the nearest width of the encoder (6, 12
            from large on, 16 for giant).
        predictor_heads: its attention heads. By default as many as the encoder has, or the nearest number that divides
            predictor_dim.
        mlp_ratio: hidden width of the encoder's MLPs over its width. By default 4; 6144 / 1408 at the width of giant.
        predictor_mlp_ratio: the same ratio of the predictor. By default mlp_ratio where that is given, otherwise 4.
        mask_ratio: share of the patches that the context leaves out. It has round((1 - mask_ratio) * N) patches, drawn
            uniformly from those outside the target blocks. None: all of those, as in the paper.
        masks: further settings of ``MaskConfig``, such as num_targets, target_scale or min_keep. min_keep is by
            default 10, and N / 16 on grids of fewer than 160 patches.
        loss: l2 (paper), smooth_l1 (official code) or l1, between prediction and layer-normalised target features.
        variance_weight, covariance_weight, invariance_weight: weights of VICReg's terms, which keep features of small
            data sets from collapsing, see ``ijepa_fast.model.jepa.Objective``.
        projector_dim: width of two layers between pooled context features and these terms. None: no layers.
        ema_momentum: momentum of the target encoder; with total_steps, its value at the start.
        final_momentum: its value after total_steps.
        momentum_shape: its curve between them: cosine, or linear as in the official code.
        total_steps: optimizer steps over which the momentum goes from ema_momentum to final_momentum. None: it stays
            where it is.
        auto_ema: average into the target encoder whenever the context encoder was stepped. False: only when
            ``update_target`` is called.
        seed: seed of the masks. Weights come from torch's global generator.
        mean, std: mean and standard deviation of each channel, for images in [0, 1]; uint8 images are normalised with
            them. By default ImageNet's for three channels, otherwise 0.5.
        init: flat (std 0.02 at all depths), depth_scaled or whitened (flat but for the patch embedding).
        attention: backend of variable-length attention, see ``ijepa-fast doctor``.
        activation_checkpointing: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: a value is out of its range.
    """

    img_size: int | Sequence[int] = 224
    patch_size: int = 16
    in_chans: int = 3
    encoder_dim: int = 768
    encoder_depth: int | None = None
    encoder_heads: int | None = None
    predictor_dim: int = 384
    predictor_depth: int | None = None
    predictor_heads: int | None = None
    mlp_ratio: float | None = None
    predictor_mlp_ratio: float | None = None
    mask_ratio: float | None = 0.75
    masks: Mapping[str, Any] = field(default_factory=dict)
    loss: Literal["l2", "smooth_l1", "l1"] = "l2"
    variance_weight: float = 0.0
    covariance_weight: float = 0.0
    invariance_weight: float = 0.0
    projector_dim: int | None = None
    ema_momentum: float = 0.996
    final_momentum: float = 1.0
    momentum_shape: Literal["cosine", "linear"] = "cosine"
    total_steps: int | None = None
    auto_ema: bool = True
    seed: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    init: Literal["flat", "depth_scaled", "whitened"] = "flat"
    attention: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        # What the parts do not check themselves: networks, ``MaskConfig`` and ``Objective`` refuse the rest.
        for name in ("in_chans", "encoder_dim", "predictor_dim", "projector_dim"):
            value = getattr(self, name)
            if value is None and name == "projector_dim":
                continue
            if not isinstance(value, int):
                raise ValueError(f"{name} must be one whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("ema_momentum", "final_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.momentum_shape not in ("cosine", "linear"):
            raise ValueError(f"momentum_shape must be cosine or linear, got {self.momentum_shape!r}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> JEPAConfig:
        """The settings in a dict. Raises ValueError for unknown keys, with the nearest known ones."""
        refuse_unknown(keys, [f.name for f in fields(cls)], "JEPAModel")
        return cls(**_tuples(keys))

    def resolved(self) -> JEPAConfig:
        """These settings with a value for each that was left open."""
        size = min(SIZES, key=lambda name: abs(SIZES[name]["embed_dim"] - self.encoder_dim))
        exact = SIZES[size] if SIZES[size]["embed_dim"] == self.encoder_dim else {}
        heads = self.encoder_heads
        if heads is None:
            heads = exact.get("num_heads") or nearest_heads(self.encoder_dim, self.encoder_dim / 64)
        rgb = self.in_chans == 3
        derived = {
            "encoder_depth": SIZES[size]["depth"],
            "encoder_heads": heads,
            "predictor_depth": PREDICTOR_DEPTH[size],
            "predictor_heads": nearest_heads(self.predictor_dim, heads),
            "mlp_ratio": exact.get("mlp_ratio", 4.0),
            "predictor_mlp_ratio": 4.0 if self.mlp_ratio is None else self.mlp_ratio,
            "mean": IMAGENET_MEAN if rgb else (0.5,) * self.in_chans,
            "std": IMAGENET_STD if rgb else (0.5,) * self.in_chans,
        }
        return replace(self, **{name: value for name, value in derived.items() if getattr(self, name) is None})

    def build(self) -> tuple[Encoder, Predictor, Objective]:
        """The networks with fresh weights, and what they minimise, for settings that are ``resolved``."""
        shared = {name: getattr(self, name) for name in ("init", "attention", "activation_checkpointing")}
        encoder = Encoder(
            self.img_size,
            self.patch_size,
            self.in_chans,
            self.encoder_dim,
            self.encoder_depth,
            self.encoder_heads,
            self.mlp_ratio,
            mean=self.mean,
            std=self.std,
            **shared,
        )
        predictor = Predictor(
            encoder.grid,
            self.encoder_dim,
            self.predictor_dim,
            self.predictor_depth,
            self.predictor_heads,
            self.predictor_mlp_ratio,
            projector_dim=self.projector_dim,
            **shared,
        )
        names = ("variance_weight", "covariance_weight", "invariance_weight")
        return encoder, predictor, Objective(self.loss, **{name: getattr(self, name) for name in names})

    def mask_config(self, num_patches: int) -> MaskConfig:
        """Settings of the masks for images of this many patches."""
        refuse_unknown(self.masks, [f.name for f in fields(MaskConfig)], "masks")
        settings = {"min_keep": min(10, num_patches // 16)}
        if self.mask_ratio is not None:
            settings |= {"context": "fixed", "mask_ratio": self.mask_ratio}
        return MaskConfig(**settings | _tuples(self.masks))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def nearest_heads(dim: int, wanted: float) -> int:
    """The number of heads nearest to ``wanted`` that divides ``dim``, into head dims that are multiples of 8 where
    there are any (attention kernels want them)."""
    divisors = [heads for heads in range(1, dim + 1) if dim % heads == 0]
    good = [heads for heads in divisors if dim // heads % 8 == 0]
    return min(good or divisors, key=lambda heads: abs(heads - wanted))


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], whose: str) -> None:
    unknown = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            unknown.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if unknown:
        raise ValueError(f"{whose} has no key {', '.join(unknown)}; its keys are {', '.join(known)}")


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
