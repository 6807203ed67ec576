"""Which encoder does a fixed time buy, and which do fixed epochs? Pretrain with each implementation and mask mode, then
judge the target encoders on held-out images.

    python -m benchmarks.train_to_accuracy --recipe cifar10_vits4 --data PATH --minutes 30 --json FILE
    python -m benchmarks.train_to_accuracy --recipe benchmarks/accuracy_cpu.yaml --data PATH --minutes 5 \\
        --regularised --seeds 3 --threads 1 --json FILE

PATH is a folder with train/ and val/, and a folder for each class in both. Contenders:

- ``exact``: this package, all visible patches.
- ``batch_min``: this package, the official truncated masks.
- ``eager``: the published algorithm (benchmarks/baselines.py), the same truncated masks, which are drawn in its step as
  in ours.
- ``no_prediction``: a control, with --regularised alone: ``exact`` without the prediction loss.

The first one named gets --minutes of training, or --steps, or --epochs. At equal epochs the others run as many steps;
at equal time, as many as fit into that time by the rates of all contenders, which are measured beforehand, step by step
in turn: processor time on the CPU, which busy neighbours disturb less, else wall-clock. A contender whose numbers of
steps are the same is trained once. Schedules end where the run does.

All start from the same weights, see the same crops in the same order, and minimise the prediction loss alone, which is
what the published algorithm has. On sets of some ten thousand images that loss collapses (look at the rank), and what
is compared then is noise; with --regularised everyone gets the recipe's variance-covariance term on top. Evaluation is
the package's own for all, in fp32 on the weights that the optimizer steps and averages: what an export holds. (In bf16,
ours trains with rounded copies of them, and eager rounds within its step.) Started again with the same settings, the
command passes over the runs that FILE has.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Eager, load_weights, mask_lists
from ijepa_fast.bench.measure import Took, in_turns, results, save, stopwatch
from ijepa_fast.config import ModelConfig, RunConfig, from_dict, read_recipe
from ijepa_fast.data import TrainLoader
from ijepa_fast.data.datasets import Sources, open_sources
from ijepa_fast.evaluate.encoder import evaluate
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import IJEPA, Objective, variance_covariance
from ijepa_fast.run.build import assemble
from ijepa_fast.run.checkpoint import optimizer_tensors
from ijepa_fast.weights.runs import NETWORKS, full_precision

CONTENDERS = ("exact", "batch_min", "eager")
CONTROL = "no_prediction"
COMPARISONS = ("time", "epochs")
WARM_UP, RATED = 2, 9  # steps: not timed, and timed, to find the rate
WARM_UP_SHARE = 0.1
"""Largest share of a run that is warm-up: the recipes' warm-ups are made for longer runs."""
SIZES = ("img_size", "patch_size", "embed_dim", "depth", "predictor_embed_dim", "predictor_depth")


def prepare(config: RunConfig, regularised: bool) -> RunConfig:
    """The recipe as all contenders run it.

    Raises:
        ValueError: it has no variance-covariance term to regularise with.
    """
    ours, plain = config.objective, Objective()
    if not regularised:
        return replace(config, objective=plain)
    if not ours.regularised:
        raise ValueError("the recipe has no variance-covariance term: objective.variance_weight is 0")
    terms = ("variance_weight", "covariance_weight")
    return replace(config, objective=replace(plain, **{name: getattr(ours, name) for name in terms}))


@dataclass
class Contender:
    """Networks in training.

    Attributes:
        train: of uint8 images and a step number; one step.
        networks: with the parameters of an ``IJEPA``; ``optimizer`` trains them.
    """

    train: Callable[[Tensor, int], Any]
    networks: nn.Module
    optimizer: torch.optim.Optimizer
    model: ModelConfig

    def collect(self) -> IJEPA:
        """The networks as they are now, in fp32, whatever precision they are trained in."""
        names = {parameter: name for name, parameter in self.networks.named_parameters()}
        tensors = {f"model.{name}": value for name, value in self.networks.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, names)
        model = self.model.build(Objective())
        for part in NETWORKS:
            getattr(model, part).load_state_dict(full_precision(tensors, part))
        return model.to(next(self.networks.parameters()).device)


