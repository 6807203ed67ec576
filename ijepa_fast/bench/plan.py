"""``ijepa-fast plan``: what a recipe needs on many GPUs, by arithmetic and with the masks that its sampler draws."""

from __future__ import annotations

from ijepa_fast.command_line import UsageError, run_config, run_parser
from ijepa_fast.config import RunConfig
from ijepa_fast.step import scaling

DRAWN, STEPS = (16, 256), 200
"""Images and steps that masks are drawn for, and steps that are simulated with them."""


def lines(config: RunConfig, gpus: int, gpu: str = "h100") -> list[str]:
    """The plan of a recipe, as it is printed.

    Raises:
        ValueError: the batch cannot be divided.
    """
    train = config.train
    if train.batch_size % (gpus * train.accumulate):
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be split into {gpus} GPUs x {train.accumulate} micro-batches"
        )
    images, size = train.batch_size // gpus // train.accumulate, 4 if train.precision == "fp32" else 2
    reduce_size = 4 if train.reduce == "fp32" else 2
    found = scaling.on_paper(
        config.model, config.masks, config.objective, gpus,
        gpu=gpu, images=images, size=size, reduce_size=reduce_size,
    )  # fmt: skip
    trained, averaged = found["parameters"].values()
    memory = scaling.MEMORY[gpu]
    said = [
        f"{gpus} x {gpu.upper()}, {train.batch_size} images a step: {images} a GPU in each of {train.accumulate} "
        f"micro-batches",
        f"parameters: {trained / 1e6:,.0f} M trained, {averaged / 1e6:,.0f} M averaged",
        f"compute: {found['seconds_per_image'] * 1e3:.2f} ms an image at {scaling.UTILISATION:.0%} of the peak, at "
        f"most {found['images_per_second']:,.0f} images/s, {found['data_bytes'] / 1e9:.2f} GB/s of JPEGs",
    ]
    for name, mode in found["modes"].items():
        state, activations, wire = mode["state"], mode["activations"], mode["wire"]
        needed = sum(state.values())
        parts = ", ".join(f"{part} {value / 1e9:.2f}" for part, value in state.items() if value)
        kept = ", ".join(f"{value / 1e9:.1f} ({kind})" for kind, value in activations.items())
        fits = next((kind for kind, most in mode["fits"].items() if most >= images), None)
        sent = ", ".join(f"{kind} {value / 1e9:.2f}" for kind, value in wire.items() if value)
        said += [
            "",
            f"train.parallel {name.replace(' ', ', train.shards ')}",
            f"  state of a GPU: {needed / 1e9:.1f} of {memory / 1e9:.0f} GB: {parts}",
            f"  activations by recomputation: {kept} GB",
            f"  fits with activation_checkpointing: {fits}" if fits else "  does not fit: accumulate, or more GPUs",
            f"  sent by a GPU in a step: {sent or 'nothing'} GB, {mode['wire_seconds'] * 1e3:.1f} ms; hidden behind "
            f"compute from {mode['hidden_from']:.1f} images a GPU",
        ]
    if gpus > 1 and config.masks.context != "batch_min":
        unequal = scaling.imbalance(scaling.image_flops(config.model, config.masks, *DRAWN), gpus, images, STEPS)
        said += [
            "",
            f"slowest GPU over the mean, {STEPS} simulated steps: +{unequal['drawn']:.1%} as masks are drawn, "
            f"+{unequal['dealt in hosts']:.1%} if they were dealt out by size within hosts, "
            f"+{unequal['dealt']:.1%} among all",
        ]
    return said


def plan_command(argv: list[str]) -> int:
    parser = run_parser("plan", "Memory, bytes on the wire and balance of a recipe on many GPUs, on paper.")
    parser.add_argument("--gpus", type=int, default=8, help="Number of GPUs.")
    parser.add_argument("--gpu", choices=tuple(scaling.MEMORY), default="h100", help="Kind of GPU.")
    config, parsed = run_config(parser, argv)
    if parsed.gpus < 1:
        raise UsageError(f"--gpus must be at least 1, got {parsed.gpus}")
    print("\n".join(lines(config, parsed.gpus, parsed.gpu)))
    return 0


COMMANDS = {"plan": plan_command}
