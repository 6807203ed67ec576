"""Configurations: every shipped recipe builds, names are checked, changes on resume are told apart."""

from dataclasses import replace

import jsonargparse
import pytest

from ijepa_fast.config import (
    CHANGEABLE,
    EvaluationConfig,
    RunConfig,
    as_dict,
    changes,
    find_recipe,
    flatten,
    from_dict,
    present_flags,
    read_recipe,
    recipes,
    value_text,
)
from ijepa_fast.config.former import FIXED, GONE, RENAMED
from ijepa_fast.masks.sampler import MaskConfig
from ijepa_fast.model.vit import IMAGENET_MEAN

OFFICIAL = {"vith14_in1k": 128, "vith16_448_in1k": 16, "vith14_in22k": 32, "vitg16_in22k": 16}


def read(name) -> RunConfig:
    return from_dict(read_recipe(name))


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_configuration(name):
    config = read(name)
    assert config.model.img_size % config.model.patch_size == 0
    side = config.model.img_size // config.model.patch_size
    from ijepa_fast.masks.sampler import MaskSampler

    MaskSampler(config.masks, (side, side))


@pytest.mark.parametrize(("name", "group"), OFFICIAL.items())
def test_official_recipes_have_the_official_masks_and_exact_siblings(name, group):
    config, sibling = read(name), read(name + "_exact")
    assert config.masks == MaskConfig.official(group)
    assert sibling.masks == MaskConfig()
    assert replace(sibling, masks=config.masks, output=config.output) == config
    assert "NOT VALIDATED" in find_recipe(name + "_exact").read_text()
    assert (config.optim.lr, config.optim.lr_ends) == (1e-3, (2e-4, 1e-6))
    assert (config.train.batch_size, config.optim.max_grad_norm) == (2048, None)


def test_dict_round_trip_and_unknown_names():
    config = read("vith14_in1k")
    assert from_dict(as_dict(config)) == config
    with pytest.raises(ValueError, match="unknown setting optim.learning_rate"):
        from_dict({"optim": {"learning_rate": 1}})
    with pytest.raises(ValueError, match="unknown setting model.embed_dims; did you mean embed_dim?"):
        from_dict({"model": {"embed_dims": 1}})


def test_jsonargparse_reads_the_same_configuration():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig)
    parsed = parser.parse_args(["--config", str(find_recipe("vitb16_in1k")), "--optim.lr", "0.002"])
    values = parser.instantiate(parsed)
    expected = read("vitb16_in1k")
    assert values.model == expected.model and values.masks == expected.masks
    assert values.optim == replace(expected.optim, lr=0.002)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="neither a file nor a recipe; did you mean vitb16_in1k"):
        find_recipe("vitb16_in1")


def test_a_base_is_a_recipe_or_a_file_beside_and_sections_are_merged(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "common.yaml").write_text("base: demo\noptim: {lr: 0.5, betas: [0.8, 0.9]}\n")
    (tmp_path / "own" / "run.yaml").write_text("base: ../common.yaml\noptim: {lr: 0.25}\ntrain: {steps: 3}\n")
    demo, config = read("demo"), read(str(tmp_path / "own" / "run.yaml"))
    optim = replace(demo.optim, lr=0.25, betas=(0.8, 0.9))
    assert config == replace(demo, optim=optim, train=replace(demo.train, steps=3))
    assert read_recipe("demo")["optim"]["lr"] == demo.optim.lr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nothing_here\n", "neither a file nor a recipe"),
        ("base: this.yaml\n", "its own base.*this.yaml"),
        ("- a list\n", "this.yaml must hold settings .* got list"),
        ("", "must hold settings .* got NoneType"),
        ("optim: {lr: 1\n", "this.yaml is not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    (tmp_path / "this.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(str(tmp_path / "this.yaml"))


def test_changes_are_told_apart():
    old = RunConfig(data="a")
    loader = replace(old.loader, workers=4)
    new = replace(old, seed=1, loader=loader, evaluation=EvaluationConfig(bank=5), output="elsewhere", data="a/")
    allowed, refused = changes(flatten(old), flatten(new))
    assert set(allowed) == {"loader.workers", "evaluation.bank", "output", "data"}
    assert refused == {"seed": (0, 1)}
    names = set(flatten(old))
    assert all(name in names or any(n.startswith(name + ".") for n in names) for name in CHANGEABLE)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"batch_size": 0}}, "train.batch_size must be at least 1, got 0"),
        ({"train": {"epochs": 0}}, "train.epochs must be positive, got 0"),
        ({"objective": {"loss": "huber"}}, "objective.loss must be .* got 'huber'"),
        ({"objective": {"target_selection": "middle"}}, "target_selection must be output or input, got 'middle'"),
        (
            {"objective": {"targets": "pixels", "target_selection": "input"}},
            "objective.targets must .* got 'pixels_alone'",
        ),
        ({"evaluation": {"results": "some"}}, "evaluation.results must be one of all, .* got 'some'"),
        ({"objective": {"target_eps": 0}}, "objective.target_eps is no setting any more and always 1e-05, got 0"),
        ({"optim": {"momentum": [0.9, 0.95, 1]}}, "momentum must be two numbers, at the start and at the end, got"),
        ({"masks": {"context": "batch_min"}}, "needs group_size"),
        ({"step": {"capture": True}, "train": {"device": "cpu"}}, "step.capture needs one GPU.* device cpu"),
        ({"step": {"capture": True}, "train": {"accumulate": 2}}, "step.capture needs .* accumulate 2"),
        ({"step": {"capture": True}, "train": {"precision": "fp16"}}, "step.capture needs .* precision fp16"),
        (
            {"step": {"overlap_target": True}, "train": {"device": "cpu"}},
            "step.overlap_target needs a GPU, got device cpu",
        ),
        (
            {"step": {"blocks": "fast"}},
            "step.blocks must be one of auto, plain, compile, fused, fused.compile, got 'fast'",
        ),
        (
            {"step": {"blocks": "fused"}, "train": {"device": "cuda", "precision": "fp32"}},
            "step.blocks fused .* got fp32",
        ),
        ({"step": {"fp8_targets": True}, "train": {"precision": "fp32"}}, "fp8_targets needs .* bf16, got fp32"),
        ({"model": {"num_heads": 0}}, "cannot be split into 0 heads"),
        ({"model": {"predictor_embed_dim": 388}}, "model.predictor_embed_dim 388, the width of the predictor, .* 12"),
    ],
)
def test_bad_values_are_refused_at_construction(section, message):
    with pytest.raises(ValueError, match=message):
        from_dict(section)


