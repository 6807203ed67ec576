"""The options that ``fastest.py`` tries: what a machine has to offer, in groups, and settings as people type them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ijepa_fast.attention.dispatch import BACKENDS, Request, resolve
from ijepa_fast.config import RunConfig, flatten
from ijepa_fast.step.train_step import PRECISION_DTYPES

Settings = dict[str, Any]
"""Dotted names of settings -> values, as flags have them."""


def choices_on(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Whether ``device`` is a "gpu", and attention backends that run the sets of ``config`` on it: "any" for sets of
    any length, "whole" for whole images, and the one that "auto" takes (None where that depends on the network). The
    reference is not among them: it is slow."""
    model, dtype = config.model, PRECISION_DTYPES[config.train.precision]
    patches = (model.img_size // model.patch_size) ** 2
    encoder, predictor = (width // model.num_heads for width in (model.embed_dim, model.predictor_embed_dim))
    sets = [Request(device, dtype, head_dim, patches) for head_dim in (encoder, predictor)]
    whole = [Request(device, dtype, encoder, patches, uniform=True)]

    def able(requests: list[Request]) -> list[str]:
        names = [name for name in BACKENDS if name != "reference"]
        return [name for name in names if all(BACKENDS[name].reason(request) is None for request in requests)]

    taken = {resolve("auto", request) for request in sets}
    auto = taken.pop() if len(taken) == 1 else None
    return {"gpu": device.type == "cuda", "any": able(sets), "whole": able(whole), "auto": auto}


def _blocks(choices: Mapping[str, Any], now: RunConfig, gpus: int) -> Iterator[Settings]:
    for fused, compiled in ((False, False), (True, False), (False, True), (True, True)):
        yield {"train.fused": fused, "train.compile": compiled}


def _attention(choices: Mapping[str, Any], now: RunConfig, gpus: int) -> Iterator[Settings]:
    for name in choices["any"]:
        if name != _backend(choices, now):
            yield {"model.attention": name}


def _target_attention(choices: Mapping[str, Any], now: RunConfig, gpus: int) -> Iterator[Settings]:
    for name in (None, *choices["whole"]):
        if name != _backend(choices, now):
            yield {"model.target_attention": name}


def _backend(choices: Mapping[str, Any], now: RunConfig) -> str | None:
    return choices["auto"] if now.model.attention == "auto" else now.model.attention


def _overlap(choices: Mapping[str, Any], now: RunConfig, gpus: int) -> Iterator[Settings]:
    if choices["gpu"]:
        yield from ({"train.overlap_target": value} for value in (False, True))


def _capture(choices: Mapping[str, Any], now: RunConfig, gpus: int) -> Iterator[Settings]:
    if choices["gpu"] and gpus == 1:
        yield from ({"train.capture": value} for value in (False, True))


GROUPS = (_blocks, _attention, _target_attention, _overlap, _capture)
"""Options that exclude one another, group by group in the order in which they are tried: of what can run here (see
``choices_on``), what is set now, and the number of GPUs."""


def differing(config: RunConfig, settings: Settings) -> Settings:
    """Those of the settings that ``config`` does not have already."""
    return {name: value for name, value in settings.items() if flatten(config)[name] != value}


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """``config`` with some settings changed. Raises ValueError where they do not fit together."""
    changed = nested(settings).items()
    return replace(config, **{section: replace(getattr(config, section), **values) for section, values in changed})


def nested(settings: Settings) -> dict[str, dict[str, Any]]:
    """As a YAML file of settings holds them."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in settings.items():
        section, _, name = dotted.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def flags(settings: Settings) -> str:
    """As they are typed behind ``ijepa-fast pretrain``."""
    return " ".join(f"--{name} {value_text(value)}" for name, value in settings.items())


def value_text(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, value)
