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
from ijepa_fast.command_line import run_config, run_parser
from ijepa_fast.config import RunConfig, TrainConfig, flags, flatten, from_dict, nested, with_settings
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.optim.step_tensors import StepTensors
from ijepa_fast.step import options
from ijepa_fast.step.options import Machine, StepOptions
from tests.tiny import tiny_run

CPU = torch.device("cpu")
CHOICES = {"gpu": True, "gpus": 1, "attention": ["triton", "torch_varlen"], "auto": "torch_varlen"}
NAMES = ("step.blocks", "step.attention", "step.capture", "step.overlap_target")
TINY = tiny_run("none", "none")


def named(settings) -> str:
    return flags(settings).replace("--", "")


def choose(rates, config=None, choices=CHOICES, **more):
    """What is chosen on a machine on which ways have these rates by what is on, and 100 images/s if they are not in the
    table, and what is said. A value may be a message (the way fails), or several rates (one after another)."""
    rates = {name: list(rate) if isinstance(rate, tuple) else [rate] for name, rate in rates.items()}
    said = []

    def attempt(config, device, images, seconds, gradients_file, base):
        plain = with_settings(RunConfig(), {"step.blocks": "plain"})
        settings = differing(plain, {name: flatten(config)[name] for name in NAMES})
        known = rates.get(named(settings), [100.0])
        rate = known.pop(0) if len(known) > 1 else known[0]
        if isinstance(rate, str | BaseException):
            raise Failed(rate) if isinstance(rate, str) else rate
        found = {"images_per_second": rate, "times": {"p50": images / rate * 1e6}, "activation_checkpointing": False}
        about = {"cpu": "a CPU", "gpu": "a GPU", "torch": "2", "triton": "3"}
        return found if base else found | {"machine": about, "choices": choices}

    config = config or RunConfig()
    found = fastest(config, "some", CPU, images=8, seconds=1, say=said.append, attempt=attempt, **more)
    return found, "\n".join(said)


def test_every_option_is_tried_on_top_of_the_fastest_so_far_and_kept_after_every_way(tmp_path):
    path, best = tmp_path / "new" / "report.json", "step.blocks fused step.attention triton step.capture true"
    found, said = choose(
        {
            "step.blocks fused": 150.0,
            "step.blocks fused+compile": 120.0,
            "step.blocks fused step.attention triton": 200.0,
            best: 220.0,
            f"{best} step.overlap_target true": "no stream",
        },
        path=path,
    )
    assert [named(way["settings"]) for way in found["ways"]] == [
        "",
        *(f"step.blocks {kind}" for kind in ("compile", "fused", "fused+compile")),
        "step.blocks fused step.attention triton",
        best,
        f"{best} step.overlap_target true",
        "",
        best,
    ]
    assert found["settings"] == {"step.blocks": "fused", "step.attention": "triton", "step.capture": True}
    assert found["gain"] == 2.2 and found["ways"][6]["failed"] == "no stream"
    assert "no stream" in said and "2.20x" in said and "a GPU" in said
    assert json.loads(path.read_text()) == found
    with pytest.raises(KeyboardInterrupt):
        choose({"step.blocks fused": KeyboardInterrupt()}, path=path)
    assert [named(way["settings"]) for way in json.loads(path.read_text())["ways"]] == ["", "step.blocks compile"]


def test_options_that_are_on_are_tried_off():
    on = replace(RunConfig(), step=StepOptions(blocks="fused+compile", overlap_target=True))
    found, _ = choose({"step.blocks compile step.overlap_target true": 130.0, "step.blocks compile": 140.0}, on)
    assert found["settings"] == {"step.blocks": "compile", "step.overlap_target": False} and found["gain"] == 1.4
    assert flags(found["settings"]) == "--step.blocks compile --step.overlap_target false"


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"step.blocks fused": 101.0, "step.blocks compile": "no compiler"}, "no compiler"),
        ({"step.blocks fused": (150.0, 100.0)}, "the second time it was 1.00x as fast: nothing is to be changed"),
        ({"step.blocks fused": (150.0, "out of memory")}, "the second time one of them failed"),
    ],
)
def test_nothing_is_changed_without_a_gain_that_is_seen_twice(rates, words):
    found, said = choose(rates)
    assert found["settings"] == {} and found["gain"] == 1.0 and words in said


def test_options_that_the_settings_exclude_are_named_with_the_reason():
    found, said = choose({}, replace(RunConfig(), train=TrainConfig(accumulate=2)))
    excluded = [way for way in found["ways"] if way["settings"] == {"step.capture": True}]
    assert "step.capture needs one GPU, train.accumulate 1" in excluded[0]["failed"] and excluded[0]["failed"] in said


@pytest.mark.parametrize(
    ("choices", "gpus", "left_out"),
    [
        (CHOICES, 1, set()),
        (CHOICES, 8, {"step.capture"}),  # a graph is of one GPU
        (CHOICES | {"gpu": False}, 1, {"step.capture", "step.overlap_target"}),
    ],
)
def test_what_is_tried_depends_on_the_devices(choices, gpus, left_out):
    found, _ = choose({}, choices=choices, gpus=gpus)
    assert {name for way in found["ways"] for name in way["settings"]} == set(NAMES) - left_out


