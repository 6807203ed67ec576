"""The moving average of a module by itself, without an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.optim.step_tensors import LOW_PRECISION, local


class EMA:
    """Exponential moving average of one module's parameters in another of the same shape.

    ``EMA(target, source)``, then ``update(momentum)`` after each optimizer step:
    ``target = momentum * target + (1 - momentum) * source``. Buffers are left alone. Shards of DTensors (FSDP2) are
    averaged where they lie; both modules must be sharded alike.

    The average of a low-precision target is kept in fp32 in ``averages``, because steps of ``1 - momentum`` are lost
    in rounding; the target receives the rounded copy.

    Raises:
        ValueError: the modules' parameters have different names or shapes.
    """

    @torch.no_grad()
    def __init__(self, target: nn.Module, source: nn.Module):
        targets, sources = dict(target.named_parameters()), dict(source.named_parameters())
        if targets.keys() != sources.keys():
            raise ValueError(f"modules differ in parameters {sorted(targets.keys() ^ sources.keys())}")
        for name, parameter in sources.items():
            there, here = tuple(local(targets[name]).shape), tuple(local(parameter).shape)
            if there != here:
                raise ValueError(f"{name} is {there} in the target, {here} here")
        self.sources = [sources[name] for name in targets]
        self.targets = list(targets.values())
        self.averages = {name: local(t).float() for name, t in targets.items() if t.dtype in LOW_PRECISION}
        self._names = list(targets)
        self._tables: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, momentum: float | Tensor) -> None:
        """Fold the source in.

        Args:
            momentum: in [0, 1]. A tensor on the parameters' GPU is not read by the host; give one where ``update``
                is captured in a CUDA graph.
        """
        if not isinstance(momentum, Tensor):
            device = self.targets[0].device
            momentum = torch.full((), momentum, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
        targets = [local(target) for target in self.targets]
        averages = [self.averages.get(name, target) for name, target in zip(self._names, targets, strict=True)]
        sources = [local(source).detach() for source in self.sources]
        if self._tables is None:
            self._tables = ops.pointer_tables("ema_", averages, sources)
        ops.ema_(averages, sources, momentum, **self._tables)
        if self.averages:
            low = [i for i, name in enumerate(self._names) if name in self.averages]
            torch._foreach_copy_([targets[i] for i in low], [averages[i] for i in low])
