"""The command ``ijepa-fast``."""

from __future__ import annotations

import difflib
import logging
import shlex
import sys
from importlib import import_module
from pathlib import Path

from ijepa_fast.command_line import EXIT_USAGE, UsageError, add_checkpoint, make_parser, parse, run_config, run_parser

EXIT_ERROR = 1
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: the run was stopped by a signal, saved itself, and can be started again."""
EXIT_INTERRUPTED = 128 + 2
"""The status that shells give for SIGINT: stopped at once by Ctrl-C, in training by the second one."""

EXTRAS = {
    "train": "jsonargparse docstring_parser typeshed_client yaml matplotlib PIL safetensors tensorboard tqdm",
    "shards": "webdataset aiohttp",
    "huggingface": "transformers",
    "lightning": "lightning",
    "onnx": "onnx onnxscript",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "evaluate": "sklearn",
    "parquet": "pyarrow",
    "datasets": "datasets",
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
  export     write a checkpoint for transformers, timm, ONNX or the official code
  import     make weights of these a checkpoint
  accelerate-official
             run an unmodified checkout of the official code with the parts of this package
  report     gather a run into one HTML page
  bench      how fast training and every op is on this machine
  plan       what a recipe needs on many GPUs: memory, bytes on the wire, balance
  fastest    which options of the training step are fastest on this machine
  doctor     what is installed, and what is missing why

`ijepa-fast COMMAND --help` describes the options of a command."""

ELSEWHERE = {
    **dict.fromkeys(("probe", "knn"), "downstream.accuracy"),
    **dict.fromkeys(("evaluate", "features", "neighbours", "finetune"), "downstream.command"),
    **dict.fromkeys(("export", "import", "accelerate-official"), "interop.command"),
    **dict.fromkeys(("bench", "fastest"), "bench.command"),
    "plan": "bench.plan",
}
"""Commands of the wings -> module that has them in its ``COMMANDS``; imported only by who calls them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for errors, 2 for wrong usage, 75 for a stopped run, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from ijepa_fast import __version__

        print(__version__)
        return 0
    if argv[0] not in [*COMMANDS, *ELSEWHERE]:
        near = difflib.get_close_matches(argv[0], [*COMMANDS, *ELSEWHERE], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"ijepa-fast: no command {argv[0]!r}{hint}\n\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    # Other libraries are heard when they warn; matplotlib tells at INFO that it makes a list of fonts.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ijepa_fast").setLevel(logging.INFO)
    try:
        commands = import_module(f"ijepa_fast.{ELSEWHERE[argv[0]]}").COMMANDS if argv[0] in ELSEWHERE else COMMANDS
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


def _pretrain(argv: list[str]) -> int:
    parser = run_parser("pretrain", "Train an encoder with I-JEPA.")
    config, parsed = run_config(parser, argv)
    import yaml

    from ijepa_fast.config import as_dict, flags, flatten
    from ijepa_fast.configure import NoRecipe, choose
    from ijepa_fast.train import Stopped, pretrain

    if parsed.config is None:
        named = {argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")}
        try:
            recipe, settings = choose(config, {name: v for name, v in flatten(config).items() if name in named})
        except NoRecipe as error:
            raise UsageError(str(error)) from None
        config, _ = run_config(parser, ["--config", recipe, *shlex.split(flags(settings)), *argv])
    try:
        summary = pretrain(config, to_yaml=lambda c: yaml.safe_dump(as_dict(c), sort_keys=False))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STOPPED
    if summary:
        print(_table(summary, config))
    return 0


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


def _masks(argv: list[str]) -> int:
    parser = run_parser("masks", "Draw the masks of a configuration over some of its images.")
    parser.add_argument("--out", type=Path, default=Path("masks.png"), help="PNG file to write.")
    parser.add_argument("--count", type=int, default=8, help="Number of images.")
    config, parsed = run_config(parser, argv)
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.plots.run import draw_masks

    draw_masks(config, open_sources(**config.images).train, parsed.out, parsed.count)
    print(parsed.out)
    return 0


def _report(argv: list[str]) -> int:
    parser = make_parser("report", "Gather a run, finished or not, into one self-contained HTML page.")
    add_checkpoint(parser)
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
    parsed = parse(parser, argv)
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


def _doctor(argv: list[str]) -> int:
    parse(make_parser("doctor", "Print versions, GPU, and which optional parts are in use or missing, and why."), argv)
    from ijepa_fast import doctor

    print(doctor.text(doctor.report()))
    return 0


COMMANDS = {"pretrain": _pretrain, "masks": _masks, "report": _report, "doctor": _doctor}
