"""``JEPAModel``: the whole method as one module, for a training loop of your own."""

from ijepa_fast.jepa_model.config import JEPAConfig
from ijepa_fast.jepa_model.model import JEPAModel

__all__ = ["JEPAConfig", "JEPAModel"]
