"""How a definition in plain torch becomes an op of the package: the only place that uses ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.library import CustomOpDef


def op(kernel: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable], CustomOpDef]:
    """Decorator that registers a definition as the op ``ijepa_fast::NAME``, NAME being the function's own.

    CUDA tensors take ``ijepa_fast.kernels.<kernel>.NAME``, whose file (and Triton) is loaded at first use; tensors of
    other devices run the definition. The definition itself, which autograd can follow, is the op's attribute
    ``definition``; ``kernel`` names the kernel's file.
    """

    def register(definition: Callable) -> CustomOpDef:
        name = definition.__name__

        def run(*args):
            # An op computes in the dtypes it is given: autocast would cast the matrix products of a definition.
            with torch.autocast(_device(args).type, enabled=False):
                return definition(*args)

        schema = torch.library.infer_schema(definition, mutates_args=mutates_args)
        registered = torch.library.custom_op(f"ijepa_fast::{name}", run, mutates_args=mutates_args, schema=schema)
        registered.definition, registered.kernel = definition, kernel

        @registered.register_kernel("cuda")
        def launch(*args):
            with torch.cuda.device(_device(args)):  # Triton launches on the current device
                return getattr(import_module(f"ijepa_fast.kernels.{kernel}"), name)(*args)

        return registered

    return register


def _device(args: Sequence) -> torch.device:
    return (args[0] if isinstance(args[0], Tensor) else args[0][0]).device


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the ops sum and keep statistics: fp32, and fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