def test_the_step_as_configured_must_run():
    with pytest.raises(Failed, match="as configured does not run: CUDA out of memory; give fewer than 8 images"):
        choose({"": "CUDA out of memory"})


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1), "images must be positive, got 0"),
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
    masks = MaskConfig(context="exact" if group is None else "batch_min", group_size=group)
    config = RunConfig(masks=masks, train=TrainConfig(batch_size=batch, accumulate=accumulate))
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
    for changed, message in (
        ({"first_loss": 3.0}, r"loss .* apart \(at most 1e-05\)"),
        ({"losses": [3.0] * 12}, "losses"),
        ({"losses": [math.nan] * 12}, "losses nan"),
        ({"moved": [0.0, 0.0]}, "moved inf apart"),
        ({"skipped": -1}, "skipped 1 apart"),
    ):
        with pytest.raises(ValueError, match=f"does not train the same: {message}"):
            try_way(TINY, *common, base | changed)


def test_every_gradient_counts(configured):
    common, base = configured
    kept = torch.load(common[-1], weights_only=True)
    for which, factor in ((0, 2.0), (5, math.nan), (-1, 2.0)):
        name = list(kept)[which]
        torch.save(kept | {name: kept[name] * factor}, common[-1])
        with pytest.raises(ValueError, match="does not train the same: gradient"):
            try_way(TINY, *common, base)
    with pytest.raises(ValueError, match="different parameters are trained: b, c"):
        gradient_difference({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "c": torch.ones(1)}, 0.1)


@pytest.mark.parametrize("broken", [0, 4], ids=["context", "average"])
def test_updates_that_do_not_reach_weights_or_averages_are_seen(configured, monkeypatch, broken):
    """Their losses hardly tell."""
    common, base = configured
    update = StepTensors.update

    def partly(self, *arguments):
        before = [value.clone() for value in self._tensors[broken]]
        update(self, *arguments)
        for value, old in zip(self._tensors[broken], before, strict=True):
            value.copy_(old)

    monkeypatch.setattr(StepTensors, "update", partly)
    with pytest.raises(ValueError, match="does not train the same: .*moved"):
        try_way(TINY, *common, base)


def test_a_step_as_configured_that_cannot_stand_for_others_is_told(tmp_path):
    wild = replace(TINY, optim=replace(TINY.optim, lr_ends=(1e30, 1e-6), lr=1e30))
    with pytest.raises(ValueError, match="as configured, losses after updates is not finite: lower optim.lr"):
        try_way(wild, CPU, 4, 0.01, tmp_path / "gradients.pt", None)
    with pytest.raises(OSError, match=r"do not go into .* \(TMPDIR names another folder\)"):
        try_way(TINY, CPU, 2, 0.01, tmp_path / "missing" / "gradients.pt", None)


def test_gradients_in_fp16_are_not_lost():
    """Without scaling most would be zero."""
    wide = replace(TINY, model=replace(TINY.model, embed_dim=384, predictor_embed_dim=192))
    half, full = (
        first_gradients(*random_step(with_settings(wide, {"train.precision": precision}), CPU, 16))[1]
        for precision in ("fp16", "fp32")
    )
    assert gradient_difference(half, full, 1e-2) < 0.1


def test_a_micro_batch_stands_for_all_and_a_deterministic_run_is_tried_as_one(tmp_path):
    """The gradient of the whole batch at once would need the memory that accumulation saves."""
    summing = with_settings(TINY, {"train.accumulate": 2, "train.deterministic": True})
    try:
        try_way(summing, CPU, 4, 0.01, tmp_path / "gradients.pt", None)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    step, pixels = random_step(summing, CPU, 4)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert gradient_difference(found, first_gradients(step, pixels[:2])[1], 0.0) == 0


def test_choices_on_a_cpu():
    assert choices_on(TINY, CPU) == Machine(False, 1, ("cpu", "sdpa"), "cpu")


def test_settings_go_through_yaml_and_flags(tmp_path):
    settings = {"step.blocks": "fused", "step.attention": "sdpa", "step.activation_checkpointing": False}
    recipe, added = tmp_path / "recipe.yaml", tmp_path / "fastest.yaml"
    values = {"train": {"device": "cpu", "batch_size": 8}, "step": {"attention": "cpu"}}
    recipe.write_text(yaml.safe_dump(values))
    added.write_text(yaml.safe_dump(nested(settings)))
    parser = run_parser("pretrain", "")
    by_file, _ = run_config(parser, ["--config", str(recipe), "--config", str(added)])
    by_flags, _ = run_config(parser, ["--config", str(recipe), *flags(settings).split()])
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


def test_wrong_usage_of_the_command(tmp_path, capsys):
    assert cli.main(["fastest", "--config", "demo", "--out", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err
    for flag in ("--images", "--gpus", "--seconds"):
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
