"""Checkpoints to other formats and back, as typed: nothing is lost, and training goes on where it stopped."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ijepa_fast import cli
from ijepa_fast.config import from_dict, read_recipe
from ijepa_fast.interop import official
from ijepa_fast.interop.export import export
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.run import auto
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.step.train_step import PRECISION_DTYPES
from ijepa_fast.weights.encoder_file import KEY, load_encoder, save_encoder
from ijepa_fast.weights.official import read, write
from ijepa_fast.weights.reading import WeightsError, layer_norm_eps, read_safetensors, set_layer_norm_eps
from ijepa_fast.weights.runs import load_run, save_run
from ijepa_fast.weights.timm import timm_arguments, to_timm

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY = {
    "model": {**SIZES, "predictor_embed_dim": 8, "predictor_depth": 1},
    "masks": {"min_keep": 1},
    "optim": {"warmup_epochs": 0.5},
    "evaluation": {"results": "none"},
    "train": {"batch_size": 8, "steps": 4, "log_every": 1, "save_every": 2, "keep": 5, "device": "cpu"},
}
HEADS = ["--num_heads", "2"]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request, data, tmp_path_factory):
    """A run of 4 steps, 2 an epoch."""
    folder = tmp_path_factory.mktemp(request.param)
    values = copy.deepcopy(TINY)
    values["train"]["precision"] = request.param
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    command = ["pretrain", "--config", str(folder / "tiny.yaml"), "--data", str(data), "--output", str(folder / "run")]
    assert cli.main(command) == 0
    return folder / "run"


def exported(run, tmp_path, *arguments):
    out = tmp_path / "out"
    status = cli.main(["export", str(run), "--out", str(out), *map(str, arguments)])
    assert status == 0
    return out


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_an_encoder_by_itself_gives_the_same_features(run, tmp_path, capsys, encoder):
    out = exported(run, tmp_path, "--to", "safetensors", "--encoder", encoder)
    assert f"the {encoder} encoder after step 4" in capsys.readouterr().out
    loaded, about = load_encoder(out)
    assert about == {"encoder": encoder, "step": 4}
    model, _, _ = load_run(run)
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    torch.testing.assert_close(loaded(images), getattr(model, f"{encoder}_encoder")(images), rtol=0, atol=0)
    if encoder == "target":
        assert not torch.equal(loaded.norm.weight, model.context_encoder.norm.weight)


def test_low_precision_runs_export_their_fp32_masters(run, tmp_path):
    state = read_safetensors(exported(run, tmp_path, "--to", "timm"))[0]
    kept = checkpoints.load(checkpoints.find(run)).tensors
    name = "blocks.1.mlp.fc1.weight"
    low = kept[f"model.target_encoder.{name}"]
    if low.dtype == torch.bfloat16:
        assert torch.equal(state[name], kept[f"optimizer.context_encoder.{name}.ema"])
        assert torch.equal(state[name].bfloat16(), low) and not torch.equal(state[name], low.float())
    else:
        assert torch.equal(state[name], low)


def test_a_folder_of_transformers_and_back(run, tmp_path, capsys):
    folder = exported(run, tmp_path, "--to", "huggingface", "--encoder", "context")
    assert f'the context encoder after step 4\nload it with transformers.AutoModel.from_pretrained("{folder}")' in (
        capsys.readouterr().out
    )
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "back"), "--train.precision", "fp32"]) == 0
    assert "an encoder of transformers, width 16, 2 blocks" in capsys.readouterr().out
    kept, _, _ = load_run(run)
    back, config, _ = load_run(tmp_path / "back")
    assert config.model.num_heads == 2
    torch.testing.assert_close(back.target_encoder.state_dict(), kept.context_encoder.state_dict(), rtol=0, atol=0)
    values = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(values))
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "eps")]) == 0
    assert "its layer-norm eps is 1e-12; runs have 1e-06" in capsys.readouterr().out
    assert cli.main(["import", str(folder / "model.safetensors"), "--out", str(tmp_path / "file")]) == 1
    assert "has the names of transformers: give its folder" in capsys.readouterr().err


def test_timm_is_told_the_number_of_heads(run, tmp_path, capsys):
    out = exported(run, tmp_path, "--to", "timm")
    call = capsys.readouterr().out.partition("load it with ")[2]
    assert call.startswith("timm.create_model(model_name='vit_base_patch16_gap_224', img_size=24")
    # Whoever pastes it gives timm what timm_arguments says, and the file.
    given = eval(call, {"timm": SimpleNamespace(create_model=dict)})
    network = load_run(run)[0].target_encoder
    assert given == timm_arguments(network, out) and given["num_heads"] == 2
    overlay = given["pretrained_cfg_overlay"]
    assert given["pretrained"] and overlay["file"] == str(out) and overlay["num_classes"] == 0
    assert overlay["input_size"] == (3, 24, 24) and list(overlay["mean"]) == network.patch_embed.mean
    assert all(value.dtype == torch.float32 for value in read_safetensors(out)[0].values())


def test_the_official_file_resumes_in_official_modules(run, tmp_path, capsys):
    """The networks, the moments and the step arrive; the checks of load_checkpoint are those of torch's AdamW."""
    out = exported(run, tmp_path, "--to", "official")
    assert "after step 4, epoch 2" in capsys.readouterr().out
    encoder = official.VisionTransformer([24], 4, embed_dim=16, depth=2, num_heads=2)
    predictor = official.vit_predictor(num_patches=36, embed_dim=16, predictor_embed_dim=8, depth=1, num_heads=2)
    target = copy.deepcopy(encoder)
    opt = torch.optim.AdamW(official.parameter_groups(encoder, predictor))
    scaler = torch.amp.GradScaler("cpu")
    *_, epoch = official.load_checkpoint("cpu", out, encoder, predictor, target, opt, scaler)
    assert epoch == 2 and [g.get("WD_exclude", False) for g in opt.param_groups] == [False, False, True, True]
    kept = checkpoints.load(checkpoints.find(run)).tensors
    for part, module in (("context_encoder", encoder), ("predictor", predictor)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                for kind in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(opt.state[parameter][kind], kept[f"optimizer.{part}.{name}.{kind}"].float())
                assert opt.state[parameter]["step"] == 4
            else:
                assert parameter not in opt.state
    model, _, _ = load_run(run)
    torch.testing.assert_close(target.state_dict(), model.target_encoder.state_dict(), rtol=0, atol=0)


def test_to_the_official_format_and_back_training_goes_on_to_the_same_weights(run, data, tmp_path, capsys):
    """Steps 2 to 4 of the run, from a file of the official format that was made of its step 2."""
    half = run / "checkpoints" / "step_000000002.safetensors"
    file = exported(half, tmp_path, "--to", "official")
    config = ["--config", str(run / "config.yaml"), "--data", str(data)]
    assert cli.main(["import", str(file), "--out", str(tmp_path / "again"), *config, *HEADS]) == 0
    said = capsys.readouterr().out
    assert "an official checkpoint after epoch 1" in said and "2 steps done; optimizer state included" in said
    assert "CC-BY-NC-4.0" in said and f"pretrain --config {tmp_path / 'again' / 'config.yaml'}" in said
    assert cli.main(["pretrain", "--config", str(tmp_path / "again" / "config.yaml")]) == 0
    straight, again = (checkpoints.load(checkpoints.find(folder)) for folder in (run, tmp_path / "again"))
    assert (straight.step, again.step) == (4, 4)
    names = [name for name in straight.tensors if name.startswith(("model.", "optimizer."))]
    for name in names:
        assert torch.equal(straight.tensors[name], again.tensors[name]), name
    assert again.tensors.keys() == straight.tensors.keys()


@pytest.mark.slow
def test_probe_and_knn_judge_imported_weights(run, data, tmp_path, capsys):
    file = exported(run, tmp_path, "--to", "official")
    assert cli.main(["import", str(file), "--out", str(tmp_path / "imported"), *HEADS]) == 0
    for command in ("probe", "knn"):
        results = []
        for folder in (run, tmp_path / "imported"):
            capsys.readouterr()
            assert cli.main([command, str(folder), "--data", str(data), "--device", "cpu"]) == 0
            results.append(json.loads(capsys.readouterr().out.splitlines()[-1])[command])
        assert results[0] == pytest.approx(results[1], abs=0.11)  # bf16 features here and fp32 there: one of 10 images


def encoder_files(tmp_path):
    """The same encoder in every form that holds one alone."""
    torch.manual_seed(3)
    encoder = VisionTransformer(**SIZES)
    save_encoder(tmp_path / "ours.safetensors", encoder, {"encoder": "context", "step": 7})
    torch.save(to_timm(encoder), tmp_path / "timm.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in to_timm(encoder).items()}}, tmp_path / "wrapped.pt")
    return encoder, ["ours.safetensors", "timm.pth", "wrapped.pt"]


def test_a_file_keeps_the_layer_norm_eps_of_its_encoder(tmp_path, capsys):
    encoder, _ = encoder_files(tmp_path)
    encoder.pos_embed.mul_(1e-3)  # with features of a small variance eps is felt
    images = torch.randn(2, 3, 24, 24)
    usual = encoder(images)
    set_layer_norm_eps(encoder, 1e-2)
    save_encoder(tmp_path / "eps.safetensors", encoder)
    loaded, _ = load_encoder(tmp_path / "eps.safetensors")
    torch.testing.assert_close(loaded(images), encoder(images), rtol=0, atol=0)
    assert not torch.allclose(loaded(images), usual)
    assert cli.main(["import", str(tmp_path / "eps.safetensors"), "--out", str(tmp_path / "run")]) == 0
    assert "its layer-norm eps is 0.01; runs have 1e-06" in capsys.readouterr().out
    assert layer_norm_eps(load_run(tmp_path / "run")[0].target_encoder) == 1e-6

    # As earlier versions wrote it: eps was 1e-6, and nothing says so.
    state, metadata = read_safetensors(tmp_path / "eps.safetensors")
    described = json.loads(metadata[KEY])
    del described["layer_norm_eps"]
    save_file(state, tmp_path / "old.safetensors", {KEY: json.dumps(described)})
    torch.testing.assert_close(load_encoder(tmp_path / "old.safetensors")[0](images), usual, rtol=0, atol=0)

    encoder.norm.eps = 1e-5
    with pytest.raises(ValueError, match=r"must have one eps, got \[1e-05, 0.01\]"):
        save_encoder(tmp_path / "several.safetensors", encoder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_alone_becomes_both_encoders(tmp_path, capsys, precision):
    encoder, files = encoder_files(tmp_path)
    for name in files:
        out = tmp_path / f"run-{name}"
        heads = HEADS if not name.startswith("ours") else []
        assert (
            cli.main(["import", str(tmp_path / name), "--out", str(out), "--train.precision", precision, *heads]) == 0
        )
        said = capsys.readouterr().out
        assert "both encoders start from the one that is there\nthe predictor is new" in said
        model, config, step = load_run(out)
        assert (step, config.model.num_heads, config.model.img_size) == (0, 2, 24)
        for network in (model.context_encoder, model.target_encoder):
            torch.testing.assert_close(network.state_dict(), encoder.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_training_starts_from_an_imported_encoder(data, tmp_path, precision, monkeypatch):
    """In the precision of the machine that trains, where none is named."""
    encoder, _ = encoder_files(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--data", str(data), "--train.precision", precision]
    source = str(tmp_path / "ours.safetensors")
    assert cli.main(["import", source, "--out", str(tmp_path / "run"), *arguments, "--optim.lr", "0"]) == 0
    start = checkpoints.load(checkpoints.find(tmp_path / "run"))
    model, _, _ = load_run(tmp_path / "run")
    torch.testing.assert_close(model.target_encoder.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    monkeypatch.setattr(auto, "supported_precision", lambda device: ("bf16", "a test says so"))
    assert cli.main(["pretrain", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    end = checkpoints.load(checkpoints.find(tmp_path / "run"))
    assert (start.step, end.step) == (0, 4) and end.extra["origin"] == start.extra["imported"]
    assert {value.dtype for value in start.tensors.values()} == {torch.float32}
    dtype = PRECISION_DTYPES[{"auto": "bf16"}.get(precision, precision)]
    assert end.tensors["model.context_encoder.blocks.0.attn.qkv.weight"].dtype == dtype
    master = end.tensors.get("optimizer.context_encoder.blocks.0.attn.qkv.weight.master")
    assert (master is None) == (dtype == torch.float32)
    assert cli.main(["pretrain", "--config", str(tmp_path / "run" / "config.yaml")]) == 0  # it is trained


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of an untrained model, in the folder of a run."""
    config = from_dict({"model": TINY["model"]})
    folder = tmp_path_factory.mktemp("small")
    save_run(folder, config.model.build(config.objective), config, 4)
    return folder


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """An official checkpoint with optimizer state, of an untrained model."""
    config = from_dict({"model": TINY["model"]})
    folder = tmp_path_factory.mktemp("official")
    save_run(folder, config.model.build(config.objective), config, 4, data="images")
    export(folder, "official", folder / "file.pth.tar", steps_per_epoch=2)
    return folder / "file.pth.tar"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "/nowhere", "--to", "timm", "--out", "x"], "no checkpoint at /nowhere"),
        (["export", "RUN", "--to", "timm", "--out", "RUN"], "exists already"),
        (["export", "RUN", "--to", "tflite", "--out", "x"], "onnx"),
        (["import", "/nowhere", "--out", "x"], "/nowhere"),
        (["import", "FOLDER", "--out", "x"], "is a folder without config.json"),
        (["import", "RUN", "--out", "x"], "is a run of ijepa_fast and needs no import"),
        (["import", "TEXT", "--out", "x"], "TEXT is damaged or not a file of weights"),
        (["import", "TIMM", "--out", "x"], "is none of the known sizes: give num_heads"),
        (["import", "OTHER", "--out", "x"], "not the weights of a ViT encoder: no pos_embed, patch_embed.proj.weight"),
        (["import", "TIMM", "--out", "RUN", "--num_heads", "2"], "already holds a run; give another folder"),
        (["import", "OURS", "--out", "x"], "is a run of ijepa_fast and needs no import"),
    ],
)
def test_mistakes_end_with_a_clear_message(small, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    encoder_files(tmp_path)
    (tmp_path / "TEXT").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "OTHER")
    (tmp_path / "FOLDER").mkdir()
    names = {"RUN": str(small), "TIMM": "timm.pth", "OURS": str(checkpoints.find(small))}
    status = 2 if "tflite" in arguments else 1  # of wrong usage, of other errors
    assert cli.main([names.get(argument, argument) for argument in arguments]) == status
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_a_run_without_metrics_needs_to_be_told_its_epochs(small, tmp_path, capsys):
    command = ["export", str(small), "--to", "official", "--out", str(tmp_path / "out.pth.tar")]
    assert cli.main(command) == 1
    assert "cannot tell how many epochs 4 steps are" in capsys.readouterr().err
    assert cli.main([*command, "--steps_per_epoch", "3"]) == 0
    said = capsys.readouterr().out
    assert "go on from the start of epoch 2: 1 steps are repeated" in said and "without optimizer state" in said
    assert read(tmp_path / "out.pth.tar").epoch == 1


def test_files_of_others_are_not_taken_for_encoder_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="was not written by ijepa_fast"):
        load_encoder(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-2])
    with pytest.raises(WeightsError, match="damaged"):
        read_safetensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.opt["state"][3].update(exp_avg=torch.zeros(2)), "has not the shape of its weights"),
        (lambda f: f.opt["state"][3].pop("exp_avg_sq"), "has no exp_avg_sq: not that of AdamW"),
        (lambda f: f.opt["state"].pop(3), "has no step, exp_avg, exp_avg_sq"),
        (lambda f: f.opt["state"][3].update(step=9), "stepped differently often: [4, 9]"),
        (lambda f: f.opt["param_groups"][0]["params"].pop(), "the optimizer groups have [9, 8, 19, 12] parameters"),
        (lambda f: f.predictor.pop("predictor_blocks.0.mlp.fc1.weight"), "not the weights of a predictor"),
        (lambda f: f.predictor.pop("mask_token"), "1 missing: mask_token"),
        (lambda f: f.encoder.update(pos_embed=torch.zeros(35, 16)), "with square patches: their dimensions are"),
        (lambda f: f.encoder.update(pos_embed=torch.zeros(1, 35, 16)), "35 patches do not form a square grid"),
    ],
)
def test_official_files_that_make_no_sense_are_refused(official_file, tmp_path, capsys, change, message):
    found = read(official_file)
    change(found)
    write(tmp_path / "wrong.pth.tar", found)
    assert cli.main(["import", str(tmp_path / "wrong.pth.tar"), "--out", str(tmp_path / "x"), *HEADS]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_both_encoders_without_a_predictor(tmp_path, capsys):
    encoder, target = VisionTransformer(**SIZES), VisionTransformer(**SIZES)
    state = {name: {f"module.{k}": v for k, v in to_timm(network).items()} for name, network in
             (("encoder", encoder), ("target_encoder", target))}  # fmt: skip
    torch.save(state, tmp_path / "both.pth")
    out = tmp_path / "run"
    assert cli.main(["import", str(tmp_path / "both.pth"), "--out", str(out), "--train.precision", "fp32", *HEADS]) == 0
    assert "both encoders of an official checkpoint" in capsys.readouterr().out
    model, _, _ = load_run(out)
    torch.testing.assert_close(model.context_encoder.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.target_encoder.state_dict(), target.state_dict(), rtol=0, atol=0)


def test_the_giant_has_another_mlp_ratio_in_its_predictor(tmp_path):
    torch.manual_seed(0)
    giant = {"img_size": [24], "patch_size": 4, "embed_dim": 44, "depth": 1, "num_heads": 2, "mlp_ratio": 48 / 11}
    encoder = official.VisionTransformer(**giant)
    predictor = official.vit_predictor(num_patches=36, embed_dim=44, predictor_embed_dim=8, depth=1, num_heads=2)
    opt = torch.optim.AdamW(official.parameter_groups(encoder, predictor))
    file = tmp_path / "giant.pth.tar"
    official.save_checkpoint(
        file, encoder, predictor, encoder, opt, None, epoch=0, loss=0.0, batch_size=1, world_size=1, lr=0.0
    )
    assert cli.main(["import", str(file), "--out", str(tmp_path / "run"), *HEADS]) == 0
    model, config, _ = load_run(tmp_path / "run")
    assert (config.model.mlp_ratio, config.model.predictor_mlp_ratio) == (192 / 44, 4.0)
    assert model.predictor.predictor_blocks[0].mlp.fc1.out_features == 32
    recipe = from_dict(read_recipe("vitg16_in22k"))
    with torch.device("meta"):
        built = recipe.model.build(recipe.objective)
    assert built.predictor.predictor_blocks[0].mlp.fc1.out_features == 1536
    assert built.context_encoder.blocks[0].mlp.fc1.out_features == 6144
