"""``ijepa-fast evaluate``, ``features`` and ``neighbours``: one encoder, judged or put to use."""

from __future__ import annotations

import importlib
import json
import logging
import time
from dataclasses import asdict, fields
from pathlib import Path

from ijepa_fast.command_line import make_parser, parse
from ijepa_fast.downstream.embed import check_out, neighbours, open_images, write_features
from ijepa_fast.downstream.encoders import Loaded, digest, load_any, untrained
from ijepa_fast.downstream.finetune import Finetuning, finetune
from ijepa_fast.downstream.results import chart, table
from ijepa_fast.downstream.store import at_most
from ijepa_fast.downstream.subject import Options, Subject
from ijepa_fast.downstream.tasks import OPENED_BY, TASKS, named_tasks
from ijepa_fast.ranks import pick_device
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_json, write_text

log = logging.getLogger(__name__)


def evaluate(
    loaded: Loaded,
    tasks: str,
    data: str | None = None,
    evaluation_data: str | None = None,
    options: Options = Options(),  # noqa: B008, it is frozen
    *,
    out: Path | None = None,
    device: str = "auto",
    compare: bool = False,
) -> dict:
    """Judge an encoder by tasks, and write evaluation.json, evaluation.md and evaluation.png.

    Each task's figures are written as soon as they are known. What the file holds already, of the same encoder, images
    and settings, is not computed again; tasks that are not named here stay in it.

    Args:
        loaded: the encoder.
        tasks: names of ``TASKS``, separated by commas.
        data, evaluation_data: training images, and test images where they do not lie beside them; by default those of
            the encoder's run.
        options: settings of the tasks.
        out: folder to write to; ``loaded.results`` by default.
        device: auto, cpu or cuda.
        compare: judge an untrained encoder of the same shape as well.

    Returns:
        What evaluation.json holds.

    Raises:
        ValueError, OSError: tasks, settings or images that cannot be used, before any features are taken.
    """
    chosen = named_tasks(tasks)
    kind = next(iter(chosen.values())).data
    options.check(loaded.encoder)
    for task in chosen.values():
        if task.needs:
            importlib.import_module(task.needs)  # now, and not when there are features already
    if data is None and kind == "classes":
        data, evaluation_data = loaded.data, evaluation_data or loaded.evaluation_data
    pixels = loaded.images(own=data == loaded.data)
    if data is None:
        raise ValueError("no images are given: --data PATH")
    if kind != "classes" and evaluation_data:
        raise ValueError(
            f"test images with {kind} lie beside the training images; --test {evaluation_data} is not read"
        )
    images = OPENED_BY[kind](data, evaluation_data, options, pixels)
    out = loaded.results if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    where, weights = pick_device(device, 0), digest(loaded.encoder)
    report = _earlier(out / "evaluation.json", weights)
    report |= loaded.about | {"digest": weights, "environment": describe(), "tasks": report.get("tasks", {})}
    encoders = {"trained": loaded.encoder} | ({"untrained": untrained(loaded.encoder)} if compare else {})
    for whose, encoder in encoders.items():
        of = weights if whose == "trained" else digest(encoder)
        settings = asdict(options) | {"resize_ratio": loaded.resize_ratio, "workers": None}  # of any number
        subject = Subject(encoder.to(where), of, images, out / "work", options, loaded.resize_ratio)
        for name, task in chosen.items():
            key = settings | {"data": [images.train.fingerprint, images.test.fingerprint]}
            entry = report["tasks"].get(name, {})
            if entry.get("key") != key:
                entry = {"key": key, "data": str(data), "about": task.about}
            if whose in entry:
                log.info("%s of the %s encoder is in %s already", name, whose, out / "evaluation.json")
                continue
            log.info("%s (%s), %s encoder", name, task.about, whose)
            started = time.monotonic()
            entry[whose] = task.run(subject) | {"seconds": round(time.monotonic() - started, 1)}
            report["tasks"][name] = entry
            write_json(out / "evaluation.json", report)
        encoder.cpu()
    write_text(out / "evaluation.md", table(report))
    chart(report, out / "evaluation.png")
    return report


