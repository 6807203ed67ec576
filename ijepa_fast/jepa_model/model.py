"""``JEPAModel``: the whole of I-JEPA as one ``nn.Module`` for training loops of your own.

Legend: B images, N patches per image.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ijepa_fast.jepa_model.config import JEPAConfig, refuse_unknown
from ijepa_fast.jepa_model.following import as_cast, averages_into, first_values, holds, performed
from ijepa_fast.jepa_model.metrics import Encoder, Metrics, cosine_similarity, warn_of_range
from ijepa_fast.masks.sampler import Masks, MaskSampler
from ijepa_fast.model.jepa import IJEPA, TARGET_EPS, Losses
from ijepa_fast.optim import EMA
from ijepa_fast.optim.step_tensors import local
from ijepa_fast.run.files import write_tensors
from ijepa_fast.step.options import StepOptions, apply
from ijepa_fast.step.train_step import PRECISION_DTYPES
from ijepa_fast.weights.reading import WeightsError, check_fit, description_in, load_weights, read_safetensors

FORMAT = "ijepa_fast-jepa_model-1"
_EVALUATION_STEP = 2**32 - 1
"""The step whose masks are drawn in eval mode: the last one, which no training call gets to."""
_OF_THE_WATCH = ("_ema", "_addresses", "_values", "_followed", "_noted", "_stepped", "_performed", "_averaged")
"""Attributes that are not copied with a model."""


class JEPAModel(IJEPA):
    """I-JEPA in one module: ``loss, metrics = model(images)``, ``loss.backward()``, and any torch optimizer.

    The target encoder follows by itself, once per optimizer step: at the next call of the model, or as soon as it is
    needed (``target_encoder``, ``state_dict``, ``save``, a copy, a pickle), the context encoder is averaged into it if
    its weights have changed since the last training call. ``follow(optimizer)`` averages after each step of an
    optimizer instead, ``update_target`` at once. ``FusedAdamW(parameter_groups(model))`` averages in its own pass over
    the weights and is followed from the start: it gets the momentum from here.

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
        updates: int64 scalar on the device, updates of the target encoder so far; the momentum follows it.

    Raises:
        ValueError: unknown keys (with the nearest known ones), or values that do not fit together.
    """

    _accelerated = False

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any):
        config = JEPAConfig.from_keys({**(config or {}), **settings}).resolved()
        encoder, predictor, objective = config.build()
        super().__init__(encoder, predictor, objective)
        self.config = config
        masks = config.mask_config(encoder.grid[0] * encoder.grid[1])
        self.sampler = MaskSampler(masks, encoder.grid, channels=encoder.in_chans)
        self.calls = 0
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._start_watching()

    def accelerate(
        self, *, device: torch.device | str | None = None, precision: str | None = None, **options: Any
    ) -> JEPAModel:
        """Bring the model to a device, and compute there as options of the training step say.

        ``model.accelerate(blocks="compile")``. Call it once, before the optimizer is made and the model is wrapped.

        Args:
            device: by default the first GPU, or the CPU where there is none.
            precision: of the weights: fp32 (beside autocast, where you want it), bf16 or fp16. None: as they are.
            options: fields of ``StepOptions`` (docs/step.md), such as ``blocks`` and ``wide_residual``. attention and
                activation_checkpointing are by default those of the configuration.

        Returns:
            The model itself.

        Raises:
            ValueError: an unknown option, or one that the model, the device or a loop of your own does not allow; a
                second call.
        """
        if self._accelerated:
            raise ValueError("accelerate was called before: call it once, on a new model or one from JEPAModel.load")
        refuse_unknown(options, [f.name for f in fields(StepOptions)], "accelerate")
        kept = {name: getattr(self.config, name) for name in ("attention", "activation_checkpointing")}
        chosen = StepOptions(**kept | options)
        if chosen.capture:
            raise ValueError("capture needs a step that has the optimizer and the images: `ijepa-fast pretrain`")
        if chosen.activation_checkpointing == "auto":
            raise ValueError("activation_checkpointing must be true or false: the size of the batches is not known")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        names = {dtype: name for name, dtype in PRECISION_DTYPES.items()}
        dtype = self.predictor.predictor_embed.weight.dtype
        if dtype not in names:
            raise ValueError(f"weights must be fp32, bf16 or fp16, but these are {dtype}: call model.float() before")
        precision = precision or names[dtype]
        if precision not in PRECISION_DTYPES:
            raise ValueError(f"precision must be one of {', '.join(PRECISION_DTYPES)}, got {precision!r}")
        chosen.check(precision=precision, accumulate=1, device=device.type)
        apply(chosen, self, device=device, precision=precision)
        self._accelerated = True
        return self

    # Loss

    # Before FSDP's hooks, which replace parameters by gathered ones for the time of the call.
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._catch_up()
        watching = self.config.auto_ema and not self._followed
        if watching and self._noted is None and self.training and torch.is_grad_enabled():
            self._find()
            self._noted = torch.cat(self._values)
        self._calling = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._calling = False

    # torch.compile passes over this frame and compiles `_compute`, which it calls, into one graph.
    @torch.compiler.disable(recursive=False)
    def forward(self, images: Tensor, masks: Masks | None = None) -> tuple[Tensor, Metrics]:
        """Loss of one batch. In training mode each call draws new masks; in eval mode they are always the same.

        Args:
            images: [B, C, h, w]; uint8 and uint16 are normalised here, float is taken as normalised.
            masks: instead of those drawn here.

        Returns:
            The loss, a scalar, and its ``Metrics``.

        Raises:
            ValueError: images of another shape.
        """
        if not self._looked_at_images:
            self._looked_at_images = True
            warn_of_range(images, self.config.mean, self.config.std)
        if masks is None:
            masks = self.draw_masks(images)
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
        return *self.losses(predicted, masks), cosine_similarity(predicted, TARGET_EPS)

    @torch.compiler.disable
    @torch.no_grad()
    def _metrics(self, losses: Losses, pooled: Tensor, similarity: Tensor, masks: Masks) -> Metrics:
        values = {"loss": losses.total.detach()}
        if self.objective.regularised:
            values["prediction_loss"] = losses.prediction
            values["variance_loss"], values["covariance_loss"] = losses.variance, losses.covariance
            values["invariance_loss"] = losses.invariance
        values["feature_std"] = pooled.std(0, correction=0).mean()
        values["cosine_similarity"] = similarity
        values["tokens"] = masks.context.cu_seqlens[-1] + masks.targets.cu_seqlens[-1]
        values["momentum"] = self.momentum()
        return Metrics(values, pooled)

    # Target encoder

    @property
    def target_encoder(self) -> Encoder:
        if not (torch.compiler.is_compiling() or self._calling):
            self._catch_up()
        return self._modules["target_encoder"]

    @torch.no_grad()
    def momentum(self) -> Tensor:
        """fp64 scalar on the device: the momentum of the next update."""
        start, end, steps = self.config.ema_momentum, self.config.final_momentum, self.config.total_steps
        if steps is None:
            return torch.full((), start, dtype=torch.float64, device=self.updates.device)
        progress = (self.updates.double() / steps).clamp(max=1)
        if self.config.momentum_shape == "cosine":
            progress = 0.5 - 0.5 * torch.cos(torch.pi * progress)
        return start + (end - start) * progress

    def update_target(self) -> None:
        """Average the context encoder into the target encoder now.

        Where the model looks for steps by itself (``auto_ema``) and has been called in training, this averages only
        what has changed since, so that nothing is averaged twice. Otherwise each call is an update.
        """
        if self._noted is None and self._performed is False and not self._followed:
            self._performed = True
        self._catch_up()

    def follow(self, *optimizers: Optimizer) -> None:
        """Average after each step of these optimizers from now on; hooks of their own tell of it.

        Needed for optimizers that call the model during their step (LBFGS), and for several steps without a call of
        the model in between. Of several optimizers over the encoder give all: there is one update when each has
        stepped. An optimizer that averages into the target encoder itself is given the momentum.

        Raises:
            ValueError: an optimizer that does not step the context encoder, or of several only some average.
        """
        for optimizer in optimizers:
            if not holds(optimizer, self.context_encoder):
                raise ValueError(f"this {type(optimizer).__name__} holds no parameters of the context encoder")
        together = {*self._followed, *optimizers}
        if len({averages_into(optimizer, self._modules["target_encoder"]) for optimizer in together}) > 1:
            names = ", ".join(sorted(type(optimizer).__name__ for optimizer in together))
            raise ValueError(f"of the followed optimizers all or none must average by themselves (ema), got {names}")
        self._catch_up()  # while the model still looks by itself
        self._noted = None
        for optimizer in optimizers:
            if optimizer not in self._followed:
                self._followed.add(optimizer)
                optimizer.register_step_pre_hook(self._before_step)
                optimizer.register_step_post_hook(self._after_step)

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A step within a step, as of a subclass that calls super().step(), has its hooks called twice. So what a step
        # did is averaged when the next one begins, or when the model is used, and not when the first hook is called.
        if id(optimizer) in self._stepped:
            self._catch_up()
        if averages_into(optimizer, self._modules["target_encoder"]):
            optimizer.momentum = self.momentum()

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._stepped.add(id(optimizer))
        self._performed = self._performed | performed(optimizer)
        self._averaged = averages_into(optimizer, self._modules["target_encoder"])

    @torch.compiler.disable
    @torch.no_grad()
    def _catch_up(self) -> None:
        """Average if the context encoder was stepped since the last time."""
        source, target = self.context_encoder, self._modules["target_encoder"]
        for module in (self, source, target):
            if hasattr(module, "reshard"):  # FSDP2 leaves gathered parameters behind after a call without gradients
                module.reshard()
        if self._performed is not False:
            if not self._averaged:
                self._find()
            self._average(self._performed, self._averaged)
        elif self._noted is not None:
            self._find()
            moved, averaged = (torch.cat(self._values) != self._noted).view(2, -1).any(1)
            # On the CPU nothing is lost by looking. Elsewhere the host does not wait: see `_average`.
            if moved.device.type != "cpu" or moved:
                self._average(moved, averaged)
            self._noted = torch.cat(self._values)

    @torch.compiler.disable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _average(self, performed: Tensor | bool, averaged: Tensor | bool = False) -> None:
        """Update the target if a step was ``performed``; only count it if the optimizer has ``averaged`` by itself."""
        if averaged is not True:
            self._ema = self._ema or EMA(self._modules["target_encoder"], self.context_encoder)
            # Momentum 1 leaves the target as it is, to the bit, and the host need not know.
            pending = performed if averaged is False else performed & ~averaged
            momentum = self.momentum()
            self._ema.update(momentum if pending is True else torch.where(pending, momentum, 1.0))
        self.updates += performed
        self._stepped, self._performed, self._averaged = set(), False, False

    @torch.compiler.disable
    @torch.no_grad()
    def _find(self) -> None:
        """Know the parameters again that were moved to a device, cast or sharded since the last time."""
        encoders = (self.context_encoder, self._modules["target_encoder"])
        parameters = [local(parameter) for encoder in encoders for parameter in encoder.parameters()]
        addresses = [parameter.data_ptr() for parameter in parameters]
        if addresses != self._addresses:
            self._ema, self._addresses, self._values = None, addresses, [first_values(p) for p in parameters]
            self._noted = None if self._noted is None else as_cast(self._noted, self._values)

    def _apply(self, *args, **kwargs) -> JEPAModel:  # of casts and moves, which are no steps
        self._catch_up()
        super()._apply(*args, **kwargs)
        if self._noted is not None:
            self._find()
            self._noted = torch.cat(self._values)
        return self

    def _forget_steps(self) -> None:
        """Start anew: no optimizer is known to have stepped since the last update."""
        self._ema: EMA | None = None
        self._addresses: list[int] = []
        self._values: list[Tensor] = []  # the first of each parameter of the encoders, as views
        self._noted: Tensor | None = None  # these values at the last training call or update
        self._stepped: set[int] = set()  # ids of the followed optimizers that have stepped since the last update
        self._performed: Tensor | bool = False  # whether one of these steps did anything
        self._averaged = False  # whether they averaged by themselves

    def _start_watching(self) -> None:
        self._followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._calling = self._looked_at_images = False
        self._forget_steps()
        for name in ("context_encoder", "target_encoder"):
            self._modules[name].model = weakref.ref(self)

    # Saving

    def state_dict(self, *args, **kwargs):
        self._catch_up()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load weights as any module does; with ``strict``, everything is checked before anything is loaded.

        Raises:
            WeightsError: names are missing or unexpected, or shapes differ; the model is left as it was.
        """
        if strict:
            state_dict = check_fit(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _before_loading(self) -> None:
        """Average what is due, so that loading is not taken for a step of an optimizer."""
        self._catch_up()
        self._forget_steps()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._before_loading()
        super()._load_from_state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)

    def __getstate__(self) -> dict:
        self._catch_up()
        # A copy begins to watch anew: the optimizers that are followed do not step it.
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_THE_WATCH}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._start_watching()

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
        model = cls({"momentum_shape": "linear"} | about["config"])  # as files of earlier versions meant it
        load_weights(model, tensors, str(path))
        return model