def build(name: str, config: RunConfig, steps: int, per_epoch: int, device: torch.device) -> Contender:
    """A contender with the weights of the configuration's seed, and schedules for so many steps."""
    torch.manual_seed(config.seed)
    model = config.model.build(config.objective)
    grid, batch = model.context_encoder.grid, config.train.batch_size
    warmup = min(config.optim.warmup_epochs, WARM_UP_SHARE * steps / per_epoch)
    schedules = replace(config.optim, warmup_epochs=warmup).schedules(steps, per_epoch)
    official = MaskConfig.official(batch, min_keep=config.masks.min_keep)
    if name != "eager":
        if name == CONTROL:
            model.objective = replace(config.objective, prediction_weight=0.0)
        sampler = MaskSampler(official if name == "batch_min" else config.masks, grid)
        step = assemble(model, config, sampler, schedules, batch, device)
        return Contender(step, model, step.optimizer, config.model)
    model.to(device)
    context_loss = _regulariser(config.objective) if config.objective.regularised else None
    eager = Eager(config.model, schedules, config.train.precision, context_loss).to(device)
    load_weights(eager, model.state_dict())
    sampler = MaskSampler(official, grid)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in config.model.mean_std)

    def train(images: Tensor, number: int) -> float:
        masks = sampler.sample(len(images), seed=config.seed, step=number)
        parts = (masks.context, masks.num_contexts), (masks.targets, masks.num_targets)
        lists = tuple(mask_lists(tokens, count, sampler.num_patches) for tokens, count in parts)
        return eager((images / 255 - mean) / std, lists, number)

    return Contender(train, eager, eager.optimizer, config.model)


def _regulariser(objective: Objective) -> Callable[[Tensor], Tensor]:
    """The term that ``Objective`` adds to the prediction loss, a function of context features [B, K, D]."""

    def loss(context: Tensor) -> Tensor:
        terms = variance_covariance(context.float().mean(1))
        return objective.variance_weight * terms[0] + objective.covariance_weight * terms[1]

    return loss


