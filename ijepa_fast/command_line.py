"""What the commands of ``ijepa-fast`` have in common: their parsers, the settings of a run, and wrong usage."""

from __future__ import annotations

import argparse
import difflib
import re
from dataclasses import fields
from pathlib import Path

EXIT_USAGE = 2


class UsageError(ValueError):
    """Flags or settings that do not exist, lack a value, or have one that they cannot have."""


def make_parser(command: str, description: str):
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"ijepa-fast {command}", description=description, exit_on_error=False)


def parse(parser, argv: list[str]):
    """Parse; on failure raise UsageError with the nearest option to an unknown one."""
    from jsonargparse import ArgumentError

    names = [action.dest for action in parser._actions if action.option_strings]
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        message = str(error)
        unknown = ""
        if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            unknown = f"{match[1]}.{match[2]}"
        elif match := re.search(
            r"[Uu]nrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'|[Kk]ey '([\w.]+)'", message
        ):
            unknown = match[match.lastindex]
        elif (match := re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", message)) and "data" in names:
            raise UsageError(f"{message}\ndid you mean --data {match[1]}?") from None
        near = _nearest(unknown, names)
        raise UsageError(message + (f"\ndid you mean {' or '.join(near)}?" if near else "")) from None


def _nearest(unknown: str, names: list[str]) -> list[str]:
    """Settings that an unknown name may stand for: those that end in it, else the one most like it."""
    ends = {name: name.rpartition(".")[2] for name in names}
    exact = [name for name in names if ends[name] == unknown]
    if exact or not unknown:
        return exact
    if near := difflib.get_close_matches(unknown, names, n=1, cutoff=0.5):
        return near
    # A bare name, such as learning_rate or epoch, against the last parts of the nested ones.
    near = difflib.get_close_matches(unknown, ends.values(), n=1, cutoff=0.6)
    return [name for name in names if ends[name] in near]


def run_parser(command: str, description: str):
    from jsonargparse import ActionConfigFile

    from ijepa_fast.config import RunConfig

    parser = make_parser(command, description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file, or the name of a shipped recipe.")
    parser.add_class_arguments(RunConfig)
    return parser


def run_config(parser, argv: list[str]):
    """(RunConfig, namespace as parsed) from flags and --config FILE or RECIPE."""
    import yaml

    from ijepa_fast.config import RunConfig, as_dict, common_settings, flatten, present_flags, read_recipe

    sections = {name for name, value in as_dict(RunConfig()).items() if isinstance(value, dict)}
    named_so_far: dict[str, object] = {}

    def text(recipe: str) -> str:
        settings = read_recipe(recipe, onto=named_so_far)
        for name in sections & settings.keys():
            if not isinstance(settings[name], dict):
                raise UsageError(f"{name} in {recipe} must hold settings (name: value), got {settings[name]!r}")
        named_so_far.update(flatten(settings))
        return yaml.safe_dump(settings, sort_keys=False)

    named = []
    flagged = {argument.partition("=")[0] for argument in argv}
    if "--train.epochs" in flagged and "--train.steps" not in flagged:
        argv = [*argv, "--train.steps=null"]  # a recipe or the run to continue may have some, which would win
    for i, argument in enumerate(argv):
        if i and argv[i - 1] == "--config":
            argument = text(argument)
        elif argument.startswith("--config="):
            argument = f"--config={text(argument.partition('=')[2])}"
        named.append(argument)
    named = present_flags(named, named_so_far)
    if "--help-all" in argv:
        parser.print_help()
        raise SystemExit(0)
    settings = flatten(RunConfig())
    parser.epilog = f"--help-all lists all {len(settings)} settings of a run."
    for action in parser._actions:
        if action.dest in {*settings, *sections} - common_settings() or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
    parsed = parse(parser, named)
    values = parser.instantiate(parsed)
    return RunConfig(**{f.name: values[f.name] for f in fields(RunConfig)}), parsed


def add_checkpoint(parser) -> None:
    parser.add_argument("run", type=Path, help="Folder of a run, or a checkpoint file.")
    which = "Which one of the run: the newest, or the one with the best online k-NN (rank, without labels)."
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help=which)
