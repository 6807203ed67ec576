"""Replacing parts of the official code, tried on a small stand-in with its layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ijepa_fast import cli
from ijepa_fast.interop import official
from ijepa_fast.interop.official.launch import launch
from ijepa_fast.interop.official.replacements import REPLACEMENTS, CheckoutError

ROOT = Path(__file__).resolve().parents[1]

# Only the names and arguments are those of the official code; nothing here works before it is replaced.
STAND_IN = {
    "models/vision_transformer.py": "".join(
        f"def vit_{size}(patch_size=16, **kwargs): raise NotImplementedError\n"
        for size in ("tiny", "small", "base", "large", "huge", "giant")
    )
    + "def vit_predictor(**kwargs): raise NotImplementedError\n",
    "masks/multiblock.py": """
class MaskCollator:
    def __init__(self, input_size=(224, 224), patch_size=16, enc_mask_scale=(0.2, 0.8), pred_mask_scale=(0.2, 0.8),
                 aspect_ratio=(0.3, 3.0), nenc=1, npred=2, min_keep=4, allow_overlap=False):
        raise NotImplementedError
""",
    "masks/utils.py": "def apply_masks(x, masks): raise NotImplementedError\n",
    "utils/logging.py": "def grad_logger(named_params): raise NotImplementedError\n",
    "helper.py": """
import src.models.vision_transformer as vit
def init_opt(encoder, predictor, iterations_per_epoch, start_lr, ref_lr, warmup, num_epochs, wd=1e-6, final_wd=1e-6,
             final_lr=0.0, use_bfloat16=False, ipe_scale=1.25):
    raise NotImplementedError
def load_checkpoint(device, r_path, encoder, predictor, target_encoder, opt, scaler): raise NotImplementedError
""",
    "train.py": """
import json, os
import torch, torch.distributed as dist
from src.helper import init_opt, load_checkpoint, vit
from src.masks.multiblock import MaskCollator as Collator
from src.masks.utils import apply_masks

def main(args):
    encoder = vit.__dict__[args["meta"]["model_name"]](img_size=[24], patch_size=4)
    predictor = vit.vit_predictor(num_patches=36, embed_dim=192, predictor_embed_dim=12, depth=1, num_heads=3)
    collator = Collator(24, 4, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), 1, 4, 1)
    optimizer, _, schedule, decay = init_opt(encoder, predictor, 2, 1e-3, 1e-3, 0, 1)
    images, contexts, targets = collator([torch.randn(3, 24, 24) for _ in range(2)])
    encoder = torch.nn.parallel.DistributedDataParallel(encoder, static_graph=True)
    schedule.step(), decay.step()
    loss = (predictor(encoder(images, contexts), contexts, targets) - apply_masks(encoder(images), targets)).square()
    loss.mean().backward()
    optimizer.step()
    names = [type(x).__module__ for x in (encoder.module, predictor, collator, optimizer)]
    names.append(load_checkpoint.__module__)
    with open(os.path.join(args["logging"]["folder"], f"rank{dist.get_rank()}.json"), "w") as file:
        json.dump([names, dist.get_world_size(), os.environ["CUDA_VISIBLE_DEVICES"]], file)
