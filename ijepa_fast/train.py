"""The training loop: from a configuration to a folder with a trained encoder, its figures and its pictures."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from ijepa_fast.config import RunConfig, as_dict
from ijepa_fast.configure import configure, refuse_in_workers
from ijepa_fast.data import DevicePrefetcher, LoaderError, StopRequested
from ijepa_fast.evaluate.encoder import evaluate, evaluated_on
from ijepa_fast.evaluate.health import mean_cosine
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.plots.run import draw_run
from ijepa_fast.ranks import ranks
from ijepa_fast.run import folder as run_folder
from ijepa_fast.run.callbacks import Callback, Callbacks
from ijepa_fast.run.checkpoint import Checkpoint
from ijepa_fast.run.files import write_json
from ijepa_fast.run.log import ESTIMATED_BY, RunLog, heard, known
from ijepa_fast.run.loggers import loggers
from ijepa_fast.start import MONITOR_EVERY, Run, begin, setup, with_precision
from ijepa_fast.step.train_step import StepResult
from ijepa_fast.weights.runs import about_run, load_run, training_tensors, whole_encoder

log = logging.getLogger(__name__)

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
        run = setup(me.from_main(with_precision(config, me) if me.is_main else None), me)
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
