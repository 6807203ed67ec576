"""The smallest JEPAModel, its images, and how to train it a few steps: shared by the tests of the integrations."""

import torch
from torch import nn

from ijepa_fast import JEPAModel

TINY = {
    "img_size": 24,
    "patch_size": 4,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "predictor_dim": 8,
    "predictor_depth": 1,
    "ema_momentum": 0.9,
}
BATCH, PATCHES = 4, 36


def tiny(**settings) -> JEPAModel:
    torch.manual_seed(0)
    return JEPAModel(TINY, **settings)


def images(step: int = 0, count: int = BATCH) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(100 + step)
    )


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def trained(model: JEPAModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: JEPAModel, optimizer: torch.optim.Optimizer, steps: range, after=lambda: None) -> list[float]:
    """The losses; ``after`` is called after each step."""
    losses = []
    for step in steps:
        loss, _ = model(images(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        losses.append(float(loss.detach()))
    return losses
