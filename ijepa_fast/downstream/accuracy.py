"""``ijepa-fast probe`` and ``knn``: one figure of a run's frozen features."""

from __future__ import annotations

import json
from functools import partial

from ijepa_fast.command_line import add_checkpoint, make_parser, parse
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.evaluate.encoder import evaluate
from ijepa_fast.ranks import pick_device
from ijepa_fast.run.checkpoint import find
from ijepa_fast.weights.runs import ENCODERS, load_run


def _accuracy(figure: str, description: str, argv: list[str]) -> int:
    parser = make_parser(figure, description)
    add_checkpoint(parser)
    parser.add_argument("--data", type=str | None, default=None, help="Labelled images; those of the run by default.")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="Which encoder to evaluate.")
    parser.add_argument("--layers", choices=("last", "last4"), default="last", help="Last block, or last four.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where to compute.")
    given = parse(parser, argv)
    model, config, step = load_run(find(given.run, given.checkpoint))
    if given.layers == "last4" and config.model.depth < 4:
        raise ValueError(f"--layers last4 needs an encoder of 4 blocks; {given.run} has {config.model.depth}")
    others = {"data": given.data, "evaluation_data": None, "labels": None} if given.data else {}
    sources = open_sources(**config.images | others)
    if sources.test is None:
        raise ValueError(
            f"{given.data or config.data} has no labelled test images (folders train/ and val/ or test/ with a folder "
            "per class in each, or a .csv with path, label and split); --data PATH evaluates on other images"
        )
    encoder = getattr(model, ENCODERS[given.encoder]).to(pick_device(given.device, 0))
    figures = evaluate(encoder, sources, config, layers=given.layers)
    about = {"checkpoint": str(given.run), "step": step, "encoder": given.encoder, "layers": given.layers}
    print(json.dumps(about | {figure: figures[figure], "rank": figures["rank"]}))
    return 0


COMMANDS = {
    "probe": partial(_accuracy, "probe", "Linear-probe accuracy of a checkpoint."),
    "knn": partial(_accuracy, "knn", "k-NN accuracy of a checkpoint."),
}
