"""The folder of a run: which files a run writes there, what makes it a run's, and how a start takes it over."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ijepa_fast.config import RunConfig, as_dict, changes, flatten, present, present_sections
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointDamaged, CheckpointError

log = logging.getLogger(__name__)

RECORDS = ("environment.json", "before.json", "metrics.jsonl", "summary.json", "config.yaml")
"""What a run tells of itself."""

PICTURES = ("masks.png", "curves.png", "pca.png")
LOGGED_RUNS = "logged_runs.json"
"""The names under which wandb and mlflow know the run."""

RUN_FILES = (
    "checkpoints/step_*.safetensors",
    "checkpoints/step_*.partial",
    "checkpoints/step_*.damaged",
    "checkpoints/best.safetensors",
    "checkpoints/best.safetensors.partial",
    *(f"checkpoints/{name}/{file}" for name in ("step_*", "best*") for file in ("shard-*.safetensors", "about.json*")),
    "tensorboard/events.out.tfevents.*",
    "metrics.csv",
    LOGGED_RUNS,
    *PICTURES,
    *(f"{name}.partial" for name in RECORDS),
    # Last, and config.yaml at their end: a removal that is interrupted leaves what is still known to be a run.
    *RECORDS,
)
"""All that a run writes into its folder, as patterns; ``remove_run`` removes it in this order."""

FIGURES_DEPEND_ON = ("data", "seed", "init", "model", "objective", "loader", "evaluation")
"""Settings that change what before.json holds."""

LENGTH = ("train.epochs", "train.steps")
"""Settings that may be raised where a run goes on; whether they are, its trainer knows, which knows the epochs."""

_COUNTED = re.compile(r"(folder|shards|mixture|table):(\d+):")
"""Fingerprints that begin with the number of images."""


def start_afresh(folder: Path) -> str:
    """How to, in words: the end of messages about a folder that holds a run already."""
    return f"give another output folder, or remove the run in {folder} with --resume overwrite"


def go_on(folder: Path) -> str:
    """How to train a run for longer, or to begin another from its weights, in words."""
    return (
        "to train it for longer, change train.epochs or train.steps alone, and its schedules are stretched; to begin a "
        f"new run from its weights, add --init {folder} and give another --output"
    )


def holds_run(folder: Path) -> bool:
    """Whether there are a run's config.yaml or checkpoints in a folder.

    Raises:
        CheckpointError: it holds a config.yaml or other files of the names in ``RECORDS`` that no run wrote.
    """
    settings = folder / "config.yaml"
    if settings.exists() and _settings_of_run(settings) is None:
        raise CheckpointError(
            f"{settings} was not written by a run, which would write over it; give another output folder, or move it"
        )
    if settings.exists() or checkpoints.list_steps(folder / "checkpoints"):
        return True
    if strangers := [name for name in RECORDS if (folder / name).exists()]:
        raise CheckpointError(
            f"{folder} holds {', '.join(strangers)} but no run, which would write over that; give another output folder"
        )
    return False


def _settings_of_run(path: Path) -> dict | None:
    """The nested settings in a file with every section, as each run writes it; None for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
        try:
            # A run started from Python writes JSON.
            values = json.loads(text)
        except json.JSONDecodeError:
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError:
                return None
    except (OSError, UnicodeDecodeError):
        return None
    # Older runs have no section for the step.
    sections = {name for name, value in as_dict(RunConfig()).items() if isinstance(value, dict)} - {"step"}
    if not isinstance(values, dict):
        return None
    values = present_sections(values, strict=False)
    of_run = all(isinstance(values.get(name), dict) for name in sections)
    return values if of_run else None


def written_before(config: RunConfig, section: str, name: str) -> object:
    """A setting of the run that ``config`` continues, as its folder has it; None where none is continued."""
    folder = Path(config.output)
    if config.resume not in ("auto", "require") or not checkpoints.list_steps(folder / "checkpoints"):
        return None
    return (_settings_of_run(folder / "config.yaml") or {}).get(section, {}).get(name)


