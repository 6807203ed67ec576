"""The training loop: from a configuration to a folder with a trained encoder, its figures and its pictures."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.config import RunConfig, as_dict
from ijepa_fast.configure import configure, refuse_in_workers
from ijepa_fast.data import DevicePrefetcher, LoaderError, Source, StopRequested
from ijepa_fast.data.datasets import Sources, open_sources, train_loader
from ijepa_fast.data.survey import announce, measured
from ijepa_fast.evaluate import HealthBuffer, OnlineKNN
from ijepa_fast.evaluate.encoder import evaluate, evaluated_on
from ijepa_fast.evaluate.health import mean_cosine
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.plots.run import draw_run
from ijepa_fast.ranks import Ranks, ranks
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run import folder as run_folder
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
from ijepa_fast.run.callbacks import Callback, Callbacks
from ijepa_fast.run.checkpoint import Checkpoint
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_json, write_text
from ijepa_fast.run.lengthening import length_before, refuse_shortening, tell_of_stretching
from ijepa_fast.run.log import ESTIMATED_BY, RunLog, heard, known
from ijepa_fast.run.loggers import loggers
from ijepa_fast.run.meter import Meter
from ijepa_fast.run.saving import Saver
from ijepa_fast.run.signals import StopFlag
from ijepa_fast.step.sharding import is_sharded
from ijepa_fast.step.train_step import StepResult, TrainStep
from ijepa_fast.weights.any_format import start_from
from ijepa_fast.weights.runs import about_run, check_training, load_run, restore, training_tensors, whole_encoder

log = logging.getLogger(__name__)

MONITOR_EVERY = 8
"""Steps from one whose target features are kept for the online rank and k-NN to the next. The others leave out the rows
of the target encoder's last block that no prediction reads."""

load_trained = load_run
"""The name of ``weights.runs.load_run`` in earlier versions."""


class Stopped(Exception):
    """SIGTERM, SIGUSR1 or Ctrl-C ended the run early; a checkpoint was written and the run can be continued."""


class NotFinite(RuntimeError):
    """The loss became infinite or NaN."""


def pretrain(
    config: RunConfig | Mapping | Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    to_yaml: Callable[[RunConfig], str] | None = None,
    **settings: object,
) -> dict:
    """Train an encoder, or continue the run from the newest checkpoint of its output folder.

    ``pretrain(data="PATH", output="runs/mine")`` chooses what fits the images and the machine.

    Args:
        config: a configuration, its settings as nested dicts, a YAML file, or the name of a recipe; without it, the
            settings of the run in the output folder, or those that fit the images.
        callbacks: called as ``run.callbacks.Callback`` says.
        to_yaml: how config.yaml is written; JSON (which is YAML too) without it.
        settings: any settings by their names, ``**{"train.steps": 500}``; they win over those in ``config``.

    Returns:
        What ``summary.json`` holds: steps, seconds (of all starts together), loss of the last log interval, bad files,
        "before" and "after" with the "rank" of features and, with labelled data, "knn" and "probe", and then "pixels"
        and "colours".

    Raises:
        ValueError: settings that contradict each other or the data, before anything is written.
        CheckpointError: the output folder holds another run, is in use, or has damaged checkpoints alone.
        OSError: the disk is full; the checkpoints on it are whole.
        Stopped: by a signal (or Ctrl-C), after saving.
        KeyboardInterrupt: by a second Ctrl-C, or by one before the first step or after the last.
        NotFinite: the loss was not finite; the checkpoints on disk are from before.
        RankLost: another rank ended, or did not answer for ``train.timeout`` minutes.
    """
    refuse_in_workers()
    given = Callbacks(callbacks).all  # checked before anything is done
    with heard(), ExitStack() as open_:
        config = configure(config, settings)
        me = open_.enter_context(ranks(config.train.device, timedelta(minutes=config.train.timeout)))
        # Hosts may differ: the first rank's choice is everybody's.
        run = setup(me.from_main(_with_precision(config, me) if me.is_main else None), me)
        if me.is_main:
            open_.enter_context(run_folder.locked(run.folder))
        begin(run, to_yaml or (lambda config: json.dumps(as_dict(config), indent=2)))
        if me.is_main:
            run_log = RunLog(run.folder, run.total_steps, run.done, run.folder.name)
            run.records = run_log.records
            run.loss = run.records[-1].get("loss") if run.records else None
            left = run.done < run.total_steps or _summary(run) is None
            others = [*loggers(run.config.log), *given] if left else []
            run.callbacks = Callbacks([run_log, *others])
            open_.callback(run.callbacks.call, "close")
            run.callbacks.call("on_start", run)
        with me.naming_the_lost():
            train(run)
            encoder = whole_encoder(run.model, run.config)
            summary = finish(run, encoder) if me.is_main else {}
            me.barrier()
        return summary


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


