"""Everything that a run works with, and how it starts: anew, or from the newest checkpoint of its folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.config import RunConfig
from ijepa_fast.data import Source
from ijepa_fast.data.datasets import Sources, open_sources, train_loader
from ijepa_fast.data.survey import announce, measured
from ijepa_fast.evaluate import HealthBuffer, OnlineKNN
from ijepa_fast.evaluate.encoder import evaluate, evaluated_on
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.ranks import Ranks
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run import folder as run_folder
from ijepa_fast.run import sharded
from ijepa_fast.run.auto import resolved
from ijepa_fast.run.best import Best
from ijepa_fast.run.build import (
    check_batches,
    hint_at_options,
    make_optimizer,
    make_scaler,
    make_step,
    mesh_of,
    prepare,
    tell_what_starts,
    use_deterministic,
)
from ijepa_fast.run.callbacks import Callbacks
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointDamaged
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_json, write_text
from ijepa_fast.run.lengthening import length_before, refuse_shortening, tell_of_stretching
from ijepa_fast.run.meter import Meter
from ijepa_fast.run.saving import Saver
from ijepa_fast.run.signals import StopFlag
from ijepa_fast.step.sharding import fill, is_sharded
from ijepa_fast.step.train_step import TrainStep
from ijepa_fast.weights.any_format import start_from
from ijepa_fast.weights.runs import check_training, restore, whole_encoder

log = logging.getLogger(__name__)

MONITOR_EVERY = 8
"""Steps from one whose target features are kept for the online rank and k-NN to the next. The others leave out the rows
of the target encoder's last block that no prediction reads."""


@dataclass
class Run:
    """Everything that a run works with.

    Attributes:
        stop: whether a signal asked to stop.
        step: training step; made by ``begin``.
        callbacks: none on ranks but the first.
        records: metrics of all log intervals, of earlier starts too.
        knn: None without labels.
        done: steps done.
        saved: ``done`` at the newest checkpoint, -1 without one.
        loss: of the last log interval.
        origin: what was imported, where the run goes on from weights of elsewhere.
        best: which checkpoint is the best one.
        saver: writes checkpoints.
        seconds: of earlier starts.
    """

    config: RunConfig
    me: Ranks
    sources: Sources
    stop: StopFlag
    loader: object
    total_steps: int
    model: IJEPA
    optimizer: FusedAdamW
    scaler: torch.amp.GradScaler | None
    schedules: Schedules
    health: HealthBuffer
    knn: OnlineKNN | None
    meter: Meter
    best: Best
    saver: Saver
    step: TrainStep | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    records: list[dict] = field(default_factory=list)
    done: int = 0
    saved: int = -1
    loss: float | None = None
    origin: dict | None = None
    bad_files: dict = field(default_factory=dict)
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def images_per_rank(self) -> int:
        return self.config.train.batch_size // self.me.world_size


def with_precision(config: RunConfig, me: Ranks) -> RunConfig:
    """Where it is left to us, the precision of the run that is continued, else what the device multiplies."""
    if config.train.precision == "auto":
        before = run_folder.written_before(config, "train", "precision") or "auto"
        config = replace(config, train=replace(config.train, precision=before))
    return resolved(config, me.device)


def _with_mean_std(config: RunConfig, train: Source) -> RunConfig:
    """Where they are left to us, mean and standard deviation of the run that is continued, else of a sample."""
    if config.model.mean_std != "auto":
        return config
    before = run_folder.written_before(config, "model", "mean_std") or "auto"
    if before == "auto":
        before = measured(train, config.model.size, config.loader.workers)
        log.info("measured: --model.mean_std '%s'", [list(values) for values in before])
    return replace(config, model=replace(config.model, mean_std=tuple(map(tuple, before))))