def test_a_warm_up_longer_than_the_run_is_a_tenth_of_it_and_named(caplog):
    optim = from_dict({"optim": {"warmup_epochs": 1.5}}).optim
    assert optim.schedules(total_steps=76, steps_per_epoch=50).warmup_steps == 75
    assert not caplog.messages
    assert optim.schedules(total_steps=75, steps_per_epoch=50).warmup_steps == 7
    assert "optim.warmup_epochs 1.5 (75 steps, with 50 in an epoch)" in caplog.text
    assert optim.schedules(total_steps=1, steps_per_epoch=50).warmup_steps == 0


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"train": {"compile": True}}, {"step": {"blocks": "compile"}}),
        ({"train": {"fused": True, "compile": False}}, {"step": {"blocks": "fused"}}),
        ({"train": {"fused": True, "compile": True}}, {"step": {"blocks": "fused+compile"}}),
        ({"train": {"fused": False}, "step": {"blocks": "compile"}}, {"step": {"blocks": "compile"}}),
        ({"train": {"fp8_targets": "tensor"}}, {"step": {"fp8_targets": True}}),
        ({"train": {"fp8_targets": "off", "capture": True}}, {"step": {"capture": True}}),
        ({"model": {"attention": "sdpa", "target_attention": "cudnn"}}, {"step": {"attention": "sdpa"}}),
        ({"model": {"activation_checkpointing": True}}, {"step": {"activation_checkpointing": True}}),
        ({"optim": {"lr": 2e-3, "start_lr": 1e-4}}, {"optim": {"lr": 2e-3, "lr_ends": [1e-4, 1e-6]}}),
        ({"optim": {"weight_decay": "5e-2"}}, {"optim": {"weight_decay": [0.05, 0.4]}}),
        ({"optim": {"momentum": 0.98, "final_momentum": 0.99}}, {"optim": {"momentum": [0.98, 0.99]}}),
        ({"model": {"std": [0.5, 0.5, 0.5]}}, {"model": {"mean_std": [list(IMAGENET_MEAN), [0.5, 0.5, 0.5]]}}),
        ({"evaluation": {"test_images": 9, "monitor_every": 4}}, {"evaluation": {"images": [10_000, 9]}}),
        ({"objective": {"target_selection": "output"}}, {}),
        ({"objective": {"target_selection": "input"}}, {"objective": {"targets": "features_alone"}}),
        (
            {"objective": {"targets": "average", "target_selection": "input"}},
            {"objective": {"targets": "average_alone"}},
        ),
        ({"evaluation": {"pictures": False}}, {"evaluation": {"results": "figures"}}),
        ({"evaluation": {"before_and_after": False, "pictures": True}}, {"evaluation": {"results": "pictures"}}),
        ({"evaluation": {"before_and_after": False, "pictures": False}}, {"evaluation": {"results": "none"}}),
        ({"objective": {"target_eps": 1e-5}, "loader": {"timeout": 3}, "optim": {"layer_decay": 1}}, {}),
    ],
    ids=str,
)
def test_settings_of_earlier_versions(old, now):
    assert from_dict(old) == from_dict(now)
    typed = [f"--{section}.{name}" for section, values in old.items() for name in values]
    values = [value_text(value) for section in old.values() for value in section.values()]
    joined, parts = [], []
    for flag, value in zip(typed, values, strict=True):
        joined.append(f"{flag}={value}")
        parts += [flag, value]
    assert " ".join(present_flags(joined)).replace("=", " ") == " ".join(present_flags(parts))
    gone = {name for name, now in RENAMED.items() if not isinstance(now, tuple)} | FIXED.keys() | GONE.keys()
    assert not gone & {part.removeprefix("--") for part in present_flags(parts)}


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        (["--train.compile", "true", "--train.fused", "true"], ["--step.blocks", "fused+compile"]),
        (["--train.compile=true", "--seed", "1"], ["--step.blocks", "compile", "--seed", "1"]),
        (["--model.attention", "triton", "--config", "x"], ["--step.attention", "triton", "--config", "x"]),
        (["--resume", "never", "--overwrite", "true"], ["--resume", "overwrite"]),
        (["--overwrite", "true"], []),
        (["--overwrite", "false", "--resume=never"], ["--resume", "never"]),
        (["--overwrite", "False", "--resume=never"], ["--resume", "never"]),
        (["--overwrite", "no", "--resume=never"], ["--resume", "never"]),
        (["--optim.eps=.1e-7", "--train.compile=False"], ["--step.blocks", "plain"]),
        (["--optim.momentum", "0.99", "--seed", "1"], ["--optim.momentum", "[0.99, 1.0]", "--seed", "1"]),
        (
            ["--objective.targets", "average", "--objective.target_selection", "input"],
            ["--objective.targets", "average_alone"],
        ),
        (
            ["--evaluation.pictures", "no", "--seed", "1", "--evaluation.before_and_after=False"],
            ["--seed", "1", "--evaluation.results", "none"],
        ),
        (["--optim.momentum", "[0.9, 0.99]"], ["--optim.momentum", "[0.9, 0.99]"]),
        (
            ["--optim.momentum", ".99", "--optim.start_lr=1e-4"],
            ["--optim.momentum", "[0.99, 1.0]", "--optim.lr_ends", "[0.0001, 1e-06]"],
        ),
    ],
)
def test_flags_of_earlier_versions_keep_their_place(typed, understood):
    assert present_flags(typed) == understood


