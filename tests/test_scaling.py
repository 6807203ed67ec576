"""The arithmetic of many GPUs against what real networks hold, and the balance of ranks against hand-made costs."""

from dataclasses import replace

import pytest
import torch

from ijepa_fast import cli
from ijepa_fast.bench.plan import lines
from ijepa_fast.config import from_dict, read_recipe
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.step.flops import TokenCounts, step_flops
from ijepa_fast.step.memory import state_bytes
from ijepa_fast.step.scaling import NETWORK, NVLINK, REACHED, Layout, Parameters, image_flops, imbalance
from tests.tiny import GRID, MASKS, MODEL

COUNT = Parameters(trained=1000, averaged=800, gathered=50)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_state_of_ddp_is_that_of_the_optimizer(dtype, size):
    model = replace(MODEL, embed_dim=128, predictor_embed_dim=64).build(Objective())
    expected = Layout(8, 1).state(
        Parameters.of(replace(MODEL, embed_dim=128, predictor_embed_dim=64), Objective()), size
    )
    cast_weights(model, dtype)
    assert sum(expected.values()) == pytest.approx(state_bytes(model), rel=0.02)  # norms and biases stay fp32


def test_shards_hold_a_share_and_what_is_gathered():
    state = Layout(8, 8).state(COUNT)
    assert state == {"weights": 500, "gradients": 500, "moments": 1000, "target": 400, "gathered": 50}


def test_bytes_on_the_wire():
    """Rings: of what n ranks gather or scatter, each sends (n - 1) / n; to sum is both."""
    assert Layout(4, 1).wire(COUNT) == {"gather": 0, "scatter": 0, "all_reduce": 2 * 2000 * 3 / 4}
    assert Layout(4, 4).wire(COUNT) == {"gather": 2800 * 2 * 3 / 4, "scatter": 4000 * 3 / 4, "all_reduce": 0}
    halves = Layout(4, 2).wire(COUNT, reduce_size=2)
    assert halves == {"gather": 2800 * 2 / 2, "scatter": 2000 / 2, "all_reduce": 2 * 1000 / 2}


def test_rings_leave_a_host_by_the_networks_of_all_its_ranks():
    def seconds(ranks, shards):
        return Layout(ranks, shards).wire_seconds(COUNT) * REACHED

    sent = Layout(64, 1).wire(COUNT)["all_reduce"]
    assert seconds(64, 1) == pytest.approx(sent / (8 * NETWORK)) and seconds(8, 1) < seconds(64, 1)
    sent = Layout(64, 8).wire(COUNT)
    inside, between = sent["gather"] + sent["scatter"], sent["all_reduce"]
    assert seconds(64, 8) == pytest.approx(inside / NVLINK + between / NETWORK)
    sent = Layout(4, 2).wire(COUNT)
    assert seconds(4, 2) == pytest.approx(sum(sent.values()) / NVLINK)


def test_operations_of_images_are_those_of_steps():
    masks = [MaskSampler(MASKS, GRID).sample(8, seed=0, step=step) for step in range(3)]
    expected = step_flops(MODEL, TokenCounts.of(*masks), all_targets=True).total
    assert float(image_flops(MODEL, MASKS, 8, 3).mean()) == pytest.approx(expected)


def test_equal_images_are_balanced_and_dealing_helps():
    assert imbalance(torch.ones(10), 4, 3, steps=2) == {"drawn": 0, "dealt": 0, "dealt in hosts": 0}
    found = imbalance(torch.rand(500, generator=torch.Generator().manual_seed(0)), 16, 8, steps=50)
    assert found["dealt"] < found["dealt in hosts"] < found["drawn"]


def test_dealing_is_back_and_forth():
    costs = torch.tensor([6.0, 5, 4, 3, 2, 1])
    from ijepa_fast.step.scaling import _dealt

    assert _dealt(costs.view(1, 2, 3)).tolist() == [[6 + 3 + 2, 5 + 4 + 1]]


def test_plan_of_a_recipe():
    config = from_dict(read_recipe("vith14_in1k_exact"))
    said = "\n".join(lines(config, 16))
    for words in ("128 a GPU in each of 1 micro-batches", "train.parallel ddp", "train.parallel hsdp, train.shards 8"):
        assert words in said
    assert "as masks are drawn" in said
    official = replace(config, masks=MaskConfig.official(16))
    assert "slowest GPU" not in "\n".join(lines(official, 2))
    with pytest.raises(ValueError, match="train.batch_size 2048 cannot be split into 3 GPUs x 1 micro-batches"):
        lines(config, 3)


def test_the_command(capsys):
    assert cli.main(["plan", "--config", "demo", "--gpus", "1"]) == 0
    assert "train.parallel ddp" in capsys.readouterr().out
    assert cli.main(["plan", "--config", "demo", "--gpus", "0"]) == 2
