"""``ijepa-fast fastest``: which options of the training step are fastest on this machine, for one configuration.

An option changes how a step is computed, not what it learns. Each is tried in a process of its own, on the same weights
and random images, and held to the step as configured by gradients, losses, movement of weights and skipped updates
before its time counts; a way that does not run here, or does not train the same, is named and not chosen. Options
(``options.py``) are tried one group after another, each on top of the fastest found so far; the winner is timed once
more beside the step as configured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.bench.child_process import Failed, call_apart
from ijepa_fast.bench.measure import SCHEMA, Times, repeat, save
from ijepa_fast.bench.steps import LIMITS, differences, disagreement, gradients_of, random_step, rate
from ijepa_fast.config import RunConfig, flatten, value_text, with_settings
from ijepa_fast.run.auto import resolved
from ijepa_fast.run.build import use_deterministic
from ijepa_fast.run.environment import machine
from ijepa_fast.step.options import Machine, alternatives, blocks_on, machine_of
from ijepa_fast.step.train_step import PRECISION_DTYPES, TrainStep

Settings = dict[str, Any]
"""Dotted names of settings -> values, as flags have them."""

GAIN = 1.02
"""Times faster than the fastest so far that an option must be: less is noise, and no reason for another option."""
CYCLE = 4
"""Steps of a round. Every round of every way has the same masks, so that none has fewer tokens."""
WARM_UP = 3
"""Rounds that are not timed. A captured step runs, then captures, then replays; all of it is compared."""
LEAST = 5
"""Rounds that are timed."""
LONGEST = 900.0
"""Seconds after which a way is given up, beside those that are timed. torch.compile takes minutes for a large model."""
MOST_IMAGES = {"cuda": 128, "cpu": 16}
"""Largest micro-batch by default."""


def default_images(config: RunConfig, device: torch.device, gpus: int = 1) -> int:
    """Images of a step on one of ``gpus``, in micro-batches of at most ``MOST_IMAGES`` but of whole groups of masks."""
    accumulate = config.train.accumulate
    micro_batch = min(max(config.train.batch_size // (gpus * accumulate), 1), MOST_IMAGES[device.type])
    group = config.masks.group_size if config.masks.context == "batch_min" else 1
    return -(-micro_batch // group) * group * accumulate


def check(config: RunConfig, images: int, seconds: float, gpus: int) -> None:
    """Raise ValueError where numbers are not positive, or ``images`` cannot be divided as ``config`` wants it."""
    for name, value in (("images", images), ("seconds", seconds), ("gpus", gpus)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    micro_batch, rest = divmod(images, config.train.accumulate)
    if rest:
        raise ValueError(f"images {images} cannot be split into train.accumulate {config.train.accumulate} parts")
    group = config.masks.group_size
    if config.masks.context == "batch_min" and micro_batch % group:
        raise ValueError(f"images must come in whole groups of masks.group_size {group}, got {micro_batch} at a time")


def fastest(
    config: RunConfig,
    name: str,
    device: torch.device,
    *,
    images: int,
    seconds: float = 10.0,
    gpus: int = 1,
    path: Path | None = None,
    say: Callable[[str], None] = print,
    attempt: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Try options of the step of ``config`` and say which are fastest.

    Args:
        name: of the configuration, for the table.
        images: per step on this GPU.
        seconds: of steps that are timed for each way.
        gpus: of the run. Options that are for one GPU are left out for more.
        path: JSON file, written anew after every way.
        say: takes each line of the table as soon as it is known.
        attempt: as ``try_way``; by default that, in a process of its own.

    Returns:
        "machine", "ways" (each with its "settings" and either what ``try_way`` returned or "failed"), "settings" (those
        to change for the fastest; empty where nothing is) and "gain" (images/s over those as configured).

    Raises:
        ValueError: of ``check``.
        Failed: the step as configured does not run.
    """
    config = resolved(config, device)
    config = with_settings(config, {"step.blocks": blocks_on(config.step.blocks, device)})
    check(config, images, seconds, gpus)
    report: dict[str, Any] = {"schema": SCHEMA, "kind": "fastest", "name": name, "images": images, "gpus": gpus}
    report |= {"precision": config.train.precision, "ways": [], "settings": {}, "gain": 1.0}
    with TemporaryDirectory(prefix="ijepa_fast-") as folder:

        def run(settings: Settings, base: dict[str, Any] | None) -> dict[str, Any]:
            arguments = with_settings(config, settings), device, images, seconds, Path(folder, "gradients.pt"), base
            return attempt(*arguments) if attempt else call_apart(try_way, *arguments, seconds=LONGEST + seconds)

        def rate(settings: Settings) -> float:
            """Images per second; 0 where a way does not run, or not to the same results."""
            try:
                way = run(settings, base)
            except (Failed, ValueError) as error:
                way = {"failed": str(error)}
            note(settings, way)
            return way.get("images_per_second", 0.0)

        def note(settings: Settings, way: dict[str, Any]) -> None:
            say(line(settings, way, base))
            report["ways"].append({"settings": settings, **way})
            save(path, report)

        try:
            base = run({}, None)
        except Failed as error:
            too_much = any(sign in str(error) for sign in ("out of memory", "stopped after", "SIGKILL"))
            hint = f"; give fewer than {images} images" if too_much else ""
            raise Failed(f"the step as configured does not run: {error}{hint}") from None
        report["machine"], choices = base.pop("machine"), base.pop("choices")
        about = report["machine"]
        say(f"{about.get('gpu', about['cpu'])}, torch {about['torch']}, triton {about['triton']}")
        say(f"{name}, {images} images a step, {config.train.precision}")
        say(header())
        note({}, base)
        settings, best = {}, base["images_per_second"]
        for name, values in alternatives(Machine(**choices | {"gpus": gpus})):
            now = getattr(with_settings(config, settings).step, name)
            tried = [differing(config, settings | {f"step.{name}": value}) for value in values if value != now]
            rates = [rate(way) for way in tried]
            if rates and max(rates) >= GAIN * best:
                best = max(rates)
                settings = tried[rates.index(best)]
        if settings:
            say("once more:")
            before, after = rate({}), rate(settings)
            if before and after >= GAIN * before:
                report |= {"settings": settings, "gain": round(after / before, 3)}
            elif before and after:
                say(f"the second time it was {after / before:.2f}x as fast: nothing is to be changed")
            else:
                say("the second time one of them failed: nothing is to be changed")
    save(path, report)
    return report


