"""``ijepa-fast export``, ``import`` and ``accelerate-official``."""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_fast.command_line import EXIT_USAGE, add_checkpoint, make_parser, parse, run_config, run_parser


def export_command(argv: list[str]) -> int:
    """``ijepa-fast export``."""
    parser = make_parser("export", "Write a checkpoint in the format of another library, or an encoder by itself.")
    add_checkpoint(parser)
    formats = ("huggingface", "timm", "onnx", "torch", "official", "safetensors")
    parser.add_argument("--to", choices=formats, required=True, help="Whose format.")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="Official files hold both.")
    parser.add_argument("--out", type=Path, required=True, help="File to write; a folder for huggingface.")
    steps_help = "For the official format, which counts epochs; by default from the metrics of the run."
    parser.add_argument("--steps_per_epoch", type=int | None, default=None, help=steps_help)
    size_help = "Height and width of the images, for onnx and torch; those of the training by default."
    parser.add_argument("--image_size", type=tuple[int, int] | int | None, default=None, help=size_help)
    batch_help = "Images of every call, for onnx and torch; any number by default."
    parser.add_argument("--batch", type=int | None, default=None, help=batch_help)
    license_help = "For the model card of huggingface, such as apache-2.0 or cc-by-4.0."
    parser.add_argument("--license", type=str, default="unknown", help=license_help)
    push_help = "Repository of the Hugging Face Hub to upload to, for huggingface; a new one is private."
    parser.add_argument("--push", type=str | None, metavar="NAME/MODEL", default=None, help=push_help)
    parsed = parse(parser, argv)
    from ijepa_fast.interop.export import export
    from ijepa_fast.run.checkpoint import find

    said = export(
        find(parsed.run, parsed.checkpoint),
        parsed.to,
        parsed.out,
        parsed.encoder,
        parsed.steps_per_epoch,
        image_size=(parsed.image_size,) * 2 if isinstance(parsed.image_size, int) else parsed.image_size,
        batch=parsed.batch,
        license=parsed.license,
        push=parsed.push,
    )
    print(said)
    return 0


def import_command(argv: list[str]) -> int:
    """``ijepa-fast import``."""
    parser = run_parser("import", "Make weights of the official code, timm or transformers a checkpoint of a run.")
    parser.add_argument("source", type=Path, help="File of weights, or a folder of transformers.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the run. With --data, training can go on.")
    parser.add_argument(
        "--num_heads", type=int | None, default=None, help="Attention heads, where the encoder is none of the paper's."
    )
    config, parsed = run_config(parser, argv)
    import yaml

    from ijepa_fast.config import as_dict
    from ijepa_fast.data.datasets import open_sources
    from ijepa_fast.interop.import_weights import import_weights
    from ijepa_fast.run.folder import holds_run

    holds_run(parsed.out)
    sources = open_sources(**config.images) if config.data is not None else None
    fingerprint = None if sources is None else sources.train.fingerprint
    config, said = import_weights(parsed.source, parsed.out, config, parsed.num_heads, fingerprint)
    (parsed.out / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    print(said)
    if sources is not None:
        print(f"go on training with: ijepa-fast pretrain --config {parsed.out / 'config.yaml'}")
    return 0


def accelerate_command(argv: list[str]) -> int:
    """``ijepa-fast accelerate-official``."""
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


COMMANDS = {"export": export_command, "import": import_command, "accelerate-official": accelerate_command}
