"""The smallest run that still has everything: shared by the tests of step, training and command line."""

from dataclasses import fields

import torch

from ijepa_fast.config import (
    EvaluationConfig,
    LoaderConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import IJEPA, Objective
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.step.options import StepOptions
from ijepa_fast.step.train_step import PRECISION_DTYPES, TrainStep

MODEL = ModelConfig(
    img_size=24, patch_size=4, embed_dim=16, depth=2, num_heads=2, predictor_embed_dim=8, predictor_depth=2
)
MASKS = MaskConfig(min_keep=1)
GRID = (6, 6)


def tiny_model(objective: Objective | None = None, seed: int = 0) -> IJEPA:
    torch.manual_seed(seed)
    return MODEL.build(objective or Objective())


def tiny_step(
    precision: str = "fp32",
    accumulate: int = 1,
    objective: Objective | None = None,
    masks: MaskConfig = MASKS,
    **settings,
) -> TrainStep:
    model = tiny_model(objective)
    cast_weights(model, PRECISION_DTYPES[precision])
    optimizer = FusedAdamW(parameter_groups(model), **settings)
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    schedules = Schedules(total_steps=20, warmup_steps=2)
    sampler = MaskSampler(masks, GRID)
    return TrainStep(model, optimizer, sampler, schedules, seed=0, accumulate=accumulate, scaler=scaler)


def images(step: int, count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=generator)


def tiny_run(data, output, **train) -> RunConfig:
    """A run of 12 steps; ``train`` are settings of ``TrainConfig`` and ``StepOptions``."""
    options = {name: train.pop(name) for name in [f.name for f in fields(StepOptions)] if name in train}
    settings = {"batch_size": 8, "steps": 12, "log_every": 4, "save_every": 5, "precision": "fp32", "device": "cpu"}
    return RunConfig(
        data=str(data),
        output=str(output),
        model=MODEL,
        masks=MASKS,
        loader=LoaderConfig(workers=0),
        optim=OptimConfig(warmup_epochs=0.5),
        train=TrainConfig(**(settings | train)),
        step=StepOptions(**options),
        evaluation=EvaluationConfig(results="none", bank=32),
    )
