"""Settings as nested dicts, by their dotted names, and as text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict


def as_dict(config) -> dict:
    """A configuration as a nested plain dict, tuples as lists: what YAML and JSON hold."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def flatten(config, prefix: str = "") -> dict[str, object]:
    """Dotted name -> value of every setting of a configuration, or of nested settings as ``as_dict`` gives them."""
    flat = {}
    for name, value in (config if isinstance(config, dict) else as_dict(config)).items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def nested(settings: dict[str, object]) -> dict:
    """Settings by their dotted names, as a YAML file holds them."""
    sections: dict = {}
    for dotted, value in settings.items():
        section, dot, name = dotted.partition(".")
        if dot:
            # An empty section of a YAML file is null.
            sections[section] = (sections.get(section) or {}) | {name: value}
        else:
            sections[section] = value
    return sections


def flags(settings: dict[str, object]) -> str:
    """Settings as they are typed behind ``ijepa-fast pretrain``."""
    return " ".join(f"--{name} {value_text(value)}" for name, value in settings.items())


def value_text(value: object) -> str:
    """A value as YAML and flags have it."""
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one of those there are, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
