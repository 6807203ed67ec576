"""Recipes: the YAML files of settings that the package ships, or that a user writes."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path


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


def read_recipe(name: str, above: tuple[Path, ...] = ()) -> dict:
    """Nested settings of a YAML file or shipped recipe: what ``config.from_dict`` takes.

    A file may name a recipe, or another file (relative to its own folder), as its ``base``: it then holds only what
    differs from that. ``above`` are the files that this one is a base of.

    Raises:
        ValueError: there is no such file or recipe, it is not YAML with settings, or it is its own base.
    """
    import yaml

    path = find_recipe(name).resolve()
    if path in above:
        raise ValueError(f"{name!r} is its own base: {' <- '.join(map(str, (*above, path)))}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings (name: value), got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merged(read_recipe(base if base in recipes() else str(path.parent / base), (*above, path)), values)


def _merged(base: dict, changed: dict) -> dict:
    """``base`` with the settings of ``changed``, section by section."""

    def value_of(name: str):
        old, new = base.get(name), changed.get(name)
        return _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else changed.get(name, old)

    return {name: value_of(name) for name in base | changed}