def setup(config: RunConfig, me: Ranks) -> Run:
    """Open the data and make networks, optimizer and schedules. Nothing is written yet."""
    sources = open_sources(**config.images)
    if me.is_main:
        announce(*sources)
    config = me.from_main(_with_mean_std(config, sources.train) if me.is_main else None)
    use_deterministic(config)
    torch.manual_seed(config.seed)
    check_batches(config, me)
    divided = config.train.parallel != "ddp"
    # Of networks in shards the first rank alone has room for all; the others get their shares of what it has.
    with torch.device("cpu" if me.is_main or not divided else "meta"):
        model = config.model.build(config.objective)
    folder = Path(config.output).resolve()
    begins = config.resume == "overwrite" or not checkpoints.list_steps(folder / "checkpoints")
    judged = config.evaluation.figures and not (folder / "before.json").exists()
    if config.init is not None and (begins or judged) and (me.is_main or not divided):
        init = Path(config.init).resolve()
        if config.resume == "overwrite" and (init == folder or folder / "checkpoints" in (init, init.parent)):
            raise ValueError(f"resume overwrite would remove the weights of init, {config.init}; give another output")
        told = start_from(model, config.model, config.init)
        if me.is_main:
            log.info(told)
    stop = StopFlag(speak=me.is_main)
    loader = train_loader(
        sources.train,
        image_size=config.model.img_size,
        global_batch=config.train.batch_size,
        seed=config.seed,
        rank=me.rank,
        world_size=me.world_size,
        workers=config.loader.workers,
        scale=config.loader.crop_scale,
        ratio=config.loader.crop_ratio,
        flip=config.loader.flip,
        max_bad_share=config.loader.max_bad_share,
        epoch_images=config.loader.epoch_images,
        pin_memory=me.device.type == "cuda",
        stop=stop,
    )
    total_steps = config.train.total_steps(loader.steps_per_epoch)
    schedules = config.optim.schedules(total_steps, loader.steps_per_epoch)
    share = config.train.batch_size // me.world_size // config.train.accumulate
    whole = model.state_dict() if divided and me.is_main else {}
    prepare(model, config, share, me.device, mesh_of(config, me))
    if divided:
        fill(model, whole)
        del whole
    # Features of one log interval: those of older weights would lend a collapsed network their rank.
    pushed = config.train.batch_size // me.world_size * math.ceil(config.train.log_every / MONITOR_EVERY)
    knn, width = None, config.model.embed_dim
    if sources.train.labels is not None and config.evaluation.bank:
        knn = OnlineKNN(width, capacity=min(config.evaluation.bank, len(sources.train)), device=me.device)
    return Run(
        config=config,
        me=me,
        sources=sources,
        stop=stop,
        loader=loader,
        total_steps=total_steps,
        model=model,
        optimizer=make_optimizer(model, config),
        scaler=make_scaler(config, me.device),
        schedules=schedules,
        health=HealthBuffer(width, capacity=min(2048, max(128, pushed)), device=me.device),
        knn=knn,
        meter=Meter(me, config.train.batch_size),
        best=Best("rank" if knn is None else "knn"),
        saver=Saver(
            folder / "checkpoints",
            config.train.keep,
            me,
            shards=is_sharded(model) or config.train.async_save,
            background=config.train.async_save,
        ),
    )


