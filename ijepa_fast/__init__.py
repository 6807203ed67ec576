"""I-JEPA pretraining on packed token sets.

The public names below are imported on first use, so that ``import ijepa_fast`` (and with it every command's
``--help``) does not wait for torch.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

if not Path(__file__).with_name("kernels").is_dir():
    # A checkout, which has kernels/ beside this package (setup.py puts it inside): found there, installed or not.
    __path__.append(str(Path(__file__).parents[1]))

_MODULE_OF = {
    "Callback": "run.callbacks",
    "EMA": "optim",
    "FusedAdamW": "optim",
    "IJEPA": "model.jepa",
    "JEPAModel": "jepa_model",
    "MaskConfig": "masks",
    "MaskSampler": "masks",
    "Masks": "masks",
    "Predictor": "model.vit",
    "Ragged": "ragged",
    "VisionTransformer": "model.vit",
    "cast_weights": "model.vit",
    "parameter_groups": "optim",
    "pretrain": "train",
    "varlen_attention": "attention",
}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
