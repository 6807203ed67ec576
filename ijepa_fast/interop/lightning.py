"""Lightning: ``JEPAModel`` as a ``LightningModule``, and a callback that brings masks and a target encoder to one of
your own.

Legend: B images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ijepa_fast.jepa_model.following import averages_into, holds, performed
from ijepa_fast.jepa_model.model import JEPAModel
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.optim import EMA, FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules, interpolate

_IMAGE_KEYS = ("images", "image", "pixel_values")


def images_of(batch: Any) -> Tensor:
    """The images of a batch: the batch itself, the first of a tuple or list, the value of "images", "image" or
    "pixel_values", or its attribute ``images``.

    Raises:
        ValueError: it has none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    elif isinstance(batch, Mapping):
        batch = next((batch[key] for key in _IMAGE_KEYS if key in batch), batch)
    else:
        batch = getattr(batch, "images", batch)
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"a batch must be images, (images, ...) or a dict with {', '.join(_IMAGE_KEYS)}, got {_described(batch)}"
        )
    return batch


def _described(batch: Any) -> str:
    return f"a dict with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__


class IJEPAModule(L.LightningModule):
    """I-JEPA for ``Trainer.fit``: model, masks, target encoder, ``FusedAdamW`` and the official schedules.

    Batches are what ``images_of`` understands. A run that is resumed from a Lightning checkpoint ends with the same
    weights as one that was not interrupted. ``module(images)`` gives features of the target encoder.

    Args:
        config: keys of ``JEPAModel``. Without total_steps, the momentum goes to its end over the steps of the trainer.
        start_lr, lr, final_lr: learning rate at the start, after the warm-up and at the end.
        warmup: share of all steps.
        weight_decay, final_weight_decay: at the start and at the end.
        max_grad_norm: clip the gradients to this norm. (Lightning's gradient_clip_val does not go with 16-mixed here.)
        step: options of ``JEPAModel.accelerate``, such as ``{"blocks": "compile"}``.

    Attributes:
        model: the ``JEPAModel``.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        start_lr: float = 2e-4,
        lr: float = 1e-3,
        final_lr: float = 1e-6,
        warmup: float = 0.1,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        max_grad_norm: float | None = None,
        step: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of all steps in [0, 1), got {warmup}")
        config, step = dict(config or {}), dict(step or {})
        self.save_hyperparameters()
        self._to_accelerate = bool(step)
        self.model = JEPAModel(config)
        self._schedules: Schedules | None = None

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the target encoder, [B, N, D]."""
        return self.model.target_encoder(images, mask)

    def configure_optimizers(self) -> FusedAdamW:
        settings, steps = self.hparams, _total_steps(self.trainer)
        self._schedules = Schedules(
            total_steps=steps,
            warmup_steps=int(settings.warmup * steps),
            lr=settings.lr,
            lr_ends=(settings.start_lr, settings.final_lr),
            weight_decay=(settings.weight_decay, settings.final_weight_decay),
        )
        if settings.config.get("total_steps") is None:  # of this trainer, if another one has had the model before
            self.model.config = replace(self.model.config, total_steps=steps)
        return FusedAdamW(parameter_groups(self.model), lr=settings.lr, max_grad_norm=settings.max_grad_norm)

    def on_fit_start(self) -> None:
        if self._to_accelerate:  # now that the weights are on their device and in their dtype; once
            self._to_accelerate = False
            self.model.accelerate(device=self.device, **self.hparams.step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        lr, weight_decay = (at(self.global_step) for at in (self._schedules.lr_at, self._schedules.weight_decay_at))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay if group["decays"] else 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, metrics = self.model(images_of(batch))
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # elsewhere nobody waits for the device
            named = {f"train/{name}": value.float() for name, value in metrics.items()}
            self.log("loss", metrics["loss"], prog_bar=True, logger=False)
            self.log_dict(named)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images = images_of(batch)
        _, metrics = self.model(images)
        named = {f"val/{name}": metrics[name] for name in ("loss", "cosine_similarity", "feature_std")}
        self.log_dict(named, batch_size=len(images))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(images_of(batch))


class IJEPACallback(L.Callback):
    """Masks and a moving-average target encoder for a ``LightningModule`` of your own.

    Before each training batch the masks of its images are at ``module.masks``, a ``Masks``. After each optimizer step
    ``module.target_encoder`` is updated (once per step, also with accumulated gradients; steps that loss scaling leaves
    out are left out). Both are part of the trainer's checkpoints.

    Args:
        masks: what to draw.
        grid: patch rows and columns of the images; by default the ``grid`` of the context encoder.
        seed: of the masks.
        momentum, final_momentum: of the average, linearly over the steps of the trainer.
        context, target: names of the two encoders in the module. The target's parameters are frozen.

    Raises:
        ValueError: the encoders are not there or do not fit together, or the masks do not fit the grid.
    """

    def __init__(
        self,
        masks: MaskConfig | None = None,
        *,
        grid: tuple[int, int] | None = None,
        seed: int = 0,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        context: str = "context_encoder",
        target: str = "target_encoder",
    ):
        for name, value in (("momentum", momentum), ("final_momentum", final_momentum)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self.masks, self.grid, self.seed = masks or MaskConfig(), grid, seed
        self.momentum, self.final_momentum = momentum, final_momentum
        self.context, self.target = context, target
        self.calls = self.updates = 0
        self._total_steps: int | None = None
        self._changed: Tensor | bool = False
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._source, self._average = self._part(pl_module, self.context), self._part(pl_module, self.target)
        self._average.requires_grad_(False)
        EMA(self._average, self._source)  # refuses encoders that do not fit together
        grid = self.grid or getattr(self._source, "grid", None)
        if grid is None:
            raise ValueError(f"{self.context} has no attribute grid: give IJEPACallback(grid=(rows, columns))")
        self._sampler = MaskSampler(self.masks, grid, channels=getattr(self._source, "in_chans", 3))

    @staticmethod
    def _part(pl_module: L.LightningModule, name: str) -> nn.Module:
        part = getattr(pl_module, name, None)
        if not isinstance(part, nn.Module):
            raise ValueError(
                f"{type(pl_module).__name__} has no module {name!r}; its parts are "
                f"{', '.join(name for name, _ in pl_module.named_children())}"
            )
        return part

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._total_steps = _total_steps(trainer)
        self._ema = EMA(self._average, self._source)  # now that the parameters are where they stay
        self._changed = False
        for optimizer in trainer.optimizers:
            if averages_into(optimizer, self._average):
                raise ValueError(
                    f"{type(optimizer).__name__} has the parameters of {self.target} as its EMA, and IJEPACallback "
                    'would average into them a second time: leave "ema" out of the parameter groups'
                )
            if holds(optimizer, self._source):
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        images = images_of(batch)
        where = {"seed": self.seed, "step": self.calls, "first_image": trainer.global_rank * len(images)}
        self.calls += 1
        pl_module.masks = self._sampler.sample(len(images), **where, device=pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._changed is False:
            return
        momentum = torch.tensor(self._next_momentum(), dtype=torch.float64, device=pl_module.device)
        # Momentum 1 leaves the target as it is, to the bit, and the host need not know.
        self._ema.update(momentum if self._changed is True else torch.where(self._changed, momentum, 1.0))
        self.updates += 1
        self._changed = False

    def _next_momentum(self) -> float:
        return interpolate("linear", self.momentum, self.final_momentum, self.updates / self._total_steps)

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._changed = self._changed | performed(optimizer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.calls, self.updates = state_dict["calls"], state_dict["updates"]


def _total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run. Raises ValueError where the trainer has no end."""
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise ValueError("the schedules need the length of the run: give the Trainer max_steps or max_epochs")
    return int(steps)
