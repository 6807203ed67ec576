"""``JEPAModel``: the three networks behind one call, for training loops of others."""

from ijepa_fast.jepa_model.config import JEPAConfig
from ijepa_fast.jepa_model.model import JEPAModel

__all__ = ["JEPAConfig", "JEPAModel"]
