"""The configuration of a run from what people give: a recipe, some settings, or images alone."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path

from ijepa_fast.config import RunConfig, flags, flatten, from_dict, nested, present, read_recipe
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.remote import RemoteShards
from ijepa_fast.ranks import pick_device
from ijepa_fast.run.auto import RECIPE, look_at, own_images, product_rate
from ijepa_fast.run.checkpoint import list_steps

log = logging.getLogger(__name__)


def refuse_in_workers() -> None:
    """Raise RuntimeError where a program without a guard begins again in its own loader workers."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "pretrain is called again by a loader worker, which imports the program: put the call under "
            '`if __name__ == "__main__":`, or set loader.workers to 0'
        )


class NoRecipe(ValueError):
    """No recipe is named where one is needed."""


def configure(config: RunConfig | Mapping | Path | str | None, settings: Mapping[str, object]) -> RunConfig:
    """A configuration, changed by settings.

    Args:
        config: a configuration, its settings as nested dicts, a YAML file, the name of a recipe, or None: what
            ``choose`` chooses.
        settings: values by dotted names or nested, and by former names, too; they win over those in ``config``.

    Raises:
        ValueError: an unknown recipe or setting, or one with a value that it cannot have.
    """
    settings = flatten(dict(settings))
    if config is None:
        settings = present(settings)
        config, chosen = choose(from_dict(nested(settings)), settings)
        settings = {**chosen, **settings}
    if isinstance(config, (str, Path)):
        config = from_dict(read_recipe(str(config)))
    elif isinstance(config, Mapping):
        config = from_dict(dict(config))
    elif not isinstance(config, RunConfig):
        raise ValueError(f"config must be a RunConfig, settings in dicts, a YAML file or a recipe, got {config!r}")
    before = flatten(config)
    return from_dict(nested(before | present(settings, before))) if settings else config


def choose(config: RunConfig, given: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """What stands in for a recipe where none is named: the settings of the run to continue or to begin with, or what
    fits images and device.

    Args:
        config: has the settings that are given.
        given: them alone, by their dotted names.

    Returns:
        A YAML file or a recipe, and settings that change it; those that are given win over both.

    Raises:
        NoRecipe: nothing can stand in for it.
        ValueError, OSError: there are too few images, or none can be read.
    """
    continues = config.resume in ("auto", "require") and list_steps(Path(config.output, "checkpoints"))
    for folder in [config.output] if continues else [config.init] if config.init else []:
        if (written := Path(folder, "config.yaml")).exists():
            # The folder may have been moved, and the run may have begun with --resume overwrite.
            return str(written), {"output": config.output, "resume": config.resume}
    if config.init and not continues:
        raise NoRecipe(f"--init {config.init} needs a recipe with networks of the same sizes: --config NAME")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise NoRecipe(f"several processes need a recipe: --config NAME, for example --config {RECIPE}")
    source = open_sources(**config.images).train
    if isinstance(source, RemoteShards):
        raise NoRecipe("images at URLs are not counted, so a recipe is needed: --config NAME")
    device = pick_device(config.train.device, 0)
    settings = own_images(from_dict(read_recipe(RECIPE)), look_at(source), device, product_rate, given)
    log.info("no --config is given; for these images on this machine: --config %s %s", RECIPE, flags(settings))
    return RECIPE, settings
