"""Settings of earlier versions: what they are called now, so that old files, checkpoints and flags go on working."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping

from ijepa_fast.config.sections import RunConfig
from ijepa_fast.config.settings import flatten, nested, value_text

RENAMED = {
    "model.attention": "step.attention",
    "model.activation_checkpointing": "step.activation_checkpointing",
    "model.mean": ("model.mean_std", 0),
    "model.std": ("model.mean_std", 1),
    "train.capture": "step.capture",
    "train.overlap_target": "step.overlap_target",
    "train.wide_residual": "step.wide_residual",
    "train.fp8_targets": "step.fp8_targets",
    "train.compile": "step.blocks",
    "train.fused": "step.blocks",
    "overwrite": "resume",
    "labels": "evaluation.labels",
    "objective.target_selection": "objective.targets",
    "evaluation.before_and_after": "evaluation.results",
    "evaluation.pictures": "evaluation.results",
    "optim.start_lr": ("optim.lr_ends", 0),
    "optim.final_lr": ("optim.lr_ends", 1),
    "optim.weight_decay": ("optim.weight_decay", 0),
    "optim.final_weight_decay": ("optim.weight_decay", 1),
    "optim.momentum": ("optim.momentum", 0),
    "optim.final_momentum": ("optim.momentum", 1),
    "evaluation.train_images": ("evaluation.images", 0),
    "evaluation.test_images": ("evaluation.images", 1),
}
"""Settings of earlier versions -> their present names, with the place in a pair for what is half of one now. A number
alone for a pair is its first half: ``--optim.momentum 0.99`` leaves the end as it is."""

HALVES = ("overwrite", "objective.target_selection", "evaluation.before_and_after", "evaluation.pictures")
"""Those that say only half of what their present name says, which may stand beside them."""

FIXED = {
    "objective.target_std": 1.0,
    "objective.variance_eps": 1e-4,
    "objective.target_eps": 1e-5,
    "loader.shuffle": 1000,
    "optim.weight_decay_shape": "cosine",
    "optim.momentum_shape": "linear",
    "optim.schedule_stretch": 1.0,
    "optim.eps": 1e-8,
    "optim.layer_decay": 1.0,
}
"""Settings of earlier versions that are constants now -> their value. Another one would change what is learned."""

GONE = {
    "model.target_attention": None,
    "loader.timeout": 600.0,
    "evaluation.layers": "last",
    "evaluation.monitor_every": 8,
}
"""Settings of earlier versions that change nothing that is learned -> the value that they had by default."""

log = logging.getLogger(__name__)


def present(
    settings: Mapping[str, object], base: Mapping[str, object] | None = None, strict: bool = True
) -> dict[str, object]:
    """Settings by their dotted names, with those of earlier versions under their present names.

    Args:
        base: settings as they are where these change nothing, for the other half of a pair of which they name one.
            What it leaves out is as by default.
        strict: whether it is an error, or ignored, that a setting in ``FIXED`` has another value. The same for ``GONE``
            is told in the log then.

    Raises:
        ValueError: a setting in ``FIXED`` has another value.
    """
    base = flatten(RunConfig()) | dict(base or {})
    if settings.get("step.fp8_targets") == "by_hand":  # another way to the same products
        settings = {**settings, "step.fp8_targets": True}
    for name in FIXED.keys() & settings.keys() if strict else ():
        if _number(settings[name]) != FIXED[name]:
            raise ValueError(f"{name} is no setting any more and always {FIXED[name]}, got {settings[name]}")
    for name, value in settings.items() if strict else ():
        if name in GONE and value != GONE[name]:
            log.warning("%s is no setting any more: %s is ignored", name, value)
    now = {name: value for name, value in settings.items() if not is_former(name, value)}
    for old, value in settings.items():
        name = RENAMED.get(old)
        if old == "overwrite":
            if value is True and settings.get("resume", base["resume"]) == "never":
                now[name] = "overwrite"
        elif old == "objective.target_selection":
            if value not in ("output", "input"):
                raise ValueError(f"{old} must be output or input, got {value!r}")
            now[name] = now.get(name, base[name]).removesuffix("_alone") + ("_alone" if value == "input" else "")
        elif name == "evaluation.results":
            kind, shown = "pictures" if old == "evaluation.pictures" else "figures", now.get(name, base[name])
            parts = {"figures", "pictures"} if shown == "all" else {shown} - {"none"}
            parts = parts - {kind} if value in (False, "no", "off") else parts | {kind}
            now[name] = "all" if len(parts) == 2 else "".join(parts) or "none"
        elif old == "train.fp8_targets":
            now.setdefault(name, value not in ("off", False))
        elif old in ("train.fused", "train.compile"):
            on = [kind for kind in ("fused", "compile") if settings.get(f"train.{kind}")]
            now.setdefault(name, "+".join(on) or "plain")
        elif isinstance(name, tuple) and is_former(old, value):
            pair, half = name
            now[pair] = list(now.get(pair, base[pair]))
            now[pair][half] = _number(value)
        elif isinstance(name, str):
            now.setdefault(name, value)
    return now


def present_flags(arguments: list[str], base: Mapping[str, object] | None = None) -> list[str]:
    """Command-line arguments with the settings of earlier versions under their present names, where the last one stood.

    Args:
        base: as in ``present``.

    Raises:
        ValueError: one of them has no value, or one that is in ``FIXED`` another one.
    """
    kept, old, place, rest = [], {}, 0, list(arguments)
    names = RENAMED.keys() | FIXED.keys() | GONE.keys()
    flagged = {argument.partition("=")[0] for argument in arguments}
    names |= {RENAMED[name] for name in HALVES if f"--{name}" in flagged}
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in names:
            kept.append(argument)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = rest.pop(0)
        try:
            old[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except json.JSONDecodeError:
            old[name] = value
        place = len(kept)
    renamed = [part for name, value in present(old, base).items() for part in (f"--{name}", value_text(value))]
    return kept[:place] + renamed + kept[place:]


def present_sections(values: dict, base: Mapping[str, object] | None = None, strict: bool = True) -> dict:
    """``present`` of settings as a YAML file holds them."""
    return nested(present(flatten(values), base, strict))


def _number(value: object) -> object:
    """The number that a text is: YAML reads 5e-2 as text."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def is_former(name: str, value: object) -> bool:
    """Whether it takes ``present`` to understand a setting: one that goes by another name now, or by none."""
    of_a_pair = isinstance(RENAMED.get(name), tuple) and RENAMED[name][0] == name
    return not isinstance(value, (list, tuple)) if of_a_pair else name in {**RENAMED, **FIXED, **GONE}