def begin(run: Run, to_yaml: Callable[[RunConfig], str]) -> None:
    """Take over the output folder, and its newest checkpoint if there is one."""
    config, me, folder = run.config, run.me, run.folder
    state = None
    newest, changed = _changed_shards(folder / "checkpoints", me)
    if me.is_main:

        def check(state: Checkpoint, path: Path) -> None:
            wrong = changed if path == newest else sharded.changed(path) if path.is_dir() else []
            if wrong:
                raise CheckpointDamaged(
                    f"{path} has changed since it was written: the checksum of {wrong[0]} is another"
                )
            refuse_shortening(folder, state, run.loader.steps_per_epoch, run.total_steps)
            check_training(state, path, run.model, run.optimizer, run.scaler, run.total_steps)

        state = run_folder.claim(config, run.sources.train.fingerprint, check)
        # Whoever starts from this file continues the run; it must not say again that the run is to be removed.
        write_text(folder / "config.yaml", to_yaml(replace(config, resume="auto")))
        write_json(folder / "environment.json", describe())
        tell_what_starts(config, run.model, me, run.total_steps)
        if state is None:
            hint_at_options(config, me.device)
    # Every rank reads the checkpoint that the first one has chosen.
    judged = config.evaluation.figures and not (folder / "before.json").exists()
    step, judged = me.from_main((None if state is None else state.step, judged))
    if judged and (encoder := whole_encoder(run.model, run.config)) is not None and me.is_main:
        start = "untrained" if config.init is None else "initial"
        log.info("evaluating the %s encoder %s, before the first step", start, evaluated_on(run.sources, config))
        write_json(folder / "before.json", evaluate(encoder, run.sources, config, baselines=True))
    if step is not None:
        _continue(run, state, checkpoints.path_of(folder / "checkpoints", step))
    run.loader.start_at(run.done, run.total_steps - run.done)
    wrapped = None
    if me.world_size > 1 and not is_sharded(run.model):
        devices = [me.device] if me.device.type == "cuda" else None
        wrapped = DistributedDataParallel(run.model, device_ids=devices, broadcast_buffers=False)
    sampler = MaskSampler(config.masks, run.model.context_encoder.grid, channels=config.model.in_chans)
    run.step = make_step(
        run.model, run.optimizer, sampler, run.schedules, config, scaler=run.scaler, wrapped=wrapped
    )  # fmt: skip


def _changed_shards(folder: Path, me: Ranks) -> tuple[Path | None, list[str]]:
    """The newest checkpoint, and what ``sharded.changed`` says of it. Each rank looks at its part of the shards."""
    steps = checkpoints.list_steps(folder)
    newest = me.from_main(checkpoints.path_of(folder, steps[-1]) if steps else None)
    in_shards = newest is not None and newest.is_dir() and sharded.is_whole(newest)
    changed = sharded.changed(newest, me.rank, me.world_size) if in_shards else []
    return newest, sorted(me.union(dict.fromkeys(changed)))


def _continue(run: Run, state: Checkpoint | None, path: Path) -> None:
    state = restore(path, run.model, run.optimizer, run.scaler, state)
    run.done = run.saved = state.step
    run.bad_files, run.seconds = state.extra["bad_files"], state.extra.get("seconds", 0.0)
    run.origin = state.extra.get("imported") or state.extra.get("origin")
    run.best.scores, run.best.so_far = state.extra.get("scores", []), state.extra.get("best")
    if run.me.is_main and (run.best.so_far or {}).get("step") == run.done:
        checkpoints.keep_as_best(path)  # the save that found it may have been killed before
    tensors, device = state.tensors, run.me.device
    if len(features := tensors["health.features"]):
        run.health.push(features.to(device))
    # Files of earlier versions, and imported ones, have neither.
    if run.knn is not None and "knn.features" in tensors:
        run.knn.push(*(tensors[f"knn.{name}"].to(device) for name in ("features", "labels", "ids")))
    run.meter.restore(state.extra.get("interval"), device)
    if not run.me.is_main:
        return
    if run.done < run.total_steps:
        log.info("continuing %s at step %d of %d", run.folder, run.done, run.total_steps)
        before = length_before(state, run.loader.steps_per_epoch)
        if run.total_steps != before:
            (run.folder / "summary.json").unlink(missing_ok=True)
            then = run.config.optim.schedules(before, run.loader.steps_per_epoch)
            tell_of_stretching(run.done, then, run.schedules, before, run.total_steps)
    else:
        log.info(
            "%s is trained: all %d steps are done; %s; to train anew, %s",
            *(run.folder, run.total_steps, run_folder.go_on(run.folder), run_folder.start_afresh(run.folder)),
        )
