"""The training step: EMA order, accumulation, precision, and what a bad loss does."""

import copy

import pytest
import torch

from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.step.train_step import TrainStep
from tests.tiny import GRID, MASKS, images, tiny_model, tiny_step


def parameters(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_ema_folds_in_the_updated_weights_at_the_scheduled_momentum():
    step = tiny_step()
    before = parameters(step.model)
    step(images(0), 0)
    after = parameters(step.model)
    momentum = step.schedules.momentum_at(0)
    moved = 0
    for name, value in after.items():
        if name.startswith("target_encoder.") and "pos_embed" not in name:
            source = after[name.replace("target_encoder", "context_encoder")]
            expected = momentum * before[name] + (1 - momentum) * source
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
            moved += not torch.equal(value, before[name])
    assert moved > 10


def test_schedules_reach_the_groups():
    step = tiny_step()
    step(images(0), 7)
    for group in step.optimizer.param_groups:
        assert group["lr"] == step.schedules.lr_at(7)
        assert group["weight_decay"] == (step.schedules.weight_decay_at(7) if group["decays"] else 0)
    assert step.optimizer.momentum == step.schedules.momentum_at(7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_the_large_batch(precision, accumulate):
    whole, parts = tiny_step(precision), tiny_step(precision, accumulate)
    for number in range(3):
        a, b = whole(images(number), number), parts(images(number), number)
        tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
        torch.testing.assert_close(a.losses.total, b.losses.total, rtol=tolerance, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=tolerance, atol=0)
        assert a.tokens == b.tokens
    if precision == "fp32":
        for name, value in parameters(whole.model).items():
            # Adam's first steps have the sign of the gradient: where it is all but zero, rounding decides.
            torch.testing.assert_close(parameters(parts.model)[name], value, rtol=1e-2, atol=2e-4, msg=name)


def test_low_precision_gradients_are_summed_in_fp32():
    step = tiny_step("bf16", accumulate=4)
    sums = []
    run = step.optimizer.step

    def spy(*args):
        sums.extend(p.main_grad.dtype for p in step.wide_sums)
        return run(*args)

    step.optimizer.step = spy
    step(images(0), 0)
    assert sums and set(sums) == {torch.float32}
    assert all(p.main_grad is None and p.grad is None for p in step.wide_sums)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_training_follows_fp32(precision):
    wide, low = tiny_step(), tiny_step(precision)
    for number in range(8):
        expected, got = wide(images(number), number), low(images(number), number)
        torch.testing.assert_close(got.losses.total, expected.losses.total, rtol=2e-2, atol=0)
    assert int(low.optimizer.skipped) == 0
    assert low.model.context_encoder.blocks[0].attn.qkv.weight.dtype != torch.float32
    assert low.model.context_encoder.blocks[0].attn.qkv.bias.dtype == torch.float32
    assert low.model.predictor.mask_token.dtype == torch.float32


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rounded_rows_change_nothing(accumulate):
    """Rows of no token, in context, targets and predictor, up to multiples of 128."""

    def make(round_rows):
        model = tiny_model().double()
        sampler, schedules = MaskSampler(MASKS, GRID), Schedules(total_steps=20, warmup_steps=2)
        optimizer = FusedAdamW(parameter_groups(model))
        return TrainStep(model, optimizer, sampler, schedules, seed=0, accumulate=accumulate, round_rows=round_rows)

    exact, rounded = make(None), make(128)
    rows = []
    rounded.model.predictor.predictor_embed.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for number in range(3):
        want, got = exact(images(number), number), rounded(images(number), number)
        assert got.tokens == want.tokens
        torch.testing.assert_close(got.losses.total, want.losses.total, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.pooled, want.pooled, rtol=1e-5, atol=1e-6)
    assert len(rows) == 3 * accumulate and all(count % 128 == 0 for count in rows)
    assert want.tokens[0] % 128 and want.tokens[1] % 128
    for name, value in parameters(rounded.model).items():
        torch.testing.assert_close(value, parameters(exact.model)[name], rtol=1e-8, atol=1e-10, msg=name)


def test_features_of_all_patches_cost_no_training():
    some, every = tiny_step(), tiny_step()
    for number in range(2):
        a, b = some(images(number), number), every(images(number), number, all_targets=True)
        torch.testing.assert_close(a.losses.total, b.losses.total, rtol=1e-6, atol=0)
        assert not torch.allclose(a.pooled, b.pooled)


def test_first_bad_step_is_kept_and_stops_all_updates():
    step = tiny_step()
    step(images(0), 0)
    good = parameters(step.model)
    proj = step.model.predictor.predictor_proj
    hook = proj.register_forward_hook(lambda _m, _i, out: out * float("nan"))
    step(images(1), 1)
    step(images(2), 2)
    hook.remove()
    step(images(3), 3)
    assert int(step.first_bad_step) == 1
    for name, value in parameters(step.model).items():
        torch.testing.assert_close(value, good[name], rtol=0, atol=0)


def test_prediction_weight_zero_trains_by_the_regulariser_alone():
    step = tiny_step(objective=Objective(prediction_weight=0.0, variance_weight=1.0))
    predictor = copy.deepcopy(step.model.predictor)
    for group in step.optimizer.param_groups:
        group["decays"] = False
    result = step(images(0), 0)
    assert float(result.losses.prediction) > 0
    torch.testing.assert_close(result.losses.total, result.losses.variance)
    for a, b in zip(step.model.predictor.parameters(), predictor.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_step_depends_on_seed_step_and_images_alone():
    first, second = tiny_step(), tiny_step()
    first.sampler.sample(8, seed=5, step=3)
    torch.rand(7)
    for number in (0, 1):
        a, b = first(images(number), number), second(images(number), number)
        assert torch.equal(a.losses.total, b.losses.total)


def test_images_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="8 images cannot be split into 3 equal micro-batches"):
        tiny_step(accumulate=3)(images(0), 0)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        tiny_step(accumulate=0)