""",
}
CONFIG = "data: {}\nmask: {}\noptimization: {}\nmeta: {model_name: vit_tiny}\nlogging: {folder: FOLDER}\n"


def write_checkout(root: Path, **changes: str) -> Path:
    for name, text in (STAND_IN | changes).items():
        file = root / "src" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A stand-in; whatever is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield write_checkout(tmp_path / "ijepa")
    forget()


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


def test_everything_is_replaced_also_where_it_was_imported_before(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    sys.path.insert(0, str(checkout))
    import src.train

    before = src.train.apply_masks
    replaced = official.accelerate()
    assert replaced == [f"{module}.{name}" for module, names in REPLACEMENTS.items() for name in names]
    assert len(replaced) == 12
    assert src.train.apply_masks is official.apply_masks is not before
    assert src.train.Collator is official.MaskCollator and src.train.init_opt is official.init_opt
    assert src.helper.vit.vit_giant is official.vit_giant
    assert official.accelerate(checkout) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"helper.py": "x = 1\n"}, "no init_opt of src/helper.py in .*not the official I-JEPA code"),
        (
            {"masks/utils.py": "def apply_masks(x, masks, concat=True): pass\n"},
            r"apply_masks of src/masks/utils.py in .* has an argument 'concat' that its replacement has not",
        ),
        (
            {"masks/utils.py": "def apply_masks(masks, x): pass\n"},
            r"an argument 'masks' that its replacement has not, or not there \(\(masks, x\) against \(x: ",
        ),
    ],
)
def test_a_changed_checkout_is_refused_before_anything_is_replaced(checkout, changes, message):
    write_checkout(checkout, **changes)
    with pytest.raises(CheckoutError, match=message):
        official.accelerate(checkout)
    import src.models.vision_transformer as vit

    assert vit.vit_tiny is not official.vit_tiny


def test_other_folders_are_refused(checkout, tmp_path):
    with pytest.raises(
        CheckoutError, match="is no checkout of the official I-JEPA code: it has no vision_transformer.py"
    ):
        official.accelerate(tmp_path)
    with pytest.raises(CheckoutError, match="`import src` finds nothing here"):
        official.accelerate()
    official.accelerate(checkout)
    with pytest.raises(CheckoutError, match="is already imported from"):
        official.accelerate(write_checkout(tmp_path / "second"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fname", "CONFIG", "--epochs", "3"], "has no arguments --epochs 3; it has --fname, --devices"),
        (["--fname", "CONFIG", "--devices", "cuda:0", "cpu"], "--devices must be like cuda:0 cuda:1, or cpu"),
        (["--fname", "CONFIG", "--devices", "gpu0"], "--devices must be like cuda:0 cuda:1, or cpu, got gpu0"),
        (["--fname", "nowhere.yaml"], "nowhere.yaml"),
        (["--fname", "configs/half.yaml"], "configs/half.yaml is no configuration of the official code"),
        (["--fname", "EMPTY"], "EMPTY is no configuration of the official code: it needs data, logging"),
    ],
)
def test_wrong_arguments_are_refused(checkout, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("CONFIG").write_text(CONFIG)
    Path("EMPTY").write_text("data: {}\n")
    (checkout / "configs").mkdir()
    (checkout / "configs" / "half.yaml").write_text(CONFIG.replace("folder", "tag"))
    with pytest.raises((ValueError, OSError), match=message):
        launch(checkout, arguments)


def test_the_command_explains_itself(capsys):
    assert cli.main(["accelerate-official", "PATH", "--fname", "CONFIG"]) == 2
    assert "accelerate-official PATH/TO/ijepa -- --fname CONFIG" in capsys.readouterr().err
    assert cli.main(["accelerate-official", "/nowhere", "--", "--fname", str(ROOT / "pyproject.toml")]) == 1
    assert "pyproject.toml is not YAML" in capsys.readouterr().err
    for command in ("accelerate-official", "export", "import"):
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        assert f"usage: ijepa-fast {command}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_training_script_runs_on_two_processes_with_our_parts(tmp_path, launcher):
    checkout, folder = write_checkout(tmp_path / "ijepa"), tmp_path / "made" / "here"
    (tmp_path / "config.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    command = ["-m", "ijepa_fast", "accelerate-official", str(checkout), "--", "--fname", str(tmp_path / "config.yaml")]
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    else:
        command += ["--devices", "cpu", "cpu"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "ijepa_fast takes the place of src.models.vision_transformer.vit_tiny" in done.stderr
    package = "ijepa_fast.interop.official"
    modules = [f"{package}.models"] * 2 + [f"{package}.collate", "ijepa_fast.optim.adamw", f"{package}.checkpoint"]
    for rank in range(2):
        assert json.loads((folder / f"rank{rank}.json").read_text()) == [modules, 2, ""]
    assert not torch.distributed.is_initialized()
