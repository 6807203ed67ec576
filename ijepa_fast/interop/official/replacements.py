"""Run an unmodified checkout of the official code with our models, collator, optimizer and checkpoint reader in place.

In a script of one's own, before anything else of the checkout is imported:

    from ijepa_fast.interop import official
    official.accelerate("PATH/TO/ijepa")

The checkout's modules are imported, and the functions and classes of ``REPLACEMENTS`` are set as their attributes;
nothing is written to disk, and nothing else of the process is touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ijepa_fast.interop.official import checkpoint, collate, models, optim

log = logging.getLogger(__name__)

REPLACEMENTS: dict[str, dict[str, Callable]] = {
    "src.models.vision_transformer": {**models.ENCODERS, "vit_predictor": models.vit_predictor},
    "src.masks.multiblock": {"MaskCollator": collate.MaskCollator},
    "src.masks.utils": {"apply_masks": models.apply_masks},
    "src.utils.logging": {"grad_logger": optim.grad_logger},
    "src.helper": {"init_opt": optim.init_opt, "load_checkpoint": checkpoint.load_checkpoint},
}
"""Module of the official code -> names in it -> what takes their place."""


class CheckoutError(ValueError):
    """The folder does not hold the official code as it is known here."""


def accelerate(checkout: Path | str | None = None) -> list[str]:
    """Put the replacements into the official code; every check comes before the first replacement.

    Call it in each process, best before ``src.train`` is imported; modules that have imported a replaced name by then
    are given the new one as well.

    Args:
        checkout: folder that holds ``src/``. None: where ``import src`` finds it, as for a script in that folder.

    Returns:
        What was replaced, as "module.name"; also logged. Empty if it had been done before.

    Raises:
        CheckoutError: there is no such code, or a name is missing or takes other arguments than expected.
    """
    checkout = _find(checkout)
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    modules = {name: _import(name, checkout) for name in REPLACEMENTS}
    originals = {}
    for module_name, replacements in REPLACEMENTS.items():
        for name, ours in replacements.items():
            theirs = getattr(modules[module_name], name, None)
            where = f"{name} of {module_name.replace('.', '/')}.py in {checkout}"
            if theirs is None:
                raise CheckoutError(f"no {where}: not the official I-JEPA code, or a version that keeps it elsewhere")
            if theirs is not ours:
                _check_arguments(theirs, ours, where)
                originals[f"{module_name}.{name}"] = (theirs, ours)
    users = [module for name, module in sys.modules.items() if name.partition(".")[0] == "src"]
    for theirs, ours in originals.values():
        for module in users:
            for name, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, name, ours)
    if originals:
        log.info("ijepa_fast takes the place of %s", ", ".join(originals))
    return list(originals)


def _find(checkout: Path | str | None) -> Path:
    if checkout is None:
        spec = importlib.util.find_spec("src")
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places:
            raise CheckoutError("`import src` finds nothing here: give the folder of the official code")
        checkout = Path(places[0]).parent
    checkout = Path(checkout).resolve()
    for name in [*REPLACEMENTS, "src.train"]:
        file = checkout / (name.replace(".", "/") + ".py")
        if not file.is_file():
            raise CheckoutError(
                f"{checkout} is no checkout of the official I-JEPA code: it has no {file.name} at {file}"
            )
    return checkout


def _import(name: str, checkout: Path) -> ModuleType:
    module = importlib.import_module(name)
    if not Path(module.__file__).resolve().is_relative_to(checkout):
        raise CheckoutError(f"{name} is already imported from {module.__file__}, which is not in {checkout}")
    return module


def _check_arguments(theirs: Callable, ours: Callable, where: str) -> None:
    """Raise unless whatever may be given to theirs may be given to ours."""
    wanted, given = (inspect.signature(function).parameters.values() for function in (theirs, ours))
    kinds = {parameter.kind for parameter in given}
    positional = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
    for place, parameter in enumerate(wanted):
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            fits = positional[place : place + 1] == [parameter.name]
        elif parameter.kind is parameter.KEYWORD_ONLY:
            fits = parameter.name in {p.name for p in given} or inspect.Parameter.VAR_KEYWORD in kinds
        else:
            fits = parameter.kind in kinds
        if not fits:
            raise CheckoutError(
                f"{where} has an argument {parameter.name!r} that its replacement has not, or not there "
                f"({inspect.signature(theirs)} against {inspect.signature(ours)}): the checkout has been changed"
            )
