"""The loop as a user meets it: what a run leaves, exact resume after any kind of end, and refusals."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ijepa_fast import train
from ijepa_fast.attention.dispatch import BACKENDS, BackendUnavailable
from ijepa_fast.data import TrainLoader
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.model.fp8 import Fp8Linear
from ijepa_fast.plots.run import draw_run
from ijepa_fast.run import checkpoint
from ijepa_fast.run.build import check_batches, hint_at_options
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.step.train_step import TrainStep
from ijepa_fast.train import NotFinite, Stopped, pretrain
from ijepa_fast.weights.runs import load_run
from tests.image_files import bad_files, write_folder
from tests.tiny import tiny_run

RUN_TINY = Path(__file__).parent / "run_tiny.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    pretrain(tiny_run(data, folder))
    return folder


def final(folder) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.find(Path(folder)))


def metrics(folder) -> list[dict]:
    """What was recorded, but for the time that it took."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_share")} for line in lines]


def assert_same_end(folder, straight):
    ours, expected = final(folder), final(straight)
    assert ours.step == expected.step == 12
    assert metrics(folder) == metrics(straight)
    assert ours.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert torch.equal(ours.tensors[name], value), name


def test_a_run_leaves_what_it_should(straight):
    names = {path.name for path in straight.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json"}
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for key in ("loss", "lr", "weight_decay", "momentum", "grad_norm", "images_per_second", "data_wait_share"):
        assert isinstance(lines[-1][key], float), key
    for key in ("context_tokens_per_image", "std", "rank", "rank_centered", "knn", "bad_files"):
        assert key in lines[-1]
    assert 0 <= lines[-1]["data_wait_share"] <= 1
    assert lines[-1]["epoch"] == 6
    assert checkpoint.list_steps(straight / "checkpoints") == [10, 12]
    assert json.loads((straight / "summary.json").read_text())["steps"] == 12
    model, config, step = load_run(straight)
    assert step == 12 and config.model.embed_dim == 16
    assert torch.equal(model.target_encoder.norm.weight, final(straight).tensors["model.target_encoder.norm.weight"])


def test_before_and_after_and_pictures(data, tmp_path, caplog):
    config = tiny_run(data, tmp_path / "run", steps=4)
    with caplog.at_level("INFO", logger="ijepa_fast"):
        evaluation = replace(config.evaluation, results="all", images=(16, 10_000))
        summary = pretrain(replace(config, evaluation=evaluation))
    assert [message for message in caplog.messages if "evaluating" in message] == [
        "evaluating the untrained encoder by k-NN and linear probe (16 training images, 10 test images), "
        "before the first step",
        "evaluating the trained encoder by k-NN and linear probe (16 training images, 10 test images)",
    ]
    assert summary["before"].keys() == summary["after"].keys() == {"knn", "probe", "rank"}
    assert summary["pixels"].keys() == {"knn", "probe"}
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    for picture in ("curves.png", "masks.png", "pca.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")


def test_images_without_classes_are_enough(tmp_path):
    write_folder(tmp_path / "photos", 9, classes=())
    config = tiny_run(tmp_path / "photos", tmp_path / "run", steps=3)
    config = replace(config, evaluation=replace(config.evaluation, results="figures"))
    summary = pretrain(config)
    assert summary["steps"] == 3 and summary["loss"] > 0
    assert summary["before"].keys() == summary["after"].keys() == {"rank"} and "pixels" not in summary


def test_bad_files_are_reported_in_the_log_and_in_the_summary(tmp_path, caplog):
    write_folder(tmp_path / "train", 20)
    (tmp_path / "train" / "ant" / "broken.png").write_bytes(bad_files()["truncated.png"])
    config = tiny_run(tmp_path, tmp_path / "run")
    config = replace(config, loader=replace(config.loader, max_bad_share=0.5))
    with caplog.at_level("INFO", logger="ijepa_fast.run.log"):
        summary = pretrain(config)
    assert re.search(r"step 12/12: loss \d+\.\d{4}, [\d.]+ img/s, .*, 1 damaged file skipped", caplog.text)
    assert re.search(r"about \d+ s to go: 7 steps of [\d.e-]+ s, by the first ones", caplog.text)
    assert list(summary["bad_files"]) == [str(tmp_path / "train" / "ant" / "broken.png")]


def test_a_batch_that_cannot_be_loaded_ends_the_run_after_the_steps_before_it(data, straight, tmp_path, monkeypatch):
    """And the run goes on from its checkpoint to the same end."""
    load, count = TrainLoader.__iter__, 0

    def failing(self):
        for number, batch in enumerate(load(self)):
            if number == 7:
                raise OSError("the disk is gone")
            yield batch

    def counting(self, *arguments, **settings):
        nonlocal count
        count += 1
        return run(self, *arguments, **settings)

    run = TrainStep.__call__
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(TrainLoader, "__iter__", failing)
        patch.setattr(TrainStep, "__call__", counting)
        pretrain(tiny_run(data, tmp_path / "run"))
    assert count == 7 and checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [5, 7]
    pretrain(tiny_run(data, tmp_path / "run"))
    assert_same_end(tmp_path / "run", straight)


def test_attention_chosen_for_training_is_not_needed_afterwards(data, tmp_path, monkeypatch):
    """A checkpoint is looked at on other machines, in fp32 and on the CPU, as the untrained encoder of pictures is."""
    config = tiny_run(data, tmp_path / "run", steps=4)
    pretrain(replace(config, step=replace(config.step, attention="reference")))
    monkeypatch.setattr(BACKENDS["reference"], "refuse", lambda request: "is for training")
    model, config, _ = load_run(tmp_path / "run")
    assert config.step.attention == "reference"
    model.target_encoder(torch.zeros(1, 3, 24, 24))
    sources = open_sources(str(data))
    draw_run(config, model.target_encoder, sources, tmp_path / "run")
    with pytest.raises(BackendUnavailable, match="is for training"):
        model.target_encoder.use_attention("reference")
        model.target_encoder(torch.zeros(1, 3, 24, 24))


@pytest.mark.parametrize("crash_at", [3, 5, 9, 11])
def test_resume_after_a_crash_is_exact(data, straight, tmp_path, monkeypatch, crash_at):
    run = TrainStep.__call__

    def crashing(self, images, step, first_image=0, **settings):
        if step == crash_at:
            raise KeyboardInterrupt
        return run(self, images, step, first_image, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", crashing)
        pretrain(tiny_run(data, tmp_path / "run"))
    pretrain(tiny_run(data, tmp_path / "run"))
    assert_same_end(tmp_path / "run", straight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 12 and steps == sorted(set(steps))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_and_stop_and_the_run_continues_exactly(data, straight, tmp_path, monkeypatch, number):
    run = TrainStep.__call__

    def signalled(self, images, step, first_image=0, **settings):
        if step == 6:
            os.kill(os.getpid(), number)
        return run(self, images, step, first_image, **settings)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 7 of 12"):
        patch.setattr(TrainStep, "__call__", signalled)
        pretrain(tiny_run(data, tmp_path / "run"))
    assert signal.getsignal(number) is before
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints")[-1] == 7
    pretrain(tiny_run(data, tmp_path / "run"))
    assert_same_end(tmp_path / "run", straight)


def test_a_second_interrupt_ends_the_run_at_once(data, straight, tmp_path, monkeypatch, capfd):
    run = TrainStep.__call__

    def interrupted(self, images, step, first_image=0, **settings):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            assert "saved first; Ctrl-C again stops at once" in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)
        return run(self, images, step, first_image, **settings)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", interrupted)
        pretrain(tiny_run(data, tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [5]
    pretrain(tiny_run(data, tmp_path / "run"))
    assert_same_end(tmp_path / "run", straight)


def test_an_ignored_interrupt_stays_ignored(data, tmp_path, monkeypatch):
    """As in a job that a shell has put into the background."""
    run = TrainStep.__call__

    def interrupted(self, images, step, first_image=0, **settings):
        os.kill(os.getpid(), signal.SIGINT)
        return run(self, images, step, first_image, **settings)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert pretrain(tiny_run(data, tmp_path / "run", steps=2))["steps"] == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("ranks", "device"), [(1, "cpu"), (2, "cuda")])
def test_capture_is_for_one_gpu(data, tmp_path, ranks, device):
    config = tiny_run(data, tmp_path / "run", device="auto", capture=True)
    with pytest.raises(ValueError, match=f"step.capture needs one GPU.* got device {device}, {ranks} ranks"):
        check_batches(config, SimpleNamespace(world_size=ranks, device=torch.device(device)))


def test_a_second_stream_is_for_gpus(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", device="auto", overlap_target=True)
    with pytest.raises(ValueError, match="step.overlap_target needs a GPU, got device cpu"):
        check_batches(config, SimpleNamespace(world_size=1, device=torch.device("cpu")))


@pytest.mark.parametrize(
    "blocks",
    ["fused", *(pytest.param(blocks, marks=pytest.mark.slow) for blocks in ("compile", "fused+compile"))],
)
def test_compiled_and_fused_blocks_train_the_same(data, straight, tmp_path, blocks):
    """With inductor, in fp32: fused kernels round otherwise, and Adam's first steps have the sign of a gradient."""
    torch._dynamo.reset()  # what other tests compiled of the same code counts towards dynamo's limit
    pretrain(tiny_run(data, tmp_path / "run", blocks=blocks))
    lines = [(path / "metrics.jsonl").read_text().splitlines()[-1] for path in (tmp_path / "run", straight)]
    other, eager = (json.loads(line) for line in lines)
    assert other["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert other["context_tokens_per_image"] == eager["context_tokens_per_image"]


@pytest.mark.parametrize(("every", "monitored"), [(1, 12), (5, 3), (100, 1)])
def test_features_are_watched_at_some_steps_alone(data, tmp_path, monkeypatch, every, monitored):
    """The others compute no row that nobody reads; the monitors get the features of all patches."""
    run, watched = TrainStep.__call__, []

    def spying(*call, all_targets):
        watched.append(all_targets)
        return run(*call, all_targets=all_targets)

    monkeypatch.setattr(TrainStep, "__call__", spying)
    monkeypatch.setattr(train, "MONITOR_EVERY", every)
    pretrain(tiny_run(data, tmp_path / "run"))
    assert watched == [step % every == 0 for step in range(12)]
    assert final(tmp_path / "run").tensors["health.features"].shape == (8 * monitored, 16)


def test_precision_options_are_put_to_work_and_leave_the_same_files(data, tmp_path):
    options = {"plain": {}, "fp8": {"fp8_targets": True}, "wide": {"wide_residual": True}}
    ends = {}
    for name, chosen in options.items():
        pretrain(tiny_run(data, tmp_path / name, precision="bf16", **chosen))
        ends[name] = final(tmp_path / name).tensors
        assert not any(isinstance(module, Fp8Linear) for module in load_run(tmp_path / name)[0].modules())
    for name in ("fp8", "wide"):
        assert ends[name].keys() == ends["plain"].keys()
        assert all(value.dtype == ends["plain"][key].dtype for key, value in ends[name].items())
        assert any(not torch.equal(value, ends["plain"][key]) for key, value in ends[name].items())
    with pytest.raises(CheckpointError, match=r"step.fp8_targets \(True -> False\)"):
        pretrain(tiny_run(data, tmp_path / "fp8", precision="bf16"))


def test_widths_that_fp8_cannot_have_are_refused_before_anything_is_written(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", precision="bf16", fp8_targets=True)
    with pytest.raises(ValueError, match="FP8 needs widths that are multiples of 16"):
        pretrain(replace(config, model=replace(config.model, embed_dim=24)))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_trained_again_and_says_so(straight, data, monkeypatch, caplog):
    monkeypatch.setattr(TrainStep, "__call__", lambda *_: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        summary = pretrain(tiny_run(data, straight))
    assert summary["steps"] == 12
    assert "all 12 steps are done; to train it for longer, change train.epochs or train.steps alone" in caplog.text
    assert f"to train anew, give another output folder, or remove the run in {straight}" in caplog.text


def test_changed_settings_on_resume(data, tmp_path, caplog):
    config = tiny_run(data, tmp_path / "run")
    pretrain(config)
    with pytest.raises(CheckpointError, match=r"other settings: optim.lr \(0.001 -> 0.5\), seed \(0 -> 3\)"):
        pretrain(replace(config, seed=3, optim=replace(config.optim, lr=0.5)))
    with caplog.at_level("INFO"):
        pretrain(replace(config, train=replace(config.train, keep=5)))
    assert "train.keep changed from 2 to 5" in caplog.text


def test_settings_that_are_newer_than_a_run_had_their_defaults(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", precision="bf16")
    pretrain(config)
    state = final(tmp_path / "run")
    del state.extra["settings"]["step.fp8_targets"]
    checkpoint.save(tmp_path / "run" / "checkpoints", state, keep=1)
    pretrain(config)
    with pytest.raises(CheckpointError, match=r"step.fp8_targets \(False -> True\)"):
        pretrain(replace(config, step=replace(config.step, fp8_targets=True)))


def test_of_a_damaged_checkpoint_and_a_whole_one_the_whole_one_is_continued(data, straight, tmp_path, caplog):
    config = tiny_run(data, tmp_path / "run")
    pretrain(config)
    newest = checkpoint.find(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:200])
    (tmp_path / "run" / "summary.json").unlink()
    pretrain(config)
    assert "is damaged" in caplog.text and "continuing from step 10 instead" in caplog.text
    assert_same_end(tmp_path / "run", straight)
    assert newest.with_name(newest.name + ".damaged").stat().st_size == 200


def test_damaged_checkpoints_alone_are_an_error_not_a_restart(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", keep=1)
    pretrain(config)
    newest = checkpoint.find(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        pretrain(config)
    assert newest.stat().st_size == 200


def test_a_non_finite_loss_ends_the_run_with_its_step(data, tmp_path, monkeypatch):
    run = TrainStep.__call__

    def exploding(self, images, step, first_image=0, **settings):
        if step == 6:
            with torch.no_grad():
                self.model.predictor.predictor_proj.bias[0] = float("nan")
        return run(self, images, step, first_image, **settings)

    monkeypatch.setattr(TrainStep, "__call__", exploding)
    with pytest.raises(NotFinite, match="loss of step 6 is not finite"):
        pretrain(tiny_run(data, tmp_path / "run"))
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [5]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_size": 64}, "64"),
        ({"accumulate": 3}, "cannot be split into 1 ranks x 3 micro-batches"),
    ],
)
def test_impossible_batches_are_refused_before_anything_is_written(data, tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny_run(data, tmp_path / "run", **train))
    assert not (tmp_path / "run").exists()


def start(data, output, *settings):
    command = [sys.executable, str(RUN_TINY), str(data), str(output), *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(data, straight, tmp_path):
    """SIGKILL while starting, training, saving and evaluating; the last start is left alone."""
    rng = random.Random(0)
    evaluated = ['evaluation.results="figures"', "train.save_every=1"]
    for _ in range(20):
        process = start(data, tmp_path / "run", *evaluated)
        if rng.random() < 0.8:
            # Wait for a step or two, then strike within the time that a step with its save takes.
            for _ in range(rng.randint(1, 2)):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.06))
        else:
            time.sleep(rng.uniform(1, 4))
        process.kill()
        process.wait()
    process = start(data, tmp_path / "run", *evaluated)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_terminated_process_exits_with_its_own_code(data, straight, tmp_path):
    process = start(data, tmp_path / "run")
    process.stdout.readline()
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert 1 <= checkpoint.list_steps(tmp_path / "run" / "checkpoints")[-1] < 12
    assert start(data, tmp_path / "run").wait(timeout=120) == 0
    assert_same_end(tmp_path / "run", straight)


def test_an_interrupt_of_the_whole_group_stops_the_process_and_not_its_workers_first(data, straight, tmp_path):
    """A terminal sends Ctrl-C to the run and to its loader workers at once."""
    process = start(data, tmp_path / "run", "loader.workers=2")
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert 1 <= checkpoint.list_steps(tmp_path / "run" / "checkpoints")[-1] < 12
    pretrain(tiny_run(data, tmp_path / "run"))
    assert_same_end(tmp_path / "run", straight)


@pytest.mark.parametrize(
    ("device", "train", "said"),
    [("cuda", {}, True), ("cuda", {"blocks": "fused", "precision": "bf16"}, False), ("cpu", {}, False)],
)
def test_a_run_on_a_gpu_is_told_of_options_if_none_is_on(device, train, said, caplog):
    with caplog.at_level("INFO"):
        hint_at_options(tiny_run("none", "none", **train), torch.device(device))
    assert ("ijepa-fast fastest" in caplog.text) == said
