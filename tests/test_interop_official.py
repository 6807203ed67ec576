"""Against the official code: the numbers it gave for the run of official_case.py, of the same weights and images."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ijepa_fast.interop import official
from ijepa_fast.masks.sampler import Masks
from ijepa_fast.model.jepa import IJEPA, Objective
from ijepa_fast.model.vit import Predictor, VisionTransformer
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.ragged import Ragged
from tests import official_case as case

GOLDEN = json.loads((Path(__file__).parent / "golden" / "official.json").read_text())
API = SimpleNamespace(**{name: getattr(official, name) for name in official.__all__}, norm={})


def numbers(tree, path="") -> dict[str, list[float]]:
    """Every list of floating-point numbers in a nested result, by its dotted name."""
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in numbers(sub, f"{path}.{name}").items()}
    return {path: tree} if all(isinstance(value, float) for value in tree) else {}


@pytest.fixture(scope="module")
def fp64():
    return case.run(API, torch.float64)


def test_names_shapes_and_order_are_the_official_ones(fp64):
    assert fp64["names"] == GOLDEN["fp64"]["names"]


def test_optimizer_groups_and_states_are_numbered_as_the_official_ones(fp64):
    ours, theirs = fp64["optimizer"], GOLDEN["fp64"]["optimizer"]
    for key in ("groups", "excluded", "with_state", "step"):
        assert ours[key] == theirs[key]
    assert theirs["excluded"] == [False, False, True, True] and theirs["step"] == [10.0]
    assert len(theirs["with_state"]) == sum(map(len, theirs["groups"])) - 2  # two frozen tables


def test_features_loss_gradients_and_ten_steps_are_the_official_ones_in_fp64(fp64):
    ours, theirs = numbers(fp64), numbers(GOLDEN["fp64"])
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        # 1e-12: ten steps of Adam, sums of some 1,000 products of fp64.
        assert ours[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def test_in_fp32_the_difference_is_that_of_rounding():
    ours, theirs, exact = numbers(case.run(API, torch.float32)), numbers(GOLDEN["fp32"]), numbers(GOLDEN["fp64"])
    for section in ("features", "predicted", "gradients", "loss", "weights", "optimizer"):
        names = [name for name in exact if name.startswith(f".{section}")]
        assert names
        size = max(abs(value) for name in names for value in exact[name])
        error = {
            who: max(abs(a - b) for name in names for a, b in zip(found[name], exact[name], strict=True))
            for who, found in (("ours", ours), ("theirs", theirs))
        }
        assert error["ours"] <= 2 * error["theirs"] + 2**-24 * size, section


def packed(masks: list[torch.Tensor]) -> Ragged:
    """Masks [B, K], one per block, as image-major token sets."""
    return Ragged.from_lists([[b * case.N + int(i) for i in mask[b]] for b in range(case.B) for mask in masks])


def packed_model() -> IJEPA:
    """The weights of the case in the classes that training uses, whose position tables are buffers."""
    encoder = VisionTransformer(case.SIDE, case.PATCH, embed_dim=case.WIDTH, depth=case.DEPTH, num_heads=case.HEADS)
    predictor = Predictor(encoder.grid, case.WIDTH, case.PREDICTOR_WIDTH, case.PREDICTOR_DEPTH, case.HEADS)
    model = IJEPA(encoder, predictor, Objective()).double()
    parts = (model.context_encoder, model.predictor, model.target_encoder)
    for module, weights in zip(parts, case.models(API, torch.float64), strict=True):
        module.load_state_dict(weights.state_dict())
    return model


def test_the_packed_training_step_with_ema_in_the_optimizer_makes_the_same_ten_steps():
    model = packed_model()
    schedules = Schedules(
        total_steps=case.SCHEDULE_STEPS,
        warmup_steps=case.SCHEDULE["iterations_per_epoch"],
        lr=case.SCHEDULE["ref_lr"],
        lr_ends=(case.SCHEDULE["start_lr"], case.SCHEDULE["final_lr"]),
        weight_decay=(case.SCHEDULE["wd"], case.SCHEDULE["final_wd"]),
    )
    optimizer = FusedAdamW(parameter_groups(model))
    losses = []
    for step in range(case.STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedules.lr_at(step)
            group["weight_decay"] = schedules.weight_decay_at(step) if group["decays"] else 0.0
        optimizer.momentum = GOLDEN["fp64"]["momentum"][step]
        context, targets = packed(case.context_masks(step)), packed(case.target_masks(step))
        loss, _ = model(case.images(step), Masks(context, targets, num_contexts=2))
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    golden = GOLDEN["fp64"]
    assert losses == pytest.approx(golden["loss"], rel=1e-9)
    for step, (lr, weight_decay) in enumerate(zip(*golden["schedules"].values(), strict=True)):
        assert schedules.lr_at(step) == pytest.approx(lr, rel=1e-12)
        assert schedules.weight_decay_at(step) == pytest.approx(weight_decay, rel=1e-12)
    parts = {"encoder": model.context_encoder, "predictor": model.predictor, "target_encoder": model.target_encoder}
    for name, values in golden["weights"].items():
        part, _, inner = name.partition(".")
        assert case.digest(parts[part].state_dict()[inner]) == pytest.approx(values, rel=1e-9, abs=1e-12), name
