"""``ijepa-fast fastest``: which options of the training step are fastest on this machine, for one configuration.

An option changes how a step is computed, not what it learns. Each is tried in a process of its own, on the same weights
and random images, and its gradients and losses are compared with those of the step as configured before its time
counts: what does not run here, or does not train the same, is named and not chosen. Options are tried one group after
another, each on top of the fastest found so far; the winner is timed once more beside the step as configured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.attention import BACKENDS, Request, resolve
from ijepa_fast.bench.agreement import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    NOTHING,
    REHEARSED_TOLERANCE,
    gradient_difference,
    relative,
)
from ijepa_fast.bench.apart import Failed, call_apart
from ijepa_fast.bench.measure import SCHEMA, machine
from ijepa_fast.bench.training import random_step, rate
from ijepa_fast.config import RunConfig, flatten
from ijepa_fast.step import PRECISION_DTYPES, TrainStep

GAIN = 1.02
"""Times faster than the fastest so far that an option must be: less is noise, and no reason for another option."""
LONGEST = 900.0
"""Seconds after which one way is given up. torch.compile takes minutes for a large model."""

Settings = dict[str, Any]
"""Dotted names of settings -> values, as flags have them."""


def fastest(
    config: RunConfig,
    name: str,
    device: torch.device,
    *,
    images: int,
    seconds: float = 10.0,
    say: Callable[[str], None] = print,
    attempt: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Try options of the step of ``config`` and say which are fastest.

    Args:
        name: of the configuration, for the table.
        images: per step.
        seconds: of steps that are timed for each way.
        say: takes each line of the table as soon as it is known.
        attempt: as ``try_way``; by default that, in a process of its own.

    Returns:
        "machine", "ways" (each with its "settings" and either what ``try_way`` returned or "failed"), "settings" (those
        to change for the fastest; empty where nothing is) and "gain" (images/s over those as configured).

    Raises:
        ValueError: images or seconds are not positive.
        Failed: the step as configured does not run.
    """
    if images < 1:
        raise ValueError(f"images must be positive, got {images}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    with TemporaryDirectory(prefix="ijepa_fast-") as folder:
        reference = Path(folder) / "reference.pt"

        def run(settings: Settings) -> dict[str, Any]:
            arguments = with_settings(config, settings), device, images, seconds, reference
            return attempt(*arguments) if attempt else call_apart(try_way, *arguments, seconds=LONGEST)

        base = run({})
        found = base["machine"]
        say(f"{found.get('gpu', found['cpu'])}, torch {found['torch']}, triton {found['triton']}")
        say(f"{name} in steps of {images} images, {config.train.precision}")
        say(header())
        say(line({}, base, base))
        trials = Trials(run, base, say)
        settings, best = {}, base["images_per_second"]
        for group in GROUPS:
            now = with_settings(config, settings)
            tried = [differing(config, settings | change) for change in group(base) if differing(now, change)]
            rates = [trials.rate(way) for way in tried]
            if rates and max(rates) >= GAIN * best:
                best = max(rates)
                settings = tried[rates.index(best)]
        gain = 1.0
        if settings:
            say("once more:")
            before, after = trials.rate({}), trials.rate(settings)
            gain = round(after / before, 3) if before else 0.0
            if gain < GAIN:
                say(f"the second time it was {gain:.2f}x as fast: nothing is to be changed")
                settings, gain = {}, 1.0
    return {
        "schema": SCHEMA,
        "kind": "fastest",
        "machine": found,
        "name": name,
        "images": images,
        "precision": config.train.precision,
        "ways": trials.ways,
        "settings": settings,
        "gain": gain,
    }


class Trials:
    """Ways that were tried, in order.

    Args:
        run: of a way's settings; as ``try_way``.
        base: what it returned of the step as configured.
        say: takes a line of the table for each.
    """

    def __init__(self, run: Callable[[Settings], dict[str, Any]], base: dict[str, Any], say: Callable[[str], None]):
        self.run, self.base, self.say = run, base, say
        self.ways: list[dict[str, Any]] = [{"settings": {}, **base}]

    def rate(self, settings: Settings) -> float:
        """Images per second; 0 where it does not run, or not to the same results."""
        try:
            way = self.run(settings)
        except (Failed, ValueError) as error:
            way = {"failed": str(error)}
        self.ways.append({"settings": settings, **way})
        self.say(line(settings, way, self.base))
        return way.get("images_per_second", 0.0)


def try_way(config: RunConfig, device: torch.device, images: int, seconds: float, reference: Path) -> dict[str, Any]:
    """Compare a step with the one in ``reference`` (written by whoever comes first), then time it.

    Returns:
        What ``rate`` returns, "differences" (of the first loss, of the gradients and of losses after updates), and of
        the first one "machine" and "attention" (backends that can run, see ``attention_choices``).

    Raises:
        ValueError: settings that do not fit together, or a step that does not train the same.
    """
    step, pixels = random_step(config, device, images)
    loss, gradients = first_gradients(step, pixels[: images // config.train.accumulate])
    first = not reference.exists()
    if first:
        torch.save({"loss": loss, "gradients": gradients}, reference)
    want = torch.load(reference, weights_only=True)
    precision = config.train.precision
    differences = {
        "loss": relative(loss, want["loss"]),
        "gradient": gradient_difference(gradients, want["gradients"], NOTHING[precision]),
    }
    del gradients
    _check(differences, {"loss": LOSS_TOLERANCE[precision], "gradient": GRADIENT_TOLERANCE[precision]})
    found = rate(step, pixels, seconds)
    losses = found.pop("first_losses")
    if first:
        torch.save(want | {"losses": losses}, reference)
        found |= {"machine": machine(device), "attention": attention_choices(config, device)}
    else:
        pairs = zip(losses, want["losses"], strict=False)
        differences["later_losses"] = max(relative(*pair) for pair in pairs)
        _check(differences, {"later_losses": REHEARSED_TOLERANCE[precision]})
    return found | {"differences": differences}


def first_gradients(step: TrainStep, pixels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients (on the CPU) of one batch, without training on it."""
    count = len(pixels)
    rows = None if step.round_rows == 1 else step.rounded(step.sampler.counts(count, seed=step.seed, step=0))
    masks = step.sampler.sample(count, seed=step.seed, step=0, device=pixels.device, capacity=rows)
    loss = step.model(pixels, masks, all_targets=False)[0].total
    loss.backward()
    gradients = {name: p.grad.to("cpu", copy=True) for name, p in step.model.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    return float(loss.detach()), gradients


def _check(differences: Mapping[str, float], limits: Mapping[str, float]) -> None:
    wrong = [name for name, limit in limits.items() if not differences[name] <= limit]  # NaN is not
    if wrong:
        said = ", ".join(f"{name} {differences[name]:.2g} apart (at most {limits[name]:g})" for name in wrong)
        raise ValueError(f"does not train the same: {said}")


def attention_choices(config: RunConfig, device: torch.device) -> dict[str, list[str]]:
    """Backends that run the sets of ``config`` here and are not those that it takes: "attention" for sets of any
    length, "target_attention" for whole images."""
    model = config.model
    patches = (model.img_size // model.patch_size) ** 2
    dims = {model.embed_dim // model.num_heads, model.predictor_embed_dim // model.num_heads}
    dtype = PRECISION_DTYPES[config.train.precision]
    sets = [Request(device, dtype, head_dim, patches) for head_dim in sorted(dims)]
    images = [Request(device, dtype, model.embed_dim // model.num_heads, patches, uniform=True)]
    taken = {resolve(model.attention, request) for request in sets}
    taken_there = {resolve(model.target_attention or model.attention, request) for request in images}

    def others(requests: Sequence[Request], used: set[str]) -> list[str]:
        # The reference is what the others are tested against, and slow.
        names = [name for name in BACKENDS if name != "reference" and {name} != used]
        return [name for name in names if all(BACKENDS[name].reason(request) is None for request in requests)]

    return {"attention": others(sets, taken), "target_attention": others(images, taken_there)}


def _blocks(base: Mapping[str, Any]) -> Iterator[Settings]:
    for fused, compiled in ((False, False), (True, False), (False, True), (True, True)):
        yield {"train.fused": fused, "train.compile": compiled}


def _attention(base: Mapping[str, Any]) -> Iterator[Settings]:
    for name in base["attention"]["attention"]:
        yield {"model.attention": name}


def _target_attention(base: Mapping[str, Any]) -> Iterator[Settings]:
    for name in base["attention"]["target_attention"]:
        yield {"model.target_attention": name}


def _on_a_gpu(setting: str) -> Callable[[Mapping[str, Any]], Iterator[Settings]]:
    """On and off of a setting that only GPUs have."""

    def group(base: Mapping[str, Any]) -> Iterator[Settings]:
        if "gpu" in base["machine"]:
            yield from ({setting: value} for value in (False, True))

    return group


GROUPS = (_blocks, _attention, _target_attention, _on_a_gpu("train.overlap_target"), _on_a_gpu("train.capture"))
"""Options that exclude one another, group by group in the order in which they are tried."""


def differing(config: RunConfig, settings: Settings) -> Settings:
    """Those of the settings that ``config`` does not have already."""
    return {name: value for name, value in settings.items() if flatten(config)[name] != value}


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """``config`` with some settings changed. Raises ValueError where they do not fit together."""
    changed = nested(settings).items()
    return replace(config, **{section: replace(getattr(config, section), **values) for section, values in changed})


def flags(settings: Settings) -> str:
    """As they are typed behind ``ijepa-fast pretrain``."""
    return " ".join(f"--{name} {_value(value)}" for name, value in settings.items())


def nested(settings: Settings) -> dict[str, dict[str, Any]]:
    """As a YAML file of settings holds them."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in settings.items():
        section, _, name = dotted.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def header() -> str:
    """Of the table for a person; the last column is the rate over that as configured."""
    head = f"{'options':<58}{'images/s':>10}{'ms/step':>10}{'GiB':>8}{'gain':>8}"
    return f"{head}\n{'-' * len(head)}"


def line(settings: Settings, way: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Of one way."""
    start = f"{', '.join(f'{name} {_value(value)}' for name, value in settings.items()) or 'as configured':<58}"
    if "failed" in way:
        return f"{start}  {way['failed']}"
    memory = f"{way['peak_memory_gib']:>8.1f}" if "peak_memory_gib" in way else " " * 8
    milliseconds, gain = way["times"]["p50"] / 1e3, way["images_per_second"] / base["images_per_second"]
    return f"{start}{way['images_per_second']:>10.1f}{milliseconds:>10.1f}{memory}{gain:>7.2f}x"
