"""Which patches are context and which are targets: ``MaskSampler(MaskConfig(), grid).sample(...)`` gives ``Masks``."""

from ijepa_fast.masks.config import MaskConfig
from ijepa_fast.masks.sampler import Masks, MaskSampler

__all__ = ["MaskConfig", "MaskSampler", "Masks"]