def _with_precision(config: RunConfig, me: Ranks) -> RunConfig:
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
    model = config.model.build(config.objective)
    check_batches(config, me)
    folder = Path(config.output).resolve()
    begins = config.resume == "overwrite" or not checkpoints.list_steps(folder / "checkpoints")
    judged = config.evaluation.figures and not (folder / "before.json").exists()
    if config.init is not None and (begins or judged):
        init = Path(config.init).resolve()
        if config.resume == "overwrite" and (init == folder or folder / "checkpoints" in (init, init.parent)):
            raise ValueError(f"resume overwrite would remove the weights of init, {config.init}; give another output")
        log.info(start_from(model, config.model, config.init))
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
    prepare(model, config, share, me.device, mesh_of(config, me))
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
    if me.is_main:

        def check(state: Checkpoint, path: Path) -> None:
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
    sampler = MaskSampler(config.masks, run.model.context_encoder.grid)
    run.step = make_step(
        run.model, run.optimizer, sampler, run.schedules, config, scaler=run.scaler, wrapped=wrapped
    )  # fmt: skip


def _continue(run: Run, state: Checkpoint | None, path: Path) -> None:
    state = restore(path, run.model, run.optimizer, run.scaler, state)
    run.done = run.saved = state.step
    run.bad_files, run.seconds = state.extra["bad_files"], state.extra.get("seconds", 0.0)
    run.origin = state.extra.get("imported") or state.extra.get("origin")
    run.best.scores, run.best.so_far = state.extra.get("scores", []), state.extra.get("best")
    tensors, device = state.tensors, run.me.device
    if len(features := tensors["health.features"]):
        run.health.push(features.to(device))
    # Files of earlier versions, and imported ones, have neither.
    if run.knn is not None and "knn.features" in tensors:
        run.knn.push(*(tensors[f"knn.{name}"].to(device) for name in ("features", "labels", "ids")))
    run.meter.restore(state.extra.get("interval"), device)
    if run.done < run.total_steps:
        log.info("continuing %s at step %d of %d", run.folder, run.done, run.total_steps)
        before = length_before(state, run.loader.steps_per_epoch)
        if run.me.is_main and run.total_steps != before:
            (run.folder / "summary.json").unlink(missing_ok=True)
            then = run.config.optim.schedules(before, run.loader.steps_per_epoch)
            tell_of_stretching(run.done, then, run.schedules, before, run.total_steps)
    elif run.me.is_main:
        log.info(
            "%s is trained: all %d steps are done; %s; to train anew, %s",
            *(run.folder, run.total_steps, run_folder.go_on(run.folder), run_folder.start_afresh(run.folder)),
        )


def train(run: Run) -> None:
    """Do the steps that are left."""
    config, me, stop = run.config, run.me, run.stop
    with stop:
        batches = iter(DevicePrefetcher(run.loader, me.device))
        first = run.done
        for step in range(first, run.total_steps):
            batch, failure = _next_batch(run, batches)
            # All ranks stop at the same step, whoever was told, and whoever has no images.
            if me.any(batch is None or stop()):
                _stop(run, failure)

            stop.now(f"step {step + 1}")
            # Features of all patches are computed only where they are read.
            monitored = step % MONITOR_EVERY == 0
            result = run.step(batch.images, step, me.rank * run.images_per_rank, all_targets=monitored)
            run.done = step + 1

            # Nothing here waits for the device but the log interval and the save.
            run.meter.add(result, run.images_per_rank)
            if monitored:
                _watch(run, result, batch)
            if step - first in (0, ESTIMATED_BY):
                result.losses.total.item()  # the device is done with the step now, and has not only been asked for it
            run.callbacks.call("on_step", run, result)
            end = run.done == run.total_steps
            if run.done % config.train.log_every == 0 or end:
                # A callback may end the run, on all ranks together.
                end |= me.from_main(_write_metrics(run))
            if run.done % config.train.save_every == 0 or end:
                save(run)
            if end:
                break
        run.saver.wait()
        _tell_of_saves(run)


def _next_batch(run: Run, batches: Iterator) -> tuple:
    """The next batch, or None if a signal came first or there is none to be had; and the error in the last case."""
    run.stop.now("the wait for images")
    try:
        with run.meter.waiting():
            return next(batches), None
    except StopRequested:
        return None, None
    except (OSError, RuntimeError) as error:
        return None, error


