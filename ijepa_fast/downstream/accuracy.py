"""``ijepa-fast probe`` and ``knn``: one figure of a run's frozen features."""

from __future__ import annotations

import json

from ijepa_fast.command_line import add_checkpoint, make_parser, parse


def _accuracy_parser(command: str, description: str):
    parser = make_parser(command, description)
    add_checkpoint(parser)
    parser.add_argument("--data", type=str | None, default=None, help="Labelled images; those of the run by default.")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="Which encoder to evaluate.")
    parser.add_argument("--layers", choices=("last", "last4"), default="last", help="Last block, or last four.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where to compute.")
    return parser


def _accuracy(parser, argv: list[str], figure: str) -> int:
    parsed = parse(parser, argv)
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.evaluate.encoder import evaluate
    from ijepa_fast.ranks import pick_device
    from ijepa_fast.run.checkpoint import find
    from ijepa_fast.weights.runs import load_run

    model, config, step = load_run(find(parsed.run, parsed.checkpoint))
    if parsed.layers == "last4" and config.model.depth < 4:
        raise ValueError(f"--layers last4 needs an encoder of 4 blocks; {parsed.run} has {config.model.depth}")
    others = {"data": parsed.data, "evaluation_data": None, "labels": None} if parsed.data else {}
    sources = open_sources(**config.images | others)
    if sources.test is None:
        raise ValueError(
            f"{parsed.data or config.data} has no labelled test images (folders train/ and val/ or test/ with a folder "
            "per class in each, or a .csv with path, label and split); --data PATH evaluates on other images"
        )
    encoder = model.target_encoder if parsed.encoder == "target" else model.context_encoder
    figures = evaluate(encoder.to(pick_device(parsed.device, 0)), sources, config, layers=parsed.layers)
    print(json.dumps({"checkpoint": str(parsed.run), "step": step, "encoder": parsed.encoder,
                      "layers": parsed.layers, figure: figures[figure], "rank": figures["rank"]}))  # fmt: skip
    return 0


def probe(argv: list[str]) -> int:
    """``ijepa-fast probe``."""
    return _accuracy(_accuracy_parser("probe", "Linear-probe accuracy of a checkpoint."), argv, "probe")


def knn(argv: list[str]) -> int:
    """``ijepa-fast knn``."""
    return _accuracy(_accuracy_parser("knn", "k-NN accuracy of a checkpoint."), argv, "knn")


COMMANDS = {"probe": probe, "knn": knn}
