"""The functions and classes that the official training script imports, with the same names and signatures.

Written from a description of the interface; no line is from the official code (facebookresearch/ijepa, CC-BY-NC-4.0).
See docs/official.md.
"""

from ijepa_fast.interop.official.checkpoint import load_checkpoint, save_checkpoint
from ijepa_fast.interop.official.collate import DeviceMaskCollator, MaskCollator
from ijepa_fast.interop.official.models import (
    VIT_EMBED_DIMS,
    VisionTransformer,
    VisionTransformerPredictor,
    apply_masks,
    init_model,
    repeat_interleave_batch,
    vit_base,
    vit_giant,
    vit_huge,
    vit_large,
    vit_predictor,
    vit_small,
    vit_tiny,
)
from ijepa_fast.interop.official.optim import (
    CosineWDSchedule,
    WarmupCosineSchedule,
    grad_logger,
    init_opt,
    parameter_groups,
)
from ijepa_fast.interop.official.replacements import accelerate

__all__ = [
    "CosineWDSchedule",
    "DeviceMaskCollator",
    "MaskCollator",
    "VIT_EMBED_DIMS",
    "VisionTransformer",
    "VisionTransformerPredictor",
    "WarmupCosineSchedule",
    "accelerate",
    "apply_masks",
    "grad_logger",
    "init_model",
    "init_opt",
    "load_checkpoint",
    "parameter_groups",
    "repeat_interleave_batch",
    "save_checkpoint",
    "vit_base",
    "vit_giant",
    "vit_huge",
    "vit_large",
    "vit_predictor",
    "vit_small",
    "vit_tiny",
]
