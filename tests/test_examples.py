"""Every script of examples/ runs, at tiny size, and does what it says."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from image_files import smooth_image
from rendered_scenes import trained_encoder, write_boxes
from safetensors.torch import load_file

from ijepa_fast.command_line import run_config, run_parser
from ijepa_fast.weights.encoder_file import save_encoder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script as `python examples/NAME ARGUMENTS` would, in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"\bloss:? ([\d.]+)", printed)]


def test_plain_loop(run, tmp_path):
    printed = run("plain_loop.py", "--steps", 21, "--save", "model.safetensors")
    first, last = losses(printed)[0], losses(printed)[-1]
    assert last < 0.95 * first
    assert "features [4, 64, 64]" in printed and (tmp_path / "model.safetensors").exists()


def test_own_dataset_and_its_resume(run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        smooth_image(40, 40, seed=i).save(folder / f"{i}.png")
    common = (folder, "--steps", 6, "--batch-size", 4)
    assert "3 of 6 steps" in run("own_dataset.py", *common, "--save", "a.safetensors", "--stop-after", 3)
    assert "6 of 6 steps" in run("own_dataset.py", *common, "--save", "a.safetensors")
    run("own_dataset.py", *common, "--save", "b.safetensors")
    resumed, whole = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_transformers_encoder(run, tmp_path):
    printed = run("transformers_encoder.py", "--folder", "hf")
    differences = re.findall(r"(?:features|transformers): ([\d.e-]+)$", printed, re.MULTILINE)
    assert len(differences) == 2 and all(float(value) < 1e-5 for value in differences)
    assert "packed set: [10, 32]" in printed and (tmp_path / "hf" / "preprocessor_config.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_lightning_trainer(run):
    printed = run("lightning_trainer.py", "--epochs", 1, "--root", "logs")
    assert "updates of the target encoder 8" in printed and "val/loss" in printed
    assert list(Path("logs").rglob("*.ckpt"))


def test_official_trainer(run):
    printed = run("official_trainer.py", "--steps", 11, "--save", "official.pth.tar")
    assert len(losses(printed)) == 2 and losses(printed)[1] < losses(printed)[0]
    saved = torch.load("official.pth.tar", weights_only=True)
    assert {"encoder", "predictor", "target_encoder", "opt", "epoch"} <= saved.keys()


def test_pieces(run):
    printed = run("pieces.py", "--steps", 21)
    assert losses(printed)[-1] < losses(printed)[0]


@pytest.mark.slow
def test_the_notebook_from_the_first_cell_to_the_last(monkeypatch, tmp_path, capsys):
    """The code of its cells, in their order, with few images and steps in place of those that its second cell names."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "own_images.ipynb").read_text())["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    small = {
        "model.embed_dim": 16,
        "model.depth": 1,
        "model.num_heads": 2,
        "model.predictor_embed_dim": 8,
        "model.predictor_depth": 1,
        "train.steps": 4,
        "train.batch_size": 8,
        "evaluation.images": (20, 20),
    }
    names = {}
    for number, block in enumerate(code):
        exec(compile(block.replace("(split, 1000)", "(split, 24)"), f"cell {number}", "exec"), names)
        if number == 0:
            names["SETTINGS"] |= small
    printed = capsys.readouterr().out
    assert names["summary"]["steps"] == 4 and names["step"] == 4
    assert "pixels " in printed and "before " in printed and "after " in printed
    assert (tmp_path / "neighbours.png").exists() and (tmp_path / "runs" / "notebook" / "pca.png").exists()


def test_no_script_is_left_out():
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"images.py"}
    tested = set(re.findall(r'run\("([a-z_]+\.py)"', Path(__file__).read_text()))
    assert scripts == tested


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torchvision", "faster_coco_eval")),
    reason="torchvision or faster-coco-eval is not installed",
)
def test_detection_learns_boxes_and_continues(run, tmp_path):
    write_boxes(tmp_path / "coco", 200, 60)
    save_encoder(tmp_path / "encoder.safetensors", trained_encoder())
    flags = ["encoder.safetensors", "--data", "coco", "--size", 32, "--channels", 32, "--batch-size", 8, "--lr", 2e-3]
    flags += ["--rois", 32, "--freeze", "--workers", 0, "--epochs", 6, "--out", "detector.pt"]
    printed = run("detection.py", *flags)
    assert float(re.search(r"box AP50: ([\d.]+)", printed)[1]) > 0.5
    again = run("detection.py", *flags)  # nothing is left to train
    assert "epoch" not in again and again in printed


def test_kubernetes_job_trains_with_settings_that_exist():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    arguments = container["args"]
    config, _ = run_config(run_parser("pretrain", ""), arguments[arguments.index("pretrain") + 1 :])
    assert config.train.parallel == "hsdp" and config.train.async_save
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_submitit_job_hands_its_arguments_on_and_requeues(run, monkeypatch):
    submitted, commands = [], []

    class Executor:
        def __init__(self, folder):
            pass

        def update_parameters(self, **parameters):
            assert parameters["nodes"] == 2 and parameters["timeout_min"] == 90

        def submit(self, job):
            submitted.append(job)
            return SimpleNamespace(job_id="7")

    environment = SimpleNamespace(export=lambda set_cuda_visible_devices: None)
    helpers = SimpleNamespace(TorchDistributedEnvironment=lambda: environment)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor, helpers=helpers))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    assert "job 7" in run("submitit_run.py", "--nodes", 2, "--hours", 1.5, "--", "--config", "demo")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("os.system", commands.append)
    expected = ["pretrain", "--config", "demo"]
    monkeypatch.setattr("ijepa_fast.cli.main", lambda arguments: 75 if arguments == expected else 1)
    submitted[0]()
    monkeypatch.setenv("RANK", "1")
    submitted[0]()  # ends without an error
    assert commands == ["scontrol requeue 7"]
