"""The command line as it is typed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ijepa_fast import cli
from tests.image_files import write_folder

ROOT = Path(__file__).resolve().parents[1]

TINY = {
    "model": {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "predictor_embed_dim": 8,
        "predictor_depth": 1,
    },
    "masks": {"min_keep": 1},
    "optim": {"warmup_epochs": 0.5},
    "train": {"batch_size": 8, "steps": 3, "log_every": 1, "precision": "fp32", "device": "cpu"},
}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run made by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    output = folder / "run"
    status = cli.main(["pretrain", "--config", str(config), "--data", str(data), "--output", str(output)])
    assert status == 0
    return output


def test_pretrain_from_yaml_and_flags(run):
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["embed_dim"] == 16 and written["output"] == str(run)
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert (run / "pca.png").exists()


def test_the_written_configuration_runs_again(run, data, tmp_path):
    flags = ["--output", str(tmp_path / "again"), "--evaluation.results", "figures", "--optim.lr", "2e-3"]
    assert cli.main(["pretrain", "--config", str(run / "config.yaml"), *flags]) == 0
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["optim"]["lr"] == 0.002


def test_probe_and_knn(run, capsys):
    for command, figure in (("probe", "probe"), ("knn", "knn")):
        assert cli.main([command, str(run), "--encoder", "context", "--layers", "last4"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert 0 <= printed[figure] <= 1 and printed["step"] == 3 and printed["encoder"] == "context"


def test_masks_of_a_shipped_recipe(tmp_path, data):
    out = tmp_path / "masks.png"
    arguments = ["masks", "--config", "vitb16_in1k", "--data", str(data), "--out", str(out), "--count", "2"]
    assert cli.main(arguments) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_doctor_names_what_is_missing(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "triton", "attention", "flash_attn", "python"):
        assert word in printed.lower()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, None),
        (["pretain"], 2, "did you mean pretrain?"),
        (["pretrain", "--config", "vith14_in1"], 1, "did you mean vith14_in1k"),
        (["pretrain"], 1, "no images are given"),
        (["pretrain", "--data", "/nowhere"], 1, "/nowhere"),
        (["pretrain", "--optim.learning_rate", "1"], 2, "learning_rate"),
        (["pretrain", "--model.embed_dims", "1"], 2, "did you mean model.embed_dim?"),
        (["pretrain", "--lr", "3"], 2, "did you mean optim.lr?"),
        (["pretrain", "--epoch", "3"], 2, "did you mean train.epochs?"),
        (["pretrain", "--zzz", "3"], 2, "unrecognized arguments: --zzz 3\n"),
        (["pretrain", "photos/cats"], 2, "did you mean --data photos/cats?"),
        (["pretrain", "--masks.strategy", "blocks"], 2, "blocks"),
        (["pretrain", "--model.num_heads", "5"], 1, "model.embed_dim 768, the width of the encoder, cannot be split"),
        (["probe", "/nowhere"], 1, "no checkpoint at /nowhere"),
        (["probe", "/nowhere", "--layers", "last5"], 2, "invalid choice: 'last5'"),
        (["probe"], 2, "arguments are required: run"),
        (["import", "/nowhere.pth.tar", "--out", "/nowhere"], 1, "there is no file or folder /nowhere.pth.tar"),
    ],
)
def test_mistakes_end_with_a_clear_message(arguments, status, message, capsys):
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert message is None or message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 0.1\n", "did you mean optim.lr?"),
        ("optm:\n  lr: 0.1\n", "did you mean optim.lr?"),
        ("lr: 0.1\n", "did you mean optim.lr?"),
        ("optim: 0.1\n", "optim in {path} must hold settings (name: value), got 0.1"),
        ("train:\n", "train in {path} must hold settings (name: value), got None"),
    ],
)
def test_unknown_keys_of_a_file_are_refused(tmp_path, capsys, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert cli.main(["pretrain", "--config", str(path)]) == 2
    assert message.format(path=path) in capsys.readouterr().err


def test_files_that_cannot_be_opened_are_named_in_words(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "encoder.safetensors"
    assert cli.main(["export", str(run), "--to", "safetensors", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ijepa-fast export: error: {tmp_path / 'file'}: ") and "[Errno" not in error


def test_the_last_four_of_fewer_blocks_are_refused(data, tmp_path, capsys):
    shallow = tmp_path / "shallow.yaml"
    shallow.write_text(yaml.safe_dump(TINY | {"model": TINY["model"] | {"depth": 2}}))
    output = tmp_path / "run"
    flags = ["--config", str(shallow), "--data", str(data), "--output", str(output)]
    quick = ["--evaluation.results", "none"]
    assert cli.main(["pretrain", *flags, *quick]) == 0
    assert cli.main(["probe", str(output), "--layers", "last4"]) == 1
    assert f"--layers last4 needs an encoder of 4 blocks; {output} has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "extra"),
    [("transformers", "huggingface"), ("webdataset", "shards"), ("matplotlib", "train"), ("safetensors", "train")],
)
def test_a_missing_package_is_an_error_with_its_extra(run, data, tmp_path, module, extra):
    """In a process of its own, where nothing is imported yet and the package cannot be."""
    flags = {
        "transformers": ["export", str(run), "--to", "huggingface", "--out", str(tmp_path / "out")],
        "webdataset": [
            "masks",
            "--config",
            "demo",
            "--data",
            str(tmp_path / "{0..1}.tar"),
            "--out",
            str(tmp_path / "m"),
        ],
        "matplotlib": ["masks", "--config", "demo", "--data", str(data), "--out", str(tmp_path / "masks.png")],
        "safetensors": ["probe", str(run)],
    }[module]
    code = f"import sys; sys.modules[{module!r}] = None; from ijepa_fast.cli import main; sys.exit(main({flags!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"ijepa-fast {flags[0]}: error: ") and f"pip install -e '.[{extra}]'" in line
    assert "Traceback" not in done.stderr


def test_extras_are_those_of_the_package():
    text = (ROOT / "setup.py").read_text()
    (extras,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    )
    # transformers needs safetensors too; whoever lacks it alone lacks it for training.
    imported_as = {
        "pillow": "PIL",
        "pyyaml": "yaml",
        "scikit-learn": "sklearn",
        "faster-coco-eval": "faster_coco_eval",
        "mlflow-skinny": "mlflow",
    }
    for extra, packages in cli.EXTRAS.items():
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]}
        assert {imported_as.get(name, name) for name in names} - {"safetensors"} <= set(packages.split()), extra


def test_ctrl_c_is_one_line(monkeypatch, capsys, data):
    from ijepa_fast import train

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "pretrain", interrupted)
    assert cli.main(["pretrain", "--config", "demo", "--data", str(data)]) == 130
    assert capsys.readouterr().err == "\nijepa-fast pretrain: interrupted\n"


@pytest.mark.parametrize("command", ["pretrain", "probe", "knn", "masks", "doctor"])
def test_help_is_made_from_the_docstrings(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    if command == "pretrain":
        assert "images per step on all ranks together" in " ".join(printed.split())


@pytest.mark.parametrize("command", ["pretrain", "masks", "bench", "fastest", "import"])
def test_help_shows_what_people_use_and_help_all_everything(command, capsys):
    lines = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            cli.main([command, flag])
        assert end.value.code == 0
        lines[flag] = capsys.readouterr().out.splitlines()
    assert len(lines["--help"]) < 160
    for flag in ("--optim.lr LR", "--train.batch_size BATCH_SIZE", "--help-all lists all"):
        assert any(flag in line for line in lines["--help"]), flag
    for flag in ("--optim.betas", "--masks.min_keep", "--evaluation.resize_ratio"):
        assert any(flag in line for line in lines["--help-all"]), flag
        assert not any(flag in line for line in lines["--help"]), flag


def test_an_unlabelled_run_ends_with_rank_and_loss(tmp_path, capsys):
    write_folder(tmp_path / "photos", 9, classes=())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = [
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--data",
        str(tmp_path / "photos"),
        "--output",
        str(tmp_path / "r"),
    ]
    assert cli.main(["pretrain", *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"rank of the features: \d+\.\d untrained, \d+\.\d trained", printed)
    assert re.search(r"3 steps in \d+ s, loss \d\.\d{4} at the end; everything is in", printed)
    assert "ijepa-fast report" in printed
    assert cli.main(["knn", str(tmp_path / "r")]) == 1
    assert "--data PATH evaluates on other images" in capsys.readouterr().err


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ijepa_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"
