"""AdamW and the EMA of the target encoder in one pass, and the parameter groups of I-JEPA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.jepa import IJEPA

LOW_PRECISION = (torch.bfloat16, torch.float16)


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to everything but biases and norms, which are 1-D (the mask token is 3-D)."""
    return parameter.ndim > 1


def parameter_groups(model: IJEPA, layer_decay: float = 1.0) -> list[dict]:
    """The four groups of the official recipe: decayed and not, of context encoder and predictor.

    Encoder parameters bring their target encoder twin under the key "ema".

    Args:
        layer_decay: multiplies the learning rate of the encoder's layer l of L by ``layer_decay ** (L + 1 - l)``, where
            the patch embedding is layer 0, block i layer i + 1, and the final norm layer L + 1 (arXiv 2106.08254,
            appendix). 1 keeps four groups; otherwise there is one pair of groups per layer.

    Returns:
        Groups with "params", "ema" (encoder only), "name", "decays" (bool) and "lr_scale".
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
    depth = len(model.context_encoder.blocks)
    groups: dict[str, dict] = {}
    for part, module in (("encoder", model.context_encoder), ("predictor", model.predictor)):
        for wanted in (True, False):
            for name, parameter in module.named_parameters():
                if decays(parameter) != wanted:
                    continue
                key, scale = f"{part}-{'decay' if wanted else 'nodecay'}", 1.0
                if part == "encoder" and layer_decay < 1:
                    layer = _layer_of(name, depth)
                    key, scale = f"{key}-{layer}", layer_decay ** (depth + 1 - layer)
                group = groups.setdefault(key, {"params": [], "name": key, "decays": wanted, "lr_scale": scale})
                group["params"].append(parameter)
                if part == "encoder":
                    group.setdefault("ema", []).append(model.target_encoder.get_parameter(name))
    order = ("encoder-decay", "predictor-decay", "encoder-nodecay", "predictor-nodecay")
    return sorted(groups.values(), key=lambda g: [g["name"].startswith(prefix) for prefix in order].index(True))


def _layer_of(name: str, depth: int) -> int:
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if name.startswith("patch_embed.") else depth + 1


@dataclass
class _Plan:
    """The tensor lists of one step, in the layout ``ops.adamw_ema_`` takes; built again when a gradient appears."""

    sources: list[nn.Parameter] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    ema_copies: list[Tensor] = field(default_factory=list)
    copy_index: list[int] = field(default_factory=list)
    ema_index: list[int] = field(default_factory=list)
    ema_copy_index: list[int] = field(default_factory=list)
    group_index: list[int] = field(default_factory=list)


def _append(tensors: list[Tensor], tensor: Tensor | None) -> int:
    if tensor is None:
        return -1
    tensors.append(tensor)
    return len(tensors) - 1


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with fp32 masters, global gradient clipping and an EMA of the updated parameters.

    An ordinary ``torch.optim.Optimizer``: schedulers may change ``lr`` and ``weight_decay`` of its groups.

    Low-precision parameters get an fp32 master in the state; the parameter is its rounded copy. An EMA of such a
    parameter is kept in fp32 as well, and its twin receives the rounded copy. A step with a non-finite gradient
    leaves parameters, moments and EMA untouched and is counted in ``skipped``.

    Args:
        params: parameters or groups, as for any torch optimizer. A group may hold "ema" (a tensor per parameter) and
            "lr_scale" (multiplies ``lr``).
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        ema: tensors to average the parameters into, one per parameter in order; instead of the groups' "ema".
        momentum: of the EMA; set the attribute to follow a schedule.
        max_grad_norm: clip the gradients' total L2 norm to this; None for no clipping.

    Attributes:
        momentum: float, of the EMA, read at every step.
        grad_norm: fp32 scalar on the device, total norm of the last step's (unscaled) gradients before clipping.
        skipped: fp32 scalar on the device, number of steps left out because of non-finite gradients.
        blocked: fp32 scalar on the device or None; while it is not 0, steps change nothing.

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
    ):
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"eps and weight_decay must not be negative, got {eps} and {weight_decay}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        self.momentum, self.max_grad_norm = momentum, max_grad_norm
        self.betas, self.eps = tuple(betas), eps
        self.grad_norm: Tensor | None = None
        self.blocked: Tensor | None = None
        self._ema: dict[nn.Parameter, Tensor] = {}
        self._plan: _Plan | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "lr_scale": 1.0})
        if ema is not None:
            self._pair([p for group in self.param_groups for p in group["params"]], list(ema))
        device = self.param_groups[0]["params"][0].device
        self.skipped = torch.zeros((), device=device)

    def add_param_group(self, param_group: dict) -> None:
        averaged = param_group.pop("ema", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if averaged is not None:
            self._pair(group["params"], list(averaged))
        self._plan = None

    def _pair(self, params: Sequence[nn.Parameter], averaged: Sequence[Tensor]) -> None:
        if len(params) != len(averaged):
            raise ValueError(f"{len(averaged)} EMA tensors were given for {len(params)} parameters")
        for parameter, average in zip(params, averaged, strict=True):
            if parameter.shape != average.shape:
                raise ValueError(f"EMA tensor {tuple(average.shape)} does not fit parameter {tuple(parameter.shape)}")
            self._ema[parameter] = average

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        low = parameter.dtype in LOW_PRECISION
        if "exp_avg" not in state:
            if low:
                state["master"] = parameter.detach().float()
            like = state.get("master", parameter)
            state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        average = self._ema.get(parameter)
        if average is not None and average.dtype in LOW_PRECISION and "ema" not in state:
            state["ema"] = average.detach().float()
        return state

    def _build_plan(self) -> _Plan:
        plan = _Plan()
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if gradient(parameter) is None:
                    continue
                state = self._state_of(parameter)
                average = self._ema.get(parameter)
                plan.sources.append(parameter)
                plan.params.append(state.get("master", parameter.detach()))
                plan.exp_avgs.append(state["exp_avg"])
                plan.exp_avg_sqs.append(state["exp_avg_sq"])
                plan.group_index.append(index)
                plan.copy_index.append(_append(plan.copies, parameter.detach() if "master" in state else None))
                plan.ema_index.append(
                    _append(plan.emas, None if average is None else state.get("ema", average.detach()))
                )
                plan.ema_copy_index.append(_append(plan.ema_copies, average.detach() if "ema" in state else None))
        return plan

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Gradients that ``torch.amp.GradScaler`` scaled are unscaled on the way."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [p for group in self.param_groups for p in group["params"] if gradient(p) is not None]
        if not with_gradient:
            return loss
        if self._plan is None or [id(p) for p in self._plan.sources] != [id(p) for p in with_gradient]:
            self._plan = self._build_plan()
        plan = self._plan
        grads = [gradient(p) for p in plan.sources]
        device = grads[0].device
        # torch.amp.GradScaler leaves these two on the optimizer for the time of the step.
        loss_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        unscale = torch.ones((), device=device) if loss_scale is None else loss_scale.reciprocal().to(device)
        self.grad_norm = ops.grad_norm(grads) * unscale
        bad = (~self.grad_norm.isfinite()).float()
        if found_inf is not None:
            bad = torch.maximum(bad, found_inf.to(device))
        self.skipped += bad
        skip = bad if self.blocked is None else torch.maximum(bad, self.blocked)
        scale = unscale
        if self.max_grad_norm is not None:
            scale = unscale * (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1)
        groups = self.param_groups
        counters = [self.state[p]["step"] for p in plan.sources]
        torch._foreach_add_(counters, [1 - skip] * len(counters))
        first = {index: i for i, index in reversed(list(enumerate(plan.group_index)))}
        zero = torch.zeros((), device=device)
        ops.adamw_ema_(
            plan.params,
            grads,
            plan.exp_avgs,
            plan.exp_avg_sqs,
            plan.copies,
            plan.emas,
            plan.ema_copies,
            plan.copy_index,
            plan.ema_index,
            plan.ema_copy_index,
            plan.group_index,
            torch.tensor([float(g["lr"]) * g["lr_scale"] for g in groups]).to(device, non_blocking=True),
            torch.tensor([float(g["weight_decay"]) for g in groups]).to(device, non_blocking=True),
            torch.as_tensor(self.momentum, dtype=torch.float32).to(device, non_blocking=True),
            torch.stack([counters[first[i]] if i in first else zero for i in range(len(groups))]),
            scale,
            skip,
            *self.betas,
            self.eps,
        )
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As for any optimizer; masters, moments and fp32 averages keep their fp32 precision."""
        precise = {key: dict(state) for key, state in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        # torch casts every floating state tensor to the parameter's dtype, which would round bf16 masters.
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(order, params, strict=True):
            for name, value in precise.get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)
        self._plan = None


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient a step uses: ``main_grad`` if the parameter has one, else ``grad``."""
    main = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


class EMA:
    """Exponential moving average of one module's parameters in another of the same shape.

    ``EMA(target, source)``, then ``update(momentum)`` after each optimizer step:
    ``target = momentum * target + (1 - momentum) * source``.

    Raises:
        ValueError: the modules' parameters have different names or shapes.
    """

    def __init__(self, target: nn.Module, source: nn.Module):
        targets, sources = dict(target.named_parameters()), dict(source.named_parameters())
        if targets.keys() != sources.keys():
            raise ValueError(f"modules differ in parameters {sorted(targets.keys() ^ sources.keys())}")
        for name, parameter in sources.items():
            if targets[name].shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(targets[name].shape)} in the target, {tuple(parameter.shape)} here")
        self.targets, self.sources = list(targets.values()), [sources[name] for name in targets]

    @torch.no_grad()
    def update(self, momentum: float | Tensor) -> None:
        """Fold the source in. ``momentum`` lies in [0, 1]; as a tensor it is not read by the host on a GPU."""
        device = self.targets[0].device
        momentum = torch.as_tensor(momentum, dtype=torch.float32).to(device, non_blocking=True)
        ops.ema_([t.detach() for t in self.targets], [s.detach() for s in self.sources], momentum)
