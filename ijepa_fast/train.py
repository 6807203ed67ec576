"""The training loop: from a configuration to a folder with a trained encoder, its figures and its pictures."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.config import RunConfig, as_dict, flatten
from ijepa_fast.data import DevicePrefetcher
from ijepa_fast.data.datasets import Sources, open_sources, train_loader
from ijepa_fast.data.survey import announce
from ijepa_fast.evaluate import HealthBuffer, OnlineKNN
from ijepa_fast.evaluate.encoder import draw_pictures, judge
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.ranks import Ranks, ranks
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run import folder as run_folder
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointError
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_json, write_text
from ijepa_fast.run.log import RunLog
from ijepa_fast.step.build import make_optimizer, make_scaler, make_step, prepare, use_deterministic
from ijepa_fast.step.train_step import TrainStep
from ijepa_fast.weights.runs import load_run

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

load_trained = load_run
"""The name of ``weights.runs.load_run`` in earlier versions."""


class Stopped(Exception):
    """SIGTERM, SIGUSR1 or Ctrl-C ended the run early; a checkpoint was written and the run can be continued."""


class NotFinite(RuntimeError):
    """The loss became infinite or NaN."""


def pretrain(config: RunConfig, to_yaml: Callable[[RunConfig], str] | None = None) -> dict:
    """Run ``config``, or continue it from the newest checkpoint of its output folder.

    Args:
        config: everything about the run.
        to_yaml: how config.yaml is written; JSON (which is YAML too) without it.

    Returns:
        What ``summary.json`` holds: steps, seconds (of all starts together), bad files, and with labelled data "before"
        and "after" with "knn", "probe" and "rank", and "pixels".

    Raises:
        ValueError: settings that contradict each other or the data, before anything is written.
        CheckpointError: the output folder holds another run, or a damaged checkpoint.
        Stopped: by a signal (or Ctrl-C), after saving.
        KeyboardInterrupt: by a second Ctrl-C, or by one before the first step or after the last.
        NotFinite: the loss was not finite; the checkpoints on disk are from before.
    """
    with ranks(config.train.device) as me:
        sources = open_sources(config.data, config.evaluation.data, config.loader.max_pixels)
        if me.is_main:
            announce(*sources)
        return _run(config, me, sources, to_yaml or (lambda c: json.dumps(as_dict(c), indent=2)))


def _run(config: RunConfig, me: Ranks, sources: Sources, to_yaml: Callable[[RunConfig], str]) -> dict:
    folder, train = Path(config.output), config.train
    started = time.monotonic()
    use_deterministic(config)
    torch.manual_seed(config.seed)
    model = config.model.build(config.objective)
    sampler = MaskSampler(config.masks, model.context_encoder.grid)
    _check_batches(config, me)
    loader_settings = {
        "image_size": config.model.img_size,
        "global_batch": train.batch_size,
        "seed": config.seed,
        "rank": me.rank,
        "world_size": me.world_size,
        "workers": config.loader.workers,
        "timeout": config.loader.timeout,
        "scale": config.loader.crop_scale,
        "ratio": config.loader.crop_ratio,
        "flip": config.loader.flip,
        "max_bad_share": config.loader.max_bad_share,
        "epoch_images": config.loader.epoch_images,
        "shuffle": config.loader.shuffle,
        "pin_memory": me.device.type == "cuda",
    }
    steps_per_epoch = train_loader(sources.train, **loader_settings).steps_per_epoch
    total_steps = train.total_steps(steps_per_epoch)
    schedules = config.optim.schedules(total_steps, steps_per_epoch)

    per_rank = train.batch_size // me.world_size
    prepare(model, config, per_rank // train.accumulate, me.device)
    found = me.from_main(run_folder.claim(config, sources.train.fingerprint) if me.is_main else None)
    if me.is_main:
        if found is None:
            _hint_at_options(config, me.device)
        write_text(folder / "config.yaml", to_yaml(config))
        write_json(folder / "environment.json", describe())
        if config.evaluation.before_and_after and sources.test is not None and not (folder / "before.json").exists():
            log.info("judging the untrained encoder %s, before the first step", _judged_on(sources, config))
            write_json(folder / "before.json", judge(model.target_encoder, sources, config, baselines=True))
    optimizer = make_optimizer(model, config)
    scaler = make_scaler(config, me.device)
    health = HealthBuffer(config.model.embed_dim, device=me.device)
    start_step, bad_files, earlier_seconds = 0, {}, 0.0
    if found is not None:
        restored = checkpoints.load(found)
        start_step, bad_files = restored.step, restored.extra["bad_files"]
        earlier_seconds = restored.extra.get("seconds", 0.0)
        _restore(restored, model, optimizer, scaler, health)
        if start_step < total_steps:
            log.info("continuing %s at step %d of %d", folder, start_step, total_steps)
        elif me.is_main:
            again = run_folder.start_afresh(folder)
            log.info("%s is trained: all %d steps are done. To train anew, %s", folder, total_steps, again)
    wrapped = None
    if me.world_size > 1:
        devices = [me.device] if me.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    step_once = make_step(model, optimizer, sampler, schedules, config, scaler=scaler, wrapped=wrapped)
    knn = None
    if sources.train.labels is not None and config.evaluation.bank:
        bank = min(config.evaluation.bank, len(sources.train))
        knn = OnlineKNN(config.model.embed_dim, capacity=bank, device=me.device)

    def save(step: int) -> None:
        _raise_if_bad(step_once)
        if me.is_main:
            state = _state(step, config, sources, model, optimizer, scaler, health)
            state.extra["bad_files"] = bad_files
            state.extra["seconds"] = earlier_seconds + time.monotonic() - started
            checkpoints.save(folder / "checkpoints", state, train.keep)

    loader = train_loader(sources.train, **loader_settings, start_step=start_step, num_steps=total_steps - start_step)
    run_log = RunLog(folder, total_steps, start_step, folder.name) if me.is_main else None
    meter = _Meter(me, train.batch_size)
    stop = _StopFlag(speak=me.is_main)
    try:
        batches = iter(DevicePrefetcher(loader, me.device))
        for step in range(start_step, total_steps):
            with meter.waiting():
                batch = next(batches)
            monitored = step % config.evaluation.monitor_every == 0
            result = step_once(batch.images, step, me.rank * per_rank, all_targets=monitored)
            if monitored:
                health.push(result.pooled)
                if knn is not None:
                    knn.push(result.pooled, batch.labels, batch.indices)
            meter.add(result, per_rank)
            done = step + 1
            if run_log is not None:
                run_log.advance()
            if done % train.log_every == 0 or done == total_steps:
                _raise_if_bad(step_once)
                bad_files |= me.union(loader.bad)
                metrics = {"step": done, "epoch": done / steps_per_epoch, **meter.read()}
                if run_log is not None:
                    metrics |= {
                        "lr": schedules.lr_at(step),
                        "weight_decay": schedules.weight_decay_at(step),
                        "momentum": schedules.momentum_at(step),
                        "skipped": int(optimizer.skipped),
                        **health.report(),
                        "knn": knn.accuracy() if knn is not None else None,
                        "bad_files": len(bad_files),
                    }
                    run_log.write(metrics)
            stopped = me.any(stop.is_set)
            if stopped or done == total_steps or done % train.save_every == 0:
                save(done)
            if stopped and done < total_steps:
                raise Stopped(f"stopped by a signal after step {done} of {total_steps}; run again to continue")
    finally:
        stop.restore()
        if run_log is not None:
            run_log.close()
    summary = {}
    if me.is_main:
        seconds = earlier_seconds + time.monotonic() - started
        summary = _finish(config, model, sources, total_steps, seconds, bad_files)
    me.barrier()
    return summary


def _hint_at_options(config: RunConfig, device: torch.device) -> None:
    train, model = config.train, config.model
    switched_on = train.compile or train.fused or train.capture or train.overlap_target
    chosen = model.attention != "auto" or model.target_attention is not None
    if device.type == "cuda" and not (switched_on or chosen):
        log.info("`ijepa-fast fastest` finds out which options of the step are faster on this GPU")


def _check_batches(config: RunConfig, me: Ranks) -> None:
    train, group = config.train, config.masks.group_size
    if train.capture and (me.world_size > 1 or me.device.type != "cuda"):
        raise ValueError(f"train.capture is for one GPU, but this run has {me.world_size} ranks on {me.device.type}")
    if train.overlap_target and me.device.type != "cuda":
        raise ValueError(f"train.overlap_target needs a GPU, but this run is on {me.device.type}")
    share = me.world_size * train.accumulate
    if train.batch_size % share:
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be split into {me.world_size} ranks x "
            f"{train.accumulate} micro-batches"
        )
    if config.masks.context == "batch_min" and (train.batch_size // share) % group:
        raise ValueError(
            f"masks.group_size {group} does not divide the {train.batch_size // share} images of a micro-batch "
            f"({train.batch_size} over {me.world_size} ranks x {train.accumulate} micro-batches)"
        )
    if config.objective.regularised and train.accumulate > 1:
        log.warning("the variance-covariance term is taken over each of the %d micro-batches", train.accumulate)


def _names(model: IJEPA) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _state(step, config, sources, model, optimizer, scaler, health) -> Checkpoint:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= checkpoints.optimizer_tensors(optimizer, _names(model))
    tensors |= {"health.features": health.features(), "optimizer_skipped": optimizer.skipped}
    extra = {
        "settings": flatten(config),
        "config": as_dict(config),
        "data": sources.train.fingerprint,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    return Checkpoint(step, tensors, extra)


def _restore(state: Checkpoint, model, optimizer, scaler, health) -> None:
    try:
        model.load_state_dict(checkpoints.select(state.tensors, "model"))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights do not fit the model: {error}") from error
    checkpoints.load_optimizer_tensors(optimizer, _names(model), state.tensors)
    optimizer.skipped.copy_(state.tensors["optimizer_skipped"])
    if scaler is not None:
        scaler.load_state_dict(state.extra["scaler"])
    if len(state.tensors["health.features"]):
        health.push(state.tensors["health.features"].to(optimizer.skipped.device))


def _raise_if_bad(step_once: TrainStep) -> None:
    first = int(step_once.first_bad_step)
    if first >= 0:
        raise NotFinite(
            f"the loss of step {first} is not finite; nothing was updated from there on and the last checkpoint is "
            "from before. Lower optim.lr, set optim.max_grad_norm, or use train.precision fp32"
        )


def _finish(config: RunConfig, model: IJEPA, sources: Sources, steps: int, seconds: float, bad: dict) -> dict:
    folder = Path(config.output)
    path = folder / "summary.json"
    if path.exists() and json.loads(path.read_text()).get("steps") == steps:
        return json.loads(path.read_text())
    summary = {"steps": steps, "bad_files": bad}
    if (folder / "before.json").exists():
        before = json.loads((folder / "before.json").read_text())
        log.info("judging the trained encoder %s", _judged_on(sources, config))
        after = judge(model.target_encoder, sources, config)
        baselines = {name: before.pop(name) for name in ("pixels", "colours")}
        summary |= {"before": before, "after": after, **baselines}
    summary["seconds"] = round(seconds, 1)
    if config.evaluation.pictures:
        draw_pictures(config, model.target_encoder, sources, folder)
    write_json(path, summary)
    return summary


def _judged_on(sources: Sources, config: RunConfig) -> str:
    fitted = min(len(sources.train), config.evaluation.train_images)
    tested = min(len(sources.test), config.evaluation.test_images)
    return f"by k-NN and linear probe ({fitted} training images, {tested} test images)"


class _Meter:
    """Sums over a log interval, on the device; read only at its end."""

    def __init__(self, me: Ranks, global_batch: int):
        self.me, self.global_batch = me, global_batch
        self._clear()

    def _clear(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.sums: Tensor | None = None
        self.context = self.targets = self.images = 0

    def waiting(self) -> _Meter:
        return self

    def __enter__(self) -> None:
        self._from = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.waited += time.perf_counter() - self._from

    def add(self, result, images: int) -> None:
        values = torch.stack([*(value.float() for value in result.losses), result.grad_norm])
        self.sums = values if self.sums is None else self.sums + values
        self.context, self.targets = self.context + result.tokens[0], self.targets + result.tokens[1]
        self.steps, self.images = self.steps + 1, self.images + images

    def read(self) -> dict[str, float]:
        """Means over the interval and over ranks (every rank must call it), then start anew."""
        sums = self.sums / self.steps
        if self.me.world_size > 1:
            torch.distributed.all_reduce(sums)
            sums /= self.me.world_size
        total, prediction, variance, covariance, grad_norm = sums.tolist()
        seconds = time.perf_counter() - self.started
        metrics = {
            "loss": total,
            "loss_prediction": prediction,
            "loss_variance": variance,
            "loss_covariance": covariance,
            "grad_norm": grad_norm,
            "images_per_second": self.steps * self.global_batch / seconds,
            "data_wait_share": self.waited / seconds,
            "context_tokens_per_image": self.context / self.images,
            "target_tokens_per_image": self.targets / self.images,
        }
        self._clear()
        return metrics


class _StopFlag:
    """Set by SIGTERM, SIGUSR1 or the first Ctrl-C; the second Ctrl-C raises KeyboardInterrupt.

    Args:
        speak: whether this process says what a Ctrl-C does.
    """

    def __init__(self, speak: bool):
        self.is_set = False
        self._speak, self._process, self._interrupts = speak, os.getpid(), 0
        self._previous = {}
        handlers = dict.fromkeys(STOP_SIGNALS, self._set)
        # Who is started in the background by a shell ignores Ctrl-C, which is meant for others.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            handlers[signal.SIGINT] = self._interrupt
        for number, handler in handlers.items():
            try:
                self._previous[number] = signal.signal(number, handler)
            except ValueError:
                # Only the main thread may handle signals; in another one the caller decides.
                break

    def _set(self, *_) -> None:
        self.is_set = True

    def _interrupt(self, *_) -> None:
        if os.getpid() != self._process:
            # Some library's worker, forked from this process: the signal is not for it.
            return
        self.is_set = True
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self._speak:
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, which is saved first; Ctrl-C again stops at once\n")

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
