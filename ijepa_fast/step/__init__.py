"""One training step: eager (``train_step``) or replayed as a CUDA graph (``captured``)."""

from ijepa_fast.step.train_step import PRECISION_DTYPES, StepResult, TrainStep

__all__ = ["PRECISION_DTYPES", "StepResult", "TrainStep"]
