"""Every setting of a run: its sections, their limits, the files and flags they come from, and their former names."""

from ijepa_fast.config.files import find_recipe, from_dict, read_recipe, recipes
from ijepa_fast.config.former import present, present_flags, present_sections
from ijepa_fast.config.limits import LIMITS
from ijepa_fast.config.sections import (
    CHANGEABLE,
    LOGGERS,
    EvaluationConfig,
    LoaderConfig,
    RunConfig,
    TrainConfig,
    changes,
    common_settings,
    with_settings,
)
from ijepa_fast.config.settings import as_dict, did_you_mean, flags, flatten, nested, value_text
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.config import ModelConfig
from ijepa_fast.model.jepa import Objective
from ijepa_fast.optim.schedules import OptimConfig
from ijepa_fast.step.options import StepOptions

__all__ = [
    "CHANGEABLE",
    "LIMITS",
    "LOGGERS",
    "EvaluationConfig",
    "LoaderConfig",
    "MaskConfig",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "RunConfig",
    "StepOptions",
    "TrainConfig",
    "as_dict",
    "changes",
    "common_settings",
    "did_you_mean",
    "find_recipe",
    "flags",
    "flatten",
    "from_dict",
    "nested",
    "present",
    "present_flags",
    "present_sections",
    "read_recipe",
    "recipes",
    "value_text",
    "with_settings",
]