def _stop(run: Run, failure: Exception | None) -> None:
    """Save and end the run, on all ranks together; ``failure`` is why this one has no images."""
    failures = run.me.union({} if failure is None else {run.me.rank: str(failure)})
    if not failures or run.done > max(run.saved, 0):
        save(run)
    run.saver.wait()
    _tell_of_saves(run)
    if failure is not None:
        raise failure
    if failures:
        raise LoaderError("; ".join(f"no images on rank {rank}: {text}" for rank, text in sorted(failures.items())))
    raise Stopped(f"stopped by a signal after step {run.done} of {run.total_steps}; run again to continue")


def _watch(run: Run, result: StepResult, batch) -> None:
    run.health.push(result.pooled)
    if run.knn is not None:
        run.knn.push(result.pooled, batch.labels, batch.indices)


def _write_metrics(run: Run) -> bool:
    """Tell the callbacks of a log interval; whether one of them ends the run.

    Every rank must come here, because means are taken over all of them.
    """
    _raise_if_bad(run)
    run.saver.check()
    _tell_of_saves(run)
    run.bad_files |= run.me.union(run.loader.bad)
    metrics = {"step": run.done, "epoch": run.done / run.loader.steps_per_epoch, **run.meter.read()}
    if not run.me.is_main:
        return False
    metrics |= {
        "lr": run.schedules.lr_at(run.done - 1),
        "weight_decay": run.schedules.weight_decay_at(run.done - 1),
        "momentum": run.schedules.momentum_at(run.done - 1),
        "skipped": int(run.optimizer.skipped),
        **run.health.report(),
        "cosine": mean_cosine(run.health.features()[-run.images_per_rank :]),
        "knn": run.knn.accuracy() if run.knn is not None else None,
        "bad_files": len(run.bad_files),
    }
    run.loss = metrics["loss"]
    run.best.see(metrics)
    return run.callbacks.call("on_log", run, known(metrics))


def save(run: Run) -> None:
    """Write a checkpoint. Every rank must come here, because what the meter holds is a mean over all of them."""
    _raise_if_bad(run)
    measured = run.meter.state()
    run.saved = run.done
    if not run.me.is_main:
        if run.saver.shards:
            run.saver.save(Checkpoint(run.done, training_tensors(run.model, run.optimizer), {}), best=False)
        return
    tensors = training_tensors(run.model, run.optimizer) | {"health.features": run.health.features()}
    if run.knn is not None:
        tensors |= {f"knn.{name}": rows for name, rows in run.knn.rows().items()}
    regular = run.done % run.config.train.save_every == 0 or run.done == run.total_steps
    best = regular and run.best.is_beaten_at(run.done)
    extra = about_run(run.config, run.sources.train.fingerprint, run.scaler) | {
        "bad_files": run.bad_files | run.loader.bad,
        "seconds": _seconds(run),
        "interval": measured,
        "scores": run.best.scores,
        "best": run.best.so_far,
    }
    if run.origin:
        extra["origin"] = run.origin
    run.saver.save(Checkpoint(run.done, tensors, extra), best)
    _tell_of_saves(run)


def _tell_of_saves(run: Run) -> None:
    for path in run.saver.written():
        run.callbacks.call("on_save", run, path)


def finish(run: Run, encoder: VisionTransformer) -> dict:
    """Evaluate and draw what was trained, by its whole target encoder; the summary."""
    config, before = run.config, run.folder / "before.json"
    if (summary := _summary(run)) is not None:
        return summary
    summary = {"steps": run.done, "bad_files": run.bad_files, "loss": run.loss, "best": run.best.so_far}
    if before.exists():
        log.info("evaluating the trained encoder %s", evaluated_on(run.sources, config))
        figures = json.loads(before.read_text())
        baselines = {name: figures.pop(name) for name in ("pixels", "colours") if name in figures}
        after = evaluate(encoder, run.sources, config)
        summary |= {"before": figures, "after": after, **baselines}
    summary["seconds"] = round(_seconds(run), 1)
    if config.evaluation.pictures:
        draw_run(config, encoder, run.sources, run.folder)
    write_json(run.folder / "summary.json", summary)
    run.callbacks.call("on_end", run, summary)
    return summary


def _summary(run: Run) -> dict | None:
    """What summary.json holds, if it was written at this step."""
    path = run.folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get("steps") == run.done else None


def _seconds(run: Run) -> float:
    return run.seconds + time.monotonic() - run.started


def _raise_if_bad(run: Run) -> None:
    first = int(run.step.first_bad_step)
    if first >= 0:
        run.saver.wait()
        raise NotFinite(
            f"the loss of step {first} is not finite; nothing was updated from there on and the last checkpoint is "
            "from before. Lower optim.lr, set optim.max_grad_norm, or use train.precision fp32"
        )