def _earlier(path: Path, weights: str) -> dict:
    """What an earlier call wrote about the same weights, else nothing."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["digest"] == weights:
            return report
        log.warning("%s is of other weights and is replaced", path)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        log.warning("%s is not what evaluate writes and is replaced", path)
    return {}


def evaluate_command(argv: list[str]) -> int:
    """``ijepa-fast evaluate``."""
    parser = _parser("evaluate", "Judge frozen features by the tasks that papers report.")
    parser.add_argument("--tasks", type=str, default="knn,linear", help=f"Of {', '.join(TASKS)}; with commas between.")
    parser.add_argument("--test", type=str | None, default=None, help="Test images, where not beside the others.")
    parser.add_argument("--out", type=Path | None, default=None, help="Folder to write to; RUN/evaluation by default.")
    parser.add_argument("--compare", type=bool, default=False, help="Judge an untrained encoder of this shape, too.")
    parser.add_class_arguments(Options)
    given = parse(parser, argv)
    loaded, options = load_any(given.weights, given.encoder), _settings(Options, given)
    at = {"out": given.out, "device": given.device, "compare": given.compare}
    print(table(evaluate(loaded, given.tasks, given.data, given.test, options, **at)))
    return 0


def features_command(argv: list[str]) -> int:
    """``ijepa-fast features``."""
    parser = _parser("features", "Write the features of images, their paths and classes to a file.", _FEATURES)
    parser.add_argument("--out", type=Path, required=True, help="File to write, .npz or .parquet (needs pyarrow).")
    parser.add_argument("--patches", type=bool, default=False, help="Features of all patches instead of their average.")
    given = parse(parser, argv)
    check_out(given.out)
    if given.patches and given.layers == "last4":
        raise ValueError("--patches true takes the last block alone, --layers last4 averages of four")
    write_features(given.out, _subject(given), given.patches)
    print(given.out)
    return 0


def neighbours_command(argv: list[str]) -> int:
    """``ijepa-fast neighbours``."""
    parser = _parser("neighbours", "Draw the images whose features are most like those of given ones.", _FEATURES)
    parser.add_argument("--image", action="append", required=True, help="Given image; repeat for more.")
    parser.add_argument("--k", type=int, default=8, help="Number of neighbours.")
    parser.add_argument("--out", type=Path, default=Path("neighbours.png"), help="PNG file to write.")
    given = parse(parser, argv)
    found = neighbours(_subject(given), list(map(Path, given.image)), given.out, given.k)
    for image, row in zip(given.image, found, strict=True):
        print(image)
        for path, similarity in row:
            print(f"  {similarity:.3f} {path}")
    print(given.out)
    return 0


def finetune_command(argv: list[str]) -> int:
    """``ijepa-fast finetune``."""
    parser = _parser("finetune", "Train all of an encoder on labelled images; under torchrun on all ranks.")
    parser.add_argument("--test", type=str | None, default=None, help="Test images, where not beside the others.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write to, and to continue from.")
    parser.add_class_arguments(Finetuning)
    given = parse(parser, argv)
    loaded = load_any(given.weights, given.encoder)
    data, test = given.data, given.test
    if data is None:
        data, test = loaded.data, test or loaded.evaluation_data
    report = finetune(loaded, data, test, _settings(Finetuning, given), given.out, given.device)
    accuracy = f"accuracy {report['accuracy']:.1%} (chance {report['chance']:.1%})"
    print(f"{accuracy}; encoder and figures are in {given.out}/")
    return 0


_FEATURES = {"image_size", "layers", "limit", "precision", "workers"}
"""Settings of ``Options`` that decide the features of images without labels."""


def _parser(name: str, description: str, options: set[str] = frozenset()):
    parser = make_parser(name, description)
    parser.add_argument("weights", type=Path, help="Run, checkpoint, or weights of export, transformers, timm, Meta.")
    parser.add_argument("--data", type=str | None, default=None, help="Images; those of the run by default.")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="Where the file has both.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where to compute.")
    if options:
        parser.add_class_arguments(Options, skip={f.name for f in fields(Options)} - options)
    return parser


def _settings(kind: type, given):
    """The dataclass with what was given on the command line."""
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})


def _subject(given) -> Subject:
    """The encoder and unlabelled images."""
    loaded, options = load_any(given.weights, given.encoder), _settings(Options, given)
    options.check(loaded.encoder)
    data = given.data or loaded.data
    source = at_most(open_images(data, **loaded.images(own=data == loaded.data)), options.limit)
    encoder = loaded.encoder.to(pick_device(given.device, 0))
    return Subject(encoder, digest(encoder), source, loaded.results / "work", options, loaded.resize_ratio)


COMMANDS = {
    "evaluate": evaluate_command,
    "features": features_command,
    "neighbours": neighbours_command,
    "finetune": finetune_command,
}
