"""The commands and the Python of docs/official.md, docs/weights.md and docs/classifier.md, as they stand there."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ijepa_fast import cli
from ijepa_fast.config import from_dict
from ijepa_fast.interop import official
from ijepa_fast.weights.runs import save_run
from tests.image_files import write_folder

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "predictor_embed_dim": 8}


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the run and the images that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "PATH" / "train", 20)
    write_folder(tmp_path / "PATH" / "test", 10)
    config = from_dict({"model": SIZES, "data": "PATH"})
    save_run("runs/mine", config.model.build(config.objective), config, 4, data="images")
    return tmp_path


@pytest.mark.slow
def test_weights_page(workplace, capsys):
    commands = [line for block in blocks("weights.md", "") for line in block.splitlines()]
    commands = [line for line in commands if "--push" not in line and not line.startswith("hf ")]
    assert len(commands) == 11
    if importlib.util.find_spec("onnxscript") is None:
        commands = [line for line in commands if "--to onnx" not in line]
    small = {  # what the page leaves out because the sizes of the paper and a run with metrics do not need it
        "--to official": " --steps_per_epoch 2",
        "import ": " --num_heads 2 --masks.min_keep 1 --train.device cpu --train.precision fp32",
        "knn ": " --device cpu",
        "vitb16_in1k": " --train.steps 3 --train.batch_size 8 --masks.group_size 8 --optim.warmup_epochs 1"
        " --evaluation.results none --loader.workers 0",
    }
    for command in commands:
        extra = "".join(flags for part, flags in small.items() if part in command)
        program, *arguments = shlex.split(command + extra)
        assert program == "ijepa-fast"
        assert cli.main(arguments) == 0, (command, capsys.readouterr().err)
    names = {}
    for block in blocks("weights.md", "python"):
        exec(compile(block, "docs/weights.md", "exec"), names)
    assert names["about"]["encoder"] == "context" and names["larger"].grid == (12, 12)
    assert (workplace / "runs" / "continued" / "summary.json").exists()


@pytest.mark.slow
def test_classifier_page(workplace, capsys):
    commands = [line for block in blocks("classifier.md", "") for line in block.splitlines()]
    assert len(commands) == 9
    small = {
        "pretrain": " --config imagenette --model.img_size 24 --model.patch_size 4 --model.embed_dim 16 --model.depth 2"
        " --model.num_heads 2 --model.predictor_embed_dim 8 --masks.min_keep 1 --optim.warmup_epochs 0.1"
        " --train.steps 2 --train.batch_size 8 --train.device cpu --loader.workers 0 --resume overwrite",
        "evaluate": " --workers 0 --device cpu",
        "features": " --workers 0 --device cpu",
        "finetune": " --epochs 1 --warmup_epochs 0 --workers 0 --device cpu",
        "report": " --device cpu",
    }
    for command in commands:
        command = command.replace("LABELLED", "PATH").replace("NEW", "PATH/test")
        program, name, *arguments = shlex.split(command)
        arguments = [name, *shlex.split(small.get(name, "")), *arguments]  # a flag wins over a recipe before it
        if "onnx" in arguments and importlib.util.find_spec("onnxscript") is None:
            continue
        assert program == "ijepa-fast"
        assert cli.main(arguments) == 0, (command, capsys.readouterr().err)
    capsys.readouterr()
    pytest.importorskip("sklearn")
    (block,) = blocks("classifier.md", "python")
    exec(compile(block, "docs/classifier.md", "exec"), {})
    answers = capsys.readouterr().out.split("\n")[:-1]
    assert len(answers) == 10 and all(answer.endswith((" ant", " bee")) for answer in answers)


def test_official_page():
    accelerate, loop = blocks("official.md", "python")
    assert "official.accelerate()" in accelerate  # run by test_interop_official_accelerate.py, as are the commands
    for block in blocks("official.md", ""):
        assert re.search(r"accelerate-official PATH/TO/ijepa -- --fname \S+", block)
    names = {}
    exec(compile(loop, "docs/official.md", "exec"), names)
    assert names["loss"].isfinite() and names["step"] == 2
    for name in re.findall(r"`(\w+)`", (DOCS / "official.md").read_text()):
        if name.startswith(("Mask", "Device", "Warmup", "Cosine", "Vision", "init_", "apply_", "load_", "save_")):
            assert hasattr(official, name), name
