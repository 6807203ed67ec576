"""What a run folder says about its run; whatever is missing or damaged is named, not fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ijepa_fast.downstream.results import cells
from ijepa_fast.run import checkpoint as checkpoints


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as its folder tells.

    Attributes:
        folder: of the run.
        config: nested settings as config.yaml holds them; empty without one.
        metrics: records of metrics.jsonl, each with a finite number "step", ascending as they stand.
        before: figures of the encoder before the first step, and "pixels" and "colours"; empty if they were not taken.
        summary: what a finished run wrote, else None.
        checkpoint_step: steps done at the newest checkpoint, None without one.
        environment: name -> version, of the last start; empty if it was not recorded.
        evaluation: rows of ``downstream.results.COLUMNS``, of ``ijepa-fast evaluate``.
        problems: files and lines that could not be read, in words.
    """

    folder: Path
    config: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    before: dict = field(default_factory=dict)
    summary: dict | None = None
    checkpoint_step: int | None = None
    environment: dict = field(default_factory=dict)
    evaluation: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """Steps done, by the latest that the folder knows of."""
        steps = [self.metrics[-1]["step"] if self.metrics else 0, self.checkpoint_step or 0]
        return int(max(steps + [number((self.summary or {}).get("steps")) or 0]))

    @property
    def total_steps(self) -> int | None:
        """Length of the run, None where neither settings nor metrics tell."""
        train = self.config.get("train")
        train = train if isinstance(train, dict) else {}
        if steps := number(train.get("steps")):
            return int(steps)
        epochs, (newest,) = number(train.get("epochs")), self.metrics[-1:] or ({},)
        if epochs and number(newest.get("epoch")):
            return max(1, round(epochs * newest["step"] / newest["epoch"]))
        return None

    @property
    def start(self) -> str:
        """What the encoder was before the first step."""
        return "initial" if self.config.get("init") else "untrained"

    def series(self, key: str, unit: float = 1.0) -> list[tuple[float, float]]:
        """(step, value * unit) of the records with a finite value."""
        points = ((record["step"], number(record.get(key))) for record in self.metrics)
        return [(step, value * unit) for step, value in points if value is not None]


def read_record(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ValueError: it is no folder, or holds neither config.yaml nor metrics.jsonl.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a run" + ("" if folder.exists() else ": it does not exist"))
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ValueError(f"{folder} holds no run: it has neither config.yaml nor metrics.jsonl")
    problems: list[str] = []
    steps = checkpoints.list_steps(folder / "checkpoints")
    return RunRecord(
        folder,
        config=_mapping(folder / "config.yaml", _yaml_or_json, problems) or {},
        metrics=_records(folder / "metrics.jsonl", problems),
        before=_mapping(folder / "before.json", json.loads, problems) or {},
        summary=_mapping(folder / "summary.json", json.loads, problems),
        checkpoint_step=steps[-1] if steps else None,
        environment=_mapping(folder / "environment.json", json.loads, problems) or {},
        evaluation=_evaluation(folder / "evaluation" / "evaluation.json", problems),
        problems=problems,
    )


def _evaluation(path: Path, problems: list[str]) -> list[tuple[str, ...]]:
    try:
        return cells({"tasks": {}} | (_mapping(path, json.loads, problems) or {}))
    except (KeyError, TypeError, AttributeError, ValueError):
        problems.append(f"{path.name} is not what ijepa-fast evaluate writes")
        return []


def number(value: object) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _yaml_or_json(text: str) -> object:
    # A run started from Python writes JSON, and YAML would read its 1e-06 as a string.
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.safe_load(text)


def _mapping(path: Path, parse: Callable[[str], object], problems: list[str]) -> dict | None:
    if not path.is_file():
        return None
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no settings or figures, but {str(value)[:80]!r}")
        return None
    return value


def _records(path: Path, problems: list[str]) -> list[dict]:
    if not path.is_file():
        return []
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and number(record.get("step")) is not None:
            records.append(record)
        else:
            damaged += 1
    if damaged:
        problems.append(f"{damaged} of {damaged + len(records)} lines of {path.name} cannot be read")
    return records
