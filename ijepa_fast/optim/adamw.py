"""AdamW with fp32 masters, clipping and an EMA of the updated parameters, in one pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ijepa_fast.ops import SETTINGS, accumulation_dtype
from ijepa_fast.optim.step_tensors import LOW_PRECISION, SteppedParameter, StepTensors, gradient, local

FLAT_ALIGNMENT = 128
"""Bytes that flat gradients start at multiples of: a line of the GPU's cache."""


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with fp32 masters, global gradient clipping and an EMA of the updated parameters.

    An ordinary ``torch.optim.Optimizer``: schedulers may change ``lr``, ``betas`` and ``weight_decay`` of its groups.
    On a GPU a step takes three passes of kernels (norm of the gradients; a handful of scalars; everything else) and the
    host does not wait for any.

    Low-precision parameters get an fp32 master in the state; the parameter is its rounded copy. (Weights loaded into
    the parameter before the first step, or together with a state, win over the master.) An EMA of low precision is
    kept in fp32 in the state as well, and its tensor receives the rounded copy. A parameter without gradient is left
    alone, and so is its EMA. A step with a non-finite gradient changes nothing and is counted in ``skipped``.

    Parameters sharded by FSDP2 (DTensors) are stepped shard by shard, with gradients that are sharded alike; norm and
    clipping are global, and the state is made of DTensors, as ``torch.distributed.checkpoint`` wants it.

    In a CUDA graph: run a few steps first, capture ``step`` with ``flat_gradients=True``, and call
    ``upload_scalars`` before each replay. Capture anew when ``generation`` has changed.

    Args:
        params: parameters or groups, as for any torch optimizer. A group may hold "ema" (a tensor per parameter) and
            "lr_scale" (multiplies ``lr``). All on one device.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; defaults of the groups.
        ema: tensors to average the parameters into, one per parameter in order; instead of the groups' "ema".
        momentum: of the EMA; set the attribute to follow a schedule.
        max_grad_norm: clip the gradients' total L2 norm to this; None for no clipping.
        flat_gradients: keep the gradients of a group at fixed addresses, as views of one buffer per dtype.
            ``zero_grad`` then zeroes them and never makes them None, so every parameter is stepped.

    Attributes:
        momentum: float or scalar tensor, of the EMA, read at every step.
        grad_norm: scalar on the device, total norm of the last step's (unscaled) gradients before clipping.
        skipped: fp32 scalar on the device, number of steps left out because of non-finite gradients.
        performed: whether the last step changed anything, a bool scalar on the device (False before the first).
        blocked: scalar on the device or None; while it is not 0, steps change nothing.
        averages: parameter -> its EMA tensor; not to be changed.
        generation: how many times tensors of the state were replaced, by ``load_state_dict`` or ``add_param_group``.

    A parameter with an attribute ``main_grad`` (fp32, as Megatron-LM names it) is stepped with that gradient instead
    of ``.grad``.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema: Iterable[Tensor] | None = None,
        momentum: float = 0.996,
        max_grad_norm: float | None = None,
        flat_gradients: bool = False,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        self.momentum, self.max_grad_norm, self.flat_gradients = momentum, max_grad_norm, flat_gradients
        self.grad_norm: Tensor | None = None
        self.blocked: Tensor | None = None
        self.performed: Tensor | bool = False
        self.averages: dict[nn.Parameter, Tensor] = {}
        self._flat_buffers: list[Tensor] = []
        self._flat_views: dict[nn.Parameter, Tensor] = {}
        self.generation = 0
        self._tensors: StepTensors | None = None
        self._scalars: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lr_scale": 1.0})
        if ema is not None:
            self._pair(self._parameters(), list(ema))
        self._one = torch.ones((), device=self._device)
        self.skipped = torch.zeros((), device=self._device)

    def add_param_group(self, param_group: dict) -> None:
        """As for any optimizer; the group may hold "ema".

        Raises:
            ValueError: settings out of range, EMA tensors that do not fit, or parameters of several devices.
        """
        averaged = param_group.pop("ema", None)
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        devices = {parameter.device for parameter in self._parameters()}
        if len(devices) > 1:
            self.param_groups.pop()
            raise ValueError(f"all parameters must be on one device, got {sorted(map(str, devices))}")
        if averaged is not None:
            self._pair(group["params"], list(averaged))
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        for parameter in trained:
            self._state_of(parameter)
        if self.flat_gradients:
            self._flatten(trained)
        self._replaced()
        if hasattr(averaged, "model"):
            averaged.model.follow(self)

    def _replaced(self) -> None:
        """Addresses of the state's tensors are not what they were."""
        self._tensors = self._scalars = None
        self.generation += 1

    @property
    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _pair(self, params: Sequence[nn.Parameter], averaged: Sequence[Tensor]) -> None:
        if len(params) != len(averaged):
            raise ValueError(f"{len(averaged)} EMA tensors were given for {len(params)} parameters")
        for parameter, average in zip(params, averaged, strict=True):
            if parameter.shape != average.shape or local(parameter).shape != local(average).shape:
                raise ValueError(
                    f"EMA tensor {tuple(average.shape)} does not fit parameter {tuple(parameter.shape)}, "
                    f"or is sharded differently: {tuple(local(average).shape)} and {tuple(local(parameter).shape)} here"
                )
            wide = accumulation_dtype(parameter.dtype)
            if average.dtype not in (wide, *LOW_PRECISION):
                raise ValueError(
                    f"the EMA of a {parameter.dtype} parameter must be {wide} or low precision, not {average.dtype}"
                )
            self.averages[parameter] = average

    @torch.no_grad()
    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, with what was missing of it, where the parameter is now."""
        state, wide = self.state[parameter], accumulation_dtype(parameter.dtype)
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=wide)
        if parameter.dtype != wide and "master" not in state:
            state["master"] = parameter.detach().to(wide)
        average = self.averages.get(parameter)
        if average is not None and average.dtype != wide and "ema" not in state:
            state["ema"] = average.detach().to(wide)
        for name, value in state.items():
            dtype = torch.float32 if name == "step" else wide
            state[name] = torch.as_tensor(value).to(parameter.device, dtype)
        return state

    def _flatten(self, parameters: Sequence[nn.Parameter]) -> None:
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if hasattr(parameter, "to_local"):
                raise ValueError("flat_gradients is for parameters that are not sharded: FSDP2 places gradients itself")
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for dtype, members in by_dtype.items():
            step = FLAT_ALIGNMENT // dtype.itemsize
            starts = [0]
            for parameter in members:
                starts.append(starts[-1] + -(-parameter.numel() // step) * step)
            buffer = torch.zeros(starts[-1], dtype=dtype, device=members[0].device)
            self._flat_buffers.append(buffer)
            for parameter, start in zip(members, starts, strict=False):
                strides = torch.empty_like(parameter, device="meta").stride()
                parameter.grad = self._flat_views[parameter] = buffer.as_strided(parameter.shape, strides, start)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer; flat gradients are zeroed in any case."""
        if not self.flat_gradients:
            super().zero_grad(set_to_none)
            return
        for parameter, view in self._flat_views.items():
            parameter.grad = view
        torch._foreach_zero_(self._flat_buffers)

    def upload_scalars(self) -> None:
        """Send each group's learning rate, betas, eps and weight decay, and the EMA's momentum, to the device.

        Nobody waits for the copy. ``step`` calls this itself, except while a CUDA graph is captured. Values that are
        tensors on the GPU stay there and are read by the step, also in a replay.
        """
        values = self._scalar_values()
        on_gpu = self._device.type == "cuda"
        if self._scalars is None:
            # Only our kernels read them on the device; others would have to wait for it, and some have no fp64.
            device = self._device if on_gpu else torch.device("cpu")
            self._scalars = torch.zeros(len(values), dtype=torch.float64, device=device)
        on_host = [0.0 if isinstance(value, Tensor) and value.is_cuda else float(value) for value in values]
        self._scalars.copy_(torch.tensor(on_host, dtype=torch.float64, pin_memory=on_gpu), non_blocking=True)

    def _scalar_values(self) -> list[float | Tensor]:
        values: list[float | Tensor] = []
        for group in self.param_groups:
            values += [group["lr"] * group["lr_scale"], *group["betas"], group["eps"], group["weight_decay"]]
        return [*values, self.momentum]

    def _current_tensors(self) -> StepTensors | None:
        parameters = [p for p in self._parameters() if gradient(p) is not None]
        if not parameters:
            return None
        if self._tensors is None or not self._tensors.fits(parameters):
            members = [
                self._member(parameter, number)
                for number, group in enumerate(self.param_groups)
                for parameter in group["params"]
                if gradient(parameter) is not None
            ]
            self._tensors = StepTensors(members, [self.state[parameter]["step"] for parameter in parameters])
            for parameter, step in zip(parameters, self._tensors.steps, strict=True):
                self.state[parameter]["step"] = step
        return self._tensors

    def _member(self, parameter: nn.Parameter, group: int) -> SteppedParameter:
        state, average = self._state_of(parameter), self.averages.get(parameter)
        wide_average = state.get("ema", average)
        return SteppedParameter(
            parameter,
            group,
            state.get("master", parameter),
            state["exp_avg"],
            state["exp_avg_sq"],
            wide_average,
            None if wide_average is average else average,
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Gradients that ``torch.amp.GradScaler`` scaled are unscaled on the way."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and self._scalars is None:
            raise RuntimeError("run at least one step before a CUDA graph captures one")
        tensors = self._current_tensors()
        if tensors is None:
            self.performed = False
            return loss
        if not capturing:
            self.upload_scalars()
        for i, value in enumerate(self._scalar_values()):
            if isinstance(value, Tensor) and value.is_cuda:
                self._scalars[i].copy_(value)
        gradients = tensors.gradients()
        norm = tensors.norm(gradients)
        # torch.amp.GradScaler leaves these two on the optimizer for the time of the step.
        loss_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = self._one
        if loss_scale is not None:
            scale = loss_scale.to(self._device).reciprocal()
            norm = norm * scale
        self.grad_norm = norm
        apply = norm < float("inf")  # NaN is not
        if found_inf is not None:
            apply = apply & (found_inf.to(self._device) == 0)
        self.skipped += apply.logical_not()
        if self.blocked is not None:
            apply = apply & (self.blocked == 0)
        self.performed = apply
        if self.max_grad_norm is not None:
            scale = scale * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        tensors.steps += apply
        settings = self._scalars[:-1].view(-1, len(SETTINGS))
        tensors.update(gradients, settings, self._scalars[-1], scale, apply)
        return loss

    def state_dict(self) -> dict:
        """As for any optimizer. Every trained parameter has its state from the start."""
        for parameter in self._parameters():
            if parameter.requires_grad:
                self._state_of(parameter)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """As for any optimizer; masters, moments and wide averages keep their precision."""
        precise = {key: dict(state) for key, state in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        # torch casts every floating state tensor to the parameter's dtype, which would round bf16 masters.
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(order, self._parameters(), strict=True):
            for name, value in precise.get(key, {}).items():
                self.state[parameter][name] = value.detach().clone() if isinstance(value, Tensor) else value
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._replaced()


def _check_settings(group: dict) -> None:
    lr, betas, eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"betas must lie in [0, 1), got {betas}")
    if not eps >= 0 or not weight_decay >= 0:
        raise ValueError(f"eps and weight_decay must not be negative, got {eps} and {weight_decay}")
