"""``ijepa-fast fastest``: what is tried, what is believed, and what is chosen."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml

from ijepa_fast import cli
from ijepa_fast.bench import fastest as module
from ijepa_fast.bench.child_process import Failed
from ijepa_fast.bench.fastest import check, choices_on, default_images, differing, fastest, first_gradients, try_way
from ijepa_fast.bench.steps import gradient_difference, random_step
from ijepa_fast.config import RunConfig, TrainConfig, flags, flatten, from_dict, nested, with_settings
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.optim.step_tensors import Plan
from ijepa_fast.step import options
from ijepa_fast.step.options import Machine, StepOptions
from tests.tiny import tiny_run

CPU = torch.device("cpu")
CHOICES = {"gpu": True, "gpus": 1, "attention": ["triton", "torch_varlen"], "auto": "torch_varlen"}
NAMES = ("step.blocks", "step.attention", "step.capture", "step.overlap_target")
TINY = tiny_run("none", "none")


def named(settings) -> str:
    return flags(settings).replace("--", "")


def table(rates, choices=CHOICES):
    """A machine on which ways have these rates by what is on, and 100 images/s if they are not in the table. A value
    may be a message (the way fails), or several rates (one after another)."""
    rates = {name: list(rate) if isinstance(rate, tuple) else [rate] for name, rate in rates.items()}

    def attempt(config, device, images, seconds, gradients_file, base):
        settings = differing(RunConfig(), {name: flatten(config)[name] for name in NAMES})
        known = rates.get(named(settings), [100.0])
        rate = known.pop(0) if len(known) > 1 else known[0]
        if isinstance(rate, str):
            raise Failed(rate)
        found = {"images_per_second": rate, "times": {"p50": images / rate * 1e6}, "activation_checkpointing": False}
        about = {"cpu": "a CPU", "gpu": "a GPU", "torch": "2", "triton": "3"}
        return found if base else found | {"machine": about, "choices": choices}

    return attempt


def choose(rates, config=None, choices=CHOICES, **more):
    said = []
    attempt = table(rates, choices)
    found = fastest(config or RunConfig(), "some", CPU, images=8, seconds=1, say=said.append, attempt=attempt, **more)
    return found, "\n".join(said)


def test_every_option_is_tried_on_top_of_the_fastest_so_far():
    found, said = choose(
        {
            "step.blocks fused": 150.0,
            "step.blocks fused+compile": 120.0,
            "step.blocks fused step.attention triton": 200.0,
            "step.blocks fused step.attention triton step.capture true": 220.0,
            "step.blocks fused step.attention triton step.capture true step.overlap_target true": "no stream",
        }
    )
    assert [named(way["settings"]) for way in found["ways"]] == [
        "",
        "step.blocks compile",
        "step.blocks fused",
        "step.blocks fused+compile",
        "step.blocks fused step.attention triton",
        "step.blocks fused step.attention triton step.capture true",
        "step.blocks fused step.attention triton step.capture true step.overlap_target true",
        "",
        "step.blocks fused step.attention triton step.capture true",
    ]
    assert found["settings"] == {"step.blocks": "fused", "step.attention": "triton", "step.capture": True}
    assert found["gain"] == 2.2 and found["ways"][6]["failed"] == "no stream"
    assert "no stream" in said and "2.20x" in said and "a GPU" in said


def test_options_that_are_on_are_tried_off():
    on = replace(RunConfig(), step=StepOptions(blocks="fused+compile", overlap_target=True))
    found, _ = choose({"step.blocks compile step.overlap_target true": 130.0, "step.blocks compile": 140.0}, on)
    assert found["settings"] == {"step.blocks": "compile", "step.overlap_target": False} and found["gain"] == 1.4
    assert flags(found["settings"]) == "--step.blocks compile --step.overlap_target false"


def test_nothing_faster_changes_nothing():
    found, said = choose({"step.blocks fused": 101.0, "step.blocks compile": "no compiler"})
    assert found["settings"] == {} and found["gain"] == 1.0 and "once more" not in said


def test_what_was_faster_only_once_is_not_believed():
    found, said = choose({"step.blocks fused": (150.0, 100.0)})
    assert found["settings"] == {} and found["gain"] == 1.0
    assert "the second time it was 1.00x as fast: nothing is to be changed" in said


def test_a_winner_that_fails_the_second_time_is_not_chosen():
    found, said = choose({"step.blocks fused": (150.0, "out of memory")})
    assert found["settings"] == {} and found["ways"][-1]["failed"] == "out of memory"
    assert "the second time one of them failed" in said


def test_options_that_the_settings_exclude_are_named_with_the_reason():
    summing = replace(RunConfig(), train=TrainConfig(accumulate=2))
    found, said = choose({}, summing)
    excluded = [way for way in found["ways"] if way["settings"] == {"step.capture": True}]
    assert "step.capture needs one GPU, train.accumulate 1" in excluded[0]["failed"] and excluded[0]["failed"] in said


@pytest.mark.parametrize(
    ("choices", "gpus", "tried"),
    [
        (CHOICES, 1, set(NAMES)),
        (CHOICES, 8, set(NAMES) - {"step.capture"}),  # a graph is of one GPU
        (CHOICES | {"gpu": False}, 1, set(NAMES) - {"step.capture", "step.overlap_target"}),
    ],
)
def test_what_is_tried_depends_on_the_devices(choices, gpus, tried):
    found, _ = choose({}, choices=choices, gpus=gpus)
    assert {name for way in found["ways"] for name in way["settings"]} == tried


def test_the_step_as_configured_must_run():
    with pytest.raises(Failed, match="as configured does not run: CUDA out of memory; give fewer than 8 images"):
        choose({"": "CUDA out of memory"})


def test_results_are_kept_after_every_way(tmp_path):
    path, seen = tmp_path / "new" / "report.json", []
    found, _ = choose({"step.blocks fused": 150.0}, path=path)
    assert json.loads(path.read_text()) == found
    attempt = table({})

    def until_the_third(*arguments):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(arguments)
        return attempt(*arguments)

    with pytest.raises(KeyboardInterrupt):
        fastest(TINY, "some", CPU, images=2, path=path, attempt=until_the_third, say=str)
    assert [way["settings"] for way in json.loads(path.read_text())["ways"]] == [{}, {"step.blocks": "compile"}]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1), "images must be positive, got 0"),
        ((2, 0, 1), "seconds must be positive, got 0"),
        ((2, 1, 0), "gpus must be positive, got 0"),
        ((3, 1, 1), "images 3 cannot be split into train.accumulate 2 parts"),
        ((8, 1, 1), "whole groups of masks.group_size 3, got 4"),
    ],
)
def test_numbers_that_cannot_be(numbers, message):
    masks = MaskConfig(min_keep=1, context="batch_min", group_size=3)
    with pytest.raises(ValueError, match=message):
        check(replace(with_settings(TINY, {"train.accumulate": 2}), masks=masks), *numbers)


@pytest.mark.parametrize(
    ("batch", "accumulate", "group", "gpus", "images"),
    [
        (2048, 1, None, 1, 128),
        (64, 1, None, 1, 64),
        (2048, 4, None, 1, 512),
        (256, 1, None, 8, 32),
        (64, 2, 128, 1, 256),
    ],
)
def test_images_by_default(batch, accumulate, group, gpus, images):
    """In micro-batches of 128 at most, as many as training has, but whole groups of masks."""
    context = "exact" if group is None else "batch_min"
    config = RunConfig(
        masks=MaskConfig(context=context, group_size=group),
        train=TrainConfig(batch_size=batch, accumulate=accumulate),
    )
    assert default_images(config, torch.device("cuda"), gpus) == images
    check(config, images, 1, gpus)


@pytest.fixture
def configured(tmp_path):
    """Arguments of ``try_way`` of ways to be compared with the step as configured, and what was returned of that."""
    common = CPU, 4, 0.01, tmp_path / "gradients.pt"
    return common, try_way(TINY, *common, None)


def test_other_ways_are_compared_with_the_step_as_configured(configured):
    common, base = configured
    assert base["machine"]["cpu"] and base["choices"]["auto"] == "cpu" and "differences" not in base
    assert base["times"]["runs"] >= module.LEAST and len(base["losses"]) == module.WARM_UP * module.CYCLE
    other = try_way(with_settings(TINY, {"step.attention": "sdpa", "step.blocks": "fused"}), *common, base)
    differences = other["differences"]
    assert 0 < differences["gradient"] < 1e-4 and differences["losses"] < 1e-5 and differences["skipped"] == 0
    assert other["images_per_second"] > 0 and "machine" not in other


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first_loss": 3.0}, r"does not train the same: loss .* apart \(at most 1e-05\)"),
        ({"losses": [3.0] * 12}, "does not train the same: losses"),
        ({"losses": [math.nan] * 12}, "does not train the same: losses nan"),
        ({"moved": [0.0, 0.0]}, "does not train the same: moved inf apart"),
        ({"skipped": -1}, "does not train the same: skipped 1 apart"),
    ],
)
def test_a_way_that_trains_otherwise_is_no_way(configured, changed, message):
    common, base = configured
    with pytest.raises(ValueError, match=message):
        try_way(TINY, *common, base | changed)


@pytest.mark.parametrize("factor", [2.0, math.nan])
@pytest.mark.parametrize("which", [0, 5, -1])
def test_every_gradient_counts(configured, which, factor):
    common, base = configured
    gradients = torch.load(common[-1], weights_only=True)
    gradients[list(gradients)[which]] *= factor
    torch.save(gradients, common[-1])
    with pytest.raises(ValueError, match="does not train the same: gradient"):
        try_way(TINY, *common, base)


@pytest.mark.parametrize("broken", ["context", "average"])
def test_updates_that_do_not_reach_weights_or_averages_are_seen(configured, monkeypatch, broken):
    """Their losses hardly tell."""
    common, base = configured
    update = Plan.update

    def partly(self, *arguments):
        kept = self._tensors[0 if broken == "context" else 4]
        before = [value.clone() for value in kept]
        update(self, *arguments)
        for value, old in zip(kept, before, strict=True):
            value.copy_(old)

    monkeypatch.setattr(Plan, "update", partly)
    with pytest.raises(ValueError, match="does not train the same: .*moved"):
        try_way(TINY, *common, base)


def test_a_step_as_configured_that_is_not_finite_is_told(tmp_path):
    wild = replace(TINY, optim=replace(TINY.optim, start_lr=1e30, lr=1e30))
    with pytest.raises(ValueError, match="as configured, losses after updates is not finite: lower optim.lr"):
        try_way(wild, CPU, 4, 0.01, tmp_path / "gradients.pt", None)


def test_gradients_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="different parameters are trained: b, c"):
        gradient_difference({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "c": torch.ones(1)}, 0.1)


def test_gradients_in_fp16_are_not_lost():
    """Without scaling most would be zero."""
    wide = replace(TINY, model=replace(TINY.model, embed_dim=384, predictor_embed_dim=192))
    half, full = (
        first_gradients(*random_step(with_settings(wide, {"train.precision": precision}), CPU, 16))[1]
        for precision in ("fp16", "fp32")
    )
    assert gradient_difference(half, full, 1e-2) < 0.1


def test_a_micro_batch_stands_for_all(tmp_path):
    """The gradient of the whole batch at once would need the memory that accumulation saves."""
    summing = with_settings(TINY, {"train.accumulate": 2})
    try_way(summing, CPU, 4, 0.01, tmp_path / "gradients.pt", None)
    step, pixels = random_step(summing, CPU, 4)
    _, want = first_gradients(step, pixels[:2])
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert gradient_difference(found, want, 0.0) == 0


def test_a_deterministic_run_is_tried_as_one(tmp_path):
    try:
        try_way(with_settings(TINY, {"train.deterministic": True}), CPU, 2, 0.01, tmp_path / "gradients.pt", None)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_room_for_gradients_is_said(tmp_path):
    with pytest.raises(OSError, match=r"do not go into .* \(TMPDIR names another folder\)"):
        try_way(TINY, CPU, 2, 0.01, tmp_path / "missing" / "gradients.pt", None)


def test_choices_on_a_cpu():
    assert choices_on(TINY, CPU) == Machine(False, 1, ("cpu", "sdpa"), "cpu")


def test_settings_go_through_yaml_and_flags(tmp_path):
    settings = {"step.blocks": "fused", "step.attention": "sdpa", "step.activation_checkpointing": False}
    recipe, added = tmp_path / "recipe.yaml", tmp_path / "fastest.yaml"
    values = {"train": {"device": "cpu", "batch_size": 8}, "step": {"attention": "cpu"}}
    recipe.write_text(yaml.safe_dump(values))
    added.write_text(yaml.safe_dump(nested(settings)))
    parser = cli._run_parser("pretrain", "")
    by_file, _ = cli._run_config(parser, ["--config", str(recipe), "--config", str(added)])
    by_flags, _ = cli._run_config(parser, ["--config", str(recipe), *flags(settings).split()])
    plain = from_dict(values)
    assert by_file == by_flags == with_settings(plain, settings) != plain


def test_the_command(tmp_path, capsys, monkeypatch):
    """In processes of their own, as a user has it; without torch.compile, which takes a minute."""
    monkeypatch.setattr(module, "alternatives", lambda machine: options.alternatives(machine)[1:2])
    small = tmp_path / "small.yaml"
    values = {"model": vars(TINY.model), "masks": {"min_keep": 1}, "train": {"device": "cpu", "precision": "fp32"}}
    values["model"] = {name: value for name, value in values["model"].items() if not isinstance(value, tuple)}
    small.write_text(yaml.safe_dump(values))
    report, out = tmp_path / "a" / "report.json", tmp_path / "b" / "fastest.yaml"
    arguments = ["--config", str(small), "--images", "4", "--seconds", "0.2", "--json", str(report), "--out", str(out)]
    assert cli.main(["fastest", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "4 of the 2048 images of a step" in printed and "small, 4 images a step, fp32" in printed
    found = json.loads(report.read_text())
    assert not [way for way in found["ways"] if "failed" in way]
    assert yaml.safe_load(out.read_text()) == nested(found["settings"])
    assert {"step.attention": "sdpa"} in [way["settings"] for way in found["ways"]]
    chosen = flags(found["settings"])
    assert (f"ijepa-fast pretrain ... {chosen}" if chosen else "nothing here is faster than small") in printed


def test_a_folder_in_place_of_a_file_is_refused_at_once(tmp_path, capsys):
    assert cli.main(["fastest", "--config", "demo", "--out", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--images", "--gpus", "--seconds"])
def test_wrong_usage_of_the_command(flag, capsys):
    assert cli.main(["fastest", "--config", "demo", flag, "0"]) == 2
    assert f"{flag.strip('-')} must be positive, got 0" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_way_of_the_package_runs_and_trains_the_same_on_a_gpu(monkeypatch):
    """In this process, and without torch.compile, which takes a minute."""
    tried_here = lambda machine: [("blocks", ("fused",)), *options.alternatives(machine)[1:]]  # noqa: E731
    monkeypatch.setattr(module, "alternatives", tried_here)
    config = RunConfig(model=replace(RunConfig().model, embed_dim=192, depth=2, num_heads=3, predictor_depth=2))
    config = with_settings(config, {"model.predictor_embed_dim": 96, "train.device": "cuda"})

    def attempt(*arguments):
        try:
            return try_way(*arguments)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    found = fastest(config, "small", torch.device("cuda"), images=16, seconds=0.2, attempt=attempt)
    tried = {name for way in found["ways"] for name in way["settings"]}
    assert {"step.blocks", "step.attention", "step.overlap_target", "step.capture"} <= tried
    # Backends of other libraries have tests of their own.
    failed = {named(way["settings"]): way["failed"] for way in found["ways"] if "failed" in way}
    assert not [why for names, why in failed.items() if "attention" not in names or "attention triton" in names], failed
