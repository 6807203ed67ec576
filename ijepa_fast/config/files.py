"""Configurations from YAML files and shipped recipes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path

from ijepa_fast.config.former import present_sections
from ijepa_fast.config.sections import RunConfig
from ijepa_fast.config.settings import did_you_mean, flatten


def from_dict(values: dict, strict: bool = True) -> RunConfig:
    """Inverse of ``as_dict``; ``strict`` as in ``present``.

    Raises:
        ValueError: an unknown setting, with the nearest name, or a value that its section refuses.
    """
    return _section(RunConfig, present_sections(values, strict=strict), "")


def _section(kind: type, values: dict, where: str):
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown setting {where}{name}{did_you_mean(name, known)}")
    arguments = {}
    for name, value in values.items():
        default = known[name].default_factory
        if isinstance(value, dict) and is_dataclass(default):
            value = _section(default, value, f"{where}{name}.")
        arguments[name] = _tuples(value)
    return kind(**arguments)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe shipped with the package; ablations are named ``ablations/...``."""
    root = Path(str(resources.files("ijepa_fast") / "recipes"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that ``--config NAME`` means: an existing file, or a shipped recipe.

    Raises:
        ValueError: neither, with the nearest recipe names.
    """
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(shipped)}"
    raise ValueError(f"{name!r} is neither a file nor a recipe; {hint}")


def read_recipe(name: str, above: tuple[Path, ...] = (), onto: Mapping[str, object] | None = None) -> dict:
    """Nested settings of a YAML file or shipped recipe: what ``from_dict`` takes.

    A file may name a recipe, or another file (relative to its own folder), as its ``base``: it then holds only what
    differs from that.

    Args:
        above: files that this one is a base of.
        onto: settings by their dotted names that it is to change, if it has no base.

    Raises:
        ValueError: there is no such file or recipe, it is not YAML with settings, or it is its own base.
    """
    import yaml

    path = find_recipe(name).resolve()
    if path in above:
        raise ValueError(f"{name!r} is its own base: {' <- '.join(map(str, (*above, path)))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings (name: value), got {type(values).__name__}")
    base = values.pop("base", None)
    below = {}
    if base is not None:
        below = read_recipe(base if base in recipes() else str(path.parent / base), (*above, path), onto)
    # Before it is merged: a setting's old name in one file and its new one in the other are the same setting.
    return _merged(below, present_sections(values, {**(onto or {}), **flatten(below)}))


def _merged(base: dict, changed: dict) -> dict:
    """``base`` with the settings of ``changed``, section by section."""

    def value_of(name: str):
        old, new = base.get(name), changed.get(name)
        return _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else changed.get(name, old)

    return {name: value_of(name) for name in base | changed}
