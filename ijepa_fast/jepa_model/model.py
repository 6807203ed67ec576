"""``JEPAModel``: the whole of I-JEPA as one ``nn.Module`` for training loops of your own.

Legend: B images, N patches per image.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ijepa_fast.jepa_model.config import JEPAConfig
from ijepa_fast.jepa_model.metrics import Encoder, Metrics, cosine_similarity
from ijepa_fast.jepa_model.optimizer_steps import averages_into, changed_weights, parameter_ids, watch
from ijepa_fast.masks.sampler import Masks, MaskSampler
from ijepa_fast.model.jepa import IJEPA, Losses, Objective
from ijepa_fast.model.vit import Predictor
from ijepa_fast.optim import EMA
from ijepa_fast.run.files import write_tensors
from ijepa_fast.weights.reading import WeightsError, check_fit, description_in, load_weights, read_safetensors

log = logging.getLogger(__name__)

FORMAT = "ijepa_fast-jepa_model-1"
_EVALUATION_STEP = 2**32 - 1
"""The step whose masks are drawn in eval mode: the last one, which no training call gets to."""
_PATIENCE = 1000
"""Training calls without an update of the target encoder after which the log says so."""


class JEPAModel(IJEPA):
    """I-JEPA in one module: ``loss, metrics = model(images)``, ``loss.backward()``, and any torch optimizer.

    The target encoder follows by itself after each optimizer step: torch tells the model of the steps of every
    ``torch.optim.Optimizer`` that holds its parameters (see ``optimizer_steps``). Where the parameters of the context
    encoder are divided among several optimizers, the update waits until all of them were stepped, or until the next
    thing that needs it: a call of the model, ``target_encoder``, ``state_dict``, copying, pickling. Steps that
    ``GradScaler`` leaves out are left out here too. ``FusedAdamW(parameter_groups(model))`` updates the target encoder
    in its own pass; the model then only gives it the momentum.

    Args:
        config: keys of ``JEPAConfig``, all optional.
        settings: the same keys as keyword arguments; they win over ``config``.

    Attributes:
        config: the resolved ``JEPAConfig``.
        context_encoder: trained; ``context_encoder(images, mask=None)`` gives features, see ``Encoder.forward``.
        target_encoder: its moving average, the one to evaluate; called likewise.
        predictor: trained with the context encoder.
        sampler: draws the masks.
        calls: training calls whose masks were drawn here. The masks are a function of it, the seed, the rank and the
            image's place in the batch. In the state dict as ``_extra_state``.
        updates: int64 scalar on the device, updates of the target encoder; the momentum follows it.

    Raises:
        ValueError: unknown keys (with the nearest known ones), or values that do not fit together.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any):
        config = JEPAConfig.from_keys({**(config or {}), **settings}).resolved()
        shared = {
            "init": config.init,
            "attention": config.attention,
            "activation_checkpointing": config.activation_checkpointing,
        }
        encoder = Encoder(
            config.img_size,
            config.patch_size,
            config.in_chans,
            config.encoder_dim,
            config.encoder_depth,
            config.encoder_heads,
            mlp_ratio=config.mlp_ratio,
            mean=config.mean,
            std=config.std,
            **shared,
        )
        predictor = Predictor(
            encoder.grid,
            config.encoder_dim,
            config.predictor_dim,
            config.predictor_depth,
            config.predictor_heads,
            mlp_ratio=config.predictor_mlp_ratio,
            **shared,
        )
        objective = Objective(
            loss=config.loss, variance_weight=config.variance_weight, covariance_weight=config.covariance_weight
        )
        super().__init__(encoder, predictor, objective)
        self.config = config
        self.sampler = MaskSampler(config.mask_config(encoder.grid[0] * encoder.grid[1]), encoder.grid)
        self.calls = 0
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._average: EMA | None = None
        self._addresses: tuple[int, ...] = ()
        self._forget_steps()
        watch(self)

    # Loss

    # torch.compile passes over this frame and compiles `_compute`, which it calls, into one graph.
    @torch.compiler.disable(recursive=False)
    def forward(self, images: Tensor, masks: Masks | None = None) -> tuple[Tensor, Metrics]:
        """Loss of one batch. In training mode each call draws new masks; in eval mode they are always the same.

        Args:
            images: [B, C, h, w]; uint8 is normalised here, float is taken as normalised.
            masks: instead of those drawn here.

        Returns:
            The loss, a scalar, and its ``Metrics``.

        Raises:
            ValueError: images of another shape.
        """
        self._update_if_pending()
        if masks is None:
            masks = self.draw_masks(images)
        if self.training and torch.is_grad_enabled():
            self._note_training_call()
        losses, pooled, similarity = self._compute(images, masks)
        return losses.total, self._metrics(losses, pooled, similarity, masks)

    @torch.compiler.disable
    def draw_masks(self, images: Tensor) -> Masks:
        """Masks for these images, as ``forward`` draws them; in training mode the next ones of the sequence.

        With ranks, this one's images are taken for those numbered ``rank * B`` on of the global batch.
        """
        (rows, columns), (height, width) = self.context_encoder._grid_of_images(images), self.sampler.grid
        if (rows, columns) != (height, width):
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} px have {rows} x {columns} patches, but this model "
                f"is built with img_size={self.config.img_size}, {height} x {width} patches: resize the images, or "
                "give masks for theirs (positions are then interpolated)"
            )
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        step = _EVALUATION_STEP
        if self.training:
            step = self.calls
            self.calls += 1
        where = {"seed": self.config.seed, "step": step, "first_image": rank * len(images)}
        return self.sampler.sample(len(images), **where, device=images.device)

    def _compute(self, images: Tensor, masks: Masks) -> tuple[Losses, Tensor, Tensor]:
        predicted = self.predict(images, masks)
        return *self.losses(predicted, masks), cosine_similarity(predicted, self.objective.target_eps)

    @torch.compiler.disable
    @torch.no_grad()
    def _metrics(self, losses: Losses, pooled: Tensor, similarity: Tensor, masks: Masks) -> Metrics:
        values = {"loss": losses.total.detach()}
        if self.objective.regularised:
            values["prediction_loss"] = losses.prediction
            values["variance_loss"], values["covariance_loss"] = losses.variance, losses.covariance
        values["feature_std"] = pooled.std(0, correction=0).mean()
        values["cosine_similarity"] = similarity
        values["tokens"] = masks.context.cu_seqlens[-1] + masks.targets.cu_seqlens[-1]
        values["momentum"] = self.momentum()
        return Metrics(values, pooled)

    # Target encoder

    @property
    def target_encoder(self) -> Encoder:
        self._update_if_pending()
        return self._modules["target_encoder"]

    @torch.no_grad()
    def momentum(self) -> Tensor:
        """fp64 scalar on the device: the momentum of the next update."""
        start, end, steps = self.config.ema_momentum, self.config.final_momentum, self.config.total_steps
        if steps is None:
            return torch.full((), start, dtype=torch.float64, device=self.updates.device)
        return start + (end - start) * (self.updates.double() / steps).clamp(max=1)

    def update_target(self) -> None:
        """Fold the context encoder into the target encoder now.

        With ``auto_ema`` this may be called after each optimizer step or not at all: what was folded in by itself is
        not folded in twice, and nothing is where the weights have not changed (a step that ``GradScaler`` left out).
        Without ``auto_ema`` each call is an update.
        """
        if self._pending:
            self._update_if_pending()
        elif not self.config.auto_ema or not (self._followed or self._versions == self._current_versions()):
            self._fold(True)

    def is_stepped_by(self, optimizer: Optimizer) -> bool:
        return self.config.auto_ema and not self._trained().isdisjoint(parameter_ids(optimizer))

    def before_step(self, optimizer: Optimizer) -> None:
        if not self._pending.isdisjoint(parameter_ids(optimizer)):
            self._update_if_pending()  # its second step without a call in between
        if averages_into(optimizer, self._modules["target_encoder"]):
            optimizer.momentum = self.momentum()

    def after_step(self, optimizer: Optimizer) -> None:
        self._followed = True
        if averages_into(optimizer, self._modules["target_encoder"]):
            self._note_update(changed_weights(optimizer))
            return
        trained = self._trained()
        self._pending |= trained & parameter_ids(optimizer)
        self._performed = self._performed | changed_weights(optimizer)
        if self._pending >= trained:
            self._update_if_pending()

    def _trained(self) -> set[int]:
        return {id(parameter) for parameter in self.context_encoder.parameters() if parameter.requires_grad}

    def _update_if_pending(self) -> None:
        if self._pending:
            self._fold(self._performed)

    @torch.compiler.disable
    @torch.no_grad()
    def _fold(self, performed: Tensor | bool) -> None:
        self._pending, self._performed = set(), False
        source, target = self.context_encoder, self.target_encoder
        addresses = tuple(p.data_ptr() for module in (source, target) for p in module.parameters())
        if self._average is None or addresses != self._addresses:  # new, moved to a device, or cast
            self._average, self._addresses = EMA(target, source), addresses
        momentum = self.momentum()
        # Momentum 1 leaves the target as it is, to the bit, and the host need not know.
        self._average.update(momentum if performed is True else torch.where(performed, momentum, 1.0))
        self._note_update(performed)

    @torch.no_grad()
    def _note_update(self, performed: Tensor | bool) -> None:
        self.updates += performed
        self._versions = self._current_versions()
        self._calls_without_update = 0

    def _current_versions(self) -> list[int]:
        return [parameter._version for parameter in self.context_encoder.parameters()]

    @torch.compiler.disable
    def _note_training_call(self) -> None:
        self._followed = False
        self._calls_without_update += 1
        if self._calls_without_update == _PATIENCE:
            log.warning(
                "the target encoder has not been updated in %d training calls: no torch optimizer over the parameters "
                "of this model has stepped. With an optimizer that holds copies of them, set auto_ema=False and call "
                "update_target() after its steps",
                _PATIENCE,
            )

    def _forget_steps(self) -> None:
        """As if no optimizer had stepped since the last update."""
        self._pending: set[int] = set()  # ids of the parameters that were stepped
        self._performed: Tensor | bool = False  # whether one of these steps did anything
        self._followed = False  # an update followed a step by itself since the last training call
        self._versions = self._current_versions()
        self._calls_without_update = 0

    # Saving

    def state_dict(self, *args, **kwargs):
        self._update_if_pending()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As of any module, but with ``strict`` everything is checked before anything is loaded.

        Raises:
            WeightsError: names are missing or unexpected, or shapes differ; the model is left as it was.
        """
        if strict:
            state_dict = check_fit(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget_steps()

    def __getstate__(self) -> dict:
        self._update_if_pending()
        return {**super().__getstate__(), "_average": None, "_addresses": ()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget_steps()
        watch(self)

    def save(self, path: Path | str) -> None:
        """Write the model, its configuration and its counters to one safetensors file. Nothing else appears under
        that name, not even for a moment. The optimizer's ``state_dict`` is yours to save. Needs safetensors."""
        about = json.dumps({"format": FORMAT, "config": self.config.as_dict()})
        write_tensors(Path(path), self.state_dict(), {"ijepa_fast": about})

    @classmethod
    def load(cls, path: Path | str) -> JEPAModel:
        """The model of a file that ``save`` wrote, on the CPU, in training mode.

        Raises:
            WeightsError: the file is damaged, or was not written by ``save``.
            OSError: it cannot be opened.
        """
        tensors, metadata = read_safetensors(path)
        about = description_in(metadata, "ijepa_fast", ("format", "config"), path)
        if about["format"] != FORMAT:
            raise WeightsError(f"{path} was not written by JEPAModel.save: its format is {about['format']!r}")
        model = cls(about["config"])
        load_weights(model, tensors, str(path))
        return model
