"""How an op gets its kernel."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor


def cuda_kernel(op: torch.library.CustomOpDef, module: str, function: str) -> None:
    """CUDA tensors take ``ijepa_fast.kernels.<module>.<function>``, whose file (and Triton) is loaded at first use."""

    @op.register_kernel("cuda")
    def launch(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return getattr(import_module(f"ijepa_fast.kernels.{module}"), function)(*args)
