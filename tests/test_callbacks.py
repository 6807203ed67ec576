"""Callbacks and loggers: when they are called, what they are given, and that a run outlives them."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

import ijepa_fast
from ijepa_fast.command_line import run_config, run_parser
from ijepa_fast.config import RunConfig, from_dict
from ijepa_fast.run.callbacks import Callbacks
from ijepa_fast.run.folder import remove_run
from ijepa_fast.train import Stopped, pretrain
from tests.tiny import tiny_run


class Recorder(ijepa_fast.Callback):
    def __init__(self, end_at=None, stop_at=None):
        self.events, self.end_at, self.stop_at = [], end_at, stop_at

    def on_start(self, run):
        self.events.append(("start", run.done, run.total_steps))

    def on_step(self, run, result):
        self.events.append(("step", run.done, float(result.losses.total)))
        if run.done == self.stop_at:
            run.stop._set()

    def on_log(self, run, metrics):
        assert run.records[-1] == metrics
        self.events.append(("log", metrics["step"]))
        return metrics["step"] == self.end_at

    def on_save(self, run, path):
        assert path.exists()
        self.events.append(("save", path.name))

    def on_end(self, run, summary):
        assert summary == json.loads((run.folder / "summary.json").read_text())
        self.events.append(("end", summary["steps"]))

    def close(self):
        self.events.append(("close",))

    def of(self, *kinds):
        return [event for event in self.events if event[0] in kinds]


@pytest.fixture
def config(data, tmp_path):
    config = tiny_run(str(data), str(tmp_path / "run"))
    return replace(config, log=("csv",), evaluation=replace(config.evaluation, results="none"))


def test_events_come_in_order(config):
    seen = Recorder()
    summary = pretrain(config, callbacks=[seen])
    steps, every = summary["steps"], config.train.log_every
    assert seen.events[0] == ("start", 0, steps) and seen.events[-2:] == [("end", steps), ("close",)]
    assert [done for _, done, _ in seen.of("step")] == list(range(1, steps + 1))
    assert [done for _, done in seen.of("log")][:-1] == list(range(every, steps, every))
    assert seen.of("save")[-1][1].startswith("step_")
    pretrain(config, callbacks=[again := Recorder()])
    assert not again.events  # nothing was left to do
    (Path(config.output) / "summary.json").unlink()  # as if it had been killed during the evaluation
    pretrain(config, callbacks=again)
    assert [event[0] for event in again.events] == ["start", "end", "close"]


def test_a_callback_ends_the_training_which_can_be_continued(config):
    every = config.train.log_every
    summary = pretrain(config, callbacks=[Recorder(end_at=every)])
    assert summary["steps"] == every < config.train.steps
    seen = Recorder()
    whole = pretrain(config, callbacks=[seen])
    assert seen.events[0][:2] == ("start", every) and whole["steps"] > every


def test_close_is_called_after_signals_and_errors(config):
    seen = Recorder(stop_at=1)
    with pytest.raises(Stopped):
        pretrain(config, callbacks=[seen])
    assert seen.events[-1] == ("close",) and not seen.of("end")

    class Failing(Recorder):
        def on_step(self, run, result):
            raise ArithmeticError("mine")

    seen = Failing()
    with pytest.raises(ArithmeticError, match="mine"):
        pretrain(config, callbacks=[seen])
    assert seen.events[-1] == ("close",)


def test_one_that_cannot_be_closed_keeps_no_other_open():
    class Failing(Recorder):
        def close(self):
            raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        Callbacks([Failing(), seen := Recorder()]).call("close")
    assert seen.events == [("close",)]


def test_what_is_no_callback_is_refused_before_anything_is_done(config):
    with pytest.raises(ValueError, match="must be objects of ijepa_fast.Callback, got <function"):
        pretrain(config, callbacks=lambda run: None)
    assert not Path(config.output).exists()


def test_loggers_are_named_checked_and_old_runs_have_the_default():
    assert RunConfig().log == ("tensorboard",) and from_dict({"log": ["csv", "wandb"]}).log == ("csv", "wandb")
    assert RunConfig(log="csv, mlflow, csv").log == ("csv", "mlflow")
    assert RunConfig(log="none").log == from_dict({"log": None}).log == ()
    with pytest.raises(ValueError, match="log must name some of tensorboard, csv, wandb, mlflow, or none; got 'wand'"):
        RunConfig(log="wand")


@pytest.mark.parametrize("typed", ["csv,wandb", "[csv, wandb]", "--config"])
def test_loggers_as_typed(typed, tmp_path):
    (tmp_path / "mine.yaml").write_text("log: [csv, wandb]\n")
    typed = ["--config", str(tmp_path / "mine.yaml")] if typed == "--config" else ["--log", typed]
    config, _ = run_config(run_parser("pretrain", ""), typed)
    assert config.log == ("csv", "wandb")
    assert run_config(run_parser("pretrain", ""), [*typed, "--log", "none"])[0].log == ()


def test_csv_has_what_the_jsonl_has_after_a_resume_too(config):
    with pytest.raises(Stopped):
        pretrain(config, callbacks=[Recorder(stop_at=config.train.log_every + 1)])
    pretrain(config)
    folder = Path(config.output)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == records
    remove_run(folder)
    assert not (folder / "metrics.csv").exists()


def test_tensorboard_has_pictures_and_keeps_the_point_at_the_resume_step(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    every = config.train.log_every
    config = replace(config, log=("tensorboard",), evaluation=replace(config.evaluation, results="pictures"))
    with pytest.raises(Stopped):
        pretrain(config, callbacks=[Recorder(stop_at=every)])
    pretrain(config)
    events = EventAccumulator(str(Path(config.output) / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in Path(config.output, "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("loss")] == [record["step"] for record in records]
    assert set(events.Tags()["images"]) == {"masks", "curves", "pca"}


def stand_in(monkeypatch, fail=None):
    """A module wandb that records what it is told, and raises in the function ``fail``."""
    told = []

    class Run:
        id = "abc"

        def __init__(self):
            self.summary = {}

        def __getattr__(self, name):
            def call(*arguments, **settings):
                if name == fail:
                    raise ConnectionError("the server is away")
                told.append((name, arguments[0] if arguments else settings))

            return call

    def init(**settings):
        if fail == "init":
            raise ConnectionError("the server is away")
        told.append(("init", settings))
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.Image = init, str
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_is_told_settings_metrics_and_pictures_and_resumes(config, monkeypatch):
    told = stand_in(monkeypatch)
    config = replace(config, log=("wandb",), evaluation=replace(config.evaluation, results="pictures"))
    with pytest.raises(Stopped):
        pretrain(config, callbacks=[Recorder(stop_at=config.train.log_every)])
    pretrain(config)
    first, second = (settings for name, settings in told if name == "init")
    assert first["name"] == "run" and first["project"] == "ijepa_fast" and first["id"] is None
    assert first["config"]["train"]["batch_size"] == config.train.batch_size
    assert second["id"] == "abc" and second["resume"] == "allow"
    logged = [values for name, values in told if name == "log"]
    records = [json.loads(line) for line in Path(config.output, "metrics.jsonl").read_text().splitlines()]
    assert logged[:-1] == records
    assert logged[-1].keys() == {"step", "masks", "curves", "pca"}
    assert [name for name, _ in told].count("finish") == 2


@pytest.mark.parametrize("fail", ["init", "log", "finish", None])
def test_a_logger_that_fails_says_so_once_and_the_run_goes_on(config, monkeypatch, caplog, fail):
    if fail is None:
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        stand_in(monkeypatch, fail)
    summary = pretrain(replace(config, log=("wandb", "csv")))
    assert summary["steps"] and (Path(config.output) / "metrics.csv").exists()
    said = [record.message for record in caplog.records if "the logger" in record.message]
    assert len(said) == 1 and said[0].startswith("the logger wandb fails and is left out from here on: ")
    assert ("the server is away" in said[0]) == (fail is not None)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(config, tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    settings = ['log=["wandb"]', 'evaluation.results="pictures"']
    command = [sys.executable, "tests/run_tiny.py", config.data, config.output, *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the logger" not in done.stderr, done.stderr
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert list(folder.glob("*.wandb")) and list(folder.rglob("pca*.png"))
    assert json.loads(Path(config.output, "logged_runs.json").read_text())["wandb"] in folder.name


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_offline(config, tmp_path, monkeypatch, caplog):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = replace(config, log=("mlflow",), evaluation=replace(config.evaluation, results="pictures"))
    with pytest.raises(Stopped):
        pretrain(config, callbacks=[Recorder(stop_at=config.train.log_every)])
    pretrain(config)
    assert "the logger" not in caplog.text
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("ijepa_fast").experiment_id])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == str(config.train.batch_size)
    records = [json.loads(line) for line in Path(config.output, "metrics.jsonl").read_text().splitlines()]
    losses = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "loss")}
    assert losses == pytest.approx({record["step"]: record["loss"] for record in records})
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"masks.png", "curves.png", "pca.png"}