def remove_run(folder: Path) -> int:
    """Remove what a run wrote from its folder, and nothing else. Returns the number of files."""
    found = [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern)) if not path.is_dir()]
    for path in found:
        path.unlink()
    folders = {path.parent for path in found} | {folder / "checkpoints", folder / "tensorboard"}
    for inside in sorted(folders - {folder}, reverse=True):  # those inside of others first
        if inside.is_dir() and not inside.is_symlink() and not any(inside.iterdir()):
            inside.rmdir()
    return len(found)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, which is made if it is not there, for this process alone.

    The lock is on a file in it and ends with the process, however that ends. Where there are no locks (some network
    file systems), nothing is held.

    Raises:
        CheckpointError: another process holds it.
    """
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        with contextlib.ExitStack() as held:
            if file := _lock(path):
                held.callback(file.close)
                held.callback(_remove, path)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield
    finally:
        if not there and not any(folder.iterdir()):
            folder.rmdir()


def _remove(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows removes no open file; unlocked, it is in nobody's way
        path.unlink(missing_ok=True)


def _hold(file) -> None:
    """Lock an open file for this process, or raise OSError; not for loader workers, which are forked from it."""
    try:
        import fcntl
    except ImportError:  # Windows, where what is locked cannot be read: a byte behind the text, which others read
        import msvcrt

        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(path: Path):
    while True:
        file = path.open("a+")
        try:
            _hold(file)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
            file.close()  # whoever held it has removed it just now
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise CheckpointError(f"{path.parent} is in use by {holder}; give another output folder, or wait") from None
        except OSError:
            file.close()
            return None


def claim(
    config: RunConfig, data: str, check: Callable[[Checkpoint, Path], None] = lambda state, path: None
) -> Checkpoint | None:
    """Make sure the output folder is ours to write; the checkpoint to continue from, if there is one.

    A newest checkpoint that is damaged is put aside, loudly, for the newest one that is whole.

    Args:
        data: fingerprint of the training images.
        check: raises CheckpointDamaged for a checkpoint whose tensors the run cannot continue from.

    Raises:
        CheckpointError: the folder holds files of others, another run, damaged checkpoints alone, or no run where
            ``resume`` requires one. Nothing was touched then.
    """
    folder = Path(config.output)
    held, steps = holds_run(folder), checkpoints.list_steps(folder / "checkpoints")
    if held and config.resume == "never":
        raise CheckpointError(f"{folder} already holds a run; continue it (--resume auto), {start_afresh(folder)}")
    if held and config.resume == "overwrite":
        done = steps[-1] if steps else 0
        log.info("removed the run in %s, saved after step %d: %d files", folder, done, remove_run(folder))
        steps = []
    if not steps:
        if config.resume == "require":
            raise CheckpointError(f"resume is 'require', but {folder} holds no checkpoint")
        folder.mkdir(parents=True, exist_ok=True)
        _drop_figures_of_others(config, folder)
        return None
    damaged: dict[Path, CheckpointDamaged] = {}
    for step in reversed(steps):
        path = checkpoints.path_of(folder / "checkpoints", step)
        try:
            state = checkpoints.load(path, name_older=False, values=lambda _: False)
            checkpoints.check_run(state, path)
            _refuse_other_runs(state, config, data)
            check(state, path)
        except CheckpointDamaged as error:
            damaged[path] = error
            continue
        for bad, error in damaged.items():
            aside = bad.with_name(bad.name + ".damaged")
            log.warning("%s\nIt is now called %s; continuing from step %d instead", error, aside.name, step)
            if aside.is_dir():  # of an earlier time; a file is replaced, a folder would not be
                shutil.rmtree(aside)
            bad.replace(aside)
        return state
    raise next(iter(damaged.values()))


def _refuse_other_runs(state: Checkpoint, config: RunConfig, data: str) -> None:
    folder, extra = Path(config.output), state.extra
    # Settings that came into being since the run began had their defaults then.
    allowed, refused = changes(flatten(RunConfig()) | present(extra["settings"]), flatten(config))
    # Imported weights were not trained in any precision yet.
    open_still = {*LENGTH, *(["train.precision"] if extra["settings"].get("train.precision") == "auto" else [])}
    others = {name: change for name, change in refused.items() if name not in open_still}
    if others:
        listed = ", ".join(f"{name} ({old!r} -> {new!r})" for name, (old, new) in others.items())
        raise CheckpointError(
            f"{folder} holds a run with other settings: {listed}; {go_on(folder)}; else {start_afresh(folder)}"
        )
    if extra["data"] != data:
        raise CheckpointError(_other_images(folder, extra["data"], config.data, data))
    for name, (old, new) in allowed.items():
        if name != "resume":
            log.info("continuing with %s changed from %r to %r", name, old, new)
    if data.startswith("stream:") and "loader.workers" in allowed:
        old = allowed["loader.workers"][0]
        log.warning("the order of images from URLs depends on loader.workers; --loader.workers %s keeps it", old)


def _drop_figures_of_others(config: RunConfig, folder: Path) -> None:
    """Remove the figures of the untrained encoder if a start that saved nothing took them with other settings."""
    before, now = _settings_of_run(folder / "config.yaml"), as_dict(config)
    if before is not None and any(before.get(name) != now[name] for name in FIGURES_DEPEND_ON):
        (folder / "before.json").unlink(missing_ok=True)


def _other_images(folder: Path, before: str | None, path: str | None, now: str) -> str:
    """Why a run on the images of the fingerprint ``before`` does not continue on those of ``now``, in words."""
    if before is None:
        return f"{folder} holds weights that were imported for evaluation; import them with --data to train on"
    counts = [match[2] if (match := _COUNTED.match(text)) else None for text in (before, now)]
    if None in counts:
        differ = f"{before}, and {path} now is {now}"
    elif counts[0] == counts[1]:
        what = "files or weights of" if now.startswith("mixture") else "names or sizes of files in"
        differ = f"{counts[0]} as well, but {what} {path} have changed"
    else:
        differ = f"{counts[0]} of them, and {path} now has {counts[1]}"
    return (
        f"{folder} holds a run on other images: {differ}. The order of all images depends on each, so bring back those "
        f"that were there (damaged ones too: they are skipped), or {start_afresh(folder)}"
    )
