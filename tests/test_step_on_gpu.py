"""A whole training step on a GPU: the host never waits for the device, and the weights are those of the CPU.

The same step runs on the CPU too, so that this file is known to work before a GPU sees it.
"""

import pytest
import torch

from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.step.train_step import TrainStep

# Head dims 64 and 32, which the attention kernels know; blocks as in ViT-B/16, only fewer.
MODEL = ModelConfig(
    img_size=96, patch_size=8, embed_dim=128, depth=2, num_heads=2, predictor_embed_dim=64, predictor_depth=2
)
IMAGES, STEPS = 8, 3


def make_step(device, objective=None, kind=TrainStep, flat=False, model=MODEL, masks=None, **settings):
    torch.manual_seed(0)
    model = model.build(objective or Objective()).to(device)
    cast_weights(model, torch.bfloat16)
    optimizer = FusedAdamW(parameter_groups(model), max_grad_norm=1.0, flat_gradients=flat)
    sampler = MaskSampler(masks or MaskConfig(), model.context_encoder.grid)
    return kind(model, optimizer, sampler, Schedules(total_steps=20, warmup_steps=2), seed=0, **settings)


def images(number, device):
    generator = torch.Generator().manual_seed(number)
    shape = (IMAGES, 3, MODEL.img_size, MODEL.img_size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)


def train(step, device):
    """Losses of STEPS steps and the parameters after them, on the host."""
    losses = [step(images(number, device), number).losses.total for number in range(STEPS)]
    return torch.stack(losses).cpu(), {name: p.detach().float().cpu() for name, p in step.model.named_parameters()}


def test_the_step_of_this_file_trains_on_the_cpu():
    step = make_step("cpu")
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    losses, after = train(step, "cpu")
    assert losses.isfinite().all() and int(step.first_bad_step) == -1
    assert sum(not torch.equal(after[name], value.float()) for name, value in before.items()) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("objective", [Objective(), Objective(variance_weight=0.1, covariance_weight=0.01)])
def test_the_host_never_waits_for_the_device(objective, all_targets):
    step = make_step("cuda", objective)
    batches = [images(number, "cuda") for number in range(STEPS + 2)]
    for number in range(2):  # kernels are compiled, tables and workspaces made
        step(batches[number], number, all_targets=all_targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, STEPS + 2):
            result = step(batches[number], number, all_targets=all_targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.losses.total.isfinite()) and int(step.first_bad_step) == -1


@pytest.mark.gpu
def test_training_on_the_gpu_follows_the_cpu():
    """Three bf16 steps from the same weights, on the same images and masks.

    The bound on a loss is two units in the last place of bf16. Adam moves a weight by at most about the learning rate a
    step, whatever the gradient; where that is all but zero (biases of keys), rounding decides on the direction.
    """
    on_cpu, on_gpu = make_step("cpu"), make_step("cuda")
    lr = sum(on_cpu.schedules.lr_at(number) for number in range(STEPS))
    expected_losses, expected = train(on_cpu, "cpu")
    losses, parameters = train(on_gpu, "cuda")
    torch.testing.assert_close(losses, expected_losses, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    for name, value in expected.items():
        difference = (parameters[name] - value).abs()
        assert float(difference.max()) <= 2.5 * lr + 2**-8 * float(value.abs().max()), name
        assert float(difference.mean()) <= lr, name


@pytest.mark.gpu
def test_equal_runs_give_equal_bits():
    """Nothing in a step depends on the order in which a GPU's threads happen to run."""
    first, second = (train(make_step("cuda"), "cuda") for _ in range(2))
    assert torch.equal(first[0], second[0])
    for name, value in first[1].items():
        assert torch.equal(second[1][name], value), name
