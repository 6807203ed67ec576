"""Loggers: callbacks that hand the metrics, settings and pictures of a run to the tools people look at them with."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

from ijepa_fast.config import LOGGERS, as_dict, flatten
from ijepa_fast.run.callbacks import Callback
from ijepa_fast.run.files import write_json
from ijepa_fast.run.folder import LOGGED_RUNS, PICTURES

PROJECT = "ijepa_fast"
"""Project of wandb and experiment of mlflow where the environment names none."""


class Logger(Callback):
    """Base class of the loggers: without one that fails, the run goes on."""

    optional = True

    def __str__(self) -> str:
        return type(self).__name__.lower()


def loggers(names: tuple[str, ...]) -> list[Callback]:
    """The loggers that the setting ``log`` names."""
    kinds = dict(zip(LOGGERS, (TensorBoard, Csv, Wandb, MLflow), strict=True))
    return [kinds[name]() for name in names]


def _pictures(run: Any) -> list[Path]:
    return [run.folder / name for name in PICTURES if (run.folder / name).exists()]


def _figures(summary: dict) -> dict[str, float]:
    """The numbers of a summary by dotted names, such as after.knn."""
    return {name: v for name, v in flatten(summary).items() if isinstance(v, (int, float))}


def _known(run: Any, tool: str) -> str | None:
    """The name under which a tool knows the run that is continued; None for a new one."""
    path = run.folder / LOGGED_RUNS
    return json.loads(path.read_text(encoding="utf-8")).get(tool) if run.done and path.exists() else None


def _remember(run: Any, tool: str, name: str) -> None:
    path = run.folder / LOGGED_RUNS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | {tool: name})


class TensorBoard(Logger):
    """Event files in ``tensorboard/`` of the run's folder."""

    def on_start(self, run: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of the resume step itself were written before the run stopped.
        self._events = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.done + 1 if run.done else None)

    def on_log(self, run: Any, metrics: dict) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._events.add_scalar(name, value, metrics["step"])

    def on_end(self, run: Any, summary: dict) -> None:
        import numpy as np
        from PIL import Image

        for path in _pictures(run):
            with Image.open(path) as image:
                self._events.add_image(path.stem, np.asarray(image.convert("RGB")), run.done, dataformats="HWC")

    def close(self) -> None:
        if hasattr(self, "_events"):
            self._events.close()


class Csv(Logger):
    """``metrics.csv`` in the run's folder: a line for each log interval, empty where a figure was not taken."""

    def on_start(self, run: Any) -> None:
        self._path, self._columns = run.folder / "metrics.csv", []
        self._write(run.records)

    def on_log(self, run: Any, metrics: dict) -> None:
        if metrics.keys() - set(self._columns):
            self._write(run.records)
        else:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(metrics)

    def _write(self, records: list[dict]) -> None:
        self._columns = list(dict.fromkeys(name for record in records for name in record))
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(records)


class Wandb(Logger):
    """Weights & Biases: project, mode, account and folder are those of its environment variables."""

    def on_start(self, run: Any) -> None:
        import wandb

        known = _known(run, "wandb")
        self._wandb, self._run = wandb, wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.name),
            config=as_dict(run.config),
            id=known,
            resume="allow" if known else None,
        )  # fmt: skip
        # Steps of ours as the axis: wandb's own cannot go back to the step that a run is continued from.
        self._run.define_metric("*", step_metric="step")
        _remember(run, "wandb", self._run.id)

    def on_log(self, run: Any, metrics: dict) -> None:
        self._run.log(metrics)

    def on_end(self, run: Any, summary: dict) -> None:
        self._run.summary.update(_figures(summary))
        if pictures := _pictures(run):
            self._run.log({"step": run.done} | {path.stem: self._wandb.Image(str(path)) for path in pictures})

    def close(self) -> None:
        if hasattr(self, "_run"):
            self._run.finish()


class MLflow(Logger):
    """MLflow: server and experiment are those of its environment variables."""

    def on_start(self, run: Any) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        self._id = _known(run, "mlflow")
        if self._id is not None:
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        name = os.environ.get("MLFLOW_RUN_NAME", run.folder.name)
        self._id = self._client.create_run(number, run_name=name).info.run_id
        settings = [Param(name, str(value)) for name, value in flatten(run.config).items()]
        self._client.log_batch(self._id, params=settings)
        _remember(run, "mlflow", self._id)

    def on_log(self, run: Any, metrics: dict) -> None:
        self._log({name: value for name, value in metrics.items() if name != "step"}, metrics["step"])

    def on_end(self, run: Any, summary: dict) -> None:
        self._log(_figures(summary), run.done)
        for path in _pictures(run):
            self._client.log_artifact(self._id, str(path))
        self._client.set_terminated(self._id)
        self._id = None

    def _log(self, figures: dict, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        if getattr(self, "_id", None) is not None:
            self._client.set_terminated(self._id, "KILLED")
