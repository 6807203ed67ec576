"""AdamW and the EMA of the target encoder in one pass, and the parameter groups of I-JEPA."""

from ijepa_fast.optim.adamw import FusedAdamW
from ijepa_fast.optim.ema import EMA
from ijepa_fast.optim.groups import decays, parameter_groups
from ijepa_fast.optim.step_tensors import LOW_PRECISION, gradient

__all__ = ["EMA", "FusedAdamW", "LOW_PRECISION", "decays", "gradient", "parameter_groups"]
