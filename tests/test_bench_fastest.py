"""``ijepa-fast fastest``: what is tried, what is believed, and what is chosen."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from ijepa_fast import cli
from ijepa_fast.bench import fastest as module
from ijepa_fast.bench.apart import Failed
from ijepa_fast.bench.fastest import attention_choices, fastest, flags, nested, try_way, with_settings
from ijepa_fast.config import RunConfig, TrainConfig, from_dict
from tests.tiny import tiny_run

CPU = torch.device("cpu")
CHOICES = {"attention": ["triton"], "target_attention": ["cudnn"]}
TINY = tiny_run("none", "none")


def named(settings) -> str:
    return flags(settings).replace("--", "")


def table(rates, machine=None):
    """A machine on which ways have these rates by what is on, and 100 images/s if they are not in the table. A value
    may be a message (the way fails), or several rates (one after another)."""
    rates = {name: list(rate) if isinstance(rate, tuple) else [rate] for name, rate in rates.items()}

    def attempt(config, device, images, seconds, reference):
        settings = module.differing(RunConfig(), {name: module.flatten(config)[name] for name in NAMES})
        known = rates.get(named(settings), [100.0])
        rate = known.pop(0) if len(known) > 1 else known[0]
        if isinstance(rate, str):
            raise Failed(rate)
        about = {"cpu": "a CPU", "gpu": "a GPU", "torch": "2", "triton": "3"} if machine is None else machine
        times = {"p50": images / rate * 1e6}
        return {"images_per_second": rate, "times": times, "machine": about, "attention": CHOICES}

    return attempt


NAMES = (
    "train.fused", "train.compile", "model.attention", "model.target_attention", "train.overlap_target",
    "train.capture",
)  # fmt: skip


def choose(rates, config=None, machine=None):
    said = []
    found = fastest(
        config or RunConfig(), "some", CPU, images=8, seconds=1, say=said.append, attempt=table(rates, machine)
    )
    return found, "\n".join(said)


def test_every_option_is_tried_on_top_of_the_fastest_so_far():
    found, said = choose(
        {
            "train.fused true": 150.0,
            "train.fused true train.compile true": 120.0,
            "train.fused true model.attention triton": 200.0,
            "train.fused true model.attention triton model.target_attention cudnn": 203.0,  # less than 2 %
            "train.fused true model.attention triton train.overlap_target true": "no stream",
            "train.fused true model.attention triton train.capture true": 220.0,
        }
    )
    assert [named(way["settings"]) for way in found["ways"]] == [
        "",
        "train.fused true",
        "train.compile true",
        "train.fused true train.compile true",
        "train.fused true model.attention triton",
        "train.fused true model.attention triton model.target_attention cudnn",
        "train.fused true model.attention triton train.overlap_target true",
        "train.fused true model.attention triton train.capture true",
        "",
        "train.fused true model.attention triton train.capture true",
    ]
    assert found["settings"] == {"train.fused": True, "model.attention": "triton", "train.capture": True}
    assert found["gain"] == 2.2 and found["ways"][6]["failed"] == "no stream"
    assert "no stream" in said and "2.20x" in said and "a GPU" in said


def test_options_that_are_on_are_tried_off():
    on = replace(RunConfig(), train=TrainConfig(fused=True, compile=True, overlap_target=True))
    found, _ = choose({"train.compile true train.overlap_target true": 130.0, "train.compile true": 140.0}, on)
    assert found["settings"] == {"train.fused": False, "train.overlap_target": False} and found["gain"] == 1.4
    assert flags(found["settings"]) == "--train.fused false --train.overlap_target false"


def test_nothing_faster_changes_nothing():
    found, said = choose({"train.fused true": 101.0, "train.compile true": "no compiler"})
    assert found["settings"] == {} and found["gain"] == 1.0 and "once more" not in said


def test_what_was_faster_only_once_is_not_believed():
    found, said = choose({"train.fused true": (150.0, 100.0)})
    assert found["settings"] == {} and found["gain"] == 1.0
    assert "the second time it was 1.00x as fast: nothing is to be changed" in said


def test_a_winner_that_fails_the_second_time_is_not_chosen():
    found, _ = choose({"train.fused true": (150.0, "out of memory")})
    assert found["settings"] == {} and found["ways"][-1]["failed"] == "out of memory"


def test_options_that_the_settings_exclude_are_named_with_the_reason():
    summing = replace(RunConfig(), train=TrainConfig(accumulate=2))
    found, said = choose({}, summing)
    excluded = [way for way in found["ways"] if way["settings"] == {"train.capture": True}]
    assert "train.capture needs a GPU, accumulate 1" in excluded[0]["failed"] and excluded[0]["failed"] in said


def test_a_cpu_has_no_streams_or_graphs():
    found, _ = choose({}, machine={"cpu": "a CPU", "torch": "2", "triton": "3"})
    tried = {name for way in found["ways"] for name in way["settings"]}
    assert tried == {"train.fused", "train.compile", "model.attention", "model.target_attention"}


def test_the_step_as_configured_must_run():
    with pytest.raises(Failed, match="out of memory"):
        choose({"": "out of memory"})


@pytest.mark.parametrize(("settings", "message"), [({"images": 0}, "images .* got 0"), ({"seconds": 0}, "seconds")])
def test_numbers_must_be_positive(settings, message):
    with pytest.raises(ValueError, match=message):
        fastest(TINY, "some", CPU, **{"images": 2, **settings}, attempt=table({}))


def test_the_first_way_is_what_the_others_are_compared_with(tmp_path):
    reference = tmp_path / "reference.pt"
    first = try_way(TINY, CPU, 4, 0.1, reference)
    assert first["differences"] == {"loss": 0, "gradient": 0}
    assert first["machine"]["cpu"] and first["attention"] == {"attention": ["sdpa"], "target_attention": ["sdpa"]}
    other = with_settings(TINY, {"model.attention": "sdpa", "train.fused": True})
    second = try_way(other, CPU, 4, 0.1, reference)
    assert 0 < second["differences"]["gradient"] < 1e-4 and second["differences"]["later_losses"] < 1e-5
    assert second["images_per_second"] > 0 and "machine" not in second


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"loss": 3.0}, r"does not train the same: loss .* apart \(at most 1e-05\)"),
        ({"losses": [3.0, 3.0, 3.0]}, "does not train the same: later_losses"),
        ({"gradients": None}, "does not train the same: gradient 0.5 apart"),
    ],
)
def test_a_way_that_trains_otherwise_is_no_way(tmp_path, spoil, message):
    reference = tmp_path / "reference.pt"
    try_way(TINY, CPU, 4, 0.1, reference)
    good = torch.load(reference, weights_only=True)
    if "gradients" in spoil:
        spoil = {"gradients": {name: 2 * value for name, value in good["gradients"].items()}}
    torch.save(good | spoil, reference)
    with pytest.raises(ValueError, match=message):
        try_way(TINY, CPU, 4, 0.1, reference)


def test_a_micro_batch_stands_for_all(tmp_path):
    """The gradient of the whole batch at once would need the memory that accumulation saves."""
    summing = with_settings(TINY, {"train.accumulate": 2})
    found = try_way(summing, CPU, 4, 0.1, tmp_path / "reference.pt")
    assert found["images_per_second"] > 0


def test_backends_that_are_taken_already_are_no_choice():
    named_one = with_settings(TINY, {"model.attention": "sdpa", "model.target_attention": "cpu"})
    assert attention_choices(named_one, CPU) == {"attention": ["cpu"], "target_attention": ["sdpa"]}


def test_settings_go_through_yaml_and_flags(tmp_path, capsys):
    settings = {"train.fused": True, "model.attention": "sdpa"}
    recipe, added = tmp_path / "recipe.yaml", tmp_path / "fastest.yaml"
    recipe.write_text(yaml.safe_dump({"train": {"device": "cpu", "batch_size": 8}}))
    added.write_text(yaml.safe_dump(nested(settings)))
    parser = cli._run_parser("pretrain", "")
    by_file, _ = cli._run_config(parser, ["--config", str(recipe), "--config", str(added)])
    by_flags, _ = cli._run_config(parser, ["--config", str(recipe), *flags(settings).split()])
    plain = from_dict({"train": {"device": "cpu", "batch_size": 8}})
    assert by_file == by_flags == with_settings(plain, settings) != plain


def test_the_command(tmp_path, capsys, monkeypatch):
    """In processes of their own, as a user has it; without torch.compile, which takes a minute."""
    monkeypatch.setattr(module, "GROUPS", (module._attention, module._target_attention))
    small = tmp_path / "small.yaml"
    values = {"model": vars(TINY.model), "masks": {"min_keep": 1}, "train": {"device": "cpu", "precision": "fp32"}}
    values["model"] = {name: value for name, value in values["model"].items() if not isinstance(value, tuple)}
    small.write_text(yaml.safe_dump(values))
    report, out = tmp_path / "report.json", tmp_path / "fastest.yaml"
    arguments = ["--config", str(small), "--images", "4", "--seconds", "0.2", "--json", str(report), "--out", str(out)]
    assert cli.main(["fastest", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "small in steps of 4 images, fp32" in printed and "model.attention sdpa" in printed
    found = json.loads(report.read_text())
    assert not [way for way in found["ways"] if "failed" in way]
    assert yaml.safe_load(out.read_text()) == nested(found["settings"])
    assert "faster than small as configured" in printed or flags(found["settings"]) in printed


@pytest.mark.gpu
def test_every_way_of_the_package_runs_and_trains_the_same_on_a_gpu(monkeypatch):
    """In this process, and without torch.compile, which takes a minute."""
    monkeypatch.setattr(module, "GROUPS", (lambda base: [{"train.fused": True}], *module.GROUPS[1:]))
    config = RunConfig(model=replace(RunConfig().model, embed_dim=192, depth=2, num_heads=3, predictor_depth=2))
    config = with_settings(config, {"model.predictor_embed_dim": 96, "train.device": "cuda"})
    found = fastest(config, "small", torch.device("cuda"), images=16, seconds=0.2, attempt=try_way)
    tried = {name for way in found["ways"] for name in way["settings"]}
    assert {"train.fused", "model.attention", "train.overlap_target", "train.capture"} <= tried
    # Backends of other libraries have tests of their own.
    failed = {named(way["settings"]): way["failed"] for way in found["ways"] if "failed" in way}
    assert not [why for names, why in failed.items() if "attention" not in names or "attention triton" in names], failed