def test_half_of_a_pair_leaves_the_other_as_it_is(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {weight_decay: [0.1, 0.2]}")
    (tmp_path / "child.yaml").write_text("base: base.yaml\noptim: {final_weight_decay: 0.3}")
    settings = read_recipe(str(tmp_path / "child.yaml"))
    assert settings["optim"]["weight_decay"] == [0.1, 0.3]
    assert present_flags(["--optim.weight_decay", "0.5"], flatten(settings)) == ["--optim.weight_decay", "[0.5, 0.3]"]
    (tmp_path / "half.yaml").write_text("optim: {weight_decay: 0.5}")
    assert read_recipe(str(tmp_path / "half.yaml"), onto=flatten(settings))["optim"]["weight_decay"] == [0.5, 0.3]


def test_the_other_way_to_fp8_products_is_read_as_the_one_there_is():
    assert from_dict({"step": {"fp8_targets": "by_hand"}}).step.fp8_targets is True


def test_settings_that_became_constants_are_ignored_in_what_is_only_read(caplog):
    old = as_dict(RunConfig()) | {"objective": {"target_eps": 1e-6, "loss": "l1"}}
    assert from_dict(old, strict=False).objective.loss == "l1"
    for settings in ({"evaluation": {"layers": "last"}}, {"evaluation": {"layers": "last4"}}):
        assert from_dict(settings) == RunConfig()
    assert caplog.messages == ["evaluation.layers is no setting any more: last4 is ignored"]
    with pytest.raises(ValueError, match="optim.eps is no setting any more and always 1e-08, got 0.1"):
        present_flags(["--optim.eps", "0.1"])


@pytest.mark.parametrize("typed", [["--train.compile"], ["--train.compile", "--train.fused", "true"]])
def test_a_flag_of_an_earlier_version_without_a_value_is_an_error(typed):
    with pytest.raises(ValueError, match="--train.compile needs a value"):
        present_flags(typed)


def test_a_file_with_old_names_changes_a_base_with_new_ones(tmp_path):
    (tmp_path / "base.yaml").write_text("step: {blocks: compile}")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nstep:\ntrain: {compile: false}")
    assert from_dict(read_recipe(str(tmp_path / "child.yaml"))).step.blocks == "plain"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flsh"}, "step.attention must be auto or one of .*, got 'flsh'"),
        ({"activation_checkpointing": "off"}, "step.activation_checkpointing must be .*, got 'off'"),
    ],
)
def test_options_of_the_step_are_checked_when_they_are_read(settings, message):
    with pytest.raises(ValueError, match=message):
        from_dict({"step": settings})
