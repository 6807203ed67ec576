"""The command ``ijepa-fast``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import shlex
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: the run was stopped by a signal, saved itself, and can be started again."""
EXIT_INTERRUPTED = 128 + 2
"""The status that shells give for SIGINT: stopped at once by Ctrl-C, in training by the second one."""

EXTRAS = {
    "train": "jsonargparse docstring_parser typeshed_client yaml matplotlib PIL safetensors tensorboard tqdm",
    "shards": "webdataset",
    "huggingface": "transformers",
    "lightning": "lightning",
    "evaluate": "sklearn",
    "parquet": "pyarrow",
    "detection": "torchvision faster_coco_eval",
}
"""Extra of setup.py -> what can be imported where it is installed."""

USAGE = """usage: ijepa-fast COMMAND [options]

commands:
  pretrain   train an encoder with I-JEPA
  probe      linear-probe accuracy of a checkpoint
  knn        k-NN accuracy of a checkpoint
  evaluate   judge an encoder, of this package or another, by the tasks that papers report
  features   write the features of images to a file
  finetune   train all of an encoder on labelled images
  neighbours draw the images whose features are most like those of a given one
  masks      draw the masks of a configuration
  export     write a checkpoint for transformers, timm or the official code
  import     make weights of these a checkpoint
  accelerate-official
             run an unmodified checkout of the official code with the parts of this package
  report     gather a run into one HTML page
  bench      how fast training and every op is on this machine
  fastest    which options of the training step are fastest on this machine
  doctor     what is installed, and what is missing why

`ijepa-fast COMMAND --help` describes the options of a command."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for errors, 2 for wrong usage, 75 for a stopped run, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "pretrain": _pretrain,
        "probe": _probe,
        "knn": _knn,
        "masks": _masks,
        "export": _export,
        "import": _import,
        "accelerate-official": _accelerate_official,
        "report": _report,
        "bench": _bench,
        "fastest": _fastest,
        "doctor": _doctor,
        **dict.fromkeys(("evaluate", "features", "neighbours", "finetune"), partial(_downstream, argv[:1])),
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from ijepa_fast import __version__

        print(__version__)
        return 0
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"ijepa-fast: no command {argv[0]!r}{hint}\n\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    # Other libraries are heard when they warn; matplotlib tells at INFO that it makes a list of fonts.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ijepa_fast").setLevel(logging.INFO)
    try:
        return commands[argv[0]](argv[1:])
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package == "ijepa_fast":
            raise
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages.split()), None)
        hint = f"; in the checkout: pip install -e '.[{extra}]'" if extra else ""
        print(f"ijepa-fast {argv[0]}: error: {error}{hint}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"\nijepa-fast {argv[0]}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        print(f"ijepa-fast {argv[0]}: error: {message}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


def _parser(command: str, description: str):
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"ijepa-fast {command}", description=description, exit_on_error=False)


class UsageError(ValueError):
    """Flags or settings that do not exist, lack a value, or have one that they cannot have."""


def _parse(parser, argv: list[str], names: list[str]):
    """Parse; on failure raise UsageError with the nearest setting to an unknown one."""
    from jsonargparse import ArgumentError

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


def _run_parser(command: str, description: str):
    from jsonargparse import ActionConfigFile

    from ijepa_fast.config import RunConfig

    parser = _parser(command, description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file, or the name of a shipped recipe.")
    parser.add_class_arguments(RunConfig)
    return parser


def _run_config(parser, argv: list[str]):
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
    own = [action.dest for action in parser._actions if action.option_strings]
    if "--help-all" in argv:
        parser.print_help()
        raise SystemExit(0)
    settings = flatten(RunConfig())
    parser.epilog = f"--help-all lists all {len(settings)} settings of a run."
    for action in parser._actions:
        if action.dest in {*settings, *sections} - common_settings() or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
    parsed = _parse(parser, named, list(dict.fromkeys([*flatten(RunConfig()), *own])))
    values = parser.instantiate(parsed)
    return RunConfig(**{f.name: values[f.name] for f in fields(RunConfig)}), parsed


def _pretrain(argv: list[str]) -> int:
    parser = _run_parser("pretrain", "Train an encoder with I-JEPA.")
    config, parsed = _run_config(parser, argv)
    if parsed.config is None:
        config, _ = _run_config(parser, [*_unasked(config, argv), *argv])
    import yaml

    from ijepa_fast.config import as_dict
    from ijepa_fast.train import Stopped, pretrain

    try:
        summary = pretrain(config, lambda c: yaml.safe_dump(as_dict(c), sort_keys=False))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STOPPED
    if summary:
        print(_table(summary, config))
    return 0


def _unasked(config, argv: list[str]) -> list[str]:
    """Flags that stand in for a recipe where none is named: the settings of the run to continue or to begin with, or
    what fits images and device.

    ``config`` has the settings of ``argv``, which win over these.
    """
    from ijepa_fast.config import flags, flatten, from_dict, read_recipe, value_text
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.data.remote import RemoteShards
    from ijepa_fast.ranks import pick_device
    from ijepa_fast.run.auto import RECIPE, look_at, own_images, product_rate
    from ijepa_fast.run.checkpoint import list_steps

    continues = config.resume in ("auto", "require") and list_steps(Path(config.output, "checkpoints"))
    for folder in [config.output] if continues else [config.init] if config.init else []:
        if (written := Path(folder, "config.yaml")).exists():
            # The folder may have been moved, and the run may have begun with --resume overwrite.
            now = {"output": config.output, "resume": config.resume}
            return ["--config", str(written), *(f"--{name}={value_text(value)}" for name, value in now.items())]
    if config.init and not continues:
        raise UsageError(f"--init {config.init} needs a recipe with networks of the same sizes: --config NAME")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"several processes need a recipe: --config NAME, for example --config {RECIPE}")
    source = open_sources(config.data, max_pixels=config.loader.max_pixels).train
    if isinstance(source, RemoteShards):
        raise UsageError("images at URLs are not counted, so a recipe is needed: --config NAME")
    device = pick_device(config.train.device, 0)
    named = {argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")}
    given = {name: value for name, value in flatten(config).items() if name in named}
    settings = own_images(from_dict(read_recipe(RECIPE)), look_at(source), device, product_rate, given)
    chosen = f"--config {RECIPE} {flags(settings)}"
    print(f"no --config is given; for these images on this machine: {chosen}", file=sys.stderr)
    return shlex.split(chosen)


def _table(summary: dict, config) -> str:
    """What a run ends with, for people."""
    lines, output = [], config.output
    start = "untrained" if config.init is None else "initial"
    if "pixels" in summary:
        rows = [
            ("raw pixels", summary["pixels"]),
            ("colour histogram", summary["colours"]),
            (f"{start} encoder", summary["before"]),
            ("trained encoder", summary["after"]),
        ]
        lines += ["", f"{'features of held-out images':<28}{'k-NN':>8}{'probe':>8}{'rank':>8}", "-" * 52]
        for name, figures in rows:
            rank = f"{figures['rank']:.1f}" if "rank" in figures else ""
            lines.append(f"{name:<28}{figures['knn']:>8.1%}{figures['probe']:>8.1%}{rank:>8}")
        lines.append("")
    elif "after" in summary:
        before, after = summary["before"]["rank"], summary["after"]["rank"]
        lines.append(f"rank of the features: {before:.1f} {start}, {after:.1f} trained (near 1 they have collapsed)")
    loss = f", loss {summary['loss']:.4f} at the end" if summary.get("loss") is not None else ""
    if best := summary.get("best"):
        score = f"online k-NN {best['score']:.1%}" if best["by"] == "knn" else f"rank {best['score']:.1f}"
        lines.append(f"best checkpoint: step {best['step']}, {score} (--checkpoint best of probe, knn, export, report)")
    bad = f", {len(summary['bad_files'])} undecodable images" if summary["bad_files"] else ""
    lines.append(f"{summary['steps']} steps in {summary['seconds']:.0f} s{loss}{bad}; everything is in {output}/")
    pictures = "pca.png and curves.png there, or one page of all: " if config.evaluation.pictures else ""
    lines.append(f"Look at it: {pictures}ijepa-fast report {output}")
    return "\n".join(lines)


def _add_checkpoint(parser) -> None:
    parser.add_argument("run", type=Path, help="Folder of a run, or a checkpoint file.")
    which = "Which one of the run: the newest, or the one with the best online k-NN (rank, without labels)."
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help=which)


def _evaluation_parser(command: str, description: str):
    parser = _parser(command, description)
    _add_checkpoint(parser)
    parser.add_argument("--data", type=str | None, default=None, help="Labelled images; those of the run by default.")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="Which encoder to evaluate.")
    parser.add_argument("--layers", choices=("last", "last4"), default="last", help="Last block, or last four.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where to compute.")
    return parser


def _evaluate(parser, argv: list[str], figure: str) -> int:
    parsed = _parse(parser, argv, ["checkpoint", "data", "encoder", "layers", "device"])
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.evaluate.encoder import evaluate
    from ijepa_fast.ranks import pick_device
    from ijepa_fast.run.checkpoint import find
    from ijepa_fast.weights.runs import load_run

    model, config, step = load_run(find(parsed.run, parsed.checkpoint))
    if parsed.layers == "last4" and config.model.depth < 4:
        raise ValueError(f"--layers last4 needs an encoder of 4 blocks; {parsed.run} has {config.model.depth}")
    sources = open_sources(
        parsed.data or config.data, None if parsed.data else config.evaluation.data, config.loader.max_pixels
    )
    if sources.test is None:
        raise ValueError(
            f"{parsed.data or config.data} has no labelled test images (folders train/ and val/ or test/ with a folder "
            "per class in each); --data PATH evaluates on other images, which have them"
        )
    encoder = model.target_encoder if parsed.encoder == "target" else model.context_encoder
    figures = evaluate(encoder.to(pick_device(parsed.device, 0)), sources, config, layers=parsed.layers)
    print(json.dumps({"checkpoint": str(parsed.run), "step": step, "encoder": parsed.encoder,
                      "layers": parsed.layers, figure: figures[figure], "rank": figures["rank"]}))  # fmt: skip
    return 0


def _probe(argv: list[str]) -> int:
    return _evaluate(_evaluation_parser("probe", "Linear-probe accuracy of a checkpoint."), argv, "probe")


def _knn(argv: list[str]) -> int:
    return _evaluate(_evaluation_parser("knn", "k-NN accuracy of a checkpoint."), argv, "knn")


def _downstream(name: list[str], argv: list[str]) -> int:
    from ijepa_fast.downstream.command import COMMANDS

    return COMMANDS[name[0]](argv, _parser, _parse)


def _masks(argv: list[str]) -> int:
    parser = _run_parser("masks", "Draw the masks of a configuration over some of its images.")
    parser.add_argument("--out", type=Path, default=Path("masks.png"), help="PNG file to write.")
    parser.add_argument("--count", type=int, default=8, help="Number of images.")
    config, parsed = _run_config(parser, argv)
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.plots.run import draw_masks

    draw_masks(config, open_sources(config.data, max_pixels=config.loader.max_pixels).train, parsed.out, parsed.count)
    print(parsed.out)
    return 0


def _report(argv: list[str]) -> int:
    parser = _parser("report", "Gather a run, finished or not, into one self-contained HTML page.")
    _add_checkpoint(parser)
    parser.add_argument("--out", type=Path | None, default=None, help="File to write; RUN/report.html by default.")
    parser.add_argument("--images", type=int, default=6, help="Images in every picture.")
    parser.add_argument(
        "--patch",
        action="append",
        metavar="ROW,COLUMN",
        help="Patch to draw similarity to, counted from 0 at the top left; repeat for more. By default three.",
    )
    parser.add_argument("--candidates", type=int, default=1000, help="Images among which neighbours are looked for.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where to compute.")
    parsed = _parse(parser, argv, ["checkpoint", "out", "images", "patch", "candidates", "device"])
    from ijepa_fast.report import parse_patch, write_report

    patches = [parse_patch(text) for text in parsed.patch or ()]
    print(
        write_report(
            parsed.run,
            parsed.out,
            images=parsed.images,
            patches=patches,
            candidates=parsed.candidates,
            device=parsed.device,
            checkpoint=parsed.checkpoint,
        )
    )
    return 0


def _config_of_a_benchmark(parser, argv: list[str]):
    """(RunConfig, its name, namespace as parsed); of a recipe that stands for the device if none is named."""
    from ijepa_fast.bench.command import RECIPES
    from ijepa_fast.ranks import pick_device

    if not any(argument.partition("=")[0] == "--config" for argument in argv):
        argv = ["--config", RECIPES[pick_device("auto", 0).type], *argv]
    config, parsed = _run_config(parser, argv)
    named = [value for flag, value in zip(argv, argv[1:], strict=False) if flag == "--config"]
    named += [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
    return config, " + ".join(Path(name).stem for name in named), parsed


def _bench(argv: list[str]) -> int:
    parser = _run_parser("bench", "Images per second of a recipe's training step, and a table of all ops.")
    parser.add_argument("--images", type=int | None, default=None, help="Images per step, by default 128 (CPU: 16).")
    parser.add_argument("--seconds", type=float, default=90.0, help="Time for everything.")
    parser.add_argument("--compile", type=bool, default=False, help="Time torch.compile beside the ops.")
    parser.add_argument("--json", type=Path | None, default=None, help="File to write.")
    config, name, parsed = _config_of_a_benchmark(parser, argv)
    from ijepa_fast.bench.command import bench
    from ijepa_fast.ranks import pick_device

    bench(
        config,
        name,
        pick_device(config.train.device, 0),
        images=parsed.images,
        seconds=parsed.seconds,
        compiled=parsed.compile,
        path=parsed.json,
    )
    return 0


@contextlib.contextmanager
def _ended_by_signals():
    """SIGTERM and SIGHUP end the program as an exception does, so that it leaves no files and processes behind."""
    import signal
    import threading

    def end(number, _frame):
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fastest(argv: list[str]) -> int:
    parser = _run_parser("fastest", "Try the options of a recipe's training step here, and name the fastest.")
    images_help = "Images per step on one GPU; by default its share of the batch, at most 128 at a time (CPU: 16)."
    parser.add_argument("--images", type=int | None, default=None, help=images_help)
    parser.add_argument("--gpus", type=int, default=1, help="Number of GPUs of the run; one of them is used here.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Seconds of timed steps for each choice.")
    parser.add_argument("--out", type=Path | None, default=None, help="YAML file to write the fastest settings to.")
    parser.add_argument("--json", type=Path | None, default=None, help="File to write everything to, after each way.")
    config, name, parsed = _config_of_a_benchmark(parser, argv)
    import yaml

    from ijepa_fast.bench.fastest import check, default_images, fastest
    from ijepa_fast.config import flags, nested
    from ijepa_fast.ranks import pick_device

    device = pick_device(config.train.device, 0)
    images = default_images(config, device, max(parsed.gpus, 1)) if parsed.images is None else parsed.images
    try:
        check(config, images, parsed.seconds, parsed.gpus)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for path in filter(None, (parsed.out, parsed.json)):  # now, not when there are results to lose
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            if not path.stat().st_size:
                file.write("{}\n")
    say = partial(print, flush=True)
    if images * parsed.gpus != config.train.batch_size:
        say(f"{images} of the {config.train.batch_size} images of a step; --images gives another number")
    with _ended_by_signals():
        found = fastest(
            config, name, device, images=images, seconds=parsed.seconds, gpus=parsed.gpus, path=parsed.json, say=say
        )
    if not found["settings"]:
        say(f"\nnothing here is faster than {name} as configured")
    else:
        say(f"\n{found['gain']:.2f}x as fast as configured: ijepa-fast pretrain ... {flags(found['settings'])}")
    if parsed.out is not None:
        parsed.out.write_text(yaml.safe_dump(nested(found["settings"])))
    return 0


def _export(argv: list[str]) -> int:
    parser = _parser("export", "Write a checkpoint in the format of another library, or an encoder by itself.")
    _add_checkpoint(parser)
    formats = ("huggingface", "timm", "official", "safetensors")
    parser.add_argument("--to", choices=formats, required=True, help="Whose format.")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="Official files hold both.")
    parser.add_argument("--out", type=Path, required=True, help="File to write; a folder for huggingface.")
    steps_help = "For the official format, which counts epochs; by default from the metrics of the run."
    parser.add_argument("--steps_per_epoch", type=int | None, default=None, help=steps_help)
    parsed = _parse(parser, argv, ["checkpoint", "to", "encoder", "out", "steps_per_epoch"])
    from ijepa_fast.interop.export import export
    from ijepa_fast.run.checkpoint import find

    print(export(find(parsed.run, parsed.checkpoint), parsed.to, parsed.out, parsed.encoder, parsed.steps_per_epoch))
    return 0


def _import(argv: list[str]) -> int:
    parser = _run_parser("import", "Make weights of the official code, timm or transformers a checkpoint of a run.")
    parser.add_argument("source", type=Path, help="File of weights, or a folder of transformers.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the run. With --data, training can go on.")
    parser.add_argument(
        "--num_heads", type=int | None, default=None, help="Attention heads, where the encoder is none of the paper's."
    )
    config, parsed = _run_config(parser, argv)
    import yaml

    from ijepa_fast.config import as_dict
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.interop.import_weights import import_weights
    from ijepa_fast.run.folder import holds_run

    holds_run(parsed.out)
    limit = config.loader.max_pixels
    sources = open_sources(config.data, config.evaluation.data, limit) if config.data is not None else None
    fingerprint = None if sources is None else sources.train.fingerprint
    config, said = import_weights(parsed.source, parsed.out, config, parsed.num_heads, fingerprint)
    (parsed.out / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    print(said)
    if sources is not None:
        print(f"go on training with: ijepa-fast pretrain --config {parsed.out / 'config.yaml'}")
    return 0


def _accelerate_official(argv: list[str]) -> int:
    usage = (
        "usage: ijepa-fast accelerate-official PATH/TO/ijepa -- --fname CONFIG [--devices cuda:0 cuda:1 | cpu]\n\n"
        "Run the training script of a checkout of the official code with our models, mask collator, optimizer and\n"
        "checkpoint reader in place. What follows -- are the arguments of its main.py; under torchrun, --devices is\n"
        "not read. docs/official.md says what is replaced."
    )
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        raise SystemExit(0)
    if len(argv) < 2 or argv[1] != "--":
        print(usage, file=sys.stderr)
        return EXIT_USAGE
    from ijepa_fast.interop.official.launch import launch

    launch(argv[0], argv[2:])
    return 0


def _doctor(argv: list[str]) -> int:
    _parse(_parser("doctor", "Print versions, GPU, and which optional parts are in use or missing, and why."), argv, [])
    from ijepa_fast import doctor

    print(doctor.text(doctor.report()))
    return 0
