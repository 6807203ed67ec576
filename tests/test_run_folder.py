"""Whose a folder is: a run removes and overwrites its own files only, and leaves a folder of others alone."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from ijepa_fast import cli
from ijepa_fast.config import RunConfig, as_dict, from_dict, read_recipe
from ijepa_fast.run import checkpoint
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.run.folder import claim, holds_run, remove_run
from ijepa_fast.train import pretrain
from tests.image_files import write_folder
from tests.tiny import tiny_run


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_modes(data, tmp_path, caplog):
    config = tiny_run(data, tmp_path / "run", steps=4)
    with pytest.raises(CheckpointError, match="resume is 'require', but"):
        pretrain(replace(config, resume="require"))
    assert not (tmp_path / "run").exists()
    pretrain(config)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run.*--resume overwrite"):
        pretrain(replace(config, resume="never"))
    assert contents(tmp_path) == before
    with caplog.at_level("INFO"):
        pretrain(replace(config, resume="overwrite", seed=1))
    assert f"removed the run in {tmp_path / 'run'}, saved after step 4: " in caplog.text
    state = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert state.step == 4 and state.extra["settings"]["seed"] == 1


def test_never_also_refuses_checkpoints_without_settings(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", steps=4)
    pretrain(config)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="already holds a run"):
        pretrain(replace(config, resume="never"))


def test_all_that_a_run_writes_is_removed_and_nothing_else(data, tmp_path):
    folder = tmp_path / "run"
    config = tiny_run(data, folder, steps=4)
    pretrain(replace(config, evaluation=replace(config.evaluation, results="all")))
    (folder / "metrics.jsonl.partial").touch()
    (folder / "checkpoints" / "step_000000009.partial").touch()
    remove_run(folder)
    assert not list(folder.iterdir())

    pretrain(config)
    mine = ["thesis.tex", "config.yml", "checkpoints/best.pt", "tensorboard/notes.txt", "pictures/masks.png"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    remove_run(folder)
    assert contents(folder) == {folder / name: b"mine" for name in mine}


def test_a_folder_of_checkpoints_that_is_a_link_stays_one(data, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    config = tiny_run(data, tmp_path / "run", steps=4)
    pretrain(config)
    remove_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    assert not list((tmp_path / "disk").iterdir())


def test_figures_of_a_start_that_saved_nothing_are_kept_for_the_same_settings_alone(data, tmp_path):
    folder = tmp_path / "run"
    config = tiny_run(data, folder, steps=4)
    pretrain(config)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    (folder / "before.json").write_text("{}")
    assert claim(replace(config, train=replace(config.train, log_every=1)), "") is None
    assert (folder / "before.json").exists()
    assert claim(replace(config, seed=1), "") is None
    assert not (folder / "before.json").exists()


@pytest.mark.parametrize("settings", ["lr: 0.1\nmodel: vit\n", "model: [\n", "", "\x00", '{"model": {"depth": 3}}'])
@pytest.mark.parametrize("resume", ["auto", "overwrite"])
def test_a_folder_with_settings_of_others_is_refused_untouched(data, tmp_path, settings, resume):
    (tmp_path / "config.yaml").write_text(settings)
    (tmp_path / "masks.png").write_text("my picture")
    with pytest.raises(CheckpointError, match="config.yaml was not written by a run.*another output folder"):
        pretrain(replace(tiny_run(data, tmp_path), resume=resume))
    assert contents(tmp_path) == {
        tmp_path / "config.yaml": settings.encode(),
        tmp_path / "masks.png": b"my picture",
    }


def test_records_of_others_are_not_written_over(data, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="holds metrics.jsonl but no run"):
        pretrain(tiny_run(data, tmp_path))
    assert contents(tmp_path) == {tmp_path / "metrics.jsonl": b"{}\n"}


def test_settings_of_a_run_are_known_in_both_forms_and_of_older_versions(tmp_path):
    written = as_dict(RunConfig())
    del written["step"]
    assert not holds_run(tmp_path) and not holds_run(tmp_path / "nowhere")
    for text in (json.dumps(written), yaml.safe_dump(written)):
        (tmp_path / "config.yaml").write_text(text)
        assert holds_run(tmp_path)


def test_an_import_leaves_a_folder_with_settings_of_others_alone(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("lr: 0.1\n")
    assert cli.main(["import", str(tmp_path / "weights.pth"), "--out", str(tmp_path)]) == 1
    assert "was not written by a run" in capsys.readouterr().err
    assert contents(tmp_path) == {tmp_path / "config.yaml": b"lr: 0.1\n"}


def test_an_interrupted_demo_continues_when_it_is_started_again(data, tmp_path, caplog):
    """The recipe's own settings of the folder, at the size of a test."""
    demo = from_dict(read_recipe("demo"))
    config = replace(tiny_run(data, tmp_path / "run"), resume=demo.resume)
    pretrain(config)
    newest = checkpoint.find(tmp_path / "run")
    expected = checkpoint.load(newest).tensors
    newest.unlink()  # as if it had been stopped after step 10
    (tmp_path / "run" / "summary.json").unlink()
    with caplog.at_level("INFO"):
        assert pretrain(config)["steps"] == 12
    assert "continuing" in caplog.text and "at step 10 of 12" in caplog.text
    continued = checkpoint.load(newest).tensors
    assert continued.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(continued[name], expected[name])]


def test_other_images_are_counted_in_the_refusal(tmp_path):
    images = write_folder(tmp_path / "images", 20)
    config = tiny_run(images, tmp_path / "run", steps=4)
    pretrain(config)
    damaged = sorted(images.rglob("*.png"))[3]
    content = damaged.read_bytes()
    damaged.unlink()
    with pytest.raises(CheckpointError, match=r"20 of them, and .* now has 19\. .* bring back .*damaged ones too"):
        pretrain(config)
    damaged.write_bytes(content + b"0")
    with pytest.raises(CheckpointError, match=r"20 as well, but names or sizes of files .* have changed"):
        pretrain(config)
    with pytest.raises(CheckpointError, match=r"folder:20:\w+, .* now is rendered-textures"):
        claim(config, "rendered-textures-1")
    damaged.write_bytes(content)
    assert pretrain(config)["steps"] == 4
