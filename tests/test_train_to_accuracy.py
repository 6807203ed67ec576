"""The contest of implementations at equal time and at equal epochs, on a few tiny steps of the embedded images."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from benchmarks import train_to_accuracy
from benchmarks.train_to_accuracy import plan, prepare
from ijepa_fast.config import from_dict, read_recipe
from ijepa_fast.model.jepa import Objective

CPU = torch.device("cpu")
SMALL = {
    "base": "demo",
    "model": {"depth": 1, "embed_dim": 32, "predictor_depth": 1, "predictor_embed_dim": 16},
    "evaluation": {"images": [160, 160]},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def small_config(recipe, regularised):
    config = from_dict(read_recipe(recipe))
    return prepare(replace(config, train=replace(config.train, batch_size=16)), regularised)


def run(recipe, path, *arguments):
    options = ["--recipe", recipe, "--data", "rendered", "--batch", "16", "--device", "cpu", "--json", str(path)]
    train_to_accuracy.main([*options, *arguments])
    return json.loads(path.read_text())


@pytest.mark.parametrize("regularised", [False, True])
def test_the_same_masks_lead_to_the_same_losses(recipe, regularised):
    """Ours and the published algorithm, which share nothing but masks, images, first weights and the regulariser."""
    config = small_config(recipe, regularised)
    ours, eager = (train_to_accuracy.build(name, config, 10, 250, CPU) for name in ("batch_min", "eager"))
    for number in range(5):
        images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
        losses = ours.train(images, number).losses
        assert eager.train(images, number) == pytest.approx(float(losses.total), rel=1e-4)
    assert (float(losses.total) > 1.05 * float(losses.prediction)) == regularised
    one, other = (contender.collect().state_dict() for contender in (ours, eager))
    start = train_to_accuracy.build("batch_min", config, 10, 250, CPU).networks.state_dict()
    for name in ("context_encoder.blocks.0.mlp.fc1.weight", "target_encoder.blocks.0.mlp.fc1.weight"):
        moved = (one[name] - start[name]).norm()
        assert moved > 0 and (other[name] - one[name]).norm() < 0.02 * moved


@pytest.mark.parametrize("name", ["batch_min", "eager"])
def test_all_are_judged_by_the_weights_in_fp32_that_the_optimizer_has(recipe, name):
    config = small_config(recipe, False)
    config = replace(config, train=replace(config.train, precision="bf16"))
    contender = train_to_accuracy.build(name, config, 10, 250, CPU)
    for number in range(2):
        contender.train(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), number)
    trained, judged = contender.networks, contender.collect()
    assert {value.dtype for value in judged.state_dict().values()} == {torch.float32}
    for part, kept in (("context_encoder", "master"), ("target_encoder", "ema")):
        weight = getattr(trained, part).blocks[0].mlp.fc1.weight
        found = getattr(judged, part).blocks[0].mlp.fc1.weight
        state = contender.optimizer.state[trained.context_encoder.blocks[0].mlp.fc1.weight]
        assert torch.equal(found, state.get(kept, weight)) and torch.equal(found.to(weight.dtype), weight)
        assert not torch.equal(found, found.bfloat16().float())


def test_the_regulariser_of_the_published_algorithm_is_computed_in_fp32(recipe):
    """As ours is: the networks' products alone are in bf16."""
    config = small_config(recipe, True)
    covariance = replace(config.objective, variance_weight=0.0)  # the term that has a product
    config = replace(config, objective=covariance, train=replace(config.train, precision="bf16"))
    eager = train_to_accuracy.build("eager", config, 10, 250, CPU).networks
    term, seen = eager.context_loss, []

    def recorded(context):
        seen.extend((context.detach(), term(context)))
        return seen[-1]

    eager.context_loss = recorded
    images, masks = torch.randn(4, 3, 32, 32), torch.arange(8).expand(4, -1)
    eager.loss(images, [masks], [masks]).backward()
    context, value = seen
    torch.testing.assert_close(value.detach(), term(context), rtol=1e-6, atol=0)


def test_the_control_learns_from_the_regulariser_alone(recipe):
    config = small_config(recipe, True)
    control = train_to_accuracy.build("no_prediction", config, 10, 250, CPU)
    losses = control.train(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), 0).losses
    term = config.objective.variance_weight * losses.variance + config.objective.covariance_weight * losses.covariance
    assert float(losses.total) == pytest.approx(float(term)) and float(losses.prediction) > 0.1


def test_equal_time_and_equal_epochs_in_one_command_which_goes_on_where_it_stopped(
    recipe, tmp_path, monkeypatch, capsys
):
    names = ["exact", "batch_min", "eager", "no_prediction"]
    seconds = dict(zip(names, (3.0, 2.0, 6.0, 3.0), strict=True))
    monkeypatch.setattr(train_to_accuracy, "step_seconds", lambda *_: seconds)
    path = tmp_path / "report.json"
    arguments = ["--minutes", "0.1", "--impl", ",".join(names), "--regularised"]
    report = run(recipe, path, *arguments)
    assert report["steps"] == {
        "time": {"exact": 2, "batch_min": 3, "eager": 1, "no_prediction": 2},
        "epochs": {"exact": 2, "batch_min": 2, "eager": 2, "no_prediction": 2},
    }
    trained = [f"{entry['contender']} {entry['steps']}" for entry in report["runs"]]
    assert trained == ["exact 2", "batch_min 3", "batch_min 2", "eager 1", "eager 2", "no_prediction 2"]
    for entry in report["runs"]:
        assert entry["seconds"] > 0 and entry["cpu_seconds"] > 0 and 0 <= entry["probe"] <= 1
    # Cut off, then started again: what is there stays.
    monkeypatch.setattr(train_to_accuracy, "step_seconds", None)
    path.write_text(json.dumps(report | {"runs": report["runs"][:5]}))
    capsys.readouterr()
    again = run(recipe, path, *arguments, "--seeds", "2")
    assert again["runs"][:5] == report["runs"][:5] and again["runs"][5]["probe"] == report["runs"][5]["probe"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 7
    assert [entry["seed"] for entry in again["untrained"]] == [0, 1] and len(again["runs"]) == 12
    assert again["runs"][6]["rank"] != again["runs"][0]["rank"]


def test_plans():
    seconds = {"exact": 1.0, "batch_min": 0.7}
    assert plan(100, seconds, ["epochs", "time"]) == {
        "time": {"exact": 100, "batch_min": 143},
        "epochs": {"exact": 100, "batch_min": 100},
    }
    assert plan(1, {"exact": 1.0, "eager": 9.0}, ["time"]) == {"time": {"exact": 1, "eager": 1}}


def test_what_everyone_minimises():
    config = from_dict(read_recipe("cifar10"))
    assert prepare(config, False).objective == Objective()
    assert prepare(config, True).objective == Objective(variance_weight=1.0, covariance_weight=0.04)
    config = from_dict(read_recipe("benchmarks/accuracy_cpu.yaml"))
    assert config.objective.regularised and config.masks.min_keep == 4 and config.model.embed_dim == 96


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1", "--impl", "sloth"], "sloth"),
        (["--steps", "1", "--impl", "no_prediction"], "nothing to minimise without --regularised"),
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--steps", "1", "--recipe", "vitb16_in1k", "--regularised"], "no variance-covariance term"),
        (["--steps", "1", "--minutes", "1"], "not allowed with"),
    ],
)
def test_what_it_cannot_do_is_said(arguments, words, capsys):
    with pytest.raises(SystemExit):
        train_to_accuracy.main(["--data", "rendered", *arguments])
    assert words in capsys.readouterr().err