def step_seconds(names: Sequence[str], config: RunConfig, per_epoch: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step on random images without loading, medians over steps that the contenders take in turn."""
    side = config.model.img_size
    images = torch.randint(256, (config.train.batch_size, 3, side, side), dtype=torch.uint8, device=device)
    contenders = {name: build(name, config, 1000, per_epoch, device) for name in names}
    calls = {name: lambda number, c=contender: c.train(images, number) for name, contender in contenders.items()}
    in_turns(calls, WARM_UP, device)
    taken = in_turns(calls, RATED, device, first=WARM_UP)
    return {name: statistics.median(_clock(took, device) for took in of) for name, of in taken.items()}


def _clock(took: Took, device: torch.device) -> float:
    """Seconds that count: wall-clock on a GPU, processor time on the CPU."""
    return took.wall if device.type == "cuda" else took.cpu


def plan(steps: int, seconds: dict[str, float], comparisons: Sequence[str]) -> dict[str, dict[str, int]]:
    """Comparison -> contender -> steps, where the first contender runs ``steps``."""
    first = next(iter(seconds))
    counts = {
        "time": {name: max(1, round(steps * seconds[first] / each)) for name, each in seconds.items()},
        "epochs": dict.fromkeys(seconds, steps),
    }
    return {comparison: counts[comparison] for comparison in COMPARISONS if comparison in comparisons}


def loading(config: RunConfig) -> dict[str, Any]:
    """Arguments of the loader, the same for all contenders."""
    return {
        "image_size": config.model.img_size,
        "global_batch": config.train.batch_size,
        "seed": config.seed,
        "workers": config.loader.workers,
        "scale": config.loader.crop_scale,
        "ratio": config.loader.crop_ratio,
        "flip": config.loader.flip,
    }


def contest(
    name: str, config: RunConfig, sources: Sources, device: torch.device, steps: int, per_epoch: int
) -> dict[str, Any]:
    """Train one contender for so many steps, and judge it."""
    contender = build(name, config, steps, per_epoch, device)
    samples: list[Took] = []
    with stopwatch(samples, device):
        for number, batch in enumerate(TrainLoader(sources.train, **loading(config), num_steps=steps)):
            contender.train(batch.images.to(device, non_blocking=True), number)
    took = {"seconds": samples[0].wall, "cpu_seconds": samples[0].cpu}
    figures = evaluate(contender.collect().target_encoder, sources, config)
    return {"steps": steps, "epochs": steps / per_epoch, **took, **figures}


def untrained(config: RunConfig, sources: Sources, device: torch.device) -> dict[str, float]:
    """Figures of the weights that all contenders start from."""
    torch.manual_seed(config.seed)
    return evaluate(config.model.build(config.objective).to(device).target_encoder, sources, config)


def runs(
    report: dict[str, Any], config: RunConfig, sources: Sources, device: torch.device, seeds: int
) -> Iterator[dict[str, Any]]:
    """Fill ``report`` seed by seed, so that a run that is cut off leaves whole comparisons; yields every new entry."""
    counts, per_epoch = report["steps"], report["steps_per_epoch"]
    names = list(next(iter(counts.values())))
    for seed in range(seeds):
        seeded = replace(config, seed=seed)
        if all(entry["seed"] != seed for entry in report["untrained"]):
            report["untrained"].append({"seed": seed, **untrained(seeded, sources, device)})
            yield report["untrained"][-1]
        for name in names:
            for steps in dict.fromkeys(counts[comparison][name] for comparison in counts):
                place = {"contender": name, "seed": seed, "steps": steps}
                if not any(place.items() <= done.items() for done in report["runs"]):
                    report["runs"].append(place | contest(name, seeded, sources, device, steps, per_epoch))
                    yield report["runs"][-1]


def started(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier start of the same command, or an empty one."""
    if path is None or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    same = {key: value for key, value in earlier.get("settings", {}).items() if key != "seeds"}
    return earlier if same == {key: value for key, value in settings.items() if key != "seeds"} else {}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10", help="model, masks, crops and schedules: a recipe or a file")
    parser.add_argument("--data", required=True, help="labelled images: a folder with train/ and val/, or rendered")
    parser.add_argument("--name", help="name of the images in the results file")
    contenders = (*CONTENDERS, CONTROL)
    parser.add_argument("--impl", default=",".join(CONTENDERS), help=f"comma-separated, of {', '.join(contenders)}")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="minutes of training of the first contender")
    budget.add_argument("--steps", type=int, help="steps of the first contender")
    budget.add_argument("--epochs", type=float, help="epochs of the first contender")
    parser.add_argument("--equal", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--regularised", action="store_true", help="with the recipe's variance-covariance term")
    parser.add_argument("--batch", type=int, help="images per step; the recipe's by default")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each, from seed 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--threads", type=int, help="number of torch's threads on the CPU")
    parser.add_argument("--json", type=Path, help="write the report here, whole after every run")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys(options.impl.split(",")))
    if unknown := [name for name in names if name not in contenders]:
        parser.error(f"--impl must name some of {', '.join(contenders)}, got {unknown[0]!r}")
    if CONTROL in names and not options.regularised:
        parser.error(f"{CONTROL} has nothing to minimise without --regularised")
    for name in ("minutes", "steps", "epochs", "batch", "seeds", "threads"):
        if (value := getattr(options, name)) is not None and not value > 0:
            parser.error(f"--{name} must be positive, got {value}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    try:
        config = prepare(from_dict(read_recipe(options.recipe)), options.regularised)
    except ValueError as problem:
        parser.error(f"{options.recipe}: {problem}")
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    train = replace(config.train, precision=precision, batch_size=options.batch or config.train.batch_size)
    config = replace(config, data=options.data, train=train)
    sources = open_sources(config.data, config.evaluation.data)
    if sources.test is None:
        parser.error(f"{options.data} has no labelled test images")
    described = ("recipe", "minutes", "steps", "epochs", "equal", "regularised", "seeds")
    settings = {name: getattr(options, name) for name in described}
    settings |= {"data": options.name or options.data, "batch": train.batch_size, "precision": precision}
    sizes = {name: getattr(config.model, name) for name in SIZES}
    masks = json.loads(json.dumps(asdict(config.masks)))
    settings |= {"contenders": names, "device": device.type, "model": sizes, "masks": masks}
    report = started(options.json, settings)
    if not report:
        per_epoch = TrainLoader(sources.train, **loading(config)).steps_per_epoch
        seconds = step_seconds(names, config, per_epoch, device)
        steps = options.steps or max(
            1, round(options.epochs * per_epoch if options.epochs else 60 * options.minutes / seconds[names[0]])
        )
        report = results("train_to_accuracy", device)
        report |= {"step_seconds": seconds, "steps_per_epoch": per_epoch, "untrained": [], "runs": []}
        report["steps"] = plan(steps, seconds, options.equal)
        print(json.dumps({"step_seconds": seconds, "steps": report["steps"]}), flush=True)
    report["settings"] = settings
    for entry in runs(report, config, sources, device, options.seeds):
        save(options.json, report)
        print(json.dumps(entry), flush=True)
    return report


if __name__ == "__main__":
    main()