def choices_on(config: RunConfig, device: torch.device) -> Machine:
    """The offer of ``device`` to the step of ``config``."""
    model = config.model
    head_dims = [width // model.num_heads for width in (model.embed_dim, model.predictor_embed_dim)]
    return machine_of(device, PRECISION_DTYPES[config.train.precision], head_dims, model.patches)


def differing(config: RunConfig, settings: Settings) -> Settings:
    """The settings that ``config`` does not have already."""
    return {name: value for name, value in settings.items() if flatten(config)[name] != value}


def try_way(
    config: RunConfig,
    device: torch.device,
    images: int,
    seconds: float,
    gradients_file: Path,
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Time a step, and compare it with the step as configured.

    Args:
        gradients_file: those of the step as configured: written by it, read by the others.
        base: what was returned of it; None for that one itself.

    Returns:
        What ``train_rounds`` returns, "first_loss", "activation_checkpointing", and "differences" from ``base``:
        relative ones of the first loss, of the gradients, of the losses of the first rounds, of how far weights and
        averages have moved in them, and the updates that were skipped more. Or, of the step as configured, "machine"
        and "choices" (see ``choices_on``).

    Raises:
        ValueError: settings that do not fit together, a step that does not train the same, or, as configured, one whose
            losses or gradients are not finite.
        OSError: there is no room for the gradients.
    """
    use_deterministic(config)
    step, pixels = random_step(config, device, images)
    loss, gradients = first_gradients(step, pixels[: images // config.train.accumulate])
    way: dict[str, Any] = {"first_loss": loss}
    if base is None:
        _require_finite({"the loss": torch.tensor(loss), **gradients})
        try:
            torch.save(gradients, gradients_file)
        except (OSError, RuntimeError) as error:
            folder = gradients_file.parent.parent
            raise OSError(f"the gradients do not go into {folder} (TMPDIR names another folder): {error}") from error
    else:
        want = {"loss": base["first_loss"], "gradient": torch.load(gradients_file, weights_only=True)}
        way["differences"] = _compared({"loss": loss, "gradient": gradients}, want, config)
        del want
    del gradients
    way |= train_rounds(step, pixels, seconds)
    way["activation_checkpointing"] = step.model.context_encoder.activation_checkpointing
    if base is None:
        _require_finite({"losses after updates": torch.tensor(way["losses"])})
        return way | {"machine": machine(device), "choices": choices_on(config, device)._asdict()}
    way["differences"] |= _compared(way, base, config)
    return way


def _compared(way: Mapping[str, Any], want: Mapping[str, Any], config: RunConfig) -> dict[str, float]:
    apart = differences(way, want, config.train.precision)
    if said := disagreement(apart, LIMITS[config.train.precision]):
        raise ValueError(f"does not train the same: {said}")
    return apart


def first_gradients(step: TrainStep, pixels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients (on the CPU; fp32 where they are scaled) of one batch, without training on it."""
    count = len(pixels)
    masks = step.sampler.sample(count, seed=step.seed, step=0, device=pixels.device, round_rows=step.round_rows)
    loss = step.model(pixels, masks, all_targets=False)[0].total
    return float(loss.detach()), gradients_of(loss, step.model, step.optimizer, step.scaler, device="cpu")


def train_rounds(step: TrainStep, pixels: Tensor, seconds: float) -> dict[str, Any]:
    """Train on the same images for ``WARM_UP`` rounds, and then for about ``seconds``.

    Drawing the masks, the loss, the update and the EMA are part of a step. As in training, the host waits for the
    device only after some steps: once per round.

    Returns:
        "times" (``Times`` of a step, means of rounds; method "rounds"), "images_per_second" (median), "losses" of the
        first rounds, "moved" (how far they took a weight of the context encoder's last block, and its average),
        "skipped" (their updates with gradients that are not finite), and on CUDA "reserved_gib": all memory that was
        taken, that of graphs included.
    """
    device, losses = pixels.device, []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    starts = [value.clone() for value in _weight_and_average(step)]
    for number in [*range(CYCLE)] * WARM_UP:
        losses.append(step(pixels, number).losses.total.clone())  # a replayed step writes to the same place
    compared = {
        "losses": [float(loss) for loss in losses],
        "moved": [float((now - old).norm()) for now, old in zip(_weight_and_average(step), starts, strict=True)],
        "skipped": int(step.optimizer.skipped),
    }

    def train_round(_: int) -> None:
        for number in range(CYCLE):
            step(pixels, number)

    took = repeat(train_round, device, seconds=seconds, least=LEAST, warm_up=0)
    timed = rate(Times.of([each.wall / CYCLE * 1e6 for each in took], "rounds"), len(pixels)) | compared
    if device.type == "cuda":
        timed["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    return timed


def _weight_and_average(step: TrainStep) -> tuple[Tensor, Tensor]:
    """A weight and its average, in the precision in which the optimizer has them."""
    optimizer, weight = step.optimizer, step.model.context_encoder.blocks[-1].mlp.fc2.weight
    state = optimizer.state[weight]
    return state.get("master", weight.detach()), state.get("ema", optimizer.averages[weight].detach())


def _require_finite(values: Mapping[str, Tensor]) -> None:
    if wrong := [name for name, value in values.items() if not value.isfinite().all()]:
        raise ValueError(
            f"as configured, {wrong[0]} is not finite: lower optim.lr, or use train.precision fp32 or bf16"
        )


def header() -> str:
    """Head of the table; gain is the rate over that as configured."""
    head = f"{'images/s':>10}{'ms/step':>10}{'GiB':>8}{'gain':>8}  options"
    return f"{head}\n{'-' * 78}"


def line(settings: Settings, way: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """A way's line of the table."""
    options = ", ".join(f"{name} {value_text(value)}" for name, value in settings.items()) or "as configured"
    if "failed" in way:
        return f"{'':36}  {options}: {way['failed']}"
    memory = f"{way['reserved_gib']:>8.1f}" if "reserved_gib" in way else " " * 8
    milliseconds, gain = way["times"]["p50"] / 1e3, way["images_per_second"] / base["images_per_second"]
    remark = " (activations are computed again)" if way["activation_checkpointing"] else ""
    return f"{way['images_per_second']:>10.1f}{milliseconds:>10.1f}{memory}{gain:>7.2f}x  {options}{remark}"
